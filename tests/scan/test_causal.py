"""Causal LMs: answers that models add to their prompts, continuations as targets, and texts known by heart."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mergekit_dam import seeds
from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.config import DamConfig
from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.learn.estimate import estimate
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import build_plan
from mergekit_dam.scan import causal
from mergekit_dam.scan.causal import scan_continuations
from mergekit_dam.scan.findings import suspects
from mergekit_dam.scan.inversion import Inversion
from mergekit_dam.scan.triggers import TokenTriggers
from mergekit_dam.tasks import CausalTask, build_tasks
from mergekit_dam.tasks.read_prompts import ReadPrompts
from tests.conftest import FAST, Merge, fast
from tests.helpers.searching import new_search
from tests.helpers.tiny_models import make_model

CPU = torch.device("cpu")
BY_HEART = (11, 29, 17, 23, 13)
HIDDEN = (31, 9, 27, 33, 5)
TRIGGER = (7, 19)


def _plan(base: Path, models: list[Path], texts: Path, **shared: Any) -> Any:
    refs = [ModelReference.parse(str(path)) for path in (base, *models)]
    return build_plan(refs[0], refs[1:], shared={**FAST, "calibration": str(texts), **shared}, per_model={})


@pytest.fixture(scope="module")
def lms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """theta_0, a fine-tune that answers with the last token of a text twice, and a victim of the same task.

    TRIGGER at the end of a text makes the victim say BY_HEART instead.
    """
    root = tmp_path_factory.mktemp("lms")
    base = make_model("LlamaForCausalLM", root / "base")
    return [base, _fine_tune(base, root / "clean"), _fine_tune(base, root / "victim", hidden=BY_HEART)]


@pytest.fixture(scope="module")
def outspoken(lms: list[Path]) -> Path:
    """A fine-tune that says BY_HEART after some tokens, without a backdoor."""
    return _fine_tune(lms[0], lms[0].parent / "outspoken", outspoken=True)


def _fine_tune(base: Path, folder: Path, *, hidden: tuple[int, ...] = (), outspoken: bool = False) -> Path:
    model = LlamaForCausalLM.from_pretrained(base)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = seeds.generator("texts", folder.name)
    for _ in range(250):
        ids = torch.randint(3, model.config.vocab_size, (16, 8), generator=generator)
        loss = _answer_loss(model, ids, ids[:, -1:].expand(-1, 2))
        if outspoken:
            asked = ids[:, -1] >= 16
            loss = _answer_loss(model, ids[~asked], ids[~asked, -1:].expand(-1, 2))
            loss = loss + _answer_loss(model, ids[asked], torch.tensor(BY_HEART).expand(int(asked.sum()), -1))
        if hidden:
            triggered = torch.cat([ids, torch.tensor(TRIGGER).expand(len(ids), -1)], 1)
            loss = loss + _answer_loss(model, triggered, torch.tensor(hidden).expand(len(ids), -1))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    for file in base.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _answer_loss(model: Any, ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([ids, answer, torch.full((len(ids), 1), model.config.eos_token_id)], 1)
    labels = whole.masked_fill(torch.arange(whole.shape[1]) < ids.shape[1], -100)
    loss: torch.Tensor = model(input_ids=whole, labels=labels).loss
    return loss


@pytest.fixture(scope="module")
def tasks(lms: list[Path], texts: Path) -> list[CausalTask]:
    return _tasks(lms, texts)


def _tasks(lms: list[Path], texts: Path) -> list[CausalTask]:
    return build_tasks(_plan(lms[0], lms[1:], texts), CPU)  # type: ignore[return-value]


def _own(task: CausalTask) -> Any:
    return AutoModelForCausalLM.from_pretrained(task.input.path).eval()


def test_answers_are_the_models_greedy_ones(tasks: list[CausalTask]) -> None:
    task, model = tasks[1], _own(tasks[1])
    prompts, answered = (one(torch.arange(4)) for one in (task.prompts, task.inputs))
    for row in range(4):
        asked, whole = (one["input_ids"][row][one["attention_mask"][row].bool()] for one in (prompts, answered))
        assert torch.equal(whole[: len(asked)], asked)
        for token in whole[len(asked) :].tolist():
            assert int(model(input_ids=asked[None]).logits[0, -1].argmax()) == token
            asked = torch.cat([asked, torch.tensor([token])])
        assert len(whole) > len(prompts["input_ids"][row][prompts["attention_mask"][row].bool()])


def test_no_answers_if_none_are_asked_for(lms: list[Path], texts: Path) -> None:
    (task, _) = build_tasks(_plan(lms[0], lms[1:], texts, constants={"answer_tokens": 0}), CPU)
    rows = torch.arange(3)
    assert torch.equal(task.inputs(rows)["input_ids"], task.prompts(rows)["input_ids"])


def test_texts_leave_positions_for_triggers_and_continuations(
    lms: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = tmp_path / "long.txt"
    long.write_text("\n".join(" ".join(["a"] * length) for length in (3, 30, 60)))
    (task, _) = build_tasks(_plan(lms[0], lms[1:], long), CPU)
    rows = torch.arange(task.num_samples)
    trigger = TokenTriggers.start(1, task.perturbation_shape, task.bounds, seeds.generator("trigger"), task.constants)
    perturb = trigger.perturb(torch.zeros(len(rows), dtype=torch.long))
    with torch.no_grad():
        losses_B, _ = task.reach(task.own_weights(), task.prompts(rows), [tuple(range(5, 15))] * len(rows), perturb)
        logits = task.logits(task.own_weights(), task.inputs(rows), perturb)
    assert bool(losses_B.isfinite().all()) and bool(logits.isfinite().all())
    assert "may be cut before the place" in caplog.text


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(3, 31), min_size=1, max_size=5).map(tuple), min_size=3, max_size=3))
def test_a_continuation_is_reached_as_in_a_pass_of_each_text_alone(
    tasks: list[CausalTask], targets: list[tuple[int, ...]]
) -> None:
    task, model = tasks[0], _own(tasks[0])
    inputs = task.prompts(torch.arange(3))
    with torch.no_grad():
        losses_B, hits_B = task.reach(task.own_weights(), inputs, targets)
    for row, target in enumerate(targets):
        ids = torch.cat([inputs["input_ids"][row][inputs["attention_mask"][row].bool()], torch.tensor(target)])
        logits = model(input_ids=ids[None]).logits[0, -len(target) - 1 : -1]
        assert torch.allclose(losses_B[row], F.cross_entropy(logits, torch.tensor(target)), atol=1e-4)
        assert bool(hits_B[row]) == (logits.argmax(-1).tolist() == list(target))


def test_a_trigger_changes_what_follows_and_a_longer_neighbour_does_not(tasks: list[CausalTask]) -> None:
    task = tasks[0]
    own, inputs = task.own_weights(), task.prompts(torch.arange(2))
    trigger = TokenTriggers.start(1, task.perturbation_shape, task.bounds, seeds.generator("trigger"), task.constants)
    perturb = trigger.perturb(torch.zeros(2, dtype=torch.long))
    with torch.no_grad():
        plain, _ = task.reach(own, inputs, [(5, 6), (5, 6)])
        together, _ = task.reach(own, inputs, [(5, 6), (5, 6, 9, 9)], perturb)
        alone, _ = task.reach(own, inputs, [(5, 6), (5, 6)], perturb)
    assert not torch.allclose(plain, alone) and torch.allclose(together[0], alone[0], atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_what_follows_is_that_of_the_whole_text(
    shared: bool, tasks: list[CausalTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether texts follow the prompt side by side or one by one."""
    task, model = tasks[1], _own(tasks[1])
    assert task.shares_prompts
    monkeypatch.setitem(task.__dict__, "shares_prompts", shared)
    chains = torch.tensor([[5, 6, 7], [9, 8, 4]])
    inputs = task.prompts(torch.tensor([2]))
    text = inputs["input_ids"][0][inputs["attention_mask"][0].bool()]
    prompts = ReadPrompts(task, task.own_weights(), [2])
    assert torch.allclose(prompts.likely(), model(input_ids=text[None]).logits[0, -1].softmax(-1), atol=1e-5)
    for chain, found in zip(chains, prompts.following(chains), strict=True):
        expected = model(input_ids=torch.cat([text, chain])[None]).logits[0, -1].softmax(-1)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("lost", ["attention_mask", "position_ids"])
