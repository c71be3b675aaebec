"""Options and folders that a merge cannot use are refused before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError
from mergekit_dam.io.hub_download import require_readable
from mergekit_dam.plugin.options import refuse_launcher, require_options
from mergekit_dam.recipe import open_recipe


def test_pickled_output_and_absent_devices_are_refused() -> None:
    require_options(MergeOptions())
    with pytest.raises(DamError, match="no-safe-serialization"):
        require_options(MergeOptions(safe_serialization=False))
    if not torch.cuda.is_available():
        with pytest.raises(DamError, match="--cuda"):
            require_options(MergeOptions(cuda=True))


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_launcher()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DamError, match="mergekit-dam learn"):
        refuse_launcher()


def _recipe(folder: Path) -> dict[str, Any]:
    return {"merge_method": "dam", "base_model": str(folder), "models": [{"model": str(folder)}]}


@pytest.mark.parametrize(("name", "said"), [("m@2024", "revision"), ("c++", "LoRA"), ("qwen+math", "LoRA")])
def test_folders_with_signs_of_recipes_are_refused(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DamError, match=f"{said}.*rename"):
        open_recipe(_recipe(tmp_path / name))


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DamError, match="revision"):
        open_recipe(_recipe(tmp_path / "a@2024"))


def test_a_missing_right_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    require_readable(tmp_path)
    # root may read everything, so the answer of the system is replaced
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".safetensors")
    with pytest.raises(DamError, match=r"model\.safetensors.*permission denied"):
        require_readable(tmp_path)
