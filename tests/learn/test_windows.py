"""Learning in windows: what a window fits, where the samples have come after it, and what of the models it holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference

from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.engine.hidden_states import HiddenStates
from mergekit_dam.engine.shards import schedule
from mergekit_dam.errors import DamError
from mergekit_dam.learn import window_size
from mergekit_dam.learn.fisher import importance_of
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.losses import distillation, divergence, first_logits
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.learn.window_search import WindowSearch, positions_of, windows_of
from mergekit_dam.learn.window_size import free_bytes, needed_bytes, with_window
from mergekit_dam.learn.window_states import MERGED, OWN, TARGET, relative_squares
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.tasks import build_tasks
from tests.conftest import FAST
from tests.helpers.searching import CPU, new_search

# every class is a suspect, so that there are triggered streams
SUSPECTS = {"suspicion": 0.0, "scan_steps": 2, "detection": "model", "refresh_every": 1000}


def _plan(root: Path, data: Path, **more: Any) -> Plan:
    refs = [ModelReference.parse(str(root / name)) for name in ("base", "a", "b")]
    return build_plan(refs[0], refs[1:], shared={**FAST, **SUSPECTS, "calibration": str(data), **more}, per_model={})


def _scanned(plan: Plan) -> WindowSearch:
    """A search that is about to open its first window."""
    search = new_search(WindowSearch, plan)
    search.scan()
    search.prepare_tasks()
    return search


@given(st.integers(2, 40), st.integers(1, 50))
def test_windows_cover_all_positions_once(end: int, size: int) -> None:
    windows = windows_of(end, size)
    assert [place for w in windows for place in range(w.first, w.stop)] == list(range(end))
    assert all(w.stop - w.first == size for w in windows[:-1]) and [w.number for w in windows] == [*range(len(windows))]


def test_a_window_of_all_positions_is_the_search_of_the_whole_model(vit: Path, images: Path) -> None:
    records: dict[str, list[dict[str, Any]]] = {"whole": [], "window": []}
    whole = new_search(InversionSearch, _plan(vit, images), records["whole"])
    window = new_search(WindowSearch, _plan(vit, images, window=99), records["window"])
    masks, coefficients = whole.run()
    found, columns = window.run()
    losses = {name: [r["loss"] for r in made if r["phase"] == "masks"] for name, made in records.items()}
    assert losses["window"] == pytest.approx(losses["whole"], rel=1e-4) and len(losses["whole"]) == FAST["steps"]
    torch.testing.assert_close(columns, coefficients, rtol=1e-4, atol=1e-5)
    assert {n: set(by) for n, by in found.items()} == {n: set(by) for n, by in masks.items()}
    for name, by_key in masks.items():
        for key, values in by_key.items():
            assert int((found[name][key].int() - values.int()).abs().max()) <= 1, key
    for one, other in zip(window.remaining(), whole.remaining(), strict=True):
        assert one["after"] == pytest.approx(other["after"])


@pytest.mark.parametrize("kind", ["vit", "llama"])
@pytest.mark.parametrize("size", [1, 2])
def test_samples_come_as_far_as_the_merge_and_as_their_own_model(
    kind: str, size: int, request: pytest.FixtureRequest, images: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last window begins with is what the finished merge, and model t, make of the samples up to there."""
    monkeypatch.setattr("mergekit_dam.learn.window_states.TaskStates.remove", lambda self, position: None)
    plan = _plan(request.getfixturevalue(kind), images if kind == "vit" else texts, window=size)
    search = new_search(WindowSearch, plan)
    search.run()
    merged, rows_B = search.merged_weights(), torch.arange(3)
    last = search.windows[-1]
    for task in search.tasks:
        states, inputs = search.states[task.index], task.inputs(torch.arange(3))
        for stream, weights in ((OWN, task.own_weights()), *((name, merged) for name in states.merged_streams)):
            with torch.no_grad():
                expected_BLD = task.through(weights, inputs, 0, last.first, None, states.perturb(stream, rows_B))
            kept_BLD = states._states(stream, last.first).read(rows_B)
            for i, length in enumerate(states.lengths(stream, last.first, rows_B)):
                torch.testing.assert_close(kept_BLD[i, :length], expected_BLD[i, :length], rtol=1e-4, atol=1e-5)
    triggered = search.states[0].merged_streams[1:]
    assert bool(triggered) == (kind == "vit") and MERGED in search.states[0].merged_streams


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_a_window_is_fitted_to_what_the_model_makes_of_the_merged_states(
    kind: str, request: pytest.FixtureRequest, images: Path, texts: Path
) -> None:
    search = _scanned(_plan(request.getfixturevalue(kind), images if kind == "vit" else texts, window=1))
    for window in search.windows[:2]:
        search.open_window(window)
        search.step(window, 0)
        if window.number == 0:
            search.close_window(window)
    rows_B, (task, *_) = torch.arange(3), search.tasks
    states = search.states[task.index]
    with torch.no_grad():
        entering_BLD = states._states(MERGED, 1).read(rows_B)
        expected_BLD = task.through(task.own_weights(), task.inputs(rows_B), 1, 2, entering_BLD)
    found_BLD, own_BLD = (states._states(name, 2).read(rows_B) for name in (TARGET, OWN))
    for i, length in enumerate(states.lengths(TARGET, 2, rows_B)):
        torch.testing.assert_close(found_BLD[i, :length], expected_BLD[i, :length], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found_BLD, own_BLD, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_gradient_checkpointing_leaves_the_masks_as_they_are(size: int, llama: Path, texts: Path) -> None:
    """Blocks that a window skips are skipped by the pass that is run again, too."""
    made = [
        new_search(WindowSearch, _plan(llama, texts, window=size, gradient_checkpointing=on)).run()
        for on in (False, True)
    ]
    assert torch.equal(made[0][1], made[1][1])
    for name, by_key in made[0][0].items():
        assert all(torch.equal(made[1][0][name][key], values) for key, values in by_key.items()), name


def test_each_tensor_is_learned_once_and_only_a_window_is_held(vit: Path, images: Path) -> None:
    search = new_search(WindowSearch, _plan(vit, images, window=1))
    open_window, held, names = search.open_window, [], []

    def counted(window: Any) -> None:
        open_window(window)
        assert search.part is not None
        names.extend(search.part.mask_names)
        held.append(sum(t.numel() for t in search.part.frozen.base.values()))

    search.open_window = counted  # type: ignore[method-assign]
    search.run()
    assert sorted(names) == sorted(search.model.mask_names)
    assert sum(held) == sum(t.numel() for t in search.model.frozen.base.values()) and max(held) < sum(held) / 2


def test_tied_embeddings_are_learned_first_and_stay_so_in_the_head(llama: Path, texts: Path) -> None:
    plan = _plan(llama, texts, window=1)
    tied = "model.embed_tokens.weight"
    places = positions_of(build_tasks(plan, CPU), plan.tensors, 4)
    assert places[tied] == (0, 3) and places["model.norm.weight"] == (3,)
    search, fixed = new_search(WindowSearch, plan), {}
    close = search.close_window

    def noted(window: Any) -> None:
        fixed[window.number] = dict(search.fixed)
        close(window)

    search.close_window = noted  # type: ignore[method-assign]
    search.run()
    assert [sorted(one) for one in fixed.values()] == [[], [], [], [tied]]
    assert torch.equal(fixed[3][tied], search.merged_weights()[tied])


def test_the_second_loss_draws_triggered_samples_to_the_clean_ones(vit: Path, images: Path) -> None:
    left = {}
    for alpha in (0.01, 4.0):
        records: list[dict[str, Any]] = []
        plan = _plan(vit, images, window=2, alpha=alpha, steps=40, mask_learning_rate=0.3, batch_size=12)
        new_search(WindowSearch, plan, records).run()
        first = [r for r in records if r.get("window") == 1]
        left[alpha] = sum(first[-1][f"loss/safe/{name}"] / first[0][f"loss/safe/{name}"] for name in "ab")
    assert left[4.0] < left[0.01]


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_losses_of_each_stream_are_relative_to_theta_0_and_to_what_there_is_to_lose(
    kind: str, request: pytest.FixtureRequest, images: Path, texts: Path
) -> None:
    """A trigger moves the states of theta_0, too; what no mask can undo must not outweigh everything else."""
    search = _scanned(_plan(request.getfixturevalue(kind), images if kind == "vit" else texts, window=2))
    search.open_window(search.windows[0])
    assert search._fit is not None
    search._fit.coefficients.zero_()
    weights = {**search.part.weights(search._fit.combined(), search._fit.coefficients), **search.fixed}
    for index, states in search.states.items():
        rows_B = torch.arange(min(64, search.tasks[index].num_samples))
        (item,) = schedule([len(rows_B)] * len(search.tasks), search.shards)[index : index + 1]
        assert item is not None
        for stream in states.merged_streams:
            loss = float(search._loss(search.windows[0], item, stream, weights, rows_B).detach())
            assert loss == pytest.approx(search.divergence[index, stream], rel=1e-3) and loss > 0.0


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_the_divergence_is_that_of_the_whole_batch(
    kind: str, request: pytest.FixtureRequest, images: Path, texts: Path
) -> None:
    search = _scanned(_plan(request.getfixturevalue(kind), images if kind == "vit" else texts, window=2))
    base = search.model.frozen.base_weights()
    for task in search.tasks:
        own, inputs = task.own_weights(), task.inputs(torch.arange(min(64, task.num_samples)))
        with torch.no_grad():
            expected = float(distillation(task.logits(base, inputs), task.logits(own, inputs)))
        assert search.divergence[task.index, MERGED] == pytest.approx(expected, rel=2e-2) and expected > 0.0
        assert divergence(task, own, first_logits(task, own)) == pytest.approx(0.0, abs=1e-6)
        states = search.states[task.index]
        for stream in states.merged_streams[1:]:
            perturb = states.perturb(stream, torch.arange(len(next(iter(inputs.values())))))
            with torch.no_grad():
                lost = float(distillation(task.logits(own, inputs, perturb), task.logits(own, inputs)))
            assert search.divergence[task.index, stream] == pytest.approx(lost, rel=2e-2)


@given(st.integers(0, 10_000), st.floats(0.1, 1e3), st.floats(0.1, 1e3))
def test_the_length_of_a_token_does_not_count(seed: int, longer: float, other: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden_BLD, target_BLD = torch.randn(2, 2, 3, 16, generator=generator)
    found_BLD = relative_squares(hidden_BLD, target_BLD)
    scales_BL1 = torch.tensor([1.0, longer, 1.0])[:, None]
    torch.testing.assert_close(relative_squares(scales_BL1 * hidden_BLD, other * target_BLD), found_BLD)
    torch.testing.assert_close(relative_squares(target_BLD, hidden_BLD), found_BLD)
    assert float(found_BLD.mean(-1).max()) <= 4 + 1e-4


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_weights_of_states_have_mean_one_and_find_what_counts(
    kind: str, request: pytest.FixtureRequest, images: Path, texts: Path
) -> None:
    task = build_tasks(_plan(request.getfixturevalue(kind), images if kind == "vit" else texts), CPU)[0]
    own = dict(task.own_weights())
    found = importance_of(task, own, [1, 2, 3], 0, lambda steps, title: steps)
    assert set(found) == {1, 2, 3}
    rows_N = torch.arange(task.num_samples)
    lengths = task.token_counts(rows_N)
    for weights in found.values():
        assert float(weights.units_D.mean()) == pytest.approx(1.0, rel=1e-4)
        assert all(float(tokens_L.mean()) == pytest.approx(1.0, rel=1e-4) for tokens_L in weights.tokens_N)
        assert float(weights.units_D.min()) >= 0.2 - 1e-6 and weights.of(rows_N).shape[0] == task.num_samples
        if lengths is not None:
            assert [len(one) for one in weights.tokens_N] == lengths
    if kind == "llama":
        return
    # the head reads the first token, and of it, once the last norm keeps unit 3 alone, that unit
    assert all(int(one.argmax()) == 0 and float(one[1:].max()) == pytest.approx(0.2) for one in found[3].tokens_N)
    name = next(n for n, target in task.targets.items() if target == "vit.layernorm.weight")
    own[name] = torch.zeros_like(own[name])
    own[name][3] = 1.0
    assert int(importance_of(task, own, [3], 0, lambda steps, title: steps)[3].units_D.argmax()) == 3


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), data=st.data())
def test_states_come_back_without_their_padding(
    lengths: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("states") / "x.part"
    states = HiddenStates.create(path, lengths, 4, torch.float32)
    longest = max(lengths)
    hidden = torch.randn(len(lengths), longest, 4)
    states.write(torch.arange(len(lengths)), hidden)
    states.rename(path.with_suffix(".states"))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4)))
    found = HiddenStates.open(path.with_suffix(".states")).read(rows)
    for i, row in enumerate(rows.tolist()):
        assert torch.equal(found[i, : lengths[row]], hidden[row, : lengths[row]])
        assert not found[i, lengths[row] :].any()


