"""Read theta_0 and theta_t of a plan, tensor by tensor, from memory-mapped files, and check all of them.

A task vector is never stored: merging/rule.py forms theta_t - theta_0 where it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
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

STAND_INS_FOLDER = "stand-ins"  # in the folder of an unfinished run
# metadata of a stand-in's file; with `STUDENT`, missing tensors equal theta_0's
AGREEMENT, SECONDS, STUDENT, VACCINE = "agreement", "seconds", "student", "vaccine"


class TaskVectors:
    """Lazy access to the tensors of base and models by output name. T models.

    Attributes:
        specs: tensors of the plan by output name.
        bytes_read: bytes that `FrozenModels` took from the files, in this process.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.bytes_read = plan, 0
        self.specs = {spec.name: spec for spec in plan.tensors}
        self._base = Checkpoint.open(plan.base.path)
        self._models = [Checkpoint.open(model.path) for model in plan.models]

    def base(self, name: str) -> Tensor:
        """Return theta_0 of one tensor, in its stored type."""
        return self._base.tensor(self.specs[name].base_source)

    def models(self, name: str) -> list[Tensor | None]:
        """Return theta_t of one tensor for t = 1..T, in its stored type; None where a model lacks the tensor."""
        return [
            None if source is None else checkpoint.tensor(source)
            for source, checkpoint in zip(self.specs[name].sources, self._models, strict=True)
        ]


@dataclass(frozen=True)
class Survey:
    """Result of `survey`.

    Attributes:
        changed: floating tensors that some model changed; all other tensors are merged without a mask.
        norms: per model, the L2 norm of its whole task vector.
    """

    changed: tuple[TensorSpec, ...]
    norms: tuple[float, ...]


def survey(vectors: TaskVectors, shards: Shards = ALONE) -> Survey:
    """Read every tensor once: refuse NaN and infinity, find tensors that changed, measure the task vectors.

    With several processes each process reads its rows, and all processes return the same survey.

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
    by_rank = shards.all_gather_dict({shards.rank: (squares.tolist(), moved)})
    changed = [spec for spec in plan.tensors if any(there.get(spec.name) for _, there in by_rank.values())]
    if not changed:
        raise DamError(
            "task vectors",
            expected="models that differ from the base",
            got="models equal to the base in every tensor",
            cure="Check base_model and the paths of the models.",
        )
    totals = [math.fsum(sums[t] for sums, _ in by_rank.values()) for t in range(len(plan.models))]
    return Survey(tuple(changed), tuple(math.sqrt(total) for total in totals))


class StandIns(TaskVectors):
    """theta_0, and students or vaccinated models in place of theta_t, from the files of a run.

    Attributes:
        agreement: model name -> share of its calibration samples that its student answers as the model does.
        vaccine: model name -> results of its vaccination (vaccine/clean.py).
        seconds: phase of a run, `stand-in of NAME` -> seconds to make the stand-in.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        super().__init__(plan)
        self._files = [safe_open(stand_in_file(folder, t), framework="pt") for t in range(len(plan.models))]
        self._names = [frozenset(file.keys()) for file in self._files]
        metadata = [file.metadata() for file in self._files]
        self._students = [STUDENT in facts for facts in metadata]
        by_name = dict(zip([model.name for model in plan.models], metadata, strict=True))
        self.agreement = {name: float(facts[AGREEMENT]) for name, facts in by_name.items() if STUDENT in facts}
        self.vaccine = {name: json.loads(facts[VACCINE]) for name, facts in by_name.items() if VACCINE in facts}
        self.seconds = {f"stand-in of {name}": float(facts.get(SECONDS, 0.0)) for name, facts in by_name.items()}

    def models(self, name: str) -> list[Tensor | None]:
        """Return theta_t of one tensor for t = 1..T with stand-ins in place of models; see `with_stand_ins`."""
        made = [
            file.get_tensor(name) if name in names else None
            for file, names in zip(self._files, self._names, strict=True)
        ]
        return with_stand_ins(made, super().models(name), self.base(name), students=self._students)

    def all(self) -> tuple[dict[str, Tensor], ...]:
        """Return all tensors of the stand-ins, per model, by output name, float32."""
        return tuple({name: file.get_tensor(name) for name in file.keys()} for file in self._files)  # noqa: SIM118


def with_stand_ins(
    made: Sequence[Tensor | None], models: Sequence[Tensor | None], base: Tensor, *, students: Sequence[bool]
) -> list[Tensor | None]:
    """Replace the models of one tensor by their stand-ins, for learning and for merging.

    Args:
        made: T tensors of the stand-ins, float32; None where a stand-in did not change the tensor.
        models: T tensors of the models; None where a model lacks the tensor.
        base: theta_0's tensor.
        students: whether each stand-in started from theta_0 and not from its model, T.

    Returns:
        T tensors. Where a stand-in did not change the tensor: theta_0's, of a student; else the model's. None where a
        model lacks the tensor.
    """
    unchanged = [base if taught and own is not None else own for own, taught in zip(models, students, strict=True)]
    return [stored if tensor is None else tensor for tensor, stored in zip(made, unchanged, strict=True)]


def stand_in_file(folder: Path, index: int) -> Path:
    """Return the file of a model's stand-in; its name has no model name, which may differ when a run resumes."""
    return folder / STAND_INS_FOLDER / f"{index}.safetensors"
