"""What is learned depends on content, position and seed: never on how folders, tasks or data are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mergekit.common import ModelReference

from mergekit_dam.artifact.masks_file import LearnedMasks
from mergekit_dam.learn.run import learn_masks
from mergekit_dam.models.plan import build_plan
from tests.conftest import FAST

SETTINGS = {"inversion": {"suspicion": 0.0, "refresh_every": 2}, "paper": {"objective": "paper"}}


def _learned(folders: list[Path], data: Path, objective: str) -> LearnedMasks:
    base, *models = (ModelReference.parse(str(folder)) for folder in folders)
    shared = {**FAST, "num_samples": 6, "calibration": str(data), **SETTINGS[objective]}
    return learn_masks(build_plan(base, models, shared=shared, per_model={}), quiet=True)[1]


@pytest.mark.parametrize("objective", SETTINGS)
def test_renamed_and_moved_folders_give_the_same_masks(objective: str, vit: Path, images: Path, tmp_path: Path) -> None:
    old, new = [vit / name for name in ("base", "a", "b")], [tmp_path / "x" / name for name in ("theta", "b", "c")]
    for source, target in zip(old, new, strict=True):
        shutil.copytree(source, target)
    first = _learned(old, images, objective)
    again = _learned(new, Path(shutil.copytree(images, tmp_path / "pictures")), objective)
    assert first.coefficients.equal(again.coefficients)
    for mask, by_key in first.probabilities.items():
        assert all(values.equal(again.probabilities[mask][key]) for key, values in by_key.items()), mask
