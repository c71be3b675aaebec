"""The benchmark of time and memory on tiny models, its arithmetic against real tensors, and its pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from dam_bench.performance.run_depth import at_full_depth, learn
from dam_bench.performance.run_steps import read_results, short_table, whole_table
from dam_bench.performance.scaling import (
    BLOCK_OF_7B,
    BLOCK_OF_13B,
    Job,
    device_bytes,
    fits_table,
    step_flops,
    step_seconds,
)
from dam_bench.performance.shapes import make_models
from dam_bench.performance.steps import PASSES, Case, _expect, measure, set_up
from dam_bench.performance.windows import measure_window

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
STUDY = Path(__file__).parents[2] / "benchmarks" / "STUDY.md"
GB = 1e9


@pytest.mark.parametrize("objective", ["inversion", "paper"])
def test_a_step_is_measured_beside_its_own_passes(objective: str, tmp_path: Path) -> None:
    case = Case("clip-tiny", objective, 2, steps=1, batch_size=4)
    result = measure(case, tmp_path)
    assert result["ratio"] == pytest.approx(result["seconds"]["step"][0] / result["seconds"]["floor"][0])
    assert result["ratio"] > 0.5 and result["parameters"] > 20_000
    assert result["bytes"]["state"] == 6 * 4 * result["parameters"]


def test_a_floor_with_other_passes_is_refused() -> None:
    kinds = PASSES["inversion of LMs"][0]
    _expect(["answer", "with graph"], kinds, 1)
    _expect(["answer", "with graph"], PASSES["inversion"][0], 1, once=["answer"])
    for passes in (["answer", "with graph", "with graph"], ["with graph"]):
        with pytest.raises(AssertionError, match="instead of"):
            _expect(passes, kinds, 1)


def test_state_and_merged_weights_have_the_computed_bytes(tmp_path: Path) -> None:
    search, _, _ = set_up(Case("clip-tiny", "inversion", 2, batch_size=4), tmp_path, torch.device("cpu"))
    parameters = sum(torch.Size(spec.shape).numel() for spec in search.model.changed)
    expected = device_bytes(Job(parameters, 2, stored=4))
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    assert size(t for mask in search.masks.values() for t in mask.logits.values()) == expected["mask logits"]
    weights = search.model.weights(search.fit.combined(), search.coefficients)  # type: ignore[union-attr]
    changed = [weights[spec.name] for spec in search.model.changed]
    assert size(changed) == expected["merged weights"]
    for weight in changed:
        weight.grad = torch.ones_like(weight)
    search.fit.update(search.fit.combined(), weights, 0)  # type: ignore[union-attr, call-arg, arg-type]
    moments = [v for o in search.fit.optimisers.values() for s in o.state.values() for v in s.values() if v.ndim]  # type: ignore[union-attr]
    assert size(moments) == expected["Adam's moments"]
    made = make_models("clip-tiny", 2, tmp_path)
    files = sum((path / "model.safetensors").stat().st_size for path in made.models)
    assert files == pytest.approx(expected["frozen models"], rel=0.5) and files > expected["frozen models"]


def test_memory_falls_with_processes_and_windows() -> None:
    job = Job(7e9, 4)
    one, eight = (device_bytes(job, n) for n in (1, 8))
    assert one["mask logits"] == 8 * eight["mask logits"] and one["merged weights"] == eight["merged weights"]
    assert sum(device_bytes(Job(7e9, 4, window=1 / 16)).values()) < sum(one.values()) / 12
    assert step_flops(job, 100) == 7e9 * 100 * 4 * 8
    faster = step_seconds(job, 1000, flops=1e14, bandwidth=1e12, processes=4)
    assert faster == pytest.approx(step_seconds(job, 1000, flops=1e14, bandwidth=1e12) / 4)


def test_the_study_has_the_functions_figures() -> None:
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d) \| ([\d.]+) \| ([\d.]+) \|$", STUDY.read_text("utf-8"), re.M)
    assert len(rows) >= 9
    for granularity, window, processes, gigabytes, seconds in rows:
        share = 1.0 if window == "all" else int(window) * BLOCK_OF_7B / 7e9
        job = Job(7e9, 4, computed=2, entries=1.0 if granularity == "element" else 1 / 4096, window=share)
        assert float(gigabytes) == pytest.approx(sum(device_bytes(job, int(processes)).values()) / GB, abs=0.06)
        expected = step_seconds(job, 16 * 128, flops=4e14, bandwidth=2e12, processes=int(processes))
        assert float(seconds) == pytest.approx(expected, abs=0.006)


def test_the_page_on_large_models_has_the_functions_figures() -> None:
    page = PAGE.read_text("utf-8")
    assert f"\n{fits_table()}\n" in page, "run python -m dam_bench.performance.scaling"
    window = device_bytes(Job(2 * BLOCK_OF_13B, 4, computed=2, masks=5))
    assert f"| 4 x 13B | window of 2 | {sum(window.values()) / GB:.1f} |" in page
    table = 152_000 * 4096
    ends = device_bytes(Job(table, 4, computed=2, masks=5, entries=1 / 4096))
    assert float(re.search(r"takes ([\d.]+) GB\.", page)[1]) == pytest.approx(sum(ends.values()) / GB, abs=0.06)  # type: ignore[index]


def test_pages_have_the_committed_measurements() -> None:
    results, cure = read_results(), "run python -m dam_bench.performance.run_steps --table"
    assert f"\n{short_table(results)}\n" in PAGE.read_text("utf-8"), cure
    assert f"\n{whole_table(results)}\n" in STUDY.read_text("utf-8"), cure


def test_a_window_is_measured_beside_its_passes(tmp_path: Path) -> None:
    case = Case("clip-tiny", "inversion", 2, batch_size=4, settings={"window": 1})
    found = measure_window(case, tmp_path)
    assert found["ratio"] > 0.5 and len(found["seconds"]["floor"]) == len(found["seconds"]["step"]) == case.steps
    whole, _, _ = set_up(Case("clip-tiny", "inversion", 2, batch_size=4), tmp_path, torch.device("cpu"))
    assert 0 < found["parameters"] < sum(torch.Size(spec.shape).numel() for spec in whole.model.changed) / 1.5


def test_all_windows_are_measured_and_extrapolated(tmp_path: Path) -> None:
    case = Case("llama-tiny", "inversion", 2, batch_size=2, settings={"window": 1, "steps": 2})
    run = learn(case, tmp_path)
    assert run["blocks"] == 2 and run["seconds"] > 0 and run["device_bytes"] is None
    sizes = [path.stat().st_size for path in tmp_path.glob("*/*/model.safetensors")]
    assert len(sizes) == 3 and 0 < run["bytes_read"] < 4 * sum(sizes)
    shallow, deep = (run | {"blocks": n, "seconds": 5.0 + 2 * n, "own_bytes": 100 + n} for n in (4, 8))
    assert at_full_depth(shallow, deep) == {"blocks": 32, "seconds": 69.0, "peak_growth": round(108 / 104 - 1, 4)}
