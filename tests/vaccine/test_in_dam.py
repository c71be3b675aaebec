"""`clean` inside dam: vaccinated models, and vaccinated students, are merged in place of the models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.engine.task_vectors import StandIns, TaskVectors, stand_in_file
from mergekit_dam.errors import DamError
from mergekit_dam.learn import stand_ins as module
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks import build_tasks
from mergekit_dam.vaccine.settings import VaccineSettings
from tests.conftest import FAST, Merge
from tests.helpers.processes import group
from tests.vaccine.conftest import FAMILIES, FEW, plan_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vaccinations of a few steps."""
    _quick(monkeypatch.setattr)


def _quick(set_attribute: Any) -> None:
    set_attribute(module, "VaccineSettings", partial(VaccineSettings, **FEW))


def _merged(masks: Any, base: Checkpoint, models: list[Checkpoint], name: str) -> torch.Tensor:
    """The merge equation, by hand, with what stands in for the models."""
    theta_0, total = base.tensor(name).double(), 0.0
    mask_T = masks.mask(name)
    assert mask_T is not None
    students = "students" in masks.metadata
    for made, model, mask, weight in zip(
        masks.stand_ins, models, mask_T, masks.coefficients_of(name).tolist(), strict=True
    ):
        tensor = made.get(name, theta_0 if students else model.tensor(name)).double()
        total = total + weight * (tensor - theta_0) * mask.double()
    return theta_0 + total


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_merge_is_of_vaccinated_models_and_again_by_its_masks(
    family: str, merge: Merge, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(family)
    data = request.getfixturevalue("images" if family == "vit" else "texts")
    models = [folder / name for name in (("a", "b") if family == "vit" else ("m1", "m2"))]
    shared = {**FAST, "calibration": str(data), "clean": True}
    out = merge(folder / "base", models, parameters=shared)
    masks = load(out / "dam" / MASKS_FILE)
    names = {model.name for model in models}
    assert set(masks.metadata["vaccinated"]) == names and len(masks.stand_ins) == 2
    assert ("students" in masks.metadata) == (family == "bert")
    written, base = load_file(out / "model.safetensors"), Checkpoint.open(folder / "base")
    inputs = [Checkpoint.open(model) for model in models]
    prefix = next((p for p in ("", "vit.", "bert.") if p + masks.metadata["tensors"][0] in inputs[0].names), "")
    for name in masks.metadata["tensors"]:
        own = [_Named(one, prefix) for one in inputs]
        assert torch.allclose(written[name].double(), _merged(masks, base, own, name), atol=1e-6)  # type: ignore[arg-type]
    again = load_file(
        merge(folder / "base", models, out="again", parameters={"masks": str(out / "dam" / MASKS_FILE)})
        / "model.safetensors"
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in written.items())


class _Named:
    """A checkpoint whose names have a prefix."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self._checkpoint, self._prefix = checkpoint, prefix

    def tensor(self, name: str) -> torch.Tensor:
        return self._checkpoint.tensor(self._prefix + name)


def test_models_that_nobody_wants_vaccinated_are_merged_as_they_are(merge: Merge, vit: Path, images: Path) -> None:
    out = merge(vit / "base", [vit / "a", vit / "b"], parameters={**FAST, "calibration": str(images)})
    masks = load(out / "dam" / MASKS_FILE)
    assert not masks.stand_ins and "vaccinated" not in masks.metadata


def test_a_wrong_value_is_refused(merge: Merge, vit: Path, images: Path) -> None:
    with pytest.raises(DamError, match="clean"):
        merge(vit / "base", [vit / "a", vit / "b"], parameters={**FAST, "calibration": str(images), "clean": "always"})


def _made(shards: Shards, plan: Plan, folder: Path) -> list[str]:
    titles: list[str] = []

    def progress(steps: Any, title: str) -> Any:
        titles.append(title.split()[0])
        return steps

    _quick(setattr)
    tasks = build_tasks(plan, torch.device("cpu"))
    assert module.make_stand_ins(tasks, TaskVectors(plan), folder, shards=shards, progress=progress) is not None
    return titles


def test_what_an_interrupted_run_has_made_is_taken(family_plan: Plan, tmp_path: Path) -> None:
    assert len(_made(ALONE, family_plan, tmp_path)) > 0
    first = load_file(stand_in_file(tmp_path, 0))
    assert _made(ALONE, family_plan, tmp_path) == []
    stand_in_file(tmp_path, 0).unlink()
    assert len(_made(ALONE, family_plan, tmp_path)) > 0
    again = load_file(stand_in_file(tmp_path, 0))
    assert first.keys() == again.keys() and all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_what_was_not_vaccinated_is_the_models_own(family_plan: Plan, tmp_path: Path) -> None:
    _made(ALONE, family_plan, tmp_path)
    stood, own = StandIns(family_plan, tmp_path), TaskVectors(family_plan)
    made, differing = stood.all()[0], 0
    for spec in family_plan.tensors:
        (here,), (there,) = stood.models(spec.name), own.models(spec.name)
        assert (here is None) == (there is None)
        if here is None or there is None:
            continue
        differing += not torch.equal(here.float(), there.float())
        if spec.name not in made:
            assert torch.equal(here, there)
    assert 0 < differing <= len(made)


@pytest.fixture(params=FAMILIES)
def family_plan(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Plan:
    return plan_of(folders[request.param], clean=True, student_steps=0)


def test_two_processes_share_the_models_out(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(folders["image"], clean=True)
    assert [bool(titles) for titles in group(_made, 2, plan, tmp_path)] == [True, False]
