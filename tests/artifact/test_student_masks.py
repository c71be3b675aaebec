"""Masks files that hold students: merged again, and hostile ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, load, save
from mergekit_dam.errors import DamError
from mergekit_dam.models.checkpoint import Checkpoint
from tests.conftest import FAST, Merge


def test_masks_hold_the_students_and_merge_again_to_the_same_bits(merge: Merge, bert: Path, texts: Path) -> None:
    models, shared = [bert / "m1", bert / "m2"], {**FAST, "calibration": str(texts)}
    out = merge(bert / "base", models, parameters=shared)
    masks = load(out / "dam" / MASKS_FILE)
    assert (
        len(masks.stand_ins) == 2 and set(masks.metadata["students"]) == {"m1", "m2"} and masks.metadata["audit"] == []
    )
    again = merge(bert / "base", models, out="again", parameters={"masks": str(out / "dam" / MASKS_FILE)})
    first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    base = Checkpoint.open(bert / "base")
    for name in masks.metadata["tensors"]:
        vectors = [student[name].double() - base.tensor(name).double() for student in masks.stand_ins]
        mask_T = masks.mask(name)
        assert mask_T is not None
        lambdas = masks.coefficients_of(name).tolist()
        total = sum(c * v * m.double() for c, v, m in zip(lambdas, vectors, mask_T, strict=True))
        assert torch.allclose(first[name].double(), base.tensor(name).double() + total, atol=1e-6)


@pytest.mark.parametrize("shared", [{"student_steps": 0}, {"mask": "m1"}, {"objective": "paper"}])
def test_models_themselves_are_merged_where_that_is_asked_for(
    shared: dict[str, Any], merge: Merge, bert: Path, texts: Path
) -> None:
    settings = {**FAST, "calibration": str(texts), "scan_steps": 2, **shared}
    out = merge(bert / "base", [bert / "m1", bert / "m2"], parameters=settings)
    masks = load(out / "dam" / MASKS_FILE)
    assert not masks.stand_ins and "students" not in masks.metadata


def test_students_of_other_shapes_are_refused(merge: Merge, bert: Path, texts: Path, tmp_path: Path) -> None:
    models = [bert / "m1", bert / "m2"]
    out = merge(bert / "base", models, parameters={**FAST, "calibration": str(texts)})
    masks = load(out / "dam" / MASKS_FILE)
    name = masks.metadata["tensors"][0]
    metadata = {key: value for key, value in masks.metadata.items() if key != "content_sha256"}
    for wrong, said in (
        (torch.zeros(2), "shape"),
        (masks.stand_ins[0][name].half(), "float32"),
        (masks.stand_ins[0][name] * torch.nan, "finite"),
    ):
        changed = [{**masks.stand_ins[0], name: wrong}, masks.stand_ins[1]]
        path = tmp_path / said / MASKS_FILE
        save(path, LearnedMasks(masks.probabilities, masks.coefficients, metadata, stand_ins=changed))
        with pytest.raises(DamError, match="substitute for"):
            merge(bert / "base", models, out=f"no-{said}", parameters={"masks": str(path)})


@pytest.mark.parametrize("key", ["student.2.x", "student.-1.x", "student.x", "student"])
def test_students_of_no_model_are_refused(key: str, merge: Merge, bert: Path, texts: Path, tmp_path: Path) -> None:
    path = merge(bert / "base", [bert / "m1", bert / "m2"], parameters={**FAST, "calibration": str(texts)}) / "dam"
    with safe_open(path / MASKS_FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path / MASKS_FILE) | {key: torch.zeros(1)}
    save_file(tensors, tmp_path / MASKS_FILE, metadata=metadata)
    with pytest.raises(DamError, match="damaged"):
        load(tmp_path / MASKS_FILE)
