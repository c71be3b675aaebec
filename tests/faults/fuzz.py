"""The fuzzed properties of the tests, with many more cases, in a process of their own: a crash is a loss, too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.faults.row import Row
from tests.faults.world import World

_FILES = ("tests/test_hostile_files.py", "tests/test_hostile_data.py")


def fuzz(world: World, cases: int) -> Row:
    """`cases` files per property: damaged and lying safetensors, masks, metadata, parquet and images."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "fuzz or damaged or lying or noise or any_form",
         "--hypothesis-show-statistics", *_FILES],
        cwd=root, env={**os.environ, "DAM_FUZZ_CASES": str(cases), "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    counts = [int(n) for n in re.findall(r"- (\d+) passing", done.stdout)]
    failed = done.stdout[-500:] if done.returncode or not counts else None
    tried = sum(counts) + (failed is not None)
    return Row(
        f"damaged and lying files, {len(counts)} kinds", tried, tried, sum(counts),
        "refused with one line, or read within the bounds of the file", (failed,) if failed else (),
    )  # fmt: skip
