"""`tracker:`: the same numbers reach a tracker as reach metrics.jsonl, and a missing package is one line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from accelerate.utils import LoggerType
from mergekit.common import ModelReference

from mergekit_dam.errors import DamError
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.models.plan import Plan, build_plan
from tests.conftest import FAST


def _plan(vit: Path, images: Path, tracker: str) -> Plan:
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
    shared = {**FAST, "scan_steps": 2, "calibration": str(images), "tracker": tracker}
    return build_plan(refs[0], refs[1:], shared=shared, per_model={})


def test_tensorboard_gets_the_numbers_of_every_step(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    folder, _ = find_or_learn(_plan(vit, images, "tensorboard"), quiet=True)
    (file,) = (tmp_path / "runs" / "mergekit-dam").glob("events.*")
    written = file.read_bytes()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {f"masks/{key}" for record in records for key, value in record.items() if isinstance(value, float)}
    names = {name for name in names if "loss" in name or "density" in name}
    assert names and all(name.encode() in written for name in names)


def test_a_missing_tracker_names_the_extra(vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(DamError, match=r"tracker trackio: .*pip install 'mergekit-dam\[trackio\]'"):
        find_or_learn(_plan(vit, images, "trackio"), quiet=True)


def test_trackio_gets_settings_numbers_and_an_end(vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own tracker, on a stand-in for the package: a test of the real one needs it installed, see below."""
    pytest.importorskip("accelerate", minversion="1.9")  # the first that knows trackio
    trackio, logged, ended = types.ModuleType("trackio"), [], []
    run = types.SimpleNamespace(
        log=lambda values, *, step: logged.append((step, values)), finish=lambda: ended.append(len(logged))
    )
    trackio.config, projects = {}, []  # type: ignore[attr-defined]
    trackio.init = lambda project: projects.append(project) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType("trackio")])
    folder, _ = find_or_learn(_plan(vit, images, "trackio"), quiet=True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "step" in record]
    wanted = [
        (r["step"], {f"{r['phase']}/{key}": value for key, value in r.items() if isinstance(value, float)})
        for r in steps
    ]
    assert logged == wanted and any("density" in key for _, values in logged for key in values)
    assert ended == [len(steps)] and projects == ["mergekit-dam"]
    assert trackio.config["tracker"] == "trackio" and trackio.config["scan_steps"] == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "left"), [("wandb", "*.wandb"), ("trackio", "*.db")])
def test_other_trackers_get_a_run_without_network(
    name: str, left: str, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    pytest.importorskip(name)  # they read their folders when they are imported
    folder, _ = find_or_learn(_plan(vit, images, name), quiet=True)
    assert (folder / "metrics.jsonl").is_file()
    (run,) = tmp_path.rglob(left)
    assert run.stat().st_size > 0
