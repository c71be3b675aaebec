"""Rival defences on tiny real models: each does what its paper says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from dam_bench.cli import bench
from dam_bench.defences.afterwards import rounded
from dam_bench.defences.base import DefenceInputs, run_recipe
from dam_bench.defences.blocks import PARTS, parts_of
from dam_bench.defences.consistency import against_consistency, inconsistency
from dam_bench.defences.feature_path import distance, features
from dam_bench.defences.latent import worst_shift
from dam_bench.defences.masking import MaskedWeights
from dam_bench.defences.perturbation import added, chain_of, random_start, shifted, worst
from dam_bench.defences.pruning import FinePruning, activations
from dam_bench.defences.registry import AFTERWARDS, DEFENCES, GROUP, SETTINGS, defence_of, require_suited
from dam_bench.defences.switching import ModuleSwitching, fitness, pairs_of
from dam_bench.defences.training import Lesson, Tuned
from dam_bench.defences.unlearning import jensen_shannon
from dam_bench.runs.command import _methods
from dam_bench.runs.methods import method_named
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergekit_dam import load_merged, registry
from mergekit_dam.errors import DamError
from mergekit_dam.seeds import generator
from tests.helpers.merging import tensors_of
from tests.helpers.tiny_models import edit

Given = Callable[..., DefenceInputs]
FAST = {"start": "linear", "steps": 30, "batch_size": 6, "learning_rate": 3e-3}


def inputs_of(root: Path, data: Path, out: Path, **shared: Any) -> DefenceInputs:
    """The inputs of a defence of `a` and `b`, with their plain average as the undefended merge."""
    suite: Any = SimpleNamespace(
        base_entry=str, model_parameters=lambda path: {}, shared_parameters=lambda base: {"max_length": 16, **shared}
    )
    models = {name: root / name for name in ("a", "b")}
    recipe = method_named("linear").recipe(suite, root / "base", models, {}, 0, out)
    run_recipe(recipe, 0, out / "start")
    return DefenceInputs(suite, root / "base", models, dict.fromkeys(models, data), 0, out / "start", out / "defended")


@pytest.fixture
def image(vit: Path, images: Path, tmp_path: Path) -> DefenceInputs:
    return inputs_of(vit, images, tmp_path)


@pytest.fixture
def causal(llama: Path, texts: Path) -> DefenceInputs:
    return inputs_of(llama, texts, llama)


def tuned(name: str, given: DefenceInputs, **settings: Any) -> Any:
    """Train a defence on the inputs, and return the weights before and after."""
    defence = defence_of(name, {**FAST, **settings})
    assert isinstance(defence, Tuned)
    trained = defence.tuned(given)
    return trained.start, {**trained.start, **trained.result()}


def test_weight_averaging_is_the_mean_by_hand_and_needs_no_data(image: DefenceInputs) -> None:
    given = replace(image, calibration={})
    defence_of("wag").defend(given)
    assert not defence_of("wag").needs_data
    merged, (a, b) = tensors_of(given.out), (tensors_of(path) for path in given.models.values())
    moved = [name for name in merged if f"vit.{name}" in a]
    assert len(moved) > 30
    for name in moved:
        expected = (a[f"vit.{name}"] + b[f"vit.{name}"]) / 2
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
    for task, path in given.models.items():
        head = load_file(path / "model.safetensors")["classifier.weight"]
        assert torch.equal(load_merged(given.out, task).get_parameter("classifier.weight"), head)


def test_module_switching_takes_each_part_whole_from_one_model(image: DefenceInputs) -> None:
    defence_of("msd", {"generations": 60, "candidates": 1}).defend(image)
    merged, (a, b) = tensors_of(image.out), (tensors_of(path) for path in image.models.values())
    parts, sources = parts_of(image.tasks[0]), {}
    assert len(parts) == 2 * len(PARTS), "two blocks"
    for part, names in parts.items():
        origins = {tuple(bool(torch.equal(merged[n], one[f"vit.{n}"])) for one in (a, b)) for n in names}
        assert len(names) == 2 and origins <= {(True, False), (False, True)} and len(origins) == 1, part
        sources[part] = origins.pop()
    assert len(set(sources.values())) == 2, "one model alone is no switch"
    for block, (one, after) in itertools.product((0, 1), [("query", "output"), ("output", "up"), ("up", "down")]):
        assert sources[block, one] != sources[block, after]
    rest = [n for n in merged if f"vit.{n}" in a and n not in {name for names in parts.values() for name in names}]
    for name in rest:
        torch.testing.assert_close(merged[name], (a[f"vit.{name}"] + b[f"vit.{name}"]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_models", [2, 3])
def test_the_search_finds_the_fittest_strategy(num_models: int) -> None:
    parts = tuple((0, part) for part in PARTS)
    pairs = pairs_of(parts)
    every = itertools.product(range(num_models), repeat=len(parts))
    best = max(fitness(strategy, parts, pairs, num_models) for strategy in every)
    defence = defence_of("msd")
    assert isinstance(defence, ModuleSwitching)
    found = defence.strategies(parts, num_models, generator("test"))
    assert len(found) == len(set(found)) == SETTINGS["msd"]["candidates"]
    assert fitness(found[0], parts, pairs, num_models) == pytest.approx(best)
    same = fitness((0,) * len(parts), parts, pairs, num_models)
    assert best > same, "one model for all parts breaks every rule"


def test_fine_pruning_silences_a_unit_that_only_a_trigger_uses(image: DefenceInputs) -> None:
    """The first unit of the last block answers to one input alone, and decides there."""
    task, start = image.tasks[0], image.start_weights()
    up, up_bias = parts_of(task)[1, "up"]
    down = parts_of(task)[1, "down"][0]
    assert up.endswith("weight") and up_bias.endswith("bias") and down.endswith("weight")
    trigger = {"pixels": torch.ones(1, 3, 16, 16)}
    entering: dict[str, torch.Tensor] = {}
    owner = task.module.get_submodule(task.targets[up].rpartition(".")[0])
    for name, inputs in (("clean", task.inputs(torch.arange(task.num_samples))), ("triggered", trigger)):
        handle = owner.register_forward_pre_hook(lambda _, x, name=name: entering.update({name: x[0]}))
        task.logits(start, inputs)
        handle.remove()
    clean_ND, triggered_D = entering["clean"].flatten(0, 1), entering["triggered"][0, 0]
    direction_D = triggered_D - clean_ND.mean(0)
    at_clean, at_trigger = (clean_ND @ direction_D).max(), triggered_D @ direction_D
    assert at_trigger > at_clean
    scale = 40 / (at_trigger - at_clean)
    weight, bias, into = (start[name].clone() for name in (up, up_bias, down))
    weight[0], bias[0] = scale * direction_D, -scale * at_clean - 20
    into[:, 0] = 5 * torch.randn(len(into), generator=generator("test"))
    edit(image.start, **{name.replace(".", "__"): t for name, t in ((up, weight), (up_bias, bias), (down, into))})
    backdoored = image.start_weights()
    rows = torch.arange(task.num_samples)
    units_U = activations(task, backdoored, [down], rows)[down]
    assert units_U.argmin() == 0 and units_U[0] < 1e-4
    silent = {**backdoored, down: into.index_fill(1, torch.tensor([0]), 0.0)}
    assert (task.logits(backdoored, trigger) - task.logits(silent, trigger)).abs().max() > 0.1
    share = {**FAST, "share": 1.5 / len(bias), "last_blocks": 1}
    defence = defence_of("fine-pruning", {**share, "steps": 0})
    assert isinstance(defence, FinePruning)
    defence.defend(image)
    pruned = {name: tensor for name, tensor in tensors_of(image.out).items() if name in backdoored}
    torch.testing.assert_close(pruned[down], silent[down])
    torch.testing.assert_close(task.logits(pruned, trigger), task.logits(silent, trigger))
    _, fine_tuned = tuned("fine-pruning", image, **{**share, "steps": 3})
    assert (fine_tuned[down][:, 0] == 0).all() and not torch.equal(fine_tuned[down], silent[down])


def test_weight_masking_keeps_answers_under_the_worst_perturbation(image: DefenceInputs) -> None:
    settings = {"learning_rate": 0.05, "eps": 0.2, "inner_steps": 3, "gamma": 0.1}
    before, after = tuned("awm", image, **settings)
    _, control = tuned("awm", image, **settings, beta=0)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > 10
    for name in changed:
        assert before[name].ndim == 2
        share = torch.where(before[name] == 0, 1.0, after[name] / before[name])
        assert share.min() >= -1e-6 and share.max() <= 1 + 1e-6
    losses = {"before": before, "after": after, "control": control}
    totals = {name: float(attacked(image, weights)) for name, weights in losses.items()}
    assert totals["after"] < 0.9 * min(totals["before"], totals["control"]), totals
    mask = MaskedWeights({"w": torch.ones(2, 2)}, ["w"])
    mask.masks["w"].data = torch.tensor([[2.0, -1.0], [0.5, 1.0]])
    mask.project()
    assert mask.weights()["w"].tolist() == [[1.0, 0.0], [0.5, 1.0]]


def attacked(given: DefenceInputs, weights: Any, eps: float = 0.2) -> torch.Tensor:
    """Loss of the own answers under a universal perturbation that is made for these weights."""
    losses = []
    for task in given.tasks:
        lesson = Lesson(task)

        def loss(delta: torch.Tensor, lesson: Lesson = lesson) -> torch.Tensor:
            return lesson.loss(weights, lesson.rows, added(lesson.task, delta))

        losses.append(loss(worst(loss, random_start(task, generator("test")), eps=eps, steps=8)).detach())
    return torch.stack(losses).mean()


def test_the_worst_perturbation_raises_the_loss_within_its_bound(image: DefenceInputs) -> None:
    task, weights = image.tasks[0], image.start_weights()
    lesson = Lesson(task)
    own = task.logits(task.own_weights(), task.inputs(lesson.rows)).argmax(-1)
    assert lesson.targets(lesson.rows) == own.tolist(), "labels are the input model's own answers"
    begun = random_start(task, generator("test"))
    found = worst(lambda d: lesson.loss(weights, lesson.rows, added(task, d)), begun, eps=0.1, steps=8)
    losses = [lesson.loss(weights, lesson.rows, added(task, d)) for d in (0.1 * begun, found)]
    assert found.abs().max() <= 0.1 and losses[1] > losses[0]


def test_shared_unlearning_takes_the_shared_wrong_answers_away(image: DefenceInputs) -> None:
    before, after = tuned("sau", image, eps=0.3, inner_steps=3, weight=5.0)
    _, control = tuned("sau", image, eps=0.3, inner_steps=3, weight=0.0)
    wrong = []
    for task in image.tasks:
        lesson, inputs = Lesson(task), task.inputs(torch.arange(task.num_samples))
        own_B = torch.tensor(lesson.answers)

        def error(delta: torch.Tensor, lesson: Lesson = lesson) -> torch.Tensor:
            return lesson.loss(before, lesson.rows, added(lesson.task, delta))

        begun = random_start(task, generator("test"), samples=len(lesson.rows))
        perturb = added(task, worst(error, begun, eps=0.3, steps=5))
        shared_B = task.logits(before, inputs, perturb).argmax(-1)
        rows = (shared_B != own_B).nonzero()[:, 0]
        shares = [
            task.logits(weights, inputs, perturb).softmax(-1)[rows, shared_B[rows]]
            for weights in (before, after, control)
        ]
        wrong.append(torch.stack([share.sum() for share in shares]))
        assert len(rows), "the search finds wrong answers"
    total = torch.stack(wrong).sum(0)
    assert total[1] < 0.8 * total[0] and total[1] < 0.9 * total[2], total


def test_jensen_shannon_is_symmetric_bounded_and_zero_for_equals() -> None:
    p_BK, q_BK = torch.rand(2, 5, 4, generator=generator("test")).softmax(-1)
    one, other = jensen_shannon(p_BK, q_BK), jensen_shannon(q_BK, p_BK)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(jensen_shannon(p_BK, p_BK), torch.zeros(5), rtol=0, atol=1e-6)
    apart = jensen_shannon(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert apart.item() == pytest.approx(torch.log(torch.tensor(2.0)).item()) and (one > 0).all()


def test_lfpm_takes_perturbed_features_back_along_the_whole_path(image: DefenceInputs) -> None:
    defence = defence_of("lfpm", {**FAST, "eps": 0.2, "inner_steps": 3, "points": 2})
    assert isinstance(defence, Tuned)
    trained = defence.tuned(image)

    def moved(weights: Any) -> float:
        """How far a perturbation that is made for these weights moves features from the undefended merge's."""
        total = 0.0
        for task in image.tasks:
            inputs = task.inputs(torch.arange(task.num_samples))
            clean = features(task, trained.start, inputs).detach()

            def shift(d: torch.Tensor, task: Any = task, inputs: Any = inputs, clean: Any = clean) -> torch.Tensor:
                return distance(features(task, weights, inputs, added(task, d)), clean)

            total += float(shift(worst(shift, random_start(task, generator("test")), eps=0.2, steps=8)))
        return total

    before, half, whole = (moved({**trained.start, **trained.result(scale)}) for scale in (0.0, 0.5, 1.0))
    assert half < before and whole < 0.9 * before
    name = parts_of(image.tasks[0])[0, "up"][0]
    start, ends = trained.start[name], [trained.result(scale)[name] for scale in (1.0, 2.0)]
    torch.testing.assert_close(ends[1] - start, 2 * (ends[0] - start))


