"""All of learning in windows, at two depths of one shape, and what that says of the full depth:

    python -m dam_bench.performance.run_depth --device cuda --cap 24 --folder /tmp/models

By default 4 and 8 of the 32 blocks of a 7B model in bfloat16 with both of its ends, four tasks, windows of 1, from the
models' answers to the last window; the scan is left out. The device may use no more than the cap. Peak memory must not
grow with depth; seconds grow by the same for every block, so two depths give those of all blocks. The result is
printed as JSON, or written to --out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dam_bench.performance.clock import Memory, environment, resident_bytes
from dam_bench.performance.steps import Case, set_up
from mergekit_dam.learn.window_search import WindowSearch

BLOCKS = 32  # of the whole model


def learn(case: Case, folder: Path) -> dict[str, Any]:
    """Learn all windows of a case.

    Returns:
        Seconds, bytes of the device (None on a CPU) and of this process's own memory at their peaks, bytes read, and
        the number of blocks.
    """
    device = torch.device(case.device)
    search, tasks, _ = set_up(case, folder, device)
    assert isinstance(search, WindowSearch) and tasks[0].chain is not None
    search.scan_if_needed = lambda done: None  # type: ignore[method-assign]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, begun = resident_bytes()["RssAnon"], time.perf_counter()
    with Memory() as memory:
        search.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "case": case.__dict__,
        "blocks": tasks[0].chain.end - 2,
        "seconds": round(time.perf_counter() - begun, 2),
        "device_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "own_bytes": memory.anonymous - before,
        "bytes_read": search.model.vectors.bytes_read,
    }


def at_full_depth(shallow: dict[str, Any], deep: dict[str, Any], blocks: int = BLOCKS) -> dict[str, float]:
    """Extrapolate two depths along a line: seconds, and growth of the peak from the one to the other."""
    each = (deep["seconds"] - shallow["seconds"]) / (deep["blocks"] - shallow["blocks"])
    peak = "device_bytes" if deep["device_bytes"] is not None else "own_bytes"
    return {
        "blocks": blocks,
        "seconds": round(deep["seconds"] + each * (blocks - deep["blocks"]), 1),
        "peak_growth": round(deep[peak] / shallow[peak] - 1, 4),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs=2, default=["llama-7b-4", "llama-7b-8"], help="the shallow one first")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cap", type=float, default=24.0, help="GB of the device that may be used")
    parser.add_argument("--folder", type=Path, help="where models are made and kept; default: a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * 1e9 / total))
    settings = {"window": options.window, "steps": options.steps}
    settings |= {"compute_dtype": "bfloat16"} if device.type == "cuda" else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        runs = [
            learn(
                Case(
                    shapes,
                    "inversion",
                    options.tasks,
                    batch_size=options.batch_size,
                    device=options.device,
                    settings=settings,
                ),
                folder,
            )
            for shapes in options.shapes
        ]
    facts = {"runs": runs, "extrapolated": at_full_depth(runs[0], runs[1]), "environment": environment(device)}
    text = json.dumps(facts, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
