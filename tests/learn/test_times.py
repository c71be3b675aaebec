"""The times that a report shows are those of the learning, however many runs had a part in it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from mergekit.common import ModelReference

from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.io.cache import cache_folder
from mergekit_dam.learn import students
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.models.plan import Plan, build_plan
from tests.conftest import fast

PAUSE = 0.05


def _plan(root: Path, names: tuple[str, ...], data: Path, **settings: Any) -> Plan:
    base, *models = (ModelReference.parse(str(root / name)) for name in names)
    shared = fast(**{"snapshot_every": 0.0, "calibration": str(data), "scan_steps": 2, **settings})
    return build_plan(base, models, shared=shared, per_model={})


def _run_file() -> Any:
    (file,) = cache_folder().glob("*/run.json")
    return json.loads(file.read_text())


def test_times_are_summed_over_the_parts_of_a_run(vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(vit, ("base", "a", "b"), images, steps=5)
    step, write = InversionSearch.step, Snapshots.write
    monkeypatch.setattr(InversionSearch, "step", lambda self, n: (time.sleep(PAUSE), step(self, n))[1])
    facts: list[dict[str, Any]] = []

    def stopped(self: Snapshots, state: Any) -> None:
        write(self, state)
        facts.append(self.facts or {})
        if len(facts) in (2, 4):  # after the scan, and after two steps
            raise KeyboardInterrupt

    monkeypatch.setattr(Snapshots, "write", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            find_or_learn(plan, quiet=True)
    first, later = facts[1], facts[3]
    assert set(first["seconds"]) == {"scan"} and later["seconds"]["scan"] >= first["seconds"]["scan"] > 0
    assert first["started"] == later["started"]
    find_or_learn(plan, quiet=True)
    told = _run_file()
    assert told["started"] == first["started"] and set(told["seconds"]) == {"scan", "masks"}
    assert later["seconds"]["masks"] >= 2 * PAUSE
    assert told["seconds"]["masks"] >= later["seconds"]["masks"] + 3 * PAUSE
    find_or_learn(plan, quiet=True)
    assert _run_file() == told, "masks from the cache have the times of their learning"


def test_students_that_were_taught_before_count(bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, teach, taught = _plan(bert, ("base", "m1", "m2"), texts), students.train_student, []

    def once(*arguments: Any) -> Any:
        taught.append(arguments[0].name)
        if len(taught) == 2:
            raise KeyboardInterrupt
        time.sleep(PAUSE)
        return teach(*arguments)

    monkeypatch.setattr(students, "train_student", once)
    with pytest.raises(KeyboardInterrupt):
        find_or_learn(plan, quiet=True)
    find_or_learn(plan, quiet=True)
    seconds = _run_file()["seconds"]
    assert taught == ["m1", "m2", "m2"]
    assert {"stand-in of m1", "stand-in of m2"} < set(seconds)
    assert all(seconds[f"stand-in of {name}"] >= PAUSE for name in ("m1", "m2"))
