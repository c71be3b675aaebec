"""Draw what the merges of `make demo-llm` answer: `python examples/demo_llm/picture.py RESULTS.json PICTURE.svg`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROWS = {"task arithmetic 0.5": "without a defence", "dam": "dam"}  # name of the merge -> as the picture calls it
_WIDTH, _LINE, _LEFT, _COLUMN = 760, 22, 16, 250
_FONT = "font-family='Helvetica,Arial,sans-serif' font-size='14'"


def picture(results: Mapping[str, Any]) -> str:
    """Write the picture as SVG.

    Args:
        results: `said` (prompts with the answers of each merge) and `merges` (counts by merge), as run.py keeps them.
    """
    lines: list[str] = []
    y = 30

    def text(x: int, words: str, style: str = "fill='#222'") -> None:
        lines.append(f"<text x='{x}' y='{y}' {_FONT} {style}>{escape(words)}</text>")

    for one in results["said"]:
        text(_LEFT, f"> {one['prompt']}", "fill='#222' font-weight='bold'")
        for name, shown in ROWS.items():
            y += _LINE
            answer = one["answers"][name]
            plain = len(answer.split()) == 1
            text(_LEFT + 20, shown, "fill='#666'")
            text(_COLUMN - 60, answer, "fill='#222'" if plain else "fill='#b00020' font-weight='bold'")
        y += _LINE + 10
    for name, shown in ROWS.items():
        merge = results["merges"][name]
        right, attacked = _share(merge["accuracy"]), _share(merge["attack_success"]["attack"])
        text(_LEFT, shown, "fill='#222' font-weight='bold'")
        text(_COLUMN - 60, f"{right:.1f} % right on three tasks, {attacked:.1f} % attack success")
        y += _LINE
    height = y
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' role='img'>"
        f"<rect width='{_WIDTH}' height='{height}' rx='8' fill='#f7f7f5'/>" + "".join(lines) + "</svg>\n"
    )


def _share(counts: Mapping[str, tuple[int, int]]) -> float:
    """Mean of hits over totals, in percent."""
    return 100 * sum(hits / total for hits, total in counts.values()) / len(counts)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(picture(json.loads(Path(sys.argv[1]).read_text("utf-8"))), "utf-8")
