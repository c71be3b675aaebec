"""Step time over the compute floor, peak memory, the peer's step and merge throughput: one run, ratios, bars.

    make bench-performance                                     # all of it, on the CPU
    python benchmarks/performance.py --case clip-inversion-t4  # one case by the start of its name
    python benchmarks/performance.py --device cuda

Each case runs in a process of its own and writes benchmarks/results/performance/CASE.json; the table is printed from
these files, so that `--table` alone repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "performance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name starts like this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, help="folder that the random models are kept in")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    raise SystemExit


if __name__ == "__main__":
    main()
