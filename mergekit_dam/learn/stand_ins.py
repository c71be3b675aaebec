"""What is merged in the models' places: students of them, vaccinated models, or vaccinated students. T models."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.engine.shards import Shards
from mergekit_dam.engine.task_vectors import (
    AGREEMENT,
    SECONDS,
    STAND_INS_FOLDER,
    STUDENT,
    VACCINE,
    StandIns,
    TaskVectors,
    stand_in_file,
)
from mergekit_dam.io.files import replacing
from mergekit_dam.learn import students
from mergekit_dam.learn.objectives import scans
from mergekit_dam.tasks import Task, reads_text
from mergekit_dam.tasks.base import Progress
from mergekit_dam.vaccine.clean import vaccinate
from mergekit_dam.vaccine.settings import VaccineSettings

LOG = logging.getLogger(__name__)
_LEAST = 0.9  # agreement below which a student is no fair substitute
# of a vaccination that masks files tell of; their own report has the rest
_TOLD = ("held_out", "unlearned", "agreement", "rounds")


def has_students(tasks: Iterable[Task | type[Task]], config: DamConfig) -> bool:
    """Whether students of the models are merged."""
    return scans(config) and students.wanted(tasks, config)


def vaccinated(tasks: Iterable[Task | type[Task]], config: DamConfig) -> bool:
    """Whether models are vaccinated before they are merged (setting `clean`)."""
    if config.clean == "auto":
        return scans(config) and all(task.vaccinated for task in tasks)
    return bool(config.clean)


def stand_ins(
    tasks: Sequence[Task], vectors: TaskVectors, folder: Path, *, shards: Shards, progress: Progress
) -> StandIns | None:
    """Make one of every model; None where the models themselves are to be merged.

    Those that an earlier, interrupted run has left are taken as they are, unless `resume` is off.

    Args:
        tasks: T of them.
        vectors: theta_0 and the models.
        folder: of the run; all processes see it.
        shards: processes that share the models out.
        progress: wraps steps in a progress bar with a title.

    Raises:
        DamError: weights that diverged, or too few samples.
    """
    plan = vectors.plan
    taught, cleaned = has_students(tasks, plan.config), vaccinated(tasks, plan.config)
    if not taught and not cleaned:
        return None
    if shards.rank == 0:
        if not plan.config.constants.resume:
            forget_stand_ins(folder)
        (folder / STAND_INS_FOLDER).mkdir(parents=True, exist_ok=True)
    shards.barrier()
    for index, task in enumerate(tasks):
        if shards.owns(index) and not stand_in_file(folder, index).is_file():
            begun = time.perf_counter()
            made: dict[str, Tensor] = {}
            told: dict[str, str] = {}
            if taught:
                assert reads_text(task), "students are of texts"
                base = {spec.name: vectors.base(spec.name).to(task.device) for spec in plan.tensors}
                made, agreement = students.teach(task, base, plan.config, progress)
                told = {STUDENT: "yes", AGREEMENT: f"{agreement:.4f}"}
            if cleaned:
                start = {**base, **made} if taught else None
                made, facts = _vaccinated(
                    task, start, made, plan.config, folder / STAND_INS_FOLDER / str(index), progress
                )
                told[VACCINE] = json.dumps(facts)
            told[SECONDS] = f"{time.perf_counter() - begun:.3f}"
            with replacing(stand_in_file(folder, index)) as temporary:
                save_file({name: t.contiguous().cpu() for name, t in made.items()}, temporary, metadata=told)
            shutil.rmtree(folder / STAND_INS_FOLDER / str(index), ignore_errors=True)
    shards.barrier()
    found = StandIns(plan, folder)
    if shards.rank == 0:
        _warn(found)
    return found


def _vaccinated(
    task: Task,
    start: Mapping[str, Tensor] | None,
    made: Mapping[str, Tensor],
    config: DamConfig,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that a vaccination changed, with those that were `made` before, and what it measured."""
    # a student's answers are hard: how sure a model is gives away more of what a trigger does
    answers: Literal["soft", "hard"] = "soft" if start is None else "hard"
    settings = VaccineSettings(seed=config.seed, snapshot_every=config.constants.snapshot_every, answers=answers)
    result = vaccinate(
        task,
        settings,
        progress=progress,
        start=start,
        folder=folder,
        resume=config.constants.resume,
        identity="" if start is None else "a student",
    )
    return {**made, **result.weights}, {key: result.facts[key] for key in _TOLD}


def _warn(found: StandIns) -> None:
    for name, value in found.agreement.items():
        if value < _LEAST:
            LOG.warning(
                "dam: the student of %s answers only %.0f %% of the calibration texts as the model does. Give more "
                "texts (num_samples) or raise student_steps.",
                name,
                100 * value,
            )


def forget_stand_ins(folder: Path) -> None:
    """Remove those of a run."""
    shutil.rmtree(folder / STAND_INS_FOLDER, ignore_errors=True)
