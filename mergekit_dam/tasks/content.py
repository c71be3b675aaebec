"""Cache keys: digests of all that a result depends on, by content and position, whatever files and tasks are called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence

from mergekit_dam.config import NOT_LEARNED
from mergekit_dam.io.cache import code_digest, library_versions
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan
from mergekit_dam.registry import OBJECTIVES, SCANNERS, TRIGGERS, code_of
from mergekit_dam.tasks.base import Task

BY_CONTENT = frozenset({"zero_shot_model"})  # settings that name a file: the tasks' fingerprints hold what is in it


def digests_of(plan: Plan) -> dict[str, str]:
    """Hash the weight files of base and models, by model name (`base` for theta_0)."""
    models = (plan.base, *plan.models)
    return {model.name: Checkpoint.open(model.path).digest() for model in models}


def content_key(
    plan: Plan,
    tasks: Sequence[Task],
    digests: Mapping[str, str],
    *,
    without: Collection[str] = (),
    code: Sequence[str] = (),
    only: int | None = None,
) -> str:
    """Name a cache entry: runs that learn the same share it, wherever their inputs lie and whatever their names.

    Args:
        tasks: of the plan, in the order of its models.
        digests: as `digests_of` gives them.
        without: settings that the result does not depend on.
        code: digests of further code that the result depends on.
        only: index of the one model that the result depends on; None: on all of them.

    Returns:
        32 hex digits over settings, weights, samples, heads, configs, the plan's tensors, library versions and code.
    """
    chosen = range(len(tasks)) if only is None else [only]
    facts = [
        plan.config.named(without={*NOT_LEARNED, *BY_CONTENT, *without}),
        digests[plan.base.name],
        [
            [
                digests[plan.models[i].name],
                None if "weight" in without else plan.models[i].settings.weight,
                tasks[i].fingerprint(),
            ]
            for i in chosen
        ],
        [
            [spec.name, spec.mask_name, spec.shape, spec.base_source, [spec.sources[i] for i in chosen]]
            for spec in plan.tensors
        ],
        only,
        library_versions(),
        code_digest(),
        [*_code_of_others(plan, [tasks[i] for i in chosen]), *code],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _code_of_others(plan: Plan, tasks: Sequence[Task]) -> list[str]:
    """Digests of the code of other packages that has a part in what is learned."""
    found = [OBJECTIVES.code_of(plan.config.objective), code_of(type(tasks[0]))]
    for task in tasks:
        found += [SCANNERS.code_of(task.scanner), *(TRIGGERS.code_of(kind) for kind in task.trigger_kinds)]
    return [digest for digest in found if digest is not None]
