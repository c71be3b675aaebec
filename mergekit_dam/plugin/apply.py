"""Ready masks, applied to one tensor after another as mergekit hands them over."""

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
from mergekit_dam.plugin.output import keep
from mergekit_dam.plugin.planner import Context, kept_tokens

_OVERFLOW = "Lower the models' weight, leave out a model with a huge task vector, or write bfloat16 or float32."
_PROBES = 8  # places compared to tell whether mergekit handed over the planned tensor, and elements at each


class Applied:
    """Masks of a plan, learned or read, ready to be applied tensor by tensor.

    Args:
        plan: what is merged.
        models: T references, in the order of the plan's models.
        context: of the merge, where its planner is known.

    Raises:
        DamError: whatever is wrong with models, data, settings, or ready masks.
    """

    def __init__(self, plan: Plan, models: Sequence[ModelReference], context: Context | None) -> None:
        # learning needs gradients although mergekit's own arithmetic runs without
        with torch.enable_grad():
            folder, self.masks = find_or_learn(plan, quiet=context is not None and context.options.quiet)
        self.order = tuple(models)
        self.written = context and dtype_from_name(context.config.out_dtype)
        self.vectors = TaskVectors(plan)
        self.kept = None if context is None else kept_tokens(context.config, plan)
        if context is not None and context.out_path is not None:
            keep(folder, Path(context.out_path))

    def merge(self, group: TensorGroup) -> torch.Tensor:
        """theta of one tensor, in the base's type."""
        assert group.base is not None
        name = str(group.metadata.name)
        spec = self.vectors.specs.get(name)
        if spec is None:
            raise DamError(
                f"tensor {name}",
                expected="a tensor of the plan",
                got="one that mergekit added",
                cure="Use `models:` (slices that move or repeat layers cannot be masked).",
            )
        by_ref = {entry.id: entry.tensor for entry in group.non_base}
        base: torch.Tensor = group.base.tensor
        models = [by_ref.get(ref) for ref in self.order]
        planned = [self.vectors.base(name), *self.vectors.models(name)]
        rows = None
        if self.kept is not None and spec.vocabulary_axis is not None:
            rows = _Rows(spec.vocabulary_axis, self.kept, base.shape[spec.vocabulary_axis])
        for there, given in zip(planned, [base, *models], strict=True):
            if there is not None and given is not None:
                pair = (there, given) if rows is None else (rows.of_tokens(there), rows.of_tokens(given))
                _require_same(name, *pair)
        if not self.masks.has(spec.mask_name):
            return base.clone()
        dtype, device = base.dtype, base.device
        if rows is not None:  # masks are of the rows that the models have
            base, models = (
                self.vectors.base(name).to(device),
                [None if one is None else one.to(device) for one in planned[1:]],
            )
        if self.masks.stand_ins:
            made = [tensors.get(name) for tensors in self.masks.stand_ins]
            models = with_stand_ins(made, models, are_students=bool(self.masks.metadata.get("students")))
            models = [None if tensor is None else tensor.to(device) for tensor in models]
        coefficients = self.masks.coefficients_of(spec.mask_name).to(device)
        merged: torch.Tensor = merge(base, models, coefficients, self.masks.product(spec.mask_name, device))
        if rows is not None:
            merged = rows.resized(merged)
        written = self.written or dtype
        require_finite(merged.to(written), f"merged tensor {name} in {written}", "the merge", _OVERFLOW)
        return merged.to(dtype)


@dataclass(frozen=True)
class _Rows:
    """How mergekit changes the vocabulary of a tensor: it keeps the rows of all tokens, and cuts or adds others.

    Attributes:
        axis: with a row per token.
        tokens: rows that stay in their places.
        total: rows of the output.
    """

    axis: int
    tokens: int
    total: int

    def of_tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows that stay."""
        return tensor.narrow(self.axis, 0, self.tokens)

    def resized(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows that stay, and their mean in each that is added, as mergekit fills them."""
        kept = self.of_tokens(tensor)
        count = self.total - self.tokens
        mean = kept.mean(self.axis, keepdim=True).repeat_interleave(count, self.axis)
        return torch.cat([kept, mean], self.axis)


def _require_same(name: str, planned: torch.Tensor, given: torch.Tensor) -> None:
    """Slices or a changed vocabulary would put other values under a masked name."""
    same = planned.shape == given.shape
    if same:
        same = bool(torch.equal(_probe(planned).to(given.dtype), _probe(given).to("cpu")))
    if not same:
        raise DamError(
            f"tensor {name}",
            expected="the tensor that the masks were learned on",
            got="another one from mergekit",
            cure="Do slicing or vocabulary changes in a stage of its own (mergekit-multi), and dam on its output.",
        )


def _probe(tensor: torch.Tensor) -> torch.Tensor:
    """Some elements from start to end, in few places: each place is a page to be read."""
    flat = tensor.reshape(-1)
    if flat.numel() <= _PROBES**2:
        return flat
    return flat.as_strided((_PROBES, _PROBES), ((flat.numel() - _PROBES) // (_PROBES - 1), 1))
