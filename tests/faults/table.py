"""docs/threat-model.md: its table of faults from the JSON of `make faults`. Run this module to write it anew."""

from __future__ import annotations

import json
from pathlib import Path

from tests.faults.suite import SUITE

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults" / "faults.json"
DOCUMENT = ROOT / "docs" / "threat-model.md"
_BEGIN, _END = "<!-- faults:begin -->\n", "<!-- faults:end -->\n"


def table(results: Path) -> str:
    """Markdown: fault or input, trials that it struck of those tried, lost trials, outcome, name of the row."""
    facts = json.loads(results.read_text("utf-8"))
    lines = ["| fault or input | struck / tried | lost | what happens | row |", "| --- | ---: | ---: | --- | --- |"]
    lines += [
        f"| {r['fault']} | {r['hit']} / {r['tried']} | {r['lost']} | {r['outcome']} | `{name}` |"
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


def render(document: str, content: str) -> str:
    """The document with `content` between its marks."""
    before, rest = document.split(_BEGIN)
    _, after = rest.split(_END)
    return before + _BEGIN + content + _END + after


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text("utf-8"), table(RESULTS)), encoding="utf-8")
