"""Write Markdown with untrusted strings, since model ids, task names, recipes and settings of strangers are in cards.

Untrusted text stands only in code spans and code blocks, where links, images, mentions and HTML have no effect.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
_BACKTICKS = re.compile(r"`+")


def _longest_run(text: str) -> int:
    return max((len(run) for run in _BACKTICKS.findall(text)), default=0)


def code(text: object) -> str:
    """Write untrusted text as a code span on one line, in which a pipe does not end a table's cell."""
    line = _CONTROL.sub(" ", str(text)).strip() or " "
    # a backslash next to a pipe cannot be written in a table's code span, so a look-alike replaces the pipe
    line = line.replace("|", "\u2223")
    ticks = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def block(text: str, language: str = "") -> str:
    """Write untrusted text as a fenced code block that its content cannot end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; its cells must be our own text or `code(...)`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float | None) -> str:
    """Write a share in percent; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f} %"
