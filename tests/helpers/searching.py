"""A search on a plan, as `learn` builds it, in this process and without a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.paper_search import PaperSearch
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.tasks import build_tasks
from tests.conftest import fast

Search = TypeVar("Search", PaperSearch, InversionSearch, WindowSearch)
CPU = torch.device("cpu")
SEARCHES: dict[str, Any] = {"inversion": InversionSearch, "paper": PaperSearch}


def new_search(
    kind: type[Search],
    plan: Plan,
    records: list[dict[str, Any]] | None = None,
    *,
    device: torch.device = CPU,
) -> Search:
    """At its start; each step's record goes into `records`."""
    vectors, tasks = TaskVectors(plan), build_tasks(plan, device)
    changed, lazy = survey(vectors).changed, kind is WindowSearch
    model = MergedModel(vectors, changed, device, dtype=tasks[0].dtype, lazy=lazy)
    track = records.append if records is not None else lambda record: None
    start = torch.tensor([m.settings.weight for m in plan.models])
    return kind(model, tasks, plan.config, start, track=track, progress=lambda steps, title: steps)


def learned(
    root: Path, calibration: Path, *, device: torch.device = CPU, **settings: Any
) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """Logits by mask and tensor, coefficients, and losses, after three steps with `base`, `a` and `b`; on the CPU."""
    base, *models = (ModelReference.parse(str(root / name)) for name in ("base", "a", "b"))
    plan = build_plan(base, models, shared=fast(calibration=str(calibration), **settings), per_model={})
    records: list[dict[str, Any]] = []
    search = new_search(SEARCHES[plan.config.objective], plan, records, device=device)
    _, coefficients = search.run()
    logits = {f"{m.name}.{k}": v.cpu() for m in search.masks.values() for k, v in m.logits.items()}
    return logits, coefficients.cpu(), [record["loss"] for record in records if "loss" in record]
