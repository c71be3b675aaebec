"""`objective: inversion`: triggers as parameters, the blind scan on a real victim, and what the masks do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from dam_bench.suites.generated import GENERATED
from dam_bench.victims.poisoning import Backdoor
from dam_bench.victims.training import Schedule, fine_tune, pretrain, probe_head
from hypothesis import given
from hypothesis import strategies as st
from mergekit.common import ModelReference
from torch import Tensor

from examples.demo import build as demo
from mergekit_dam.artifact.masks_file import load
from mergekit_dam.config import PAPER, DamConfig
from mergekit_dam.constants import Constants
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.evaluation.attacks import PatchTrigger
from mergekit_dam.evaluation.metrics import LabelledData, attack_success_rate
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.learn.teacher import TeacherLogits
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.scan import classifiers as scanning
from mergekit_dam.scan.findings import Finding, suspects
from mergekit_dam.scan.scanner import scan
from mergekit_dam.scan.triggers import PatchTriggers, StyleTriggers
from mergekit_dam.tasks import build_tasks
from mergekit_dam.tasks.bounds import Bounds
from tests.conftest import FAST, fast
from tests.helpers.built_once import built_once
from tests.helpers.searching import new_search

CPU = torch.device("cpu")
BOX = Bounds.of(0.0, 1.0)
CONSTANTS = Constants()
SCALE = CONSTANTS.cross_task_scale


def _finding(task: int, target: int, success: float, control: float) -> Finding:
    return Finding(task, target, PatchTriggers([], BOX, CONSTANTS), 9.0, 9.0, success, control)


def test_a_trigger_that_theta_0_shares_is_no_suspect() -> None:
    found = [_finding(0, 0, 1.0, 0.95), _finding(0, 1, 0.95, 0.2), _finding(0, 2, 0.9, 0.45), _finding(1, 0, 0.9, 0.6)]
    assert [(f.task, f.target) for f in suspects(found, 0.4, CONSTANTS)] == [(0, 1)]
    assert suspects(found, 0.8, CONSTANTS) == []


def test_what_a_model_brings_to_another_task_counts_once_and_beside_its_own_trigger() -> None:
    facts = ((1, 4, 4.0, 0), (2, 5, 3.0, 0), (2, 6, 4.0, 0), (0, 1, 3.0, 2), (0, 2, 9.0, 1))
    brought = [
        replace(_finding(task, target, 0.9, 0.2), size=size, median_size=10.0, source_model=model, scale=SCALE)
        for task, target, size, model in facts
    ]
    assert [(f.task, f.target, f.model) for f in suspects(brought, 0.4, CONSTANTS)] == [(1, 4, 0), (2, 5, 0), (0, 1, 2)]
    own = _finding(2, 3, 1.0, 0.0)
    assert [f.model for f in suspects([own, *brought], 0.4, CONSTANTS)] == [2, 0, 0, 2], (
        "its own trigger may be a decoy"
    )
    assert suspects(brought, 0.75, CONSTANTS) == []


@pytest.mark.parametrize(("size", "gap", "kinds"), [(6.0, 0.4, 2), (4.0, 0.4, 1), (6.0, 0.2, 1), (1.0, 0.98, 2)])
def test_a_style_counts_beside_a_stamp_that_may_stand_for_it(size: float, gap: float, kinds: int) -> None:
    stamp = replace(_finding(0, 1, 0.9, 0.2), size=size, median_size=10.0)
    style = replace(_finding(0, 1, gap, 0.0), trigger=StyleTriggers([], BOX, CONSTANTS), size=60.0)
    others = [replace(style, target=2), replace(style, task=1), replace(style, source_model=1, scale=SCALE)]
    others = [replace(other, success=0.4) for other in others]
    assert suspects([stamp, style, *others], 0.4, CONSTANTS) == [stamp, style][:kinds]
    assert suspects(others, 0.4, CONSTANTS) == [], "by themselves they do not come up to the threshold"


@given(size=st.floats(0.1, 300.0), success=st.floats(0, 1), control=st.floats(0, 1))
def test_size_helps_no_finding_of_others_more_than_success_and_no_style(
    size: float, success: float, control: float
) -> None:
    plain = replace(_finding(0, 0, success, control), size=size, median_size=50.0)
    gap = success - control
    assert plain.suspicion >= gap - 1e-9
    assert replace(plain, source_model=1, scale=SCALE).suspicion <= max(gap, 2 * gap) + 1e-9
    assert abs(replace(plain, trigger=StyleTriggers([], BOX, CONSTANTS)).suspicion) <= abs(gap) + 1e-9


def test_the_papers_defaults_apply_where_nothing_is_given() -> None:
    paper = DamConfig(objective="paper", alpha=0.3)
    assert paper.alpha == 0.3 and paper.batch_size == PAPER["batch_size"] and paper.constants.rescale
    assert paper.model_fields_set == {"objective", "alpha"}
    assert paper.given == {"objective", "alpha"} and paper.constants.coefficient_learning_rate == 1e-3
    own = DamConfig(objective="paper", constants={"rescale": False})
    assert not own.constants.rescale and own.constants.coefficient_learning_rate == 1e-3
    assert not DamConfig().constants.rescale and DamConfig().objective == "inversion"


@pytest.fixture
def plan(vit: Path, images: Path) -> Any:
    def make(**settings: Any) -> Plan:
        refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
        return build_plan(refs[0], refs[1:], shared=fast(calibration=str(images), **settings), per_model={})

    return make


_search = partial(new_search, InversionSearch)


def test_the_start_is_task_arithmetic_with_the_given_coefficient(plan: Any) -> None:
    search = _search(plan(weight=0.4))
    for name, product in search.fit.combined().items():
        mask = product.full()
        column = search.model.mask_names.index(name)
        assert torch.allclose(mask * search.coefficients[0, column], torch.full_like(mask, 0.4), atol=1e-4)


def test_masks_and_coefficients_fit_the_models_own_answers(plan: Any) -> None:
    records: list[dict[str, Any]] = []
    made = plan(mask="dual", steps=30, suspicion=1.0, scan_steps=2)
    search = _search(made, records)
    probabilities, coefficients = search.run()
    losses = [r["loss"] for r in records if r["phase"] == "masks"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert set(probabilities) == {TASK_SHARED, BACKDOOR_DETECTION}
    assert float(coefficients.min()) >= 0 and float(coefficients.max()) <= made.config.constants.max_coefficient


@pytest.mark.parametrize(
    ("settings", "suspicious", "per_model"),
    [
        ({"detection": "auto"}, True, True),
        ({"detection": "auto"}, False, False),
        ({"detection": "shared"}, True, False),
        ({"detection": "model"}, False, True),
        ({"detection": "auto", "mask": "m2"}, True, True),
        ({"detection": "model", "rescale": True}, True, False),
        ({"detection": "model", "objective": "paper"}, False, False),
    ],
)
def test_each_model_has_a_detection_mask_where_it_needs_one(
    settings: dict[str, Any],
    suspicious: bool,
    per_model: bool,
    plan: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path))
    if not suspicious:
        monkeypatch.setattr("mergekit_dam.learn.scanned_search.suspects", lambda *_: [])
    _, masks = find_or_learn(plan(suspicion=0.0, **settings), quiet=True)
    assert any(found["suspect"] for found in masks.metadata["audit"]) == suspicious
    assert masks.metadata["own_masks"] == ([BACKDOOR_DETECTION] if per_model else [])
    for name in masks.metadata["tensors"]:
        parts = masks.parts_of(name)
        assert len(parts[BACKDOOR_DETECTION]) == (2 if per_model else 1) and len(parts.get(TASK_SHARED, [0])) == 1


def test_a_models_answers_are_made_once_and_are_those_of_any_batch(plan: Any) -> None:
    task = build_tasks(plan(), CPU)[0]
    answers, logits = TeacherLogits(task, task.own_weights()), type(task).logits
    with patch.object(type(task), "logits", autospec=True, side_effect=logits) as passes:
        for rows_B in (torch.tensor([3, 0, 3]), torch.arange(task.num_samples)):
            inputs = task.inputs(rows_B)
            expected = logits(task, answers.weights, inputs)
            assert torch.allclose(answers(rows_B, inputs), expected, atol=1e-5)
    assert passes.call_count == 1


def test_without_m2_nothing_is_scanned(plan: Any) -> None:
    search = _search(plan(mask="m1"))
    search.run()
    assert search.audit() == [] and set(search.masks) == {TASK_SHARED}


@pytest.mark.parametrize(
    ("family", "data", "names", "said"),
    [("bert", "texts", ("m1", "m2"), ["m1", "m2"]), ("vit", "images", ("a", "b"), [])],
)
def test_who_merges_text_encoders_is_told_that_they_are_not_defended(
    family: str,
    data: str,
    names: tuple[str, str],
    said: list[str],
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, calibration = (request.getfixturevalue(name) for name in (family, data))
    base, *models = (ModelReference.parse(str(root / name)) for name in ("base", *names))
    shared = {**FAST, "objective": "inversion", "calibration": str(calibration), "scan_steps": 2}
    new_search(InversionSearch, build_plan(base, models, shared=shared, per_model={})).scan()
    told = [record.getMessage() for record in caplog.records if "text encoder" in record.getMessage()]
    assert [name for m in told for name in m.removeprefix("dam: ").partition(": ")[0].split(", ")] == said


TRIGGER = PatchTrigger(4)


def sampled(name: str, rows: slice) -> tuple[Tensor, LabelledData]:
    """Images of a task, plain and as the model takes them."""
    images, labels = GENERATED[name].sample(700, demo.EDGE, seed=0)
    return images[rows], LabelledData.of_images(name, images[rows], labels[rows], demo.PREPROCESSING)


def train(folder: Path) -> None:
    """theta_0, a backdoored model of shapes and a clean one of stripes, trained for real."""
    data = {name: sampled(name, slice(0, 400))[1] for name in ("shapes", "stripes")}
    for name in data:
        demo.save_calibration(sampled(name, slice(400, 500))[0], folder / f"{name}.parquet")
    torch.manual_seed(0)
    models = {name: demo.new_model(8) for name in data}
    body = models["shapes"].vit
    models["stripes"].vit = body
    pretrain(body, models, data, Schedule(60, batch_size=32), seed=0)
    demo.save(body, folder / "base")
    for name, samples in data.items():
        model = demo.new_model(8)
        model.vit.load_state_dict(body.state_dict(), strict=False)
        probe_head(model, samples, decay=1e-2)
        backdoor = Backdoor(TRIGGER, 3, rate=1.0, interpolation=(0.3, 1.0)) if name == "shapes" else None
        fine_tune(model, samples, Schedule(80, batch_size=32, learning_rate=5e-4), seed=0, backdoor=backdoor)
        demo.save(model, folder / name)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(tmp_path_factory, "victim", train)


def test_a_real_backdoor_is_found_blindly_and_falls_in_the_merge(
    victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (_, evaluation) = victim, sampled("shapes", slice(500, 700))
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path))
    refs: Sequence[ModelReference] = [ModelReference.parse(str(folder / n)) for n in ("base", "shapes", "stripes")]
    own: dict[ModelReference, dict[str, Any]] = {
        ref: {"calibration": str(folder / f"{n}.parquet")}
        for ref, n in zip(refs[1:], ("shapes", "stripes"), strict=True)
    }
    rates = {}
    for name, shared in (("undefended", {"mask": "m1"}), ("defended", {"constants": {"scan_others": False}})):
        plan = build_plan(refs[0], refs[1:], shared={"steps": 40, **shared}, per_model=own)
        artefact, masks = find_or_learn(plan, quiet=True)
        model = MergedModel(TaskVectors(plan), survey(TaskVectors(plan)).changed, CPU)
        merged = model.weights(
            {k: m for k in model.mask_names if (m := masks.product(k)) is not None}, masks.coefficients
        )
        task = build_tasks(plan, CPU)[0]
        whole = demo.new_model(8).eval()
        whole.load_state_dict(task.parameters(merged))
        rates[name] = attack_success_rate(whole, evaluation, TRIGGER, 3).percent
    metadata = load(artefact / "dam_masks.safetensors").metadata
    audit, left = metadata["audit"], {(one["task"], one["target"], one["kind"]): one for one in metadata["remaining"]}
    worst = max((found for found in audit if found["task"] == "shapes"), key=lambda found: found["suspicion"])
    assert worst["target"] == 3 and worst["suspect"] and worst["control"] < 0.5, audit
    told = left["shapes", 3, worst["kind"]]
    assert told["after"] < told["before"] and told["before"] > 0.5, "what is reported of the merge, without labels"
    # how far it falls is the benchmark's business: these models are trained for seconds
    assert rates["defended"] < 0.9 * rates["undefended"]


def test_classes_in_several_parts_end_with_as_many_finalists(victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More classes than are inverted at once are thinned out part by part; the backdoor's stays in."""
    monkeypatch.setattr(scanning, "_AT_ONCE", 3)
    refs = [ModelReference.parse(str(victim / n)) for n in ("base", "shapes", "stripes")]
    own: dict[ModelReference, dict[str, Any]] = {
        ref: {"calibration": str(victim / f"{n}.parquet")}
        for ref, n in zip(refs[1:], ("shapes", "stripes"), strict=True)
    }
    plan = build_plan(refs[0], refs[1:], shared={"constants": {"scan_finalists": 2}}, per_model=own)
    task = build_tasks(plan, CPU)[0]
    base = {name: TaskVectors(plan).base(name) for name in task.own_weights()}
    found = [f for f in scan([task], base, plan.config, range(1)) if isinstance(f.trigger, PatchTriggers)]
    assert len(found) == 2 and all(f.median_size == other.size for f, other in zip(found, found[::-1], strict=True))
    assert max(found, key=lambda f: f.suspicion).target == 3
