"""`make faults`: every fault many times, a line per row, and the JSON from which docs/threat-model.md is made.

python -m tests.faults --out benchmarks/results/faults/faults.json            # all, some 30 minutes on one core
python -m tests.faults --out benchmarks/results/faults/faults.json --seed 1   # once more, added to the counts
python -m tests.faults --only learn_killed --scale 5                          # one row, five times as often
python -m tests.faults --only commands --scale 0.25 --seed 7                  # 25 runs; with --out they are added
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from mergekit_dam.io.cache import library_versions
from mergekit_dam.io.files import write_atomic
from tests.faults.row import Row
from tests.faults.suite import SUITE
from tests.faults.world import World


def main() -> int:
    """Run the rows; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON of results; a new seed adds to its rows")
    parser.add_argument("--only", action="append", choices=list(SUITE), help="only this row (may be repeated)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of trials")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments, sizes and bits")
    options = parser.parse_args()
    began, lost = time.monotonic(), 0
    sys.stdout.write(f"{'row':20} {'tried':>6} {'struck':>6} {'survived':>8} {'lost':>5} {'seconds':>7}\n")
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), seed=options.seed, rows=options.only or list(SUITE))
        for name in options.only or SUITE:
            start, row, entry = time.monotonic(), None, SUITE[name]
            earlier = _earlier(options.out, name, options.seed)
            for trials in entry.pieces(max(1, round(entry.trials * options.scale))):
                piece = entry.run(world, trials)
                row = piece if row is None else row + piece
                if options.out is not None:
                    _record(options.out, name, row, options.seed, time.monotonic() - start, earlier)
            assert row is not None, "there is at least one trial"
            seconds = time.monotonic() - start
            sys.stdout.write(
                f"{name:20} {row.tried:6} {row.hit:6} {row.survived:8} {row.lost:5} {seconds:7.0f}  {row.outcome}\n"
            )
            for note in row.notes:
                sys.stdout.write(f"    lost: {note}\n")
            sys.stdout.flush()
            lost += row.lost
    sys.stdout.write(f"{lost} lost, {time.monotonic() - began:.0f} s\n")
    return int(lost > 0)


def _earlier(path: Path | None, name: str, seed: int) -> dict[str, Any] | None:
    """The row of earlier runs with other seeds, to which this one is added."""
    facts = json.loads(path.read_text("utf-8")) if path is not None and path.is_file() else {}
    row: dict[str, Any] | None = (
        facts.get("rows", {}).get(name) if facts.get("versions") == library_versions() else None
    )
    return row if row is not None and seed not in row["seeds"] else None


def _record(path: Path, name: str, row: Row, seed: int, seconds: float, earlier: Mapping[str, Any] | None) -> None:
    """Put one row into the results; rows of other versions are dropped."""
    record = {key: value for key, value in vars(row).items() if key != "notes"}
    record |= {"lost": row.lost, "seconds": round(seconds), "seeds": [seed]}
    if earlier is not None:
        added = ("tried", "hit", "survived", "lost", "seconds", "seeds")
        record |= {key: earlier[key] + record[key] for key in added}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        facts = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if facts.get("versions") != library_versions():
            facts = {"versions": library_versions(), "cores": os.cpu_count(), "rows": {}}
        rows: dict[str, Any] = facts["rows"]
        rows[name] = record
        facts["rows"] = {known: rows[known] for known in SUITE if known in rows}
        write_atomic(path, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