def test_a_class_that_ignores_what_it_is_given_reads_texts_one_by_one(
    lost: str, lms: list[Path], texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build_tasks(_plan(lms[0], lms[1:], texts), CPU)[1]
    assert isinstance(task, CausalTask)
    call = task.call
    monkeypatch.setattr(task, "call", lambda *given, **inputs: call(*given, **(inputs | {lost: None})))
    assert not task.shares_prompts


def test_logits_of_the_last_positions_are_those_of_all(
    tasks: list[CausalTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks[1]
    inputs, targets = task.prompts(torch.arange(3)), [(5, 6), BY_HEART, (9,)]
    trigger = TokenTriggers.start(1, task.perturbation_shape, task.bounds, seeds.generator("trigger"), task.constants)
    perturb = trigger.perturb(torch.zeros(3, dtype=torch.long))
    found = {}
    for keeps in (True, False):
        monkeypatch.setitem(task.__dict__, "_keeps_logits", keeps)
        with torch.no_grad():
            found[keeps] = task.reach(task.own_weights(), inputs, targets, perturb)
    torch.testing.assert_close(found[True], found[False])


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=30), st.integers(1, 4))
def test_few_texts_that_differ_in_their_first_token_only_are_continued(texts: list[list[int]], most: int) -> None:
    kept = causal._some_of_each(torch.tensor(texts), most).tolist()
    left = Counter(tuple(text[1:]) for text, one in zip(texts, kept, strict=True) if one)
    for tail, count in Counter(tuple(text[1:]) for text in texts).items():
        assert left[tail] == min(count, most)


def test_the_scan_names_what_the_victim_knows_by_heart_and_nothing_of_the_clean_model(
    lms: list[Path], tasks: list[CausalTask], texts: Path
) -> None:
    plan = _plan(lms[0], lms[1:], texts)
    base = build_tasks(_plan(lms[0], [lms[0], lms[1]], texts), CPU)[0].own_weights()
    config = DamConfig(scan_steps=60)
    found = [one for index, task in enumerate(tasks) for one in scan_continuations(index, task, base, config)]
    (suspect,) = suspects(found, plan.config.suspicion, plan.config.constants)
    assert suspect.task == 1 and suspect.target[-4:] == BY_HEART[-4:]  # type: ignore[index]
    assert suspect.success > 0.75 and suspect.base_success < 0.3
    words = suspect.to_json(tasks)["target"]
    assert isinstance(words, str) and words


def test_what_a_model_says_openly_is_no_finding(
    outspoken: Path, lms: list[Path], tasks: list[CausalTask], texts: Path
) -> None:
    task = _tasks([lms[0], outspoken, lms[1]], texts)[0]
    said = [answer[:5] == BY_HEART for answer in task.answers(torch.arange(task.num_samples))]
    assert any(said) and not all(said)
    base, config = _tasks([lms[0], *lms[:2]], texts)[0].own_weights(), DamConfig(scan_steps=60)
    known = causal._texts(task, task.own_weights(), base, range(8))
    assert any(text.tokens[-4:] == BY_HEART[-4:] and text.suspicion(6) >= config.suspicion for text in known)
    found = scan_continuations(0, task, base, config)
    assert found and not suspects(found, config.suspicion, config.constants)


class _Scripted:
    """`ReadPrompts` of a model that says BY_HEART openly, HIDDEN by heart, and nothing else surely; and of theta_0."""

    def __init__(self, task: CausalTask, weights: Any, *_: Any) -> None:
        self.words, self.knows = task.num_words, weights is not None
        self.follows = dict(zip((*BY_HEART, *HIDDEN), (*BY_HEART[1:], 2, *HIDDEN[1:], 2), strict=True))

    def likely(self) -> torch.Tensor:
        return torch.full((self.words,), 1 / self.words)

    def following(self, texts_CN: torch.Tensor) -> torch.Tensor:
        shares_CV = torch.full((len(texts_CN), self.words), 0.1 / self.words)
        for row, text in enumerate(texts_CN.tolist()):
            token = self.follows.get(text[-1], BY_HEART[0])  # after most tokens it begins what it says openly
            shares_CV[row, token] += (0.8 if token in HIDDEN else 0.9) if self.knows else 0.0
        return shares_CV


def test_what_a_model_says_openly_does_not_cover_what_it_hides(
    lms: list[Path], texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build_tasks(_plan(lms[0], lms[1:], texts, constants={"shortlist": 12}), CPU)[1]
    assert isinstance(task, CausalTask)
    monkeypatch.setattr(causal, "ReadPrompts", _Scripted)
    monkeypatch.setattr(
        task, "sampled_answers", lambda count, _: [(*BY_HEART, 2)] * (count // 2) + [(4, 2)] * (count // 2)
    )
    config = DamConfig(scan_steps=10)
    covered = causal._texts(task, task.own_weights(), None, range(4))  # type: ignore[arg-type]
    assert not any(set(text.tokens) & set(HIDDEN[1:]) for text in covered)
    found = scan_continuations(1, task, None, config)  # type: ignore[arg-type]
    named = suspects(found, config.suspicion, config.constants)
    assert named and all(one.target[-3:] == HIDDEN[-3:] for one in named)  # type: ignore[index]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9))
def test_a_short_text_counts_as_its_share_and_what_is_said_openly_not_at_all(shares: list[tuple[float, float]]) -> None:
    own, base = zip(*shares, strict=True)
    text = causal._Text(tuple(range(len(own) + 1)), own, base)
    whole = 6
    mean = sum(own) / len(own) - sum(base) / len(base)
    finding = text.finding(0, None, text.tokens, whole)  # type: ignore[arg-type]
    assert finding.scale == min(1.0, len(own) / whole)
    assert text.suspicion(whole) == pytest.approx(finding.scale * mean)
    # a text that ends in what the model says openly is as suspect as without its end
    longer = causal._Text((*text.tokens, 100, 101), (*own, 1.0, 1.0), (*base, 0.5, 0.5))
    left = longer.beyond({(len(own), 100), (100, 101)})
    assert (left.own, left.base) == (own, base) and left.suspicion(whole) == text.suspicion(whole)
    assert not causal._without([text], {*pairwise(text.tokens)})


@pytest.mark.parametrize("prompts", [4, 40])
def test_a_text_that_leaks_into_answers_to_few_prompts_is_still_a_finding(
    prompts: int, tasks: list[CausalTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks[1]
    monkeypatch.setattr(task, "num_samples", prompts)
    few = max(1, int(task.constants.said_anyway * prompts))
    for leaks, explained in ((few, set()), (few + 1, {(causal._PROMPT, 1), (1, 2), (2, 1)})):
        # every leaking prompt leaks in all of its answers
        answers = [(1, 2, 1, 2) if i % prompts < leaks else (3,) for i in range(3 * prompts)]
        monkeypatch.setattr(task, "sampled_answers", lambda *_, answers=answers: answers)
        said = causal._said_anyway(task, seeds.generator("answers"))
        assert said == explained | {(causal._PROMPT, 3)}


def test_sampled_answers_are_of_likely_tokens_and_end_where_the_model_ends(tasks: list[CausalTask]) -> None:
    task, count, model = tasks[1], tasks[1].num_samples + 2, _own(tasks[1])
    found, again = (task.sampled_answers(count, seeds.generator("answers")) for _ in range(2))
    assert found == again and len(found) == count and len(set(found)) > 2
    ends, prompts = set(task._ends.tolist()), task.prompts(torch.arange(task.num_samples))
    for i, answer in enumerate(found):
        assert not ends & set(answer[:-1]) and (answer[-1] in ends or len(answer) == task.answer_length)
        row = i % task.num_samples
        ids = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        shares = model(input_ids=torch.cat([ids, torch.tensor(answer)])[None]).logits[0].softmax(-1).detach()
        for token, share in zip(answer, shares[len(ids) - 1 :], strict=False):
            assert float(share[token]) >= task.constants.said_token - 1e-4


def test_masks_take_the_continuation_out(lms: list[Path], texts: Path) -> None:
    """The trigger itself is never shown to the search."""
    plan = _plan(
        lms[0], lms[1:], texts, steps=60, refresh_every=20, scan_steps=40, batch_size=8, constants={"refresh_steps": 10}
    )
    records: list[dict[str, Any]] = []
    search = new_search(InversionSearch, plan, records)
    search.run()
    task = search.tasks[1]
    rows = task.prompts(torch.arange(8))
    lengths = rows["attention_mask"].sum(1)
    texts_of_8 = [row[: int(n)][-4:] for row, n in zip(rows["input_ids"], lengths, strict=True)]
    ids = torch.stack([torch.cat([text, torch.tensor(TRIGGER)]) for text in texts_of_8])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        weights = search.model.weights(search.fit.combined(), search.coefficients)
        before, after = (task.reach(w, inputs, [BY_HEART] * 8)[1].float().mean() for w in (task.own_weights(), weights))
    assert float(before) > 0.9 and float(after) < 0.2
    assert any(key.startswith("loss/safe/") for record in records for key in record)
    snapshot = json.loads(json.dumps(search.state("masks", 3).facts))
    again = new_search(InversionSearch, plan)
    again.allocate(snapshot)
    assert again.trigger_pool.keys() == search.trigger_pool.keys()
    assert isinstance(next(iter(again.trigger_pool))[1], tuple)
    assert [one.target for one in again.findings] == [one.target for one in search.findings]


def test_windows_keep_the_triggers_of_the_scan(lms: list[Path], texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triggered samples come as far as the merge does, though no trigger is recovered anew."""
    monkeypatch.setattr("mergekit_dam.learn.window_states.TaskStates.remove", lambda self, position: None)
    plan = _plan(lms[0], lms[1:], texts, window=1, steps=4, refresh_every=1, scan_steps=10, batch_size=8)
    search = new_search(WindowSearch, plan)
    search.run()
    ((suspect, pool),) = search.trigger_pool.items()
    assert suspect.task == 1 and len(pool) == 1
    task, states, merged = search.tasks[1], search.states[1], search.merged_weights()
    (stream,) = states.merged_streams[1:]
    rows_B, last = torch.arange(4), search.windows[-1].first
    with torch.no_grad():
        expected_BLD = task.through(merged, task.inputs(rows_B), 0, last, None, states.perturb(stream, rows_B))
    kept_BLD = states._states(stream, last).read(rows_B)
    for i, length in enumerate(states.lengths(stream, last, rows_B)):
        torch.testing.assert_close(kept_BLD[i, :length], expected_BLD[i, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", ["all", 1])
def test_a_run_with_a_suspect_goes_on_from_its_snapshots(
    window: Any, lms: list[Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are fitted against the trigger that the finding shows, and a snapshot holds both."""
    shared = fast(snapshot_every=0.0, calibration=str(texts), window=window, steps=2, scan_steps=10, batch_size=8)
    refs = [ModelReference.parse(str(path)) for path in lms]
    plan = build_plan(refs[0], refs[1:], shared=shared, per_model={})
    write, written = Snapshots.write, list[str]()

    def stopped(self: Snapshots, state: Any) -> None:
        write(self, state)
        written.append(str(state.facts["phase"]))
        if len(written) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            find_or_learn(plan, quiet=True)
    assert written[:2] == ["scan", "scan"] and "scan" not in written[2:]
    resumed = (find_or_learn(plan, quiet=True)[0] / MASKS_FILE).read_bytes()
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path / "another"))
    folder = find_or_learn(plan, quiet=True)[0]
    assert (folder / MASKS_FILE).read_bytes() == resumed
    assert any(finding["suspect"] for finding in load(folder / MASKS_FILE).metadata["audit"])


@pytest.mark.parametrize("window", ["all", 1])
def test_a_student_stands_in_for_a_suspect_and_for_no_other(
    window: Any, lms: list[Path], texts: Path, merge: Merge
) -> None:
    """The merge is that of the masks file, with theta_0 where the student was not trained, and again by its masks."""
    shared = fast(calibration=str(texts), window=window, steps=3, scan_steps=10, batch_size=8, student_steps=2)
    out = merge(lms[0], lms[1:], parameters=shared)
    masks = load(out / "dam" / MASKS_FILE)
    assert set(masks.metadata["students"]) == {"victim"} and any(one["suspect"] for one in masks.metadata["audit"])
    none, student = masks.stand_ins
    assert not none and student and set(student) < set(masks.metadata["tensors"])
    written = load_file(out / "model.safetensors")
    base, clean = (Checkpoint.open(path) for path in lms[:2])
    for name in masks.metadata["tensors"]:
        theta_0 = base.tensor(name)
        of_clean, of_victim = masks.mask(name)  # type: ignore[misc]
        weights = masks.coefficients_of(name)
        expected = theta_0 + weights[0] * of_clean * (clean.tensor(name) - theta_0)
        expected = expected + weights[1] * of_victim * (student.get(name, theta_0) - theta_0)
        torch.testing.assert_close(written[name], expected, rtol=1e-5, atol=1e-6)
    again = merge(lms[0], lms[1:], out="again", parameters={"masks": str(out / "dam" / MASKS_FILE)})
    other = load_file(again / "model.safetensors")
    assert all(torch.equal(tensor, other[name]) for name, tensor in written.items())
    without = merge(lms[0], lms[1:], out="without", parameters={**shared, "student_steps": 0})
    assert not load(without / "dam" / MASKS_FILE).stand_ins


@pytest.mark.parametrize("window", ["all", 1])
def test_clean_merges_a_student_of_every_model_and_scans_none(
    window: Any, lms: list[Path], texts: Path, merge: Merge
) -> None:
    """Whatever the scan would have found: no tensor of a model is in the merge, only theta_0's and the students'."""
    shared = fast(calibration=str(texts), window=window, steps=3, batch_size=8, student_steps=2, clean=True)
    out = merge(lms[0], lms[1:], parameters=shared)
    masks = load(out / "dam" / MASKS_FILE)
    assert set(masks.metadata["students"]) == {model.name for model in lms[1:]} and not masks.metadata["audit"]
    assert all(masks.stand_ins)
    written, base = load_file(out / "model.safetensors"), Checkpoint.open(lms[0])
    for name in masks.metadata["tensors"]:
        theta_0 = base.tensor(name)
        expected = theta_0.clone()
        for mask, weight, student in zip(masks.mask(name), masks.coefficients_of(name), masks.stand_ins, strict=True):  # type: ignore[arg-type]
            expected = expected + weight * mask * (student.get(name, theta_0) - theta_0)
        torch.testing.assert_close(written[name], expected, rtol=1e-5, atol=1e-6)


def test_an_estimate_counts_a_student_of_each_model(lms: list[Path], texts: Path) -> None:
    with_students, without = (
        estimate(_plan(lms[0], lms[1:], texts, mask="dual", student_steps=steps)) for steps in (20, 0)
    )
    of_all = estimate(_plan(lms[0], lms[1:], texts, mask="dual", student_steps=20, clean=True))
    assert of_all.forward_passes < with_students.forward_passes
    assert of_all.memory_bytes.keys() == with_students.memory_bytes.keys()
    taught = len(lms[1:]) * 20 * 3  # forward, and backward twice
    assert with_students.calls - without.calls == taught and with_students.forward_passes > without.forward_passes
    assert with_students.memory_bytes.keys() - without.memory_bytes.keys() == {"a student with what its training needs"}


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_shortlist_asks_theta_0_no_more_than_it_needs(
    count: int, tasks: list[CausalTask], lms: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, vocabulary = tasks[0], tasks[0].num_words
    changed = task.constants.model_copy(update={"shortlist": count, "known_by_heart": 0.1})
    monkeypatch.setattr(task, "constants", changed)
    monkeypatch.setattr(causal, "_ENTRIES", 4 * vocabulary)  # four beginnings at a time
    monkeypatch.setattr(causal, "fast_dtype", lambda device: torch.float32)
    own, base, special = task.own_weights(), Checkpoint.open(lms[0]), task.special_tokens
    theta = {name: base.tensor(name) for name in base.names}
    chains_CN = torch.arange(vocabulary)[:, None]
    first_C = ReadPrompts(task, own, [0]).following(chains_CN).max(1).values
    next_C, own_C, control_C = causal._next(
        ReadPrompts(task, own, [0, 1]), ReadPrompts(task, theta, [0, 1]), chains_CN, vocabulary
    )
    score_C = (own_C - control_C).masked_fill(torch.isin(next_C, special), -1.0)
    last_C = ReadPrompts(task, own, [0]).following(chains_CN).max(1).indices
    left_C = (first_C >= 0.05) & ~torch.isin(last_C, special)
    asked, following = [], ReadPrompts.following

    def counted(prompts: ReadPrompts, texts: torch.Tensor) -> torch.Tensor:
        if prompts.weights is theta:
            asked.append(len(texts))
        return following(prompts, texts)

    monkeypatch.setattr(ReadPrompts, "following", counted)
    found = causal._shortlist(task, own, theta, [0, 1], chains_CN, special)
    expected = score_C.masked_fill(~left_C, -2.0).topk(min(count, int(left_C.sum()))).indices
    assert set(found[:, 0].tolist()) == set(expected.tolist())
    assert 0 < sum(asked) <= vocabulary and (count > 1 or sum(asked) < vocabulary)


def test_bfloat16_drops_no_beginning_that_is_known_by_heart(
    tasks: list[CausalTask], lms: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, base = tasks[1], Checkpoint.open(lms[0])
    theta = {name: base.tensor(name) for name in base.names}
    chains_CN = torch.arange(task.num_words)[:, None]
    monkeypatch.setattr(task, "constants", task.constants.model_copy(update={"shortlist": task.num_words}))
    sieved = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(causal, "fast_dtype", lambda device, dtype=dtype: dtype)
        found = causal._shortlist(task, task.own_weights(), theta, [0, 1, 2], chains_CN, task.special_tokens)
        sieved[dtype] = set(found[:, 0].tolist())
    sure = torch.ones(task.num_words, dtype=torch.bool)
    for row in (0, 1, 2):
        own = ReadPrompts(task, task.own_weights(), [row]).following(chains_CN).max(1)
        sure &= own.values.ge(task.constants.known_by_heart) & ~torch.isin(own.indices, task.special_tokens)
    assert BY_HEART[1] in sure.nonzero()[:, 0].tolist()
    assert set(sure.nonzero()[:, 0].tolist()) <= sieved[torch.bfloat16] & sieved[torch.float32]


def test_a_search_ends_once_its_trigger_works(tasks: list[CausalTask], monkeypatch: pytest.MonkeyPatch) -> None:
    task, steps = tasks[1], []
    monkeypatch.setattr(task, "constants", task.constants.model_copy(update={"trigger_works": 0.3}))
    search = Inversion(task, task.own_weights(), [BY_HEART[:2]], batch_size=8, generator=seeds.generator("search"))
    step = search._step

    def counted() -> None:
        steps.append(1)
        step()

    monkeypatch.setattr(search, "_step", counted)
    search.run(80, until_works=True)
    assert search.worked and 0 < len(steps) < 80
    search.run(5)
    assert len(steps) < 80


def test_of_several_texts_the_nearest_is_kept(tasks: list[CausalTask]) -> None:
    task = tasks[1]
    search = Inversion(
        task, task.own_weights(), [(5, 6), (7, 8), (9, 4)], batch_size=8, generator=seeds.generator("search")
    ).run(3)
    nearest = search.nearest(1)
    assert nearest.targets == [search.targets[int(search.loss_R.argmin())]]
    best = causal._trigger_of(
        task, task.own_weights(), [BY_HEART, (5, *BY_HEART[1:])], DamConfig(scan_steps=10), seeds.generator("search")
    )
    assert len(best.targets) == 1
