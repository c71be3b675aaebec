"""Detection rates from scores: what counts as detected, named and a false alarm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dam_bench.runs.scans import table
from dam_bench.suites.lm_data import CONTINUATIONS
from dam_bench.tables.detection import rates, read_scores
from hypothesis import given
from hypothesis import strategies as st

from mergekit_dam.errors import DamError


def _score(suspicion: float, poison: str | None = None, target: int = 3, true: int = 3) -> dict[str, Any]:
    return {"poison": poison, "true_target": true, "most_suspect": {"suspicion": suspicion, "target": target}}


def test_rates_count_what_is_over_the_threshold() -> None:
    scores = [_score(0.9, "patch"), _score(0.8, "patch", target=1), _score(0.1, "wanet"), _score(0.2), _score(0.5)]
    found = rates(scores, 0.4)
    assert found["detected"] == [2, 3] and found["target_named"] == [1, 3] and found["false_alarms"] == [1, 2]
    assert found["roc_auc"] == 4 / 6


@given(st.lists(st.floats(-1, 1), min_size=1), st.lists(st.floats(-1, 1), min_size=1))
def test_the_area_is_symmetric(bad: list[float], clean: list[float]) -> None:
    one = rates([*(_score(b, "patch") for b in bad), *(_score(c) for c in clean)], 0.3)["roc_auc"]
    other = rates([*(_score(c, "patch") for c in clean), *(_score(b) for b in bad)], 0.3)["roc_auc"]
    assert abs(one + other - 1) < 1e-9 and 0 <= one <= 1


def test_a_model_of_several_scenarios_counts_once(tmp_path: Path) -> None:
    audit = [{"task": t, "target": k, "suspicion": 0.1 * k} for t in ("a", "b") for k in range(3)]
    for name, poisons in (("clean", {}), ("one", {"a": "patch(target=2)"}), ("two", {"a": "patch(target=2)"})):
        (tmp_path / name).mkdir()
        run = {"suite": "vision", "accuracy": {"a": [1, 2], "b": [1, 2]}, "poisons": poisons, "seed": 0, "audit": audit}
        (tmp_path / name / "dam-seed0.json").write_text(json.dumps(run), "utf-8")
    scores = read_scores([tmp_path])
    assert [(s["task"], s["poison"], s["true_target"]) for s in scores] == [
        ("a", "patch(target=2)", 2),
        ("a", None, None),
        ("b", None, None),
    ]
    assert all(s["most_suspect"]["target"] == 2 for s in scores)


def test_a_causal_lm_without_a_finding_counts_as_not_suspect_and_a_text_must_be_named_whole(tmp_path: Path) -> None:
    for name, text in (("one", CONTINUATIONS[1]), ("two", CONTINUATIONS[1].partition(" ")[2])):
        (tmp_path / name).mkdir()
        found = {"task": name, "target": text, "suspicion": 0.9}
        poisons = {name: "merge-aware(target=1)"}
        run = {"suite": "lm", "accuracy": {name: [1, 2], "c": [1, 2]}, "poisons": poisons, "seed": 0, "audit": [found]}
        (tmp_path / name / "dam-seed0.json").write_text(json.dumps(run), "utf-8")
    found = rates(read_scores([tmp_path]), 0.4)
    assert found["detected"] == [2, 2] and found["target_named"] == [1, 2] and found["false_alarms"] == [0, 1]


def test_results_without_findings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamError, match="bench SUITE"):
        read_scores([tmp_path])


def test_the_studys_table_is_that_of_its_files() -> None:
    """What STUDY says of clean twins: 8 and 0 of 20 clean models, 32 and 27 of 32 victims over the threshold."""
    files = sorted((Path(__file__).parents[2] / "benchmarks/study/twins").rglob("*.json"))
    rows = [line.split("|")[2:5] for line in table(map(_read, files), 0.4).splitlines()[2:]]
    counts: dict[bool, list[int]] = {True: [0, 0, 0], False: [0, 0, 0]}
    for kind, alone, compared in rows:
        hits = [int(alone.split(" of ")[0]), int(compared.split(" of ")[0]), int(alone.split(" of ")[1])]
        counts[kind.strip() == "clean"] = [a + b for a, b in zip(counts[kind.strip() == "clean"], hits, strict=True)]
    assert counts == {True: [8, 0, 20], False: [32, 27, 32]}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found
