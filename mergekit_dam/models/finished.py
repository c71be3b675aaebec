"""Read the tensors of a finished merge by the output names of its plan, for a scan of the merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dam.errors import DamError
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan, TensorSpec


@dataclass(frozen=True, eq=False)
class FinishedMerge:
    """A merge on the disk.

    Attributes:
        path: its directory.
        sha256: over its weight files (`Checkpoint.digest`).
        tensors: by output name, in their stored type and the shapes of the plan.
    """

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]


def finished_merge(plan: Plan, output: Path) -> FinishedMerge:
    """Open the merge of a plan.

    A recipe may change the vocabulary of its output. Rows that the inputs lack are left out, and rows that the output
    lacks, of no token, are theta_0's.

    Args:
        plan: of the recipe that the merge was made by.
        output: directory that mergekit wrote.

    Raises:
        DamError: a tensor of the plan is missing, or has another shape.
    """
    written, base = Checkpoint.open(output), Checkpoint.open(plan.base.path)
    tensors = {}
    for spec in plan.tensors:
        if spec.name in written:
            tensors[spec.name] = _with_rows(spec, written.tensor(spec.name), base, output)
        elif spec.mask_name == spec.name and spec.dtype.is_floating_point:  # tied tensors may be written once
            raise DamError(
                f"output {output}",
                expected=f"the tensor {spec.name} of its recipe",
                got="none",
                cure="Merge again: this output is not complete, or its recipe is another one.",
            )
    return FinishedMerge(output, written.digest(), tensors)


def _with_rows(spec: TensorSpec, tensor: Tensor, base: Checkpoint, output: Path) -> Tensor:
    """Return a tensor with the plan's number of rows along the axis of the vocabulary."""
    shape, axis = tuple(tensor.shape), spec.vocabulary_axis
    if shape == spec.shape:
        return tensor
    if (
        axis is None
        or len(shape) != len(spec.shape)
        or any(a != b for i, (a, b) in enumerate(zip(shape, spec.shape, strict=True)) if i != axis % len(shape))
    ):
        raise DamError(
            f"tensor {spec.name} of {output}",
            expected=f"the shape {spec.shape} of its recipe's models",
            got=str(shape),
            cure="Merge again: this output is of another recipe.",
        )
    kept = min(shape[axis], spec.shape[axis])
    stored = base.tensor(spec.base_source).to(tensor.dtype)
    return torch.cat([tensor.narrow(axis, 0, kept), stored.narrow(axis, kept, spec.shape[axis] - kept)], axis)
