"""Step time over the compute floor, peak memory, the peer's step and merge throughput: one run, ratios, bars.

    make bench-performance                                            # all of it, on the CPU
    python -m dam_bench.performance.run_steps --only clip-inversion-t4         # cases whose name starts like this
    python -m dam_bench.performance.run_steps --missing                        # go on: only what has no result yet
    python -m dam_bench.performance.run_steps --device cuda
    python -m dam_bench.performance.run_steps --table                          # measure nothing, print the table again

Each measurement runs in a process of its own and writes benchmarks/results/performance/NAME.json. Seconds on the CPU
are those of the process (one thread), which other jobs of the machine lengthen less than they do the wall's.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dam_bench.performance.elementwise import measure_elementwise
from dam_bench.performance.scaling import put_between
from dam_bench.performance.steps import Case, measure
from dam_bench.performance.throughput import METHODS, measure_merges
from dam_bench.performance.windows import measure_window
from dam_bench.runs.peer import FOLDER, peer_python
from mergekit_dam.errors import DamError

LOG = logging.getLogger("performance")
STUDY = Path(__file__).parents[2] / "STUDY.md"  # the whole table
PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"  # the rows in SHOWN
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
_CLIP, _LLAMA = "4 CLIP vision towers of 87 M", "4 Llamas of 1.1 B in bfloat16"
SHOWN = {
    "clip-inversion-t4-b8-cpu": f"{_CLIP}, one CPU core",
    "clip-inversion-t4-b8-cpu-detection-model": f"{_CLIP}, one CPU core, a mask per model",
    "clip-inversion-t4-b8-cpu-granularity-row": f"{_CLIP}, one CPU core, `granularity: row`",
    "clip-inversion-t4-b8-cpu-window-2": f"{_CLIP}, one CPU core, `window: 2`",
    "clip-inversion-t4-b8-cuda": f"{_CLIP}, one H200",
    "clip-inversion-t4-b8-cuda-detection-model": f"{_CLIP}, one H200, a mask per model",
    "clip-inversion-t4-b8-cuda-granularity-row": f"{_CLIP}, one H200, `granularity: row`",
    "llama-1b-inversion-t4-b8-cuda-compute_dtype-bfloat16": f"{_LLAMA}, one H200",
    "llama-1b-inversion-t4-b8-cuda-compute_dtype-bfloat16-detection-model": f"{_LLAMA}, one H200, a mask per model",
    "llama-1b-inversion-t4-b8-cuda-compute_dtype-bfloat16-granularity-row": f"{_LLAMA}, one H200, `granularity: row`",
}
MEMORY = Path(__file__).parents[2] / "memory.json"  # of run_memory.py
RESULTS = Path(__file__).parents[2] / "results" / "performance"
CASES = [
    Case("clip", "inversion", 2, batch_size=8),
    Case("clip", "inversion", 4),
    Case("clip", "inversion", 4, batch_size=8),
    Case("clip", "inversion", 8, steps=1, batch_size=8),
    Case("clip", "paper", 2, batch_size=8),
    Case("clip", "paper", 4, batch_size=8),
    Case("clip", "paper", 8, steps=1, batch_size=8),
    # 64 tokens per text; elementwise work weighs more in half of the default batch
    Case("llama", "inversion", 2, steps=1, batch_size=4),
    Case("llama", "inversion", 4, steps=1, batch_size=4),
    Case("llama", "inversion", 4, steps=1, batch_size=8),
    Case("clip", "inversion", 4, steps=1, batch_size=8, settings={"granularity": "row"}),
    Case("clip", "inversion", 4, batch_size=8, settings={"window": 2}),
    Case("clip", "inversion", 4, batch_size=16, settings={"window": 2}),
    # as where something is suspect: a Backdoor-Detection mask per model
    Case("clip", "inversion", 4, steps=1, batch_size=8, settings={"detection": "model"}),
]
BF16 = {"compute_dtype": "bfloat16"}
# a step there takes less than a second; b8 is launches more than arithmetic, b64 the other way round
ON_CUDA = [
    *(Case("clip", "inversion", t, steps=10, warm_up=3, batch_size=b) for t, b in ((2, 8), (4, 8), (8, 8), (4, 64))),
    Case("clip", "inversion", 4, steps=10, warm_up=3, batch_size=8, settings={"granularity": "row"}),
    Case("clip", "inversion", 4, steps=10, warm_up=3, batch_size=8, settings={"detection": "model"}),
    *(Case("llama", "inversion", t, steps=10, warm_up=3, batch_size=8) for t in (4, 8)),
    Case("llama-1b", "inversion", 4, steps=6, warm_up=2, batch_size=8, settings=BF16),
    *(
        Case("llama-1b", "inversion", 4, steps=6, warm_up=2, batch_size=8, settings={**BF16, **more})
        for more in ({"granularity": "row"}, {"detection": "model"})
    ),
]
RATIO = {4: 1.25, 8: 1.4}  # highest step time over the floor, by number of tasks
PEER_TIME, PEER_MEMORY, MERGE = 0.6, 0.4, 0.9
PEER_TASKS, PEER_BATCH = 4, 8
Row = tuple[str, str, str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only measurements whose name starts like this")
    parser.add_argument("--missing", action="store_true", help="only measurements without a result")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, help="folder that the random models are kept in; a temporary one else")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the name of one measurement: this process makes it
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    jobs = _jobs(args.device)
    if args.run:
        command = f"python -m dam_bench.performance.run_steps --only {args.run} --device {args.device}"
        result = jobs[args.run](args.models) | {"command": command}
        (RESULTS / f"{args.run}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not args.table:
        with tempfile.TemporaryDirectory() as folder:
            for name in jobs:
                if name.startswith(args.only) and not (args.missing and (RESULTS / f"{name}.json").is_file()):
                    _start(name, args.device, args.models or Path(folder))
    _write(read_results())


def _jobs(device: str) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """What can be measured, by name."""
    cases = [Case(**{**case.__dict__, "device": device}) for case in (CASES if device == "cpu" else ON_CUDA)]
    jobs: dict[str, Callable[[Path], dict[str, Any]]] = {
        case.name: lambda folder, case=case: (measure_window if "window" in case.settings else measure)(case, folder)  # type: ignore[misc]
        for case in cases
    }
    jobs[f"peer-t{PEER_TASKS}-b{PEER_BATCH}-{device}"] = lambda folder: _peer(device, folder)
    if device != "cpu":
        jobs[f"elementwise-t4-{device}"] = lambda folder: measure_elementwise(4, torch.device(device))
        return jobs
    for other in METHODS:
        jobs[f"merge-clip-t4-{other}"] = lambda folder, other=other: measure_merges("clip", 4, other, folder)  # type: ignore[misc]
    return jobs


def _start(name: str, device: str, models: Path) -> None:
    """One measurement in a process of its own, so that peaks of memory are its own."""
    LOG.info("%s ...", name)
    command = [
        sys.executable,
        "-m",
        "dam_bench.performance.run_steps",
        "--run",
        name,
        "--device",
        device,
        "--models",
        str(models),
    ]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode:
        LOG.warning("%s failed (exit code %d); its old result, if any, stays", name, done.returncode)


def _peer(device: str, folder: Path) -> dict[str, Any]:
    """fusion_bench's step at the same shapes, from its own environment (`make -C benchmarks/peer`)."""
    try:
        python = peer_python()
    except DamError as error:
        raise SystemExit(str(error)) from error
    command = [str(python), str(FOLDER / "run.py"), "--random-clip", str(PEER_TASKS), "--steps", "2"]
    command += [
        "--batch-size",
        str(PEER_BATCH),
        "--coefficient-steps",
        "0",
        "--device",
        device,
        "--out",
        str(folder / "peer"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((folder / "peer" / "peer.json").read_text("utf-8"))
    return found


def read_results() -> dict[str, dict[str, Any]]:
    """Committed results by name of the measurement."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def _write(results: dict[str, dict[str, Any]]) -> None:
    """Print the whole table, write it into benchmarks/STUDY.md, and the rows of SHOWN into docs/scaling.md."""
    rows = table_rows(results)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        LOG.info("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for page, table in ((STUDY, whole_table(results)), (PAGE, short_table(results))):
        page.write_text(put_between(page.read_text("utf-8"), BEGIN, table, END), "utf-8")


def whole_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of `table_rows`."""
    head, *rows = table_rows(results)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---", "---:", "---:", "---"), *rows))


def short_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: of the measurements in SHOWN, a step's time over that of its model passes, and the peak memory."""
    lines = ["| what | step / model passes | peak memory |", "| --- | ---: | ---: |"]
    for name, label in SHOWN.items():
        (_, ratio, _, _), (_, peak, _, _) = _step_rows(name, results[name])
        lines.append(f"| {label} | {ratio} | {peak} |")
    return "\n".join(lines)


def table_rows(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Measurement, figure, bar, and whether the bar holds, under a row of headings."""
    rows: list[Row] = [("measurement", "figure", "bar", "")]
    for name, result in results.items():
        if "ratio" in result:
            rows += _step_rows(name, result)
    for device in ("cpu", "cuda"):
        peer = results.get(f"peer-t{PEER_TASKS}-b{PEER_BATCH}-{device}")
        for objective, bars in (("paper", (PEER_TIME, PEER_MEMORY)), ("inversion", (None, None))):
            ours = results.get(f"clip-{objective}-t{PEER_TASKS}-b{PEER_BATCH}-{device}")
            if peer and ours:
                rows += _peer_rows(peer, ours, f"{objective} / fusion_bench ({device})", bars)
    for name, result in results.items():
        for what, share in result.get("share_of_copy", {}).items():
            rows.append(_row(f"{name}: {what}, rate over that of a copy", share, None))
    for name, result in results.items():
        for method, ratio in result.get("first_throughput_ratio", {}).items():
            rows.append(_row(f"{name}: dam over {method}, first merge of these files", ratio, None))
        for method, ratio in result.get("throughput_ratio", {}).items():
            rows.append(
                _row(f"{name}: dam over {method}", ratio, MERGE if method == "task_arithmetic" else None, low=True)
            )
    memory = json.loads(MEMORY.read_text("utf-8"))["results"] if MEMORY.is_file() else []
    return [*rows, *map(_memory_row, memory)]


def _step_rows(name: str, result: dict[str, Any]) -> list[Row]:
    case, size = result["case"], result["bytes"]
    rows = [_row(f"{name}: step / floor", result["ratio"], RATIO.get(case["tasks"]))]
    peak = size["device"] or size["peak_anonymous"]
    rows.append((f"{name}: peak, own memory", f"{peak / 2**30:.2f} GiB", "", ""))
    return rows


def _memory_row(result: dict[str, Any]) -> Row:
    """A line of run_memory.py: it has no bar, but the arithmetic's figure beside it."""
    what = ", ".join(f"{key} {result[key]}" for key in ("parameters", "tasks", "processes", "window"))
    measured, computed = result["bytes_per_parameter"], result["computed_bytes_per_parameter"]
    return f"memory: {what}", f"{measured} bytes per parameter", f"{computed} computed", ""


def _peer_rows(
    peer: dict[str, Any], ours: dict[str, Any], name: str, bars: tuple[float | None, float | None]
) -> list[Row]:
    """Time and memory of our step over the peer's; how much of the time the plain model's passes alone would take."""
    case = ours["case"]
    # their first step allocates
    theirs = peer["seconds"]["mask_steps_processor" if case["device"] == "cpu" else "mask_steps"][1:]
    one = sum(theirs) / len(theirs)
    seconds = {key: sum(found) / len(found) / one for key, found in ours["seconds"].items()}
    memory = ours["bytes"]["device"] or ours["bytes"]["peak"]
    return [
        _row(f"{name}: step time", seconds["step"], bars[0]),
        _row(f"{name}: our floor over their step", seconds["floor"], None),
        _row(f"{name}: peak memory", memory / (peer["peak_device_bytes"] or peer["peak_rss_bytes"]), bars[1]),
    ]


def _row(name: str, figure: float, bar: float | None, *, low: bool = False) -> Row:
    if bar is None:
        return name, f"{figure:.2f}", "", ""
    holds = figure >= bar if low else figure <= bar
    return name, f"{figure:.2f}", f"{'>=' if low else '<='} {bar:g}", "holds" if holds else "does not hold"


if __name__ == "__main__":
    main()
