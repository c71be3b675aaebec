"""Detection rates from scores: what counts as detected, named and a false alarm."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mergekit_dam.bench.detection import rates


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
