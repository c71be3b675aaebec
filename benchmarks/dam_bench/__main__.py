"""`python -m dam_bench SUITE`: options and exit codes as those of `mergekit-dam`."""

from __future__ import annotations

from dam_bench.cli import bench

if __name__ == "__main__":
    bench(prog_name="python -m dam_bench")
