"""Run `python -m dam_bench SUITE`, with options and exit codes like those of `mergekit-dam`."""

from __future__ import annotations

from dam_bench.cli import bench

if __name__ == "__main__":
    bench(prog_name="python -m dam_bench")
