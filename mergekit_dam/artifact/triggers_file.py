"""Read and write `triggers.safetensors`: the triggers that the scan recovered, for people to look at.

    metadata "dam_triggers"   JSON list, one entry per trigger: the finding's numbers, `suspect`, `kind`, and for text
                              `tokens`: per inserted position the nearest words of the vocabulary with their cosine
    <i>.mask, <i>.pattern     float16, (1, H, W) and (C, H, W) in [0, 1], of entry i with kind "pixels":
                              an image becomes x (1 - mask) + pattern mask; with kind "style" a grey checkerboard
                              as the trigger changes it
    <i>.embeddings            float32, (K, D), of entry i with kind "tokens": inserted after the first token
The file holds all suspects, and each model's most suspect class. Legend: C, H, W of images, K tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.files import replacing
from mergekit_dam.scan.findings import Finding, Suspect
from mergekit_dam.tasks import Task


@dataclass(frozen=True, eq=False)
class StoredTrigger:
    """A recovered trigger in the file, with its facts.

    Attributes:
        facts: the finding's numbers, `task`, `target`, `suspect`, `kind`; for text also `tokens`.
        tensors: `mask` and `pattern`, or `embeddings`.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save_triggers(
    path: Path, findings: Sequence[Finding], tasks: Sequence[Task], suspects: Collection[Suspect]
) -> None:
    """Write the suspects and each model's most suspect class.

    Args:
        suspects: keys of the suspect findings.
    """
    top: dict[int, Finding] = {}
    for finding in findings:
        if finding.model not in top or finding.suspicion > top[finding.model].suspicion:
            top[finding.model] = finding
    kept = [f for f in findings if f.key in suspects or top[f.model] is f]
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for i, finding in enumerate(kept):
        task = tasks[finding.task]
        parts = finding.trigger.shown(task.perturbation_shape)
        entry = {**finding.to_json(tasks), "suspect": finding.key in suspects}
        if "embeddings" in parts:
            entry["tokens"] = task.nearest_tokens(parts["embeddings"])
        entries.append(entry)
        tensors |= {f"{i}.{name}": tensor.contiguous().cpu() for name, tensor in parts.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"dam_triggers": json.dumps(entries)})


def rename_entries(path: Path, rename: Callable[[list[Any]], list[Any]]) -> None:
    """Apply `rename` to the JSON entries of the file, if it exists; the tensors do not change."""
    if path.is_file():
        with safe_open(str(path), framework="pt") as file:
            entries = rename(json.loads((file.metadata() or {})["dam_triggers"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator there)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"dam_triggers": json.dumps(entries)})


def load_triggers(path: Path) -> list[StoredTrigger]:
    """Read the triggers of the file; empty if the file is missing.

    Raises:
        DamError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        with safe_open(str(path), framework="pt") as file:
            entries = json.loads((file.metadata() or {})["dam_triggers"])
            tensors: dict[int, dict[str, Tensor]] = {}
            for name in sorted(file.keys()):
                tensors.setdefault(_row(name), {})[name.partition(".")[2]] = file.get_tensor(name)
            for entry in entries:
                if not all(isinstance(entry[key], (int, float)) for key in ("success", "control", "suspicion")):
                    raise ValueError("a rate that is no number")
            return [StoredTrigger(dict(entry), tensors.get(i, {})) for i, entry in enumerate(entries)]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamError(
            f"triggers {path}",
            expected="the file that learning wrote",
            got=f"a damaged file ({first_line(error)})",
            cure="Remove it and learn again.",
        ) from error


def _row(name: str) -> int:
    return int(name.partition(".")[0])
