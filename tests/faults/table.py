"""docs/reliability.md: its table from the JSON of `make faults`. Run this module to write it anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.faults.suite import SUITE

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults" / "faults.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- faults:begin -->\n", "<!-- faults:end -->\n"


def table(results: Path) -> str:
    """Markdown: fault or input, tried, of these struck, survived, lost, outcome, command."""
    facts = json.loads(results.read_text("utf-8"))
    lines = [
        "| fault or input | tried | struck | survived | lost | what happens | command |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    lines += [
        f"| {r['fault']} | {r['tried']} | {r['hit']} | {r['survived']} | {r['lost']} | {r['outcome']} | "
        f"`python -m tests.faults --only {name}`{_shown_by(r)} |"
        for name, r in facts["rows"].items()
    ]
    missing = [name for name in SUITE if name not in facts["rows"]]
    if missing:
        lines += ["", f"Not run with these versions yet: {', '.join(missing)}."]
    seconds = sum(r["seconds"] for r in facts["rows"].values())
    seeds = ", ".join(map(str, sorted({seed for r in facts["rows"].values() for seed in r["seeds"]})))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += ["", f"Seeds {seeds}, {seconds} s in all, {facts['cores']} cores, {versions}."]
    return "\n".join(lines) + "\n"


def _shown_by(row: Mapping[str, Any]) -> str:
    """The tests that a row stands for."""
    tests = [f"`tests/{test.replace('::', '.py::')}`" for test in row.get("tests", [])]
    return f": {', '.join(tests)}" if tests else ""


def render(document: str, content: str) -> str:
    """The document with `content` between its marks."""
    before, rest = document.split(_BEGIN)
    _, after = rest.split(_END)
    return before + _BEGIN + content + _END + after


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text("utf-8"), table(RESULTS)), encoding="utf-8")
