"""Make stand-ins to merge in place of models: students, vaccinated models or vaccinated students. T models."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
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
_LEAST_AGREEMENT = 0.9  # below it a student is a poor substitute, and a warning says so
_VACCINE_FACTS = ("held_out", "unlearned", "agreement", "rounds")


def merges_students(tasks: Sequence[Task | type[Task]], config: DamConfig) -> bool:
    """Whether students are merged in place of the models."""
    return scans(config) and students.uses_students(tasks, config)


def vaccinates(tasks: Sequence[Task | type[Task]], config: DamConfig) -> bool:
    """Whether models are vaccinated before they are merged (setting `clean`); of causal LMs, students take it over."""
    return config.clean and not (students.is_causal(tasks) and merges_students(tasks, config))


def teaches_suspects(tasks: Sequence[Task | type[Task]], config: DamConfig) -> bool:
    """Whether students are merged in place of the models that a scan makes suspect."""
    wanted = scans(config) and config.mask != "m1" and config.student_steps > 0 and students.is_causal(tasks)
    return wanted and not vaccinates(tasks, config) and not merges_students(tasks, config)


def student_settings(config: DamConfig) -> VaccineSettings:
    """Return the settings by which theta_0 is taught a causal LM's answers."""
    return VaccineSettings(
        start="base",
        plant=False,
        plant_steps=0,
        unlearn_steps=config.student_steps,
        seed=config.seed,
        snapshot_every=config.constants.snapshot_every,
    )


def make_stand_ins(
    tasks: Sequence[Task],
    vectors: TaskVectors,
    folder: Path,
    *,
    shards: Shards,
    progress: Progress,
    suspects: Collection[int] = (),
) -> StandIns | None:
    """Make a stand-in of every model, or of suspects; return None if the models themselves are merged.

    Stand-ins of an earlier, interrupted run are used again, unless the constant `resume` is off.

    Args:
        tasks: T tasks.
        vectors: theta_0 and the models.
        folder: folder of the run; all processes see it.
        shards: processes that share the models.
        progress: wraps steps in a progress bar with a title.
        suspects: indices of models to make students of; none: the settings say what is made of all models.

    Raises:
        DamError: weights that diverged, or too few samples.
    """
    plan = vectors.plan
    students_made, vaccinated = merges_students(tasks, plan.config), vaccinates(tasks, plan.config)
    if not students_made and not vaccinated and not suspects:
        return None
    if shards.rank == 0:
        if not plan.config.constants.resume:
            remove_stand_ins(folder)
        (folder / STAND_INS_FOLDER).mkdir(parents=True, exist_ok=True)
    shards.barrier()
    for index, task in enumerate(tasks):
        if shards.owns(index) and not stand_in_file(folder, index).is_file():
            begun = time.perf_counter()
            made: dict[str, Tensor] = {}
            metadata: dict[str, str] = {}
            if index in suspects or (students_made and not task.classifies):
                made, metadata = _teach(task, vectors, folder / STAND_INS_FOLDER / str(index), progress)
            elif students_made:
                assert reads_text(task), "students are of texts"
                base = {spec.name: vectors.base(spec.name).to(task.device) for spec in plan.tensors}
                made, agreement = students.train_student(task, base, plan.config, progress)
                metadata = {STUDENT: "yes", AGREEMENT: f"{agreement:.4f}"}
            if vaccinated:
                start = {**base, **made} if students_made else None
                made, facts = _vaccinate(
                    task, start, made, plan.config, folder / STAND_INS_FOLDER / str(index), progress
                )
                metadata[VACCINE] = json.dumps(facts)
            metadata[SECONDS] = f"{time.perf_counter() - begun:.3f}"
            with replacing(stand_in_file(folder, index)) as temporary:
                save_file({name: t.contiguous().cpu() for name, t in made.items()}, temporary, metadata=metadata)
            shutil.rmtree(folder / STAND_INS_FOLDER / str(index), ignore_errors=True)
    shards.barrier()
    stand_ins = StandIns(plan, folder)
    if shards.rank == 0:
        _warn(stand_ins)
    return stand_ins


def _teach(
    task: Task, vectors: TaskVectors, folder: Path, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Teach theta_0 a model's answers, by LoRAs; return the tensors that this changes, and the file's metadata.

    A text that only a trigger brings about is not in the answers.
    """
    config = vectors.plan.config
    result = vaccinate(
        task,
        student_settings(config),
        progress=lambda steps, title: progress(steps, f"student of {task.name}"),
        start={spec.name: vectors.base(spec.name).to(task.device) for spec in vectors.plan.tensors},
        folder=folder,
        resume=config.constants.resume,
        identity="theta_0",
    )
    return dict(result.weights), {STUDENT: "yes", AGREEMENT: f"{result.facts['agreement']['after']:.4f}"}


def _vaccinate(
    task: Task,
    start: Mapping[str, Tensor] | None,
    made: Mapping[str, Tensor],
    config: DamConfig,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Vaccinate a model or its student; return the changed tensors with those in `made`, and the measured facts.

    Args:
        start: weights of the student, whole; None for the model itself.
        made: tensors of the student.
    """
    # hard labels for a student: probabilities would pass on more of a trigger's effect
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
    return {**made, **result.weights}, {key: result.facts[key] for key in _VACCINE_FACTS}


def _warn(stand_ins: StandIns) -> None:
    """Warn of students that answer too few calibration samples as their models do."""
    for name, value in stand_ins.agreement.items():
        if value < _LEAST_AGREEMENT:
            LOG.warning(
                "dam: the student of %s answers only %.0f %% of the calibration texts as the model does. Give more "
                "texts (num_samples) or raise student_steps.",
                name,
                100 * value,
            )


def remove_stand_ins(folder: Path) -> None:
    """Remove the stand-ins of a run."""
    shutil.rmtree(folder / STAND_INS_FOLDER, ignore_errors=True)
