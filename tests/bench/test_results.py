"""Metrics of the benchmark from its result files: means, missing seeds, excess, front, area, hardest baseline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from dam_bench.tables.aggregate import suites
from dam_bench.tables.pareto import area, best_accuracy, margin
from dam_bench.tables.results import Run, Spread
from dam_bench.tables.sections import summary_table
from hypothesis import given, settings

from tests.helpers.bench_runs import ATTACK, METHODS, TOTAL, fill, new_run, only, place, put


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fill(tmp_path / "results")


counts = st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(data=st.lists(st.tuples(counts, counts, counts), min_size=1, max_size=4), gap=st.booleans())
@settings(max_examples=30, deadline=None)
def test_metrics_are_means_of_the_counts_and_a_missing_seed_is_named_not_filled_in(
    data: list[tuple[tuple[int, int], ...]], gap: bool
) -> None:
    def run(method: str, seed: int, c: tuple[tuple[int, int], ...]) -> Run:
        accuracy = {"cifar10": c[0], "letters": c[1]}
        success = {ATTACK: {"cifar10": c[2], "letters": c[1]}}
        changes = {"accuracy": accuracy, "attack_success": success}
        return Run.model_validate(new_run(method, "merge-aware", seed, **changes))

    runs = [run("dam", seed, c) for seed, c in enumerate(data)]
    if gap:  # a seed that another method has
        runs.append(run("ties-0.3", len(data), data[0]))
    (results,) = suites(runs)
    accuracy = results.accuracy("merge-aware", "dam")
    success = results.success("merge-aware", "dam")
    per_seed = [50 * (a[0] / a[1] + b[0] / b[1]) for a, b, _ in data]
    assert list(accuracy.values.values()) == pytest.approx(per_seed)
    assert accuracy.mean == pytest.approx(sum(per_seed) / len(data))
    assert (accuracy.low, accuracy.high) == pytest.approx((min(per_seed), max(per_seed)))
    assert success.mean == pytest.approx(sum(100 * c[0] / c[1] for _, _, c in data) / len(data))
    assert results.transfer("merge-aware", "dam").mean == pytest.approx(
        sum(100 * b[0] / b[1] for _, b, _ in data) / len(data)
    )
    assert accuracy.missing == ((len(data),) if gap else ())
    assert (f"no seed {len(data)}" in accuracy.text()) == gap
    assert results.excess("merge-aware", "dam").text() == "missing"  # there is no all-clean run


def test_excess_is_paired_by_seed(root: Path) -> None:
    run = new_run("dam", "clean", 1)
    run["attack_success"][ATTACK]["cifar10"] = [100, TOTAL]
    put(root, run)
    place(root, "clean", "dam", 2).unlink()
    excess = only(root).excess("merge-aware", "dam")
    assert excess.values == pytest.approx({0: 8 - 3, 1: 9 - 50}) and excess.missing == (2,)
    assert excess.text() == "-18.0 (-41.0 to 5.0), no seed 2"
    # An excess below zero is no merit in the score.
    assert only(root).score("merge-aware", "dam").values == pytest.approx({0: 78 - 5, 1: 79})


def test_a_spread_rounds_to_no_negative_zero() -> None:
    assert Spread({0: -0.04, 1: 0.04}, (0, 1)).text() == "0.0 (0.0 to 0.0)"


point = st.tuples(st.integers(0, 100), st.integers(0, 100)).map(lambda p: (float(p[0]), float(p[1])))
curve = st.lists(point, min_size=1, max_size=5)
curves_of = st.lists(curve, min_size=1, max_size=3)


def along(curve: list[tuple[float, float]], steps: int = 400) -> Iterator[tuple[float, float]]:
    """Points of a curve, close to each other."""
    yield from curve
    for (a, s), (b, t) in itertools.pairwise(curve):
        yield from ((a + (b - a) * i / steps, s + (t - s) * i / steps) for i in range(steps))


@given(curves=curves_of)
@settings(max_examples=40, deadline=None)
def test_area_is_the_mean_best_accuracy_over_bounds(curves: list[list[tuple[float, float]]]) -> None:
    points = sorted((s, a) for curve in curves for a, s in along(curve))
    total, best, last = 0.0, 0.0, 0.0
    for success, accuracy in [*points, (100.0, 0.0)]:
        total += best * (success - last)
        best, last = max(best, accuracy), success
    assert area(curves) == pytest.approx(total / 100, abs=0.5)  # 400 points per piece of at most 100 x 100


@given(curves=curves_of, one=point)
@settings(max_examples=60, deadline=None)
def test_ahead_of_the_front_means_more_area(curves: list[list[tuple[float, float]]], one: tuple[float, float]) -> None:
    lowest = min(s for curve in curves for _, s in curve)
    gain = area([*curves, [one]]) - area(curves)
    assert gain >= -1e-9
    if lowest <= one[1] < 100:
        assert (gain > 1e-9) == (margin(one, curves) > 1e-9)
    for curve in curves:
        assert all(margin(p, curves) <= 1e-9 for p in along(curve, 7))
    assert margin(one, curves) == pytest.approx(one[0] - best_accuracy(curves, max(one[1], lowest)))


def test_area_of_known_curves() -> None:
    assert area([[(80.0, 25.0)]]) == pytest.approx(60.0)
    assert area([[(0.0, 0.0), (100.0, 100.0)]]) == pytest.approx(50.0)
    assert area([[(50.0, 0.0), (90.0, 100.0)], [(60.0, 0.0)]]) == pytest.approx(60 + 0.75 * 15)
    assert area([[(0.0, 0.0), (100.0, 100.0)], [(40.0, 0.0), (60.0, 100.0)]]) == pytest.approx(60.0)  # they cross
    assert margin((75.0, 50.0), [[(50.0, 0.0), (90.0, 100.0)]]) == pytest.approx(5.0)


def test_curves_start_at_theta_0_and_a_hole_in_them_is_a_missing_seed(root: Path) -> None:
    results = only(root)
    assert results.undefended_curve("merge-aware", "task_arithmetic", 1) == [(51, 3), (79, 71), (71, 91)]
    assert not results.area("merge-aware", "task_arithmetic").missing
    # dam at (78, 8) lies between theta_0 (50, 2) and ties (74, 30), whose line reaches 55.1 at an ASR of 8
    assert results.margin_over_undefended("merge-aware", "dam").values[0] == pytest.approx(78 - (50 + 24 * 6 / 28))
    place(root, "merge-aware", "task_arithmetic-0.5", 1).unlink()
    results = only(root)
    assert results.area("merge-aware", "task_arithmetic").missing == (1,)
    assert results.margin_over_undefended("merge-aware", "dam").missing == (1,)


def test_the_hardest_baseline_is_no_defence_and_has_every_seed(root: Path) -> None:
    # Scores of seed 0: task_arithmetic 0.3: 78 - 66, ties: 74 - 26, adamerging: 81 - 83; dam's would be 73.
    assert only(root).hardest(["merge-aware"]) == "ties-0.3"
    place(root, "clean", "ties-0.3", 2).unlink()
    assert only(root).hardest(["merge-aware"]) == "task_arithmetic-0.3"
    for method in METHODS:
        place(root, "clean", method, 2).unlink(missing_ok=True)
    assert only(root).hardest(["merge-aware"]) is None
    assert "hardest baseline: none has all scenarios, seeds and floors" in summary_table([only(root)])


def test_the_hardest_rival_is_chosen_among_the_defences_of_others(root: Path) -> None:
    assert only(root).hardest(["merge-aware"], rivals=True) is None
    for method, hits in (("wag", 60), ("msd", 70)):
        for scenario, seed in itertools.product(("clean", "merge-aware"), range(3)):
            accuracy = {task: [hits, TOTAL] for task in new_run("dam", scenario, seed)["accuracy"]}
            put(root, new_run("dam", scenario, seed, method=method, defence=method, density={}, accuracy=accuracy))
    assert only(root).hardest(["merge-aware"], rivals=True) == "msd"
    assert only(root).hardest(["merge-aware"]) == "ties-0.3"
    rows = [line.split(" | ")[1] for line in summary_table([only(root)]).splitlines()]
    assert rows[2:5] == ["ties-0.3 (hardest baseline)", "msd (hardest rival)", "paper-dual"]
