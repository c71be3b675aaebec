"""With --quiet a command prints nothing, on stdout or stderr, neither itself nor its libraries."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import ViTImageProcessor

from mergekit_dam.cli.main import main
from tests.conftest import FAST


def _run(*arguments: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments), "--quiet"])
    assert done.value.code in (0, 3)


def test_every_command_is_silent(
    vit: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(vit, tmp_path / "models"))
    for name in ("base", "a", "b"):
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / name)
    entries = [{"model": str(root / name), "parameters": {"calibration": str(images)}} for name in "ab"]
    recipe = {"merge_method": "dam", "base_model": str(root / "base"), "models": entries, "parameters": FAST}
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(recipe))
    weights = [{"model": str(root / name), "parameters": {"weight": 0.3}} for name in "ab"]
    other = {**recipe, "merge_method": "task_arithmetic", "models": weights, "parameters": {}, "dtype": "float32"}
    (tmp_path / "ta.yml").write_text(yaml.safe_dump(other))
    for label in ("0", "1", "2"):
        (tmp_path / "labelled" / label).mkdir(parents=True)
        shutil.copy(images / f"{label}.png", tmp_path / "labelled" / label)
    monkeypatch.setattr("mergekit_dam.cli.eval.refuse_overlap", lambda *a: None)
    out = tmp_path / "out"
    for arguments in (
        ("check", tmp_path / "dam.yml"),
        ("audit", tmp_path / "dam.yml", "--out", tmp_path / "audit"),
        ("learn", tmp_path / "dam.yml", tmp_path / "learned"),
        ("merge", tmp_path / "dam.yml", out),
        ("merge", tmp_path / "ta.yml", tmp_path / "ta"),
        ("eval", out, "--task", "a", "--data", tmp_path / "labelled", "--save", out),
        ("push", out, "org/name", "--dry-run"),
    ):
        capfd.readouterr()
        _run(*arguments)
        told = capfd.readouterr()
        kept = [line for line in told.err.splitlines() if "suspect:" not in line]
        assert told.out == "" and kept == [], arguments
