"""A run that was cut short goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest
import torch
from mergekit.common import ModelReference
from safetensors import safe_open

import mergekit_dam
from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.errors import DamError
from mergekit_dam.io import cache
from mergekit_dam.io.cache import cache_folder
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.models.plan import build_plan
from mergekit_dam.tasks import content
from tests.conftest import fast

SETTINGS: dict[str, dict[str, Any]] = {
    # every class is a suspect, so that triggers are pooled and found anew, and masks made anew after the scan
    "inversion": {
        "detection": "auto",
        "suspicion": 0.0,
        "scan_steps": 2,
        "refresh_every": 2,
        "refresh_steps": 2,
        "steps": 5,
    },
    "paper": {"objective": "paper", "steps": 3, "coefficient_steps": 3},
    "windows": {"window": 2, "suspicion": 0.0, "scan_steps": 2, "steps": 3, "refresh_every": 1},
}
KILLED = """
import os, pickle, signal, sys
from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.learn.run import find_or_learn
write, replace, written = Snapshots.write, Snapshots._replace, []
def counted(self, state):
    written.append(state)
    write(self, state)
def killed(self, temporary):
    if len(written) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)  # everything is written, nothing is in its place
    replace(self, temporary)
Snapshots.write, Snapshots._replace = counted, killed
find_or_learn(pickle.load(open(sys.argv[1], "rb")), quiet=True)
"""


@pytest.fixture(autouse=True)
def _no_debug_records() -> Iterator[None]:
    """DCP writes a debug record per tensor, and pytest formats each."""
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)


class Stopped(Exception):
    """Stands for the end of the process at this point."""


def _plan(vit: Path, images: Path, objective: str, **more: Any) -> Any:
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
    shared = fast(**{"snapshot_every": 0.0, "calibration": str(images), **SETTINGS[objective], **more})
    return build_plan(refs[0], refs[1:], shared=shared, per_model={})


def _stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Raise after the given number of snapshots; returns the list of those written."""
    write, written = Snapshots.write, []

    def counted(self: Snapshots, state: Any) -> None:
        write(self, state)
        written.append(len(written) + 1)
        if len(written) == number:
            raise Stopped

    monkeypatch.setattr(Snapshots, "write", counted)
    return written


def _results(folder: Path) -> tuple[bytes, str]:
    return (folder / MASKS_FILE).read_bytes(), (folder / "metrics.jsonl").read_text()


@pytest.fixture
def another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def switch(name: str) -> None:
        monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path / name))

    return switch


