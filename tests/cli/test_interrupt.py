"""Ctrl-C: one line that says how to go on, exit code 130, no traceback; and going on as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_dam.cli.main import main
from mergekit_dam.engine.snapshots import Snapshots
from tests.conftest import fast


@pytest.fixture
def recipe(tmp_path: Path, vit: Path, images: Path) -> Path:
    models = [{"model": str(vit / name), "parameters": {"calibration": str(images)}} for name in "ab"]
    settings = fast(steps=4, snapshot_every=0.0)
    content = {"merge_method": "dam", "base_model": str(vit / "base"), "models": models, "parameters": settings}
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(content))
    return tmp_path / "dam.yml"


def _told(*arguments: Any) -> str:
    done = CliRunner().invoke(main, [*map(str, arguments), "--quiet"])
    assert done.exit_code == 130 and done.stdout == "" and isinstance(done.exception, SystemExit), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("interrupted; ")
    return line


def _stopping(monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
    write, written = Snapshots.write, []

    def stopped(self: Snapshots, state: Any) -> None:
        write(self, state)
        written.append(state)
        if len(written) in at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Snapshots, "write", stopped)


def test_learning_goes_on_from_the_step_that_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stopping(monkeypatch, 1, 4)
    assert _told("merge", recipe, tmp_path / "out").endswith("goes on from model 1 of the scan")
    line = _told("merge", recipe, tmp_path / "out")
    (step,) = re.findall(r"goes on from step (\d+) of the masks", line)
    assert CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out"), "--quiet"]).exit_code == 0
    metrics = (tmp_path / "out" / "dam" / "metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, metrics) if record["phase"] == "masks"]
    assert int(step) == 2 and steps == list(range(4)), "every step once, those before it too"


def test_what_is_kept_is_what_is_said(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stopping(monkeypatch, 3)
    assert "keeps nothing" in _told("merge", recipe, tmp_path / "out", "--no-resume")
    content = yaml.safe_load(recipe.read_text())
    content["parameters"] = fast(steps=4, snapshot_every=0.0, resume=False)
    recipe.write_text(yaml.safe_dump(content))
    _stopping(monkeypatch, 3)
    assert "starts over" in _told("learn", recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "place", "told"),
    [
        ("merge", "mergekit_dam.recipe.run_merge", "masks that were learned are in the cache"),
        ("audit", "mergekit_dam.recipe.audit", "what was scanned is in the cache"),
        ("eval", "mergekit_dam.cli.eval.load_merged", "starts over"),
    ],
)
def test_every_long_command_ends_in_one_line(
    command: str, place: str, told: str, recipe: Path, tmp_path: Path, vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    arguments = {
        "merge": (recipe, tmp_path / "out"),
        "audit": (recipe, "--out", tmp_path),
        "eval": (vit / "a", "--data", "x"),
    }
    assert told in _told(command, *arguments[command])
