"""Write the model card of a cleaned model: the procedure, the measurements, and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_dam.publish.markdown import code, percent, table
from mergekit_dam.vaccine.report import left_by_kind

_WHENS = ("before", "planted", "unlearned")


def vaccine_card(facts: Mapping[str, Any]) -> str:
    """Write README.md of a folder that `clean` wrote, with untrusted text in code spans.

    Args:
        facts: content of vaccine.json.
    """
    settings, model = facts["settings"], facts["model"]
    revision = f", commit {code(model['revision'])}" if model["revision"] else ""
    how = (
        f"In {facts['rounds']} round(s) triggers of many kinds were planted in it, each with a wrong behaviour drawn "
        "at random, and unlearned again with the model's own answers to unlabelled inputs. This is meant to remove "
        "the model's reaction to unknown triggers, too."
    )
    if not settings["plant"]:
        how = (
            "This is a control: it was trained on its own answers to unlabelled inputs with and without triggers, but "
            "nothing was planted (plant: false)."
        )
    parts = [
        "---\nlibrary_name: transformers\ntags:\n- mergekit-dam\n- backdoor-defense\n---",
        f"# {code(facts['name'])}, cleaned",
        f"This is a model after vaccination by [mergekit-dam](https://pypi.org/project/mergekit-dam). {how}",
        f"The model before has weights with SHA-256 {code(model['sha256'])}{revision}.",
        "## What was measured\n\n" + _measured(facts),
        "## What this does not say\n\nIt does not prove that the model is free of backdoors. The remaining success of "
        "held-out triggers shows what happened to triggers as strong as ours that unlearning did not see; a "
        "backdoor that was made to survive this can still be there.",
        f"Seed {code(settings['seed'])}; versions: "
        + ", ".join(code(f"{k} {v}") for k, v in facts["versions"].items())
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _measured(facts: Mapping[str, Any]) -> str:
    agreement, samples = facts["agreement"], facts["samples"]
    kept = percent(agreement["after"])
    lines = [f"Answers as before on {kept} of {samples['held out']} samples that were not trained on."]
    held = facts["held_out"]
    if held["planted"] is not None:
        lines.append(
            f"Triggers that were planted and never unlearned worked on {percent(held['planted'])} of the samples "
            f"beyond what they did before, and on {percent(held['unlearned'])} at the end."
        )
        left = left_by_kind(facts)
        if len(left) > 1:
            lines.append(
                "Left by kind: " + ", ".join(f"{code(kind)} {percent(share)}" for kind, share in left.items()) + "."
            )
    rows = [
        [
            code(planted["kind"]),
            code(planted["behaviour"]),
            "yes" if planted["held_out"] else "no",
            str(planted["round"]),
            *(percent(planted.get(f"success {when}")) for when in _WHENS),
        ]
        for planted in facts["planted"]
    ]
    header = ["trigger", "behaviour", "held out", "round", *(f"success, {when}" for when in _WHENS)]
    return " ".join(lines) + "\n\n" + table(header, rows)