@pytest.mark.parametrize("objective", SETTINGS)
def test_stopped_after_units_of_every_phase(
    objective: str, vit: Path, images: Path, another_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(vit, images, objective)
    with monkeypatch.context() as patch:
        written = _stop_at(patch, -1)
        expected = _results(find_or_learn(plan, quiet=True)[0])
    assert len(written) == {"inversion": 2 + 5, "paper": 3 + 3, "windows": 2 + 3 + 1 + 3}[objective]
    for number in {"inversion": (1, 2, 5), "paper": (2, 3, 5), "windows": (1, 4, 5, 6, 8)}[objective]:
        another_cache(f"stopped-{number}")
        with monkeypatch.context() as patch:
            _stop_at(patch, number)
            with pytest.raises(Stopped):
                find_or_learn(plan, quiet=True)
        with monkeypatch.context() as patch:
            rest = _stop_at(patch, -1)
            folder = find_or_learn(plan, quiet=True)[0]
        assert len(rest) == len(written) - number, "work that was done is not done again"
        assert _results(folder) == expected, f"stopped after unit {number}"
        assert not list((folder / "run").glob("*")), "nothing is left behind"


@pytest.mark.parametrize(("objective", "number"), [("inversion", 5), ("paper", 5), ("windows", 4)])
def test_kill_9_while_a_snapshot_is_written(
    objective: str, number: int, vit: Path, images: Path, another_cache: Any, tmp_path: Path
) -> None:
    plan = _plan(vit, images, objective)
    expected = _results(find_or_learn(plan, quiet=True)[0])
    another_cache("killed")
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "plan"), str(number)]
    # the same bytes are promised for the same number of threads, which another test may have changed in this process
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (run,) = cache_folder().glob("*/run")
    facts = json.loads((run / "snapshot" / "facts.json").read_text())
    assert facts["done"] == number - 1 - (3 if objective == "paper" else 2)
    # the lines after the snapshot are lost with the process, or are on the disk and must not come twice
    with (run.parent / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"half": ')
    assert _results(find_or_learn(plan, quiet=True)[0]) == expected


def test_snapshots_are_safetensors_and_json(vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_at(monkeypatch, 4)
    with pytest.raises(Stopped):
        find_or_learn(_plan(vit, images, "inversion"), quiet=True)
    (snapshot,) = cache_folder().glob("*/run/snapshot")
    names = sorted(path.name for path in snapshot.iterdir())
    assert [name.rpartition(".")[2] for name in names] == ["json", "safetensors"]
    with safe_open(snapshot / names[1], "pt") as file:
        parts = {name.split("/")[0] for name in file.keys()}  # noqa: SIM118
    assert parts == {"task_shared", "backdoor_detection", "adam", "coefficients", "finding", "pool"}


def test_a_damaged_snapshot_is_named_and_resume_false_starts_anew(
    vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _stop_at(patch, 3)
        with pytest.raises(Stopped):
            find_or_learn(_plan(vit, images, "paper"), quiet=True)
    (file,) = cache_folder().glob("*/run/snapshot/*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DamError, match=r"snapshot .* remove it, and learning starts over"):
        find_or_learn(_plan(vit, images, "paper"), quiet=True)
    with monkeypatch.context() as patch:
        written = _stop_at(patch, -1)
        find_or_learn(_plan(vit, images, "paper", resume=False), quiet=True)
    assert len(written) == 6


def test_masks_of_other_code_are_learned_again(vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(vit, images, "paper")
    first, _ = find_or_learn(plan, quiet=True)
    assert find_or_learn(plan, quiet=True)[0] == first
    monkeypatch.setattr(content, "code_digest", lambda: "another working copy")
    second, _ = find_or_learn(plan, quiet=True)
    assert second != first and _results(second) == _results(first)


def test_only_code_that_has_a_part_in_masks_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit of any module that learning imports changes the digest; one of another room does not."""
    package = tmp_path / "mergekit_dam"
    shutil.copytree(Path(mergekit_dam.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "_PACKAGE", package)
    digest = cache.code_digest.__wrapped__
    before = digest()
    graph = grimp.build_graph("mergekit_dam", cache_dir=None)
    used = {"mergekit_dam.learn.run", *graph.find_upstream_modules("mergekit_dam.learn.run")}
    assert len(used) > 50
    for module in sorted(graph.modules):
        path = package.parent / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        if module in used - {"mergekit_dam"}:
            assert digest() != before, module
        elif module.split(".")[1:2] in (["cli"], ["publish"], ["evaluation"], ["plugin"]):
            assert digest() == before, module
        path.write_bytes(content)
    assert digest() == before


def test_resume_false_takes_no_window_of_an_earlier_run(
    vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(vit, images, "windows", resume=False)
    with monkeypatch.context() as patch:
        _stop_at(patch, 8)  # in the second window
        with pytest.raises(Stopped):
            find_or_learn(plan, quiet=True)
    (masks,) = cache_folder().glob("*/run/windows/masks-0.safetensors")
    masks.write_bytes(b"not a window's masks")
    with monkeypatch.context() as patch:
        written = _stop_at(patch, -1)
        find_or_learn(plan, quiet=True)
    assert len(written) == 2 + 3 + 1 + 3, "both windows, after a scan whose result is known"
