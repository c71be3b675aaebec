"""The audit: score every input model for backdoors before anything is merged, or a finished merge as one more model.

Models can be clean one by one and bad together (MergeBackdoor, USENIX Security 2025), so the merge is scanned, too: per
task, with that task's head and calibration data. The scan sees unlabelled calibration data only (inversion.py). A score
is a rank within the models at hand, not a proof: a clean model can have a class that is easy to reach, and a trigger of
another kind than those searched is not found.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.io.cache import library_versions
from mergekit_dam.merging.checks import require_finite
from mergekit_dam.merging.rule import task_vector
from mergekit_dam.models.finished import FinishedMerge
from mergekit_dam.models.plan import Plan, revision_of
from mergekit_dam.scan.advice import next_steps
from mergekit_dam.scan.evidence import evidence
from mergekit_dam.scan.findings import Finding, Suspect, in_order, suspects
from mergekit_dam.scan.scanner import KnownScan, scan, undefended
from mergekit_dam.scan.twin import compared_with_twins
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.base import Progress

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Audit:
    """The result of an audit.

    Attributes:
        facts: JSON, schema 1: `models` with scores and ranks, `over` (names), `notes` (sentences that belong beside
            the scores), `next` (what to do), threshold, settings, versions, time. In an audit of a merge, `merge` is
            its directory's name and its SHA-256, and `models` has the merge once per task, under the task's name.
        findings: of the scan, for the pictures.
        suspects: keys of those over the threshold.
        tasks: as the findings number them.
    """

    facts: Mapping[str, Any]
    findings: Sequence[Finding]
    suspects: frozenset[Suspect]
    tasks: Sequence[Task]


def audit(
    plan: Plan,
    tasks: Sequence[Task],
    *,
    threshold: float,
    source: str,
    device: torch.device,
    progress: Progress,
    known: KnownScan | None = None,
    merge: FinishedMerge | None = None,
) -> Audit:
    """Scan every model of a plan, or the merge that was made of them.

    Args:
        tasks: of the plan.
        threshold: suspicion from which a model counts as over, 0 or more.
        source: the recipe as the user named it; read without a merge.
        device: where the models run.
        progress: wraps the models' indices in a progress bar with a title.
        known: where a scan is kept for other runs; None: nowhere.
        merge: of this plan; it is then scanned in place of each task's own model.

    Raises:
        DamError: damaged weights, or data or heads that do not fit.
    """
    begun = time.perf_counter()
    vectors = TaskVectors(plan)
    base = {spec.name: vectors.base(spec.name).to(device) for spec in plan.tensors}
    if merge is None:
        scanned, config, norms = tasks, plan.config, survey(vectors).norms
    else:
        scanned = [task.with_weights(merge.tensors) for task in tasks]
        config, norms = merge_settings(plan.config), (_norm(merge, base),) * len(tasks)
    with torch.enable_grad():  # mergekit may have switched gradients off
        found = in_order(scan(scanned, base, config, progress(range(len(tasks)), "scan"), known))
        # what a merge of clean models has beyond its twin was not measured
        findings = found if merge is not None else compared_with_twins(found, scanned, base, config, threshold)
    marked = {finding.key: finding for finding in suspects(findings, threshold, config.constants)}
    models = model_scores(findings, [task.name for task in tasks], norms, threshold)
    for entry, task, model in zip(models, tasks, plan.models, strict=True):
        if merge is None:
            entry |= {"model": str(model.ref), "revision": revision_of(model)}
        else:  # one model with one norm, which has no others to be compared with
            entry |= {"model": merge.path.resolve().name, "revision": None, "norm_ratio": None}
        entry["defended"] = task.defended
        for one in entry["classes"]:
            key = one.pop("key")
            one |= {"target": tasks[key.task].words_of(key.target), "suspect": key in marked}
            if key in marked:
                one["evidence"] = evidence(marked[key], tasks, base, None if merge is None else merge.tensors)
    facts = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "base": {"model": str(plan.base.ref), "revision": revision_of(plan.base)},
        "merge": None if merge is None else {"name": merge.path.resolve().name, "sha256": merge.sha256},
        "threshold": threshold,
        "models": models,
        "over": [entry["name"] for entry in models if entry["over"]],
        "notes": undefended(tasks),
        "settings": {k: v for k, v in config.named().items() if k.startswith("scan") or k in _SHOWN},
        "versions": library_versions(),
        "device": str(device),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    facts["next"] = next_steps(facts, source)
    return Audit(facts, findings, frozenset(marked), tasks)


def merge_settings(config: DamConfig) -> DamConfig:
    """Return the settings for the scan of a merge: no task is scanned again with other models in place of its own.

    What another model brings to a task is in the merge itself.
    """
    return config.model_copy(update={"constants": config.constants.model_copy(update={"scan_others": False})})


def _norm(merge: FinishedMerge, base: Mapping[str, Tensor]) -> float:
    """L2 norm of merge - theta_0; refuse weights that are not finite."""
    total = 0.0
    for name, tensor in merge.tensors.items():
        if tensor.is_floating_point():
            require_finite(tensor, f"tensor {name}", f"the merge {merge.path}")
            total += float(task_vector(base[name].cpu(), tensor).double().square().sum())
    return math.sqrt(total)


_SHOWN = ("seed", "num_samples", "max_length", "perturbation_tokens")


def model_scores(
    findings: Sequence[Finding], names: Sequence[str], norms: Sequence[float], threshold: float
) -> list[dict[str, Any]]:
    """One entry per model: suspicion, rank among the models, classes by rank, norm of its task vector.

    Args:
        findings: of the scan; a model without any is never over.
        names: of the models, T.
        norms: L2 norm of each task vector, T.
        threshold: suspicion from which a model counts as over.

    Returns:
        In the order of `names`. `suspicion` is that of the model's most suspect class, None without any finding;
        `rank` 1 is the most suspect model; `norm_ratio` is its norm over the median of the others'.
    """
    entries: list[dict[str, Any]] = []
    for index, (name, norm) in enumerate(zip(names, norms, strict=True)):
        own = sorted((f for f in findings if f.model == index), key=lambda f: -f.suspicion)
        others = [other for i, other in enumerate(norms) if i != index]
        middle = statistics.median(others) if others else 0.0
        top = own[0].suspicion if own else None
        entries.append(
            {
                "name": name,
                "suspicion": None if top is None else round(float(top), 4),
                "rank": None,
                "over": top is not None and top >= threshold,
                "task_vector_norm": norm,
                "norm_ratio": round(norm / middle, 4) if middle > 0 else None,
                "classes": [
                    {
                        "task": names[f.task],
                        "target": f.target,
                        "kind": f.trigger.kind,
                        **f.numbers,
                        "shared": round(f.shared, 4),
                        "key": f.key,
                        "rank": rank,
                    }
                    for rank, f in enumerate(own, 1)
                ],
            }
        )
    scanned = sorted((e for e in entries if e["suspicion"] is not None), key=lambda e: -e["suspicion"])
    for rank, entry in enumerate(scanned, 1):
        entry["rank"] = rank
    return entries
