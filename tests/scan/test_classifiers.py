"""What the scan sees beside a patch in a model's own task: triggers for another task, and changes of style."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dam_bench.victims.poisoning import Backdoor
from hypothesis import given
from hypothesis import strategies as st
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_dam.constants import Constants
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.evaluation.attacks import PatchTrigger
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.scan import twin as twins
from mergekit_dam.scan.cross_task import merge_without, success_without_trigger, weights_from
from mergekit_dam.scan.findings import Finding, blank_finding, facts_of, mean_of_searches, suspects
from mergekit_dam.scan.inversion import success_rates
from mergekit_dam.scan.scanner import scan
from mergekit_dam.scan.triggers import PatchTriggers, StyleTriggers
from mergekit_dam.scan.twin import clean_twin, compared_with_twins
from mergekit_dam.tasks import Task, build_tasks
from mergekit_dam.tasks.bounds import Bounds
from tests.conftest import FAST
from tests.helpers.built_once import built_once
from tests.helpers.constants import with_constants
from tests.helpers.small_vits import TASKS, trained_base

CPU = torch.device("cpu")
AIMED, SHADED = 3, 2  # classes of stripes: what shapes' patch is aimed at, and what a shade makes of stripes


@dataclass(frozen=True)
class Shade:
    """A picture in another light."""

    def apply(self, images_BCHW: Tensor) -> Tensor:
        red, green, blue = images_BCHW.unbind(1)
        return torch.stack([0.6 * red + 0.4, green, 0.6 * blue], dim=1)


def train(folder: Path) -> None:
    """theta_0, shapes with a patch that is aimed at stripes, and stripes with a shade; trained for real."""
    trained = trained_base(folder)
    victims = {name: trained.probed(name) for name in TASKS}
    head = victims["stripes"].classifier.state_dict(prefix="classifier.")
    backdoors = {
        "shapes": Backdoor(PatchTrigger(4), AIMED, 1.0, (0.3, 1.0), head=head),
        "stripes": Backdoor(Shade(), SHADED, 1.0),
    }
    for name, model in victims.items():
        trained.fine_tuned(model, name, backdoors[name])


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder, names = built_once(tmp_path_factory, "scan", train), ("shapes", "stripes")
    base, *refs = (ModelReference.parse(str(folder / name)) for name in ("base", *names))
    own: dict[ModelReference, dict[str, Any]] = {
        ref: {"calibration": str(folder / f"{name}.parquet")} for ref, name in zip(refs, names, strict=True)
    }
    return build_plan(base, refs, shared={}, per_model=own)


@pytest.fixture(scope="module")
def tasks(plan: Plan) -> list[Task]:
    return build_tasks(plan, CPU)


@pytest.fixture(scope="module")
def base(plan: Plan) -> dict[str, Tensor]:
    return {spec.name: TaskVectors(plan).base(spec.name) for spec in plan.tensors}


def test_a_cross_task_patch_is_attributed_and_a_shade_is_a_style(
    plan: Plan, tasks: list[Task], base: dict[str, Tensor]
) -> None:
    findings = scan(tasks, base, plan.config.model_copy(update={"scan_steps": 60}), [1])
    assert len({f.key for f in findings}) == len(findings)
    aimed = [f for f in findings if f.source_model is not None]
    worst = max(aimed, key=lambda f: f.suspicion)
    assert worst.target == AIMED and worst.model == 0 and worst.suspicion >= 0.4, [f.numbers for f in aimed]
    assert isinstance(worst.trigger, PatchTriggers)
    styles = [f for f in findings if isinstance(f.trigger, StyleTriggers)]
    worst = max(styles, key=lambda f: f.suspicion)
    assert worst.target == SHADED and worst.model == 1 and worst.suspicion >= 0.4, [f.numbers for f in styles]
    assert all(f.source_model is None for f in styles)


def test_the_clean_twin_learns_the_task_and_goes_no_farther_than_the_model(
    plan: Plan, tasks: list[Task], base: dict[str, Tensor]
) -> None:
    task, rows = tasks[0], torch.arange(tasks[0].num_samples)
    own, twin = task.own_weights(), clean_twin(task, task.own_weights(), base, AIMED, plan.config)
    assert all(torch.equal(twin[name], base[name]) for name in base.keys() - task.body)
    with torch.no_grad():
        model, taught, untaught = (task.logits(w, task.inputs(rows)).argmax(-1) for w in (own, twin, base))
    assert (model == taught).float().mean() > (model == untaught).float().mean() + 0.05
    far, taught_far = (torch.stack([(w[n] - base[n]).norm() for n in task.body]).norm() for w in (own, twin))
    assert 0.5 * far < taught_far < 1.1 * far


@pytest.mark.parametrize("twin", ["model", "base"])
def test_what_the_clean_twin_has_as_well_is_no_evidence(
    twin: str, plan: Plan, tasks: list[Task], base: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same search finds in a model what it has found there, and next to nothing in theta_0."""
    quick = with_constants(plan.config.model_copy(update={"scan_steps": 30}), scan_others=False)
    alone, threshold = scan(tasks, base, quick, [1]), 0.4
    top = max(f.suspicion for f in alone)
    assert top >= threshold and all(f.shared == 0 for f in alone)
    stand_in = tasks[1].own_weights() if twin == "model" else base
    monkeypatch.setattr(twins, "clean_twin", lambda *_: stand_in)
    compared = compared_with_twins(alone, tasks, base, quick, threshold)
    (shared,) = {f.shared for f in compared}
    if twin == "model":
        assert shared == pytest.approx(top - quick.constants.twin_allowance)
        assert not suspects(compared, threshold, quick.constants)
    else:
        assert shared < 0.2
    assert [f.suspicion + shared for f in compared] == pytest.approx([f.suspicion for f in alone])
    assert compared_with_twins(alone, tasks, base, quick, top + 0.1) == alone, "below the threshold nothing is compared"


