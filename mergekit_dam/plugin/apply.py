"""Apply masks to one tensor after another, in the order in which mergekit passes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.merge_methods.base import TensorGroup

from mergekit_dam.engine.task_vectors import TaskVectors, with_stand_ins
from mergekit_dam.errors import DamError
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.merging.checks import require_finite
from mergekit_dam.merging.rule import merge
from mergekit_dam.models.plan import Plan
from mergekit_dam.plugin.output import place_artifact
from mergekit_dam.plugin.planner import PlannerContext, kept_tokens

_OVERFLOW = "Lower the models' weight, leave out a model with a huge task vector, or write bfloat16 or float32."
_PROBES = 8  # positions compared to check that mergekit passed the planned tensor, and elements at each


class MaskedMerge:
    """Merge with the masks of a plan, learned or read, tensor by tensor.

    Args:
        plan: what is merged.
        models: T references, in the order of the plan's models.
        context: the merge as its planner knows it; None without a planner.

    Attributes:
        masks: the masks that are applied.

    Raises:
        DamError: a fault in models, data, settings, or given masks.
    """

    def __init__(self, plan: Plan, models: Sequence[ModelReference], context: PlannerContext | None) -> None:
        out = None if context is None else context.out_path
        quiet = context is not None and context.options.quiet
        # learning needs gradients, which mergekit switches off
        with torch.enable_grad():
            _, self.masks = find_or_learn(
                plan, quiet=quiet, copy=None if out is None else lambda folder: place_artifact(folder, Path(out))
            )
        self.refs = tuple(models)
        self.out_dtype = context and dtype_from_name(context.config.out_dtype)
        self.vectors = TaskVectors(plan)
        self.num_tokens = None if context is None else kept_tokens(context.config, plan)

    def merge(self, group: TensorGroup) -> torch.Tensor:
        """Return theta of one tensor, in the base's type."""
        assert group.base is not None
        name = str(group.metadata.name)
        spec = self.vectors.specs.get(name)
        if spec is None:
            raise DamError(
                f"tensor {name}",
                expected="a tensor of the plan",
                got="a tensor that mergekit added",
                cure="Use `models:` (slices that move or repeat layers cannot be masked).",
            )
        by_ref = {entry.id: entry.tensor for entry in group.non_base}
        base: torch.Tensor = group.base.tensor
        models = [by_ref.get(ref) for ref in self.refs]
        planned = [self.vectors.base(name), *self.vectors.models(name)]
        rows = None
        if self.num_tokens is not None and spec.vocabulary_axis is not None:
            rows = _VocabularyRows(spec.vocabulary_axis, self.num_tokens, base.shape[spec.vocabulary_axis])
        for stored, given in zip(planned, [base, *models], strict=True):
            if stored is not None and given is not None:
                pair = (stored, given) if rows is None else (rows.of_tokens(stored), rows.of_tokens(given))
                _require_same(name, *pair)
        if not self.masks.has(spec.mask_name):
            return base.clone()
        dtype, device = base.dtype, base.device
        if rows is not None:  # masks have the rows that the models have, so merge stored tensors and resize the result
            base = self.vectors.base(name).to(device)
            models = [None if stored is None else stored.to(device) for stored in planned[1:]]
        if self.masks.stand_ins:
            made = [tensors.get(name) for tensors in self.masks.stand_ins]
            taught = self.masks.metadata.get("students") or {}
            students = [model["name"] in taught for model in self.masks.metadata["models"]]
            models = with_stand_ins(made, models, base, students=students)
            models = [None if tensor is None else tensor.to(device) for tensor in models]
        coefficients = self.masks.coefficients_of(spec.mask_name).to(device)
        merged: torch.Tensor = merge(base, models, coefficients, self.masks.product(spec.mask_name, device))
        if rows is not None:
            merged = rows.resized(merged)
        out_dtype = self.out_dtype or dtype
        require_finite(merged.to(out_dtype), f"merged tensor {name} in {out_dtype}", "the merge", _OVERFLOW)
        return merged.to(dtype)


@dataclass(frozen=True)
class _VocabularyRows:
    """A change of vocabulary size by mergekit: rows of all tokens stay, rows after them are cut or added.

    Attributes:
        axis: axis with a row per token.
        tokens: number of rows that stay.
        total: number of rows in the output.
    """

    axis: int
    tokens: int
    total: int

    def of_tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows that stay."""
        return tensor.narrow(self.axis, 0, self.tokens)

    def resized(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows that stay, followed by added rows, which are their mean, as in mergekit."""
        rows = self.of_tokens(tensor)
        count = self.total - self.tokens
        mean = rows.mean(self.axis, keepdim=True).repeat_interleave(count, self.axis)
        return torch.cat([rows, mean], self.axis)


def _require_same(name: str, planned: torch.Tensor, given: torch.Tensor) -> None:
    """Refuse a tensor that is not the planned tensor, as slices or a changed vocabulary would pass it."""
    same = planned.shape == given.shape
    if same:
        same = bool(torch.equal(_probe(planned).to(given.dtype), _probe(given).to("cpu")))
    if not same:
        raise DamError(
            f"tensor {name}",
            expected="the tensor that the masks were learned on",
            got="another tensor from mergekit",
            cure="Do slicing or vocabulary changes in a stage of its own (mergekit-multi), and dam on its output.",
        )


def _probe(tensor: torch.Tensor) -> torch.Tensor:
    """Return elements at a few positions from start to end; each position is a page to read from disk."""
    flat = tensor.reshape(-1)
    if flat.numel() <= _PROBES**2:
        return flat
    return flat.as_strided((_PROBES, _PROBES), ((flat.numel() - _PROBES) // (_PROBES - 1), 1))
