"""A search on a plan, as `learn` builds it, in this process and without a progress bar."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from mergekit_dam.defence import InversionSearch
from mergekit_dam.merged_model import MergedModel
from mergekit_dam.plan import Plan
from mergekit_dam.search import PaperSearch
from mergekit_dam.task_vectors import TaskVectors, survey
from mergekit_dam.tasks import build_tasks

Search = TypeVar("Search", PaperSearch, InversionSearch)
CPU = torch.device("cpu")


def new_search(kind: type[Search], plan: Plan, records: list[dict[str, Any]] | None = None) -> Search:
    """At its start; each step's record goes into `records`."""
    vectors = TaskVectors(plan)
    model = MergedModel(vectors, survey(vectors).changed, CPU)
    track = records.append if records is not None else lambda record: None
    start = torch.tensor([m.settings.weight for m in plan.models])
    return kind(model, build_tasks(plan, CPU), plan.config, start, track=track, progress=lambda steps, title: steps)
