"""The learning loop, and the defects of the public code that it must not have."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.config import DamConfig, ModelSettings
from mergekit_dam.constants import Constants
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.learn.losses import entropy
from mergekit_dam.learn.paper_search import PaperSearch
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.merging.mask_bytes import to_probabilities
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED
from mergekit_dam.models.plan import Plan, build_plan
from tests.conftest import FAST, fast
from tests.helpers.searching import new_search

CPU = torch.device("cpu")


@pytest.fixture
def plan(vit: Path, images: Path) -> Any:
    def make(**settings: Any) -> Plan:
        refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
        return build_plan(
            refs[0],
            refs[1:],
            shared=fast(objective="paper", calibration=str(images), **settings),
            per_model={},
        )

    return make


_search = partial(new_search, PaperSearch)


def test_two_masks_take_turns(plan: Any) -> None:
    records: list[dict[str, Any]] = []
    search = _search(plan(steps=1), records)
    before = {n: {k: v.clone() for k, v in m.logits.items()} for n, m in search.masks.items()}
    search.step(0)
    moved = {n: any(not torch.equal(m.logits[k], before[n][k]) for k in m.logits) for n, m in search.masks.items()}
    assert moved == {TASK_SHARED: True, BACKDOOR_DETECTION: False}
    search.step(1)
    assert [r["turn"] for r in records] == [TASK_SHARED, BACKDOOR_DETECTION]
    assert any(k.startswith("loss/safe/") for k in records[1]) and not any(
        k.startswith("loss/safe/") for k in records[0]
    )


def test_the_logged_loss_is_the_sum_over_tasks(plan: Any) -> None:
    records: list[dict[str, Any]] = []
    search = _search(plan(), records)
    search.step(1)
    parts = [v for k, v in records[0].items() if k.startswith(("loss/perf/", "loss/safe/"))]
    assert len(parts) == 4
    assert records[0]["loss"] == pytest.approx(sum(parts))


def test_mask_gradients_through_the_model_are_autograds(plan: Any) -> None:
    search = _search(plan())
    model, task = search.model, search.tasks[0]
    masks = {k: torch.full(s, 0.7) for k, s in model.mask_shapes.items()}
    inputs = task.inputs(torch.arange(4))
    weights = model.weights(masks, search.start)
    entropy(task.logits(weights, inputs)).backward()
    found_coefficients = model.coefficient_gradients(weights, masks, search.start)
    on_the_way = torch.zeros_like(found_coefficients)
    found = dict(model.mask_gradients(weights, masks, search.start, on_the_way))
    torch.testing.assert_close(on_the_way, found_coefficients)
    assert all(weight.grad is None for weight in weights.values())

    vectors = TaskVectors(search_plan := plan())
    leaves = {k: m.clone().requires_grad_(True) for k, m in masks.items()}
    coefficients = search.start.clone().requires_grad_(True)
    graph = model.frozen.base_weights()
    for i, name in enumerate(model.mask_names):
        base = vectors.base(name)
        taus = [m - base for m in vectors.models(name) if m is not None]
        graph[name] = base + leaves[name] * sum(c * tau for c, tau in zip(coefficients[:, i], taus, strict=True))
    entropy(task.logits(graph, inputs)).backward()
    assert len(search_plan.models) == coefficients.shape[0]
    assert coefficients.grad is not None
    torch.testing.assert_close(found_coefficients, coefficients.grad, rtol=1e-4, atol=1e-6)
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            torch.testing.assert_close(found[name], leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", ["dual", "m1", "m2"])
@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("coefficients", ["task", "layer"])
def test_every_ablation_learns(mask: str, granularity: str, coefficients: str, plan: Any) -> None:
    folder, masks = find_or_learn(plan(mask=mask, granularity=granularity, coefficients=coefficients), quiet=True)
    used = {name for name, values in masks.probabilities.items() if values}
    assert used == {"dual": {TASK_SHARED, BACKDOOR_DETECTION}, "m1": {TASK_SHARED}, "m2": {BACKDOOR_DETECTION}}[mask]
    assert masks.coefficients.shape == (2, 1 if coefficients == "task" else len(masks.metadata["tensors"]))
    shapes = {tuple(v.shape) for values in masks.probabilities.values() for v in values.values()}
    if granularity == "row":
        assert all(torch.Size(s[1:]).numel() == 1 for s in shapes)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["masks"] * 3 + ["coefficients"] * 2


def test_the_saved_mask_is_the_probability_not_a_sample(plan: Any) -> None:
    search = _search(plan(steps=0, coefficient_steps=0))
    probabilities, coefficients = search.run()
    for values in probabilities[TASK_SHARED].values():
        assert bool((to_probabilities(values) == 0.5).all())
    assert torch.equal(coefficients, search.start)


def test_calibration_samples_are_recorded_to_keep_evaluation_apart(plan: Any) -> None:
    _, masks = find_or_learn(plan(), quiet=True)
    for model in masks.metadata["models"]:
        assert len(model["samples"]) == FAST["num_samples"] == len(set(model["samples"]))


CHANGED = {
    "setting": ({"steps": 4}, "setting steps: expected 3, got 4"),
    "mask": ({"mask": "m1"}, "setting mask: expected dual, got m1"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_ready_masks_with_another_setting_are_refused(case: str, plan: Any) -> None:
    folder, _ = find_or_learn(plan(), quiet=True)
    settings, message = CHANGED[case]
    with pytest.raises(ValueError, match=message):
        find_or_learn(plan(masks=str(folder / MASKS_FILE), **settings), quiet=True)


def test_ready_masks_of_other_models_are_refused(plan: Any, vit: Path) -> None:
    folder, _ = find_or_learn(plan(), quiet=True)
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "b", "a")]
    swapped = build_plan(refs[0], refs[1:], shared={"masks": str(folder / MASKS_FILE)}, per_model={})
    with pytest.raises(ValueError, match="with the recorded content"):
        find_or_learn(swapped, quiet=True)


@pytest.mark.parametrize("damage", ["cut", "garbage", "no metadata"])
def test_damaged_masks_are_refused(damage: str, plan: Any, tmp_path: Path) -> None:
    folder, _ = find_or_learn(plan(), quiet=True)
    data = (folder / MASKS_FILE).read_bytes()
    bad = {"cut": data[: len(data) // 2], "garbage": b"\xff" * 100, "no metadata": b"\x02" + b"\0" * 7 + b"{}"}[damage]
    (tmp_path / MASKS_FILE).write_bytes(bad)
    with pytest.raises(ValueError, match="complete dam_masks"):
        load(tmp_path / MASKS_FILE)


def test_every_setting_is_read_somewhere() -> None:
    package = Path(__file__).parents[2] / "mergekit_dam"
    source = "\n".join(p.read_text() for p in package.rglob("*.py") if p.name not in ("config.py", "constants.py"))
    for name in (*DamConfig.model_fields, *ModelSettings.model_fields):
        assert f"config.{name}" in source or f"settings.{name}" in source or f'["{name}"]' in source, name
    for name in Constants.model_fields:
        assert f"constants.{name}" in source, name


def test_every_setting_has_a_description_and_a_unit() -> None:
    for settings in (DamConfig, ModelSettings, Constants):
        for name, info in settings.model_fields.items():
            assert info.description, name
            assert isinstance(info.json_schema_extra, dict) and info.json_schema_extra["unit"], name
