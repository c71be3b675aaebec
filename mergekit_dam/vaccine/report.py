"""Lines of text for a terminal that report a vaccination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("trigger", "behaviour", "before", "planted", "unlearned")


def summary(facts: Mapping[str, Any]) -> list[str]:
    """Say how much of the planted triggers is left, and how far the model still answers as before."""
    held, others, agreement = facts["held_out"], facts["unlearned"], facts["agreement"]
    lines = []
    if not facts["settings"]["plant"]:
        lines.append("nothing was planted (plant: false)")
    elif others["planted"] is not None:
        lines.append(f"planted and unlearned: {_percent(others['planted'])} -> {_percent(others['unlearned'])}")
    if held["planted"] is not None:
        lines.append(f"planted, never unlearned: {_percent(held['planted'])} -> {_percent(held['unlearned'])}")
        left = left_by_kind(facts)
        if len(left) > 1:
            lines.append("of these, left by kind: " + ", ".join(f"{kind} {_percent(s)}" for kind, s in left.items()))
    count = facts["samples"]["held out"]
    lines.append(f"answers as before: {_percent(agreement['after'])} of {count} samples that were not trained on")
    return lines


def left_by_kind(facts: Mapping[str, Any]) -> dict[str, float]:
    """Say how much of the held-out triggers is left, per kind: mean success beyond that before, the largest first.

    Kinds differ: a mean over them promises too much of some and too little of others.
    """
    excesses: dict[str, list[float]] = {}
    for trigger in facts["planted"]:
        if trigger["held_out"] and trigger.get("success unlearned") is not None:
            excess = trigger["success unlearned"] - (trigger.get("success before") or 0.0)
            excesses.setdefault(trigger["kind"], []).append(max(0.0, excess))
    means = {kind: sum(values) / len(values) for kind, values in excesses.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def table(facts: Mapping[str, Any]) -> list[str]:
    """One line per planted trigger, with its success."""
    rows: list[Sequence[str]] = [_COLUMNS]
    for one in facts["planted"]:
        held = " (held out)" if one["held_out"] else ""
        shown = f"{one['behaviour']} {one['answer']}" if one["behaviour"] == "class" else str(one["behaviour"])
        rows.append([one["kind"] + held, shown, *(_percent(one.get(f"success {when}")) for when in _COLUMNS[2:])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
