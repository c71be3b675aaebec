"""Markdown from untrusted strings: model ids, task names, recipes and settings of others end up in cards.

Foreign text only ever stands in code spans and code blocks, where no link, image, mention or HTML can come to life.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
_BACKTICKS = re.compile(r"`+")


def _longest_run(text: str) -> int:
    return max((len(run) for run in _BACKTICKS.findall(text)), default=0)


def code(text: object) -> str:
    """One line of foreign text as a code span; a pipe is written so that it does not end a table's cell."""
    line = _CONTROL.sub(" ", str(text)).strip() or " "
    # a backslash next to a pipe cannot be written in a table's code span: the look-alike keeps the cell whole
    line = line.replace("|", "\u2223")
    ticks = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def block(text: str, language: str = "") -> str:
    """Foreign text as a fenced code block that its content cannot end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells must be safe already: our own words, or `code(...)`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float | None) -> str:
    """In percent; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"