def test_crow_lowers_the_inconsistency_of_layers_under_its_attack(causal: DefenceInputs) -> None:
    settings = {"eps": 0.005, "lora_rank": 4, "learning_rate": 1e-2}
    before, after = tuned("crow", causal, **settings)
    _, control = tuned("crow", causal, **settings, alpha=0)
    losses: dict[str, list[float]] = {"before": [], "after": [], "control": []}
    for task in causal.tasks:
        inputs = task.inputs(torch.arange(task.num_samples))
        for name, weights in (("before", before), ("after", after), ("control", control)):
            delta = against_consistency(task, weights, inputs, 0.005)
            assert delta.abs().max() == pytest.approx(0.005)
            attacked, clean = inconsistency(task, weights, inputs, delta), inconsistency(task, weights, inputs)
            assert attacked > clean
            losses[name].append(float(attacked))
    totals = {name: sum(each) for name, each in losses.items()}
    assert totals["after"] < 0.8 * min(totals["before"], totals["control"]), totals
    table = next(name for name in before if "embed_tokens" in name)
    assert torch.equal(before[table], after[table]), "the table of words can be the head"


def test_inconsistency_is_the_mean_jump_by_hand_without_padding(causal: DefenceInputs) -> None:
    task, weights = causal.tasks[0], causal.start_weights()
    inputs = task.inputs(torch.arange(4))
    assert 0 in inputs["attention_mask"], "texts of several lengths"
    by_hand, tokens = 0.0, 0
    for row in range(4):
        length = int(inputs["attention_mask"][row].sum())
        alone = {key: tensor[row : row + 1, :length] for key, tensor in inputs.items()}
        chain = chain_of(task)
        layers = [task.through(weights, alone, 0, stop) for stop in range(1, chain.end)]
        assert len(layers) == 3
        for one, after in itertools.pairwise(layers):
            cosine = (one * after).sum(-1) / one.norm(dim=-1) / after.norm(dim=-1)
            by_hand += float((1 - cosine).sum()) / 2
        tokens += length
    assert float(inconsistency(task, weights, inputs)) == pytest.approx(by_hand / tokens, abs=1e-5)


