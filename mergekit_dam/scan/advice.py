"""Say what to do after an audit: sentences with the next command, for the terminal, the JSON and the pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

REACTS = 0.5  # share of the merge's gap to theta_0 from which an input model counts as reacting to the same trigger


def next_steps(facts: Mapping[str, Any], source: str) -> list[str]:
    """Return what to do next, in the order in which to try it; empty where nothing is left to do.

    Args:
        facts: of an audit (`over`, `merge`, `models`).
        source: the recipe, as the user named it; of a merge, whose files are published, only its directory is named.
    """
    if facts["merge"] is not None:
        return _after_merge(facts) if facts["over"] else []
    if not facts["over"]:
        merge = (
            f"Merge with `mergekit-dam merge {source} OUT`, then scan the merge with `mergekit-dam audit OUT`: models "
            "that look clean one by one can be bad together."
        )
        return [merge] if _has_controls(facts) else [_plant(source), merge]
    return [
        f"If you can, leave {_list(facts['over'])} out of {source}, or put a model from elsewhere in the place.",
        f"If you cannot, merge with `mergekit-dam merge {source} OUT`, which defends against what was found, "
        "and not with another method.",
        "Then scan the merge with `mergekit-dam audit OUT`.",
    ]


def _has_controls(facts: Mapping[str, Any]) -> bool:
    return any(control["works"] for entry in facts["models"] for control in entry.get("controls", ()))


def _plant(source: str) -> str:
    return (
        "Whether the scan would find a backdoor in these models is not established: "
        f"`mergekit-dam audit {source} --out audit --controls 3` plants some in copies and tells how many it finds."
    )


def _after_merge(facts: Mapping[str, Any]) -> list[str]:
    recipe = f"{facts['merge']['name']}/mergekit_config.yml"
    again = "with `mergekit-dam merge RECIPE OUT` and `mergekit-dam audit OUT`"
    own, others, unexplained = reacting(facts)
    steps = ["Do not use or publish this merge as it is."]
    if own:
        steps.append(
            f"The trigger works on {_list(own)} alone, too: leave that out of the recipe ({recipe}) or put a "
            f"model from elsewhere in the place, then merge and scan again {again}."
        )
    if unexplained:
        first = f", first {_list(others)}" if others else ""
        hint = " (it reacts alone, as clean models of other tasks can, too)" if others else ""
        steps.append(
            f"On {_list(unexplained)} the task's own model does not react to the trigger alone, so the model "
            f"looks clean and the merge does not. Leave out one model after the other in the recipe ({recipe}){first}"
            f"{hint}, each time {again}, until the finding is gone."
        )
    steps.append(
        f"If you need all of them, `mergekit-dam clean {recipe} -o cleaned` weakens unknown backdoors in every input "
        "model (experimental); merge the cleaned models, and scan that merge."
    )
    return steps


def reacting(facts: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Tell which input models react alone to the triggers of a merge's suspect findings.

    A model reacts if the trigger leads to the target on more samples than theta_0 and than without the trigger, by at
    least `REACTS` of what the merge has beyond theta_0.

    Returns:
        Models that react by their own heads; models of other tasks that react where none of the first does; and the
        tasks of such findings, whose own model does not react.
    """
    own: dict[str, None] = {}
    others: dict[str, None] = {}
    unexplained: dict[str, None] = {}
    for one in (one for entry in facts["models"] for one in entry["classes"] if one.get("evidence")):
        base = max(row["success"] for row in one["evidence"] if row["role"] == "base")
        gap = max(row["success"] for row in one["evidence"] if row["role"] == "merge") - base
        reacts = {
            row["role"]: [
                other["name"]
                for other in one["evidence"]
                if other["role"] == row["role"] and other["success"] - max(base, other["plain"] or 0.0) >= REACTS * gap
            ]
            for row in one["evidence"]
        }
        if reacts.get("own"):
            own |= dict.fromkeys(reacts["own"])
        else:
            others |= dict.fromkeys(reacts.get("other", []))
            unexplained[one["task"]] = None
    return list(own), list(others), list(unexplained)


def suspect_lines(facts: Mapping[str, Any]) -> list[str]:
    """Describe the suspect findings of a merge and what to do next, a line each; none if it is not over."""
    if not facts["over"]:
        return []
    found = [one for entry in facts["models"] for one in entry["classes"] if one["suspect"]]
    lines = [f"the merge, {what_is(one)} (suspicion {one['suspicion']})" for one in found]
    return [f"suspect: {line}" for line in (*lines, *facts["next"])]


def what_is(finding: Mapping[str, Any]) -> str:
    """Name the target of a finding: `class 1 of digits`, or the text of a continuation."""
    target = finding["target"]
    return f"class {target} of {finding['task']}" if isinstance(target, int) else f"{target!r} of {finding['task']}"


def not_scanned(output: object) -> str:
    """Say how to scan a finished merge that was not scanned."""
    return f"the merge itself was not scanned for backdoors: `mergekit-dam audit {output}` does it"


def _list(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
