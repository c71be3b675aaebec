"""The fuzzed properties of the tests, with many more cases, in a process of their own: a crash is a loss, too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.faults.row import Row
from tests.faults.world import World

_WEIGHTS = "damaged_model or lying or noise or damaged_masks or any_form"
_DATA = "damaged_parquet or damaged_images or report_of_anything"
_FILES = (
    *(f"tests/hostile/test_{subject}.py" for subject in ("files", "data", "images", "reports")),
    "tests/artifact/test_hostile_masks.py",
)


def fuzz_weights(world: World, cases: int) -> Row:
    """`cases` files per property: damaged and lying safetensors, masks, and their metadata."""
    return _fuzz("damaged and lying safetensors headers and masks files", _WEIGHTS, cases, "256 MB each")


def fuzz_data(world: World, cases: int) -> Row:
    """`cases` files per property: parquet, images, and what a report is made of."""
    memory = "256 MB each (a report 400 MB; parquet whose footer lies 2.2 GB, see SECURITY.md)"
    return _fuzz("damaged parquet and images, and reports on anything", _DATA, cases, memory)


def _fuzz(what: str, chosen: str, cases: int, memory: str) -> Row:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "-k",
            chosen,
            "--hypothesis-show-statistics",
            "--timeout",
            "1200",
            *_FILES,
        ],
        cwd=root,
        env={**os.environ, "DAM_FUZZ_CASES": str(cases), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    counts = [int(n) for n in re.findall(r"- (\d+) passing", done.stdout)]
    failed = done.stdout[-1500:] if done.returncode or not counts else None
    tried = sum(counts) + (failed is not None)
    return Row(
        f"{what}, {len(counts)} kinds",
        tried,
        tried,
        sum(counts),
        f"refused with one line, or read within the bounds of the file; at most 5 s and {memory}",
        (failed,) if failed else (),
    )
