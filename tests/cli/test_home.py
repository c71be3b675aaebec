"""~ stands for the home directory in recipes, options and variables, where no shell expands it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mergekit_dam.cli.main import main
from tests.conftest import FAST
from tests.helpers.tiny_models import make_model


def _run(*arguments: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments), "--quiet"])
    assert done.value.code == 0


def test_models_and_data_at_home(vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "models").parent.mkdir()
    (home / "models").symlink_to(vit)
    (home / "data").symlink_to(images)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", "~/cache")
    monkeypatch.chdir(tmp_path)
    entries = [{"model": f"~/models/{name}", "parameters": {"calibration": "~/data"}} for name in "ab"]
    recipe = {"merge_method": "dam", "base_model": "~/models/base", "models": entries, "dtype": "float32"}
    (home / "dam.yml").write_text(yaml.safe_dump({**recipe, "parameters": {**FAST, "objective": "paper"}}))
    _run("merge", "~/dam.yml", "~/out", "--lora-merge-cache", "~/lora", "--transformers-cache", "~/hub")
    ready = {
        **recipe,
        "models": [{"model": f"~/models/{n}"} for n in "ab"],
        "parameters": {"masks": "~/out/dam/dam_masks.safetensors"},
    }
    (home / "ready.yml").write_text(yaml.safe_dump(ready))
    _run("merge", "~/ready.yml", "~/again")
    assert (home / "out" / "model.safetensors").read_bytes() == (home / "again" / "model.safetensors").read_bytes()
    assert (home / "cache").is_dir() and not (tmp_path / "~").exists()


def test_an_adapter_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base")
    for i in range(2):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / f"lora{i}")
    monkeypatch.setenv("HOME", str(tmp_path))
    entries = [{"model": f"~/base+~/lora{i}", "parameters": {"calibration": "~/texts.txt"}} for i in range(2)]
    shutil.copy(texts, tmp_path / "texts.txt")
    recipe = {"merge_method": "dam", "base_model": "~/base", "models": entries, "parameters": FAST}
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    _run("check", "dam.yml", "--lora-merge-cache", "~/merged")
    assert not (tmp_path / "~").exists()