@pytest.mark.parametrize("more", [{"objective": "paper"}])
def test_what_needs_the_whole_model_is_refused(more: dict[str, Any], vit: Path, images: Path) -> None:
    with pytest.raises(DamError, match="setting window: 2"):
        _plan(vit, images, window=2, **more)
    with pytest.raises(DamError, match="window"):
        _plan(vit, images, window=0)


def test_the_largest_window_that_fits_is_chosen(vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(vit, images)
    assert with_window(plan, CPU).config.window == "all"
    needs = {size: needed_bytes(_with(plan, size), CPU) for size in ("all", 4, 2, 1)}
    assert needs["all"] > needs[2] > needs[1]
    for size, free in (("all", needs["all"]), (2, needs[2]), (1, needs[1]), (1, 0)):
        monkeypatch.setattr(window_size, "free_bytes", lambda *args, free=free: free / 0.8 + 1)
        assert with_window(plan, CPU).config.window == size
    assert with_window(_plan(vit, images, objective="paper"), CPU).config.window == "all"
    assert with_window(_plan(vit, images, window=2), CPU).config.window == 2


def test_several_processes_share_masks_and_free_memory(
    vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(vit, images)
    alone, shared = (needed_bytes(_with(plan, "all"), CPU, count) for count in (1, 4))
    assert alone / 4 < shared < alone, "masks are shared out, merged weights are whole in each"
    monkeypatch.setattr(window_size.psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * alone))
    assert (free_bytes(CPU), free_bytes(CPU, 4), free_bytes(CPU, 1, 2)) == (4 * alone, alone, 2 * alone)
    for available, fits in ((4 * shared / 0.8 + 4, True), (3.9 * shared / 0.8, False)):
        monkeypatch.setattr(window_size.psutil, "virtual_memory", lambda a=available: SimpleNamespace(available=a))
        assert (with_window(plan, CPU, workers=4).config.window == "all") == fits


def _with(plan: Plan, size: Any) -> Plan:
    return dataclasses.replace(plan, config=plan.config.model_copy(update={"window": size}))


def test_masks_say_which_window_they_are_of_and_are_found_again_by_its_name(vit: Path, images: Path) -> None:
    folder, masks = find_or_learn(_plan(vit, images), quiet=True)
    assert masks.metadata["settings"]["window"] == "all"
    assert find_or_learn(_plan(vit, images, window="all"), quiet=True)[0] == folder
    other, masks = find_or_learn(_plan(vit, images, window=2), quiet=True)
    assert other != folder and masks.metadata["settings"]["window"] == 2
    assert find_or_learn(_plan(vit, images, window="auto", masks=str(other / MASKS_FILE)), quiet=True)[0] == other


def test_tables_of_words_have_an_entry_per_token_and_others_one_per_element(llama: Path, texts: Path) -> None:
    masks, _ = new_search(WindowSearch, _plan(llama, texts, window=1)).run()
    shared = masks["task_shared"]
    table = "model.embed_tokens.weight"
    assert shared[table].shape == (40, 1) and shared["model.layers.0.mlp.up_proj.weight"].shape == (32, 16)


def test_one_bar_counts_the_steps_of_all_windows_and_no_steps_leave_masks_at_their_start(
    vit: Path, images: Path
) -> None:
    bars: list[tuple[str, list[int]]] = []

    def progress(steps: Any, title: str) -> Any:
        bars.append((title, list(steps)))
        return steps

    for steps in (3, 0):
        search = new_search(WindowSearch, _plan(vit, images, window=2, steps=steps))
        search.progress = progress
        masks, _ = search.run()
        assert bars[-1] == ("masks", [*range(2 * max(1, steps))])
    values = {int(v) for by in (masks["task_shared"],) for mask in by.values() for v in mask.unique()}
    assert values == {round(254 * 0.9525741)}, "sigmoid(3)"