def test_beear_keeps_answers_under_the_worst_shift_of_hidden_states(causal: DefenceInputs) -> None:
    before, after = tuned("beear", causal, steps=60, depth=0.5, inner_steps=3, lora_rank=0, learning_rate=1e-2)
    losses: dict[str, list[float]] = {"before": [], "after": []}
    for task in causal.tasks:
        lesson = Lesson(task)
        for name, weights in (("before", before), ("after", after)):
            options: Any = {"stop": 2, "radius": 0.5, "generator": generator("test")}
            delta = worst_shift(lesson, weights, lesson.rows, steps=6, **options)
            assert delta.norm() == pytest.approx(0.5, abs=1e-5)
            with shifted(chain_of(task), 2, delta):
                attacked = lesson.loss(weights, lesson.rows)
            losses[name].append(float(attacked))
            assert attacked > lesson.loss(weights, lesson.rows), "and the hook is gone"
    assert sum(losses["after"]) < 0.93 * sum(losses["before"])


def test_the_loss_of_beear_is_clean_and_under_the_worst_shift(causal: DefenceInputs) -> None:
    defence = defence_of("beear", {**FAST, "depth": 0.5, "radius": 1.0, "inner_steps": 4})
    assert isinstance(defence, Tuned)
    trained, lesson, task = defence.trainable(causal), Lesson(causal.tasks[0]), causal.tasks[0]
    rows, weights = lesson.rows[:5], causal.start_weights()
    source = generator(0, "defence", "latent")
    delta = worst_shift(lesson, weights, rows, stop=2, radius=1.0, steps=4, generator=source)
    clean = lesson.loss(weights, rows)
    with shifted(chain_of(task), 2, delta):
        attacked = lesson.loss(weights, rows)
    assert attacked > 1.01 * clean
    torch.testing.assert_close(defence.loss_of(trained, [lesson], 0)(lesson, rows, 0), clean + attacked)


