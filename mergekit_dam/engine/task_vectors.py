"""theta_0 and theta_t of a plan, tensor by tensor, from memory-mapped files; and a check of all of them.

A task vector is never stored: merging/rule.py forms theta_t - theta_0 where it is used.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.errors import DamError
from mergekit_dam.merging.checks import require_finite
from mergekit_dam.merging.rule import task_vector
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan, TensorSpec

STAND_INS_FOLDER = "stand-ins"  # of those of a run that is under way
# in the metadata of a stand-in's file; `STUDENT` is there where tensors that are missing are theta_0's
AGREEMENT, SECONDS, STUDENT, VACCINE = "agreement", "seconds", "student", "vaccine"


class TaskVectors:
    """Lazy access to the tensors of base and models by output name. T models."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.specs = {spec.name: spec for spec in plan.tensors}
        self._base = Checkpoint.open(plan.base.path)
        self._models = [Checkpoint.open(model.path) for model in plan.models]

    def base(self, name: str) -> Tensor:
        """theta_0 of one tensor, as stored."""
        return self._base.tensor(self.specs[name].base_source)

    def models(self, name: str) -> list[Tensor | None]:
        """theta_t of one tensor for t = 1..T, as stored; None where a model lacks it."""
        return [
            None if source is None else checkpoint.tensor(source)
            for source, checkpoint in zip(self.specs[name].sources, self._models, strict=True)
        ]


@dataclass(frozen=True)
class Survey:
    """What one reading of all tensors found.

    Attributes:
        changed: specs of floating tensors that some model changed; the others pass through unmasked.
        norms: per model, the L2 norm of its whole task vector.
    """

    changed: tuple[TensorSpec, ...]
    norms: tuple[float, ...]


def survey(vectors: TaskVectors, shards: Shards = ALONE) -> Survey:
    """Read every tensor once: refuse NaN and infinity, find what changed, measure the task vectors.

    With several processes each one reads its rows, and all get the same survey.

    Raises:
        DamError: a weight that is not finite, or models that equal the base in every tensor.
    """
    plan = vectors.plan
    squares = torch.zeros(len(plan.models), dtype=torch.float64)
    moved: dict[str, bool] = {}
    for spec in plan.tensors:
        base = shards.local(vectors.base(spec.name))
        if not base.is_floating_point():
            continue
        require_finite(base, f"tensor {spec.base_source}", f"model {plan.base.name}")
        moved[spec.name] = False
        for t, model in enumerate(vectors.models(spec.name)):
            if model is None:
                continue
            model = shards.local(model)
            require_finite(model, f"tensor {spec.sources[t]}", f"model {plan.models[t].name}")
            square = float(task_vector(base, model).double().square().sum())
            squares[t] += square
            moved[spec.name] |= square > 0.0
    found = shards.union({shards.rank: (squares.tolist(), moved)})
    changed = [spec for spec in plan.tensors if any(there.get(spec.name) for _, there in found.values())]
    if not changed:
        raise DamError(
            "task vectors",
            expected="models that differ from the base",
            got="models equal to the base in every tensor",
            cure="Check base_model and the paths of the models.",
        )
    totals = [math.fsum(there[t] for there, _ in found.values()) for t in range(len(plan.models))]
    return Survey(tuple(changed), tuple(math.sqrt(total) for total in totals))


class StandIns(TaskVectors):
    """theta_0, and students or vaccinated models in place of theta_t, from the files of a run.

    Attributes:
        agreement: model name -> share of its calibration samples on which its student answers as the model does.
        vaccine: model name -> what its vaccination measured (vaccine/clean.py).
        seconds: by part, as a run is timed -> what it took to make them.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        super().__init__(plan)
        self._files = [safe_open(stand_in_file(folder, t), framework="pt") for t in range(len(plan.models))]
        self._there = [frozenset(file.keys()) for file in self._files]
        told = [file.metadata() for file in self._files]
        self._are_students = [STUDENT in one for one in told]
        by_name = dict(zip([model.name for model in plan.models], told, strict=True))
        self.agreement = {name: float(one[AGREEMENT]) for name, one in by_name.items() if STUDENT in one}
        self.vaccine = {name: json.loads(one[VACCINE]) for name, one in by_name.items() if VACCINE in one}
        self.seconds = {f"stand-in of {name}": float(one.get(SECONDS, 0.0)) for name, one in by_name.items()}

    def models(self, name: str) -> list[Tensor | None]:
        """What stands in for theta_t of one tensor, t = 1..T, float32; where it was left as it was, the model's own.

        None where a student keeps theta_0's.
        """
        own = super().models(name) if not all(self._are_students) else [None] * len(self._files)
        return [
            file.get_tensor(name) if name in there else None if student else stored
            for file, there, student, stored in zip(self._files, self._there, self._are_students, own, strict=True)
        ]

    def all(self) -> tuple[dict[str, Tensor], ...]:
        """All tensors that were made, per model, by output name."""
        return tuple({name: file.get_tensor(name) for name in file.keys()} for file in self._files)  # noqa: SIM118


def stand_in_file(folder: Path, index: int) -> Path:
    """Where that of the model at this position is: a run that goes on may call the model otherwise."""
    return folder / STAND_INS_FOLDER / f"{index}.safetensors"
