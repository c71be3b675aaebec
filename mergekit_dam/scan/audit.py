"""The audit: score every input model for backdoors by the scan, before anything is merged.

The scan sees unlabelled calibration data only (inversion.py). A score is a rank within the models at hand, not a proof:
a clean model can have a class that is easy to reach, and a trigger of another kind than those searched is not found.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.io.cache import library_versions
from mergekit_dam.models.plan import Plan, revision_of
from mergekit_dam.scan.findings import Finding, Suspect, in_order, suspects
from mergekit_dam.scan.scanner import KnownScan, scan, undefended
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.base import Progress

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Audit:
    """The result of an audit.

    Attributes:
        facts: JSON, schema 1: `models` with scores and ranks, `over` (names), `notes` (sentences that belong beside
            the scores), threshold, settings, versions, time.
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
    device: torch.device,
    progress: Progress,
    known: KnownScan | None = None,
) -> Audit:
    """Scan every model of a plan.

    Args:
        tasks: of the plan.
        threshold: suspicion from which a model counts as over, 0 or more.
        device: where the models run.
        progress: wraps the models' indices in a progress bar with a title.
        known: where a scan is kept for other runs; None: nowhere.

    Raises:
        DamError: damaged weights, or data or heads that do not fit.
    """
    begun = time.perf_counter()
    vectors = TaskVectors(plan)
    found = survey(vectors)
    findings = known.take() if known is not None else None
    if findings is None:
        base = {spec.name: vectors.base(spec.name).to(device) for spec in plan.tensors}
        findings = in_order(scan(tasks, base, plan.config, progress(range(len(tasks)), "scan")))
        if known is not None:
            known.keep(findings)
    marked = frozenset(finding.key for finding in suspects(findings, threshold, plan.config.constants))
    models = model_scores(findings, [task.name for task in tasks], found.norms, threshold)
    inputs = {model.name: model for model in plan.models}
    defended = {task.name: task.defended for task in tasks}
    for entry in models:
        entry |= {"model": str(inputs[entry["name"]].ref), "revision": revision_of(inputs[entry["name"]])}
        entry["defended"] = defended[entry["name"]]
        for one in entry["classes"]:
            key = one.pop("key")
            one |= {"target": tasks[key.task].words_of(key.target), "suspect": key in marked}
    facts = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "base": {"model": str(plan.base.ref), "revision": revision_of(plan.base)},
        "threshold": threshold,
        "models": models,
        "over": [entry["name"] for entry in models if entry["over"]],
        "notes": undefended(tasks),
        "settings": {k: v for k, v in plan.config.named().items() if k.startswith("scan") or k in _SHOWN},
        "versions": library_versions(),
        "device": str(device),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    return Audit(facts, findings, marked, tasks)


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