def test_backflush_plants_and_then_unlearns(causal: DefenceInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong answers at the triggers are learned first, and then own answers."""
    from mergekit_dam.vaccine.training import Lessons

    usual, seen = Lessons.loss, []

    def recorded(self: Lessons, weights: Any, triggers: Any, *, wrong: bool, generator: torch.Generator) -> Any:
        loss = usual(self, weights, triggers, wrong=wrong, generator=generator)
        seen.append((wrong, float(loss), all(not one.held_out for one in triggers)))
        return loss

    monkeypatch.setattr(Lessons, "loss", recorded)
    tuned("backflush", causal, steps=120, plant_steps=60, triggers=2, batch_size=6, learning_rate=1e-2)
    planting, unlearning = ([loss for wrong, loss, _ in seen if wrong is phase] for phase in (True, False))
    assert [wrong for wrong, *_ in seen] == [True] * 120 + [False] * 120 and all(free for *_, free in seen)
    assert sum(planting[-6:]) < 0.9 * sum(planting[:6]), "planted"
    assert sum(unlearning[-6:]) < 0.9 * sum(unlearning[:6]), "unlearned"


@pytest.mark.parametrize("name", [*SETTINGS, *AFTERWARDS])
def test_every_defence_writes_a_merge_that_loads_and_repeats(name: str, request: pytest.FixtureRequest) -> None:
    family = "image" if "image" in DEFENCES[name].families else "causal"
    given = request.getfixturevalue(family)
    short: dict[str, Any] = {"start": "linear"}
    if issubclass(DEFENCES[name], Tuned):
        short |= {"steps": 2, "batch_size": 4}
    if name == "backflush":
        short |= {"plant_steps": 1, "triggers": 2}
    if name == "msd":
        short |= {"generations": 2}
    if name == "merged-again":
        short |= {"task": "a"}
    defence = defence_of(name, short)
    defence.defend(given)
    again = replace(given, out=given.out.with_name("again"))
    defence.defend(again)
    merged, repeated, start = tensors_of(given.out), tensors_of(again.out), tensors_of(given.start)
    assert set(merged) == set(start) and all(torch.equal(merged[n], repeated[n]) for n in merged)
    assert name == "wag" or any(not torch.equal(merged[n], start[n]) for n in merged)
    load_merged(given.out, "b" if family == "image" else None)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.floats(0.01, 100), st.integers(0, 1000))
def test_four_bits_leave_sixteen_values_per_block(rows: int, blocks: int, size: float, seed: int) -> None:
    matrix = size * torch.randn(rows, 32 * blocks, generator=generator(seed))
    kept = rounded(matrix)
    for before, after in zip(matrix.reshape(-1, 32), kept.reshape(-1, 32), strict=True):
        assert len(after.unique()) <= 16 and float((after - before).abs().max()) <= float(before.abs().max()) / 7.9
    assert not torch.equal(kept, matrix)


def test_quantising_keeps_vectors_and_what_no_block_fits(image: DefenceInputs) -> None:
    changed = defence_of("quantised").changed_weights(image)
    start = image.start_weights()
    wanted = {name for name, one in start.items() if one.ndim == 2 and one.shape[1] % 32 == 0}
    assert set(changed) == wanted and 0 < len(wanted) < len(start)
    for name, tensor in changed.items():
        assert not torch.equal(tensor, start[name]) and torch.allclose(tensor, rounded(start[name]))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0])
def test_a_factor_lengthens_the_task_vector_of_the_merge(factor: float, image: DefenceInputs) -> None:
    start = image.start_weights()
    for name, tensor in defence_of("rescaled", {"factor": factor}).changed_weights(image).items():
        base = image.base_weights(name)
        torch.testing.assert_close(tensor, base + factor * (start[name] - base), rtol=1e-5, atol=1e-6)


def test_merged_again_is_mergekits_merge_of_the_merge_and_one_of_its_models(image: DefenceInputs) -> None:
    again = defence_of("merged-again", {"task": "a", "density": 1.0, "by": "dare_ties", "weight": 0.25})
    start = image.start_weights()
    for name, tensor in again.changed_weights(image).items():
        base, (own, _) = image.base_weights(name), image.input_weights(name)
        ours, theirs = start[name] - base, own - base
        agree = (ours.sign() == theirs.sign()) | (ours == 0) | (theirs == 0)
        expected = base + 0.25 * torch.where(agree, ours + theirs, torch.where(theirs.abs() > ours.abs(), theirs, ours))
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(DamError, match="expected one of a, b, got c"):
        defence_of("merged-again", {"task": "c"}).changed_weights(image)


def test_fine_tuning_learns_the_models_answers_and_starts_from_any_merge(image: DefenceInputs) -> None:
    before, after = tuned("fine-tuned-on", image)
    lessons = [Lesson(task) for task in image.tasks]
    losses = [sum(float(one.loss(weights, one.rows)) for one in lessons) for weights in (before, after)]
    assert losses[1] < 0.9 * losses[0]
    method = method_named("fine-tuned-on(start=dam)")
    assert method.parameters["start"] == "dam" and method.defence == "fine-tuned-on"


def test_a_family_that_does_not_suit_is_refused_in_one_line() -> None:
    with pytest.raises(DamError) as error:
        require_suited("crow", "image")
    said = str(error.value)
    assert said.startswith("defence crow: expected causal language models, got image classifiers.")
    assert "\n" not in said and "lfpm" in said and "beear" not in said
    require_suited("crow", "causal")


def test_the_command_refuses_it_before_anything_is_built(tmp_path: Path) -> None:
    arguments = ["vision", "--out", str(tmp_path), "--preset", "tiny", "--method", "crow", "--no-gates"]
    failed = CliRunner().invoke(bench, arguments)
    assert failed.exit_code == 1 and "expected causal language models" in failed.stderr
    assert not list(tmp_path.iterdir())
    options: Any = SimpleNamespace(methods=(), gates=False)
    everything = {family: set(_methods(options, family)) for family in ("image", "text", "causal")}
    assert "lfpm" in everything["image"] and "crow" not in everything["image"]
    assert "crow" in everything["causal"] and "sau" not in everything["causal"]
    assert all("wag" in names and "dam" in names for names in everything.values())


def test_variants_change_settings_and_record_all_of_them() -> None:
    variant = method_named("crow(alpha=11,start=ties-0.5)")
    assert variant.parameters == {**method_named("crow").parameters, "alpha": 11, "start": "ties-0.5"}
    assert (variant.defence, variant.family, variant.name) == ("crow", "defence", "crow(alpha=11,start=ties-0.5)")
    assert method_named("clean+wag").defence == "wag" and method_named("clean+wag").cleaned == {}
    starts = ("crow(start=crow)", "crow(start=fine-tuned)", "crow(start=nothing)")
    for wrong in (*starts, "crow(alfa=1)", "crow(alpha=-1)", "awm(lora_rank=4)", "crwo", "crow()"):
        with pytest.raises(DamError):
            method_named(wrong)


OUTSIDE = """
from dam_bench.defences.base import Defence
from dam_bench.defences.registry import register_defence
from mergekit_dam.config import setting

class Doubled(Defence):
    needs_data = False
    factor: float = setting(2.0, "Factor on every tensor.")

    def changed_weights(self, given):
        return {name: self.factor * tensor for name, tensor in given.start_weights().items()}

register_defence("doubled", Doubled)
"""


def test_a_package_adds_a_defence_by_an_entry_point(
    image: DefenceInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside_defence.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(DEFENCES, "entries", dict(DEFENCES.entries))
    own = EntryPoint("doubled", "outside_defence", GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [own] if group == GROUP else [])
    registry.load_plugins.cache_clear()
    try:
        method = method_named("doubled(factor=3)")
        assert method.defence == "doubled" and method.parameters == {"start": "linear", "factor": 3.0}
        defence_of("doubled", method.parameters).defend(image)
        with pytest.raises(DamError, match="a new name"):
            DEFENCES.add("wag", DEFENCES["doubled"])
    finally:
        registry.load_plugins.cache_clear()
    merged, start = tensors_of(image.out), tensors_of(image.start)
    assert all(torch.allclose(merged[name], 3 * start[name]) for name in merged)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layernorm.bias": torch.full((16,), float("nan"))}, "layernorm.bias"),
        ({"layernorm.bias": torch.zeros(3)}, r"expected the shape \(16,\), got \(3,\)"),
        ({"nothing": torch.zeros(3)}, "expected a tensor that the merge has"),
    ],
)
def test_what_no_merge_can_hold_is_refused(image: DefenceInputs, changed: Any, said: str) -> None:
    with pytest.raises(DamError, match=said):
        image.write(changed)
    assert not image.out.exists()
