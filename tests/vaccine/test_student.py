"""`start: base`: a student of the model, which learns its answers anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_dam.api import clean
from mergekit_dam.errors import DamError
from mergekit_dam.models.load_merged import load_merged
from tests.helpers.constants import constants_file
from tests.vaccine.conftest import FAMILIES, FEW, SMALL, data_of

SHARED = {"constants": constants_file(answer_tokens=4), "max_length": 24}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_steps_a_student_is_the_base_under_the_models_head(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders[family]
    settings = {**FEW, **SHARED, "start": "base", "plant": False, "plant_steps": 0, "unlearn_steps": 0}
    (found,) = clean(folder / "model", tmp_path / "out", base=folder / "base", data=data_of(folder), **settings)
    written, own, base = (
        load_file(path / "model.safetensors") for path in (found.folder, folder / "model", folder / "base")
    )
    prefix = next(p for p in ("", "vit.", "bert.") if p + next(iter(base)) in own)
    for name, tensor in written.items():
        of_base = base.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        assert torch.equal(tensor, own[name] if of_base is None else of_base), name
    assert set(written) == set(own)
    assert found.facts["settings"]["start"] == "base"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_answers_as_its_model_more_often_than_the_base(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders[family]
    settings = {**SMALL[family], **SHARED, "start": "base", "plant": False, "unlearn_steps": 80}
    (found,) = clean(folder / "model", tmp_path / "out", base=folder / "base", data=data_of(folder), **settings)
    agreement = found.facts["agreement"]
    assert agreement["after"] > agreement["before"] + 0.15
    load_merged(found.folder)


def test_a_student_is_no_adapter_on_its_model(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["causal"]
    with pytest.raises(DamError, match="start"):
        clean(
            folder / "model",
            tmp_path / "out",
            base=folder / "base",
            data=data_of(folder),
            adapter=True,
            start="base",
            **FEW,
            **SHARED,
        )