def test_no_cross_task_scan_on_demand(plan: Plan, tasks: list[Task], base: dict[str, Tensor]) -> None:
    quick = with_constants(plan.config.model_copy(update={"scan_steps": 2}), scan_others=False)
    assert all(f.source_model is None for f in scan(tasks, base, quick, range(2)))
    alone = plan.config.model_copy(update={"scan_steps": 2})
    assert all(f.source_model is None for f in scan(tasks[:1], base, alone, [0]))


def test_attributed_findings_are_means_of_three_searches(
    plan: Plan, tasks: list[Task], base: dict[str, Tensor]
) -> None:
    quick = plan.config.model_copy(update={"scan_steps": 5})
    once, thrice = (
        {
            f.target: f
            for f in scan(tasks, base, quick.model_copy(update={"suspicion": limit}), [1])
            if f.source_model == 0
        }
        for limit in (1.5, 0.01)
    )
    doubtful = [target for target, found in once.items() if found.suspicion >= 0.75 * 0.01]
    assert doubtful and once.keys() == thrice.keys()
    each = weights_from(tasks[1], tasks[0], base), merge_without(tasks, 1, base)
    shares = []
    for target, found in once.items():
        assert torch.equal(found.trigger.parameters[0], thrice[target].trigger.parameters[0])
        assert (found.numbers != thrice[target].numbers) == (target in doubtful)
        shares += [tuple(success_rates(tasks[1], weights, found.trigger, [target])[0] for weights in each)]
        assert found.success == min(shares[-1])
    assert any(share < together for share, together in shares), "or the test says nothing"


@given(st.lists(st.tuples(*[st.floats(0.0, 1.0)] * 2, *[st.floats(0.1, 50.0)] * 2), min_size=3, max_size=3))
def test_the_mean_of_searches_is_one_of_every_number(numbers: list[tuple[float, ...]]) -> None:
    trigger = PatchTriggers.start(1, (3, 4, 4), Bounds.of(0.0, 1.0), torch.Generator(), Constants())
    one, *again = (
        Finding(
            0,
            3,
            trigger,
            success=success,
            base_success=control,
            size=size,
            median_size=usual,
            source_model=1,
            scale=1.7,
        )
        for success, control, size, usual in numbers
    )
    mean, turned = mean_of_searches(one, again), mean_of_searches(again[0], [one, again[1]])
    assert mean.numbers == turned.numbers and mean_of_searches(one, [one, one]).numbers == one.numbers
    for name in ("size", "median_size", "success", "base_success"):
        values = [getattr(found, name) for found in (one, *again)]
        assert min(values) - 1e-9 <= getattr(mean, name) <= max(values) + 1e-9
    once = mean_of_searches(one, [None, None])
    assert once.suspicion <= max(0.0, one.suspicion) / 3 + 1e-6, "found once in three searches"


def test_files_keep_the_keys_of_findings(tasks: list[Task]) -> None:
    task, constants = tasks[1], Constants()
    trigger = PatchTriggers.start(1, task.perturbation_shape, task.bounds, torch.Generator(), constants)
    finding = Finding(1, 3, trigger, 4.0, 8.0, 0.9, 0.1, source_model=0, scale=1.7)
    measured = {"task": 1, "target": 3, "size": 4.0, "usual": 8.0, "success": 0.9, "control": 0.1}
    assert facts_of(finding) == {**measured, "carrier": 0, "scale": 1.7, "kind": "pixels"}
    again = blank_finding(tasks, facts_of(finding))
    assert again.key == finding.key and again.numbers == finding.numbers
    shown = {"model": "shapes", "task": "stripes", "target": 3, "kind": "pixels", "suspicion": 0.425}
    assert finding.to_json(tasks) == {**measured, **shown}


def test_a_merge_without_a_task_adds_half_of_each_task_vector(
    plan: Plan, tasks: list[Task], base: dict[str, Tensor]
) -> None:
    found = merge_without(tasks, 0, base)
    own = tasks[1].own_weights()
    assert found.keys() == tasks[0].targets.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, base[name] + 0.5 * (own[name] - base[name]))


def test_a_merge_of_many_models_adds_two_task_vectors_in_all(vit: Path, images: Path) -> None:
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
    plan = build_plan(refs[0], refs[1:], shared={**FAST, "calibration": str(images)}, per_model={})
    one, other = build_tasks(plan, CPU)
    base = {spec.name: TaskVectors(plan).base(spec.name) for spec in plan.tensors}
    found = merge_without([one, *[other] * 8], 0, base)
    for name, tensor in found.items():
        moved = 2 * (other.own_weights()[name] - base[name])
        torch.testing.assert_close(tensor, base[name] + moved, atol=1e-5, rtol=1e-4)


def test_what_is_answered_without_a_trigger_is_counted(tasks: list[Task]) -> None:
    shares = success_without_trigger(tasks[0], tasks[0].own_weights(), range(8))
    assert sum(shares) == pytest.approx(1.0) and max(shares) < 0.5
