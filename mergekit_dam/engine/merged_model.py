"""The merged weights as leaves of a graph, and the chain rule back to masks and coefficients.

All tasks share one set of merged weights: each backward pass adds to their gradients, and `chain` turns those into
dL/dM and dL/dlambda, tensor by tensor, in one reading of the task vectors. No per-model product is stored, no mask
product, and no graph spans the merge. T models, P masks.

With several processes each one reads and merges its own rows of every tensor; merged tensors are gathered, and their
gradients summed over the processes and handed out by rows, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.engine.frozen_models import FrozenModels
from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.merging import triton_merge
from mergekit_dam.merging.chunks import Mask, gradient_shape
from mergekit_dam.merging.mask_product import MaskProduct, together_numel
from mergekit_dam.merging.rule import gradients, logit_gradients, merge
from mergekit_dam.merging.triton_groups import Group, Member, grouped
from mergekit_dam.models.plan import TensorSpec

Masks = Mapping[str, Mask]


class MergedModel:
    """theta = theta_0 + M o sum_t lambda_t tau_t for all tensors of a plan.

    Args:
        vectors: where theta_0 and theta_t come from.
        changed: tensors that some model changed; the others are theta_0's.
        device: where merging and the tasks run. On the CPU tensors stay views of the mapped files.
        shards: processes that share the rows.
        dtype: of the merged weights; merging itself is done in float32.
        specs: the tensors in question; default: all of the plan.
        lazy: leave theta_0 and theta_t in their files until they are asked for.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        changed: Sequence[TensorSpec],
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        shards: Shards = ALONE,
        specs: Sequence[TensorSpec] | None = None,
        lazy: bool = False,
    ) -> None:
        self.device, self.dtype, self.shards, self._vectors = device, dtype, shards, vectors
        self.frozen = FrozenModels(vectors, changed, device, shards=shards, specs=specs, lazy=lazy)
        self.changed = tuple(changed)
        self.mask_names = tuple(dict.fromkeys(spec.mask_name for spec in changed))
        self.mask_shapes = {spec.mask_name: spec.shape for spec in changed}
        self.vocabulary = frozenset(spec.mask_name for spec in changed if spec.vocabulary_axis == 0)  # a row per token
        self.num_models = len(vectors.plan.models)
        self._column = {name: i for i, name in enumerate(self.mask_names)}
        self._tied: dict[str, list[TensorSpec]] = {name: [] for name in self.mask_names}
        for spec in changed:
            self._tied[spec.mask_name].append(spec)
        self.specs = vectors.plan.tensors if specs is None else tuple(specs)
        alone = triton_merge.runs_on(device) and not lazy and shards.size == 1
        self._groups = self._grouped() if alone else []

    def part(self, names: Collection[str]) -> MergedModel:
        """The model of these tensors alone, on the device."""
        specs = [spec for spec in self.specs if spec.name in names]
        changed = [spec for spec in self.changed if spec.name in names]
        return MergedModel(self._vectors, changed, self.device, dtype=self.dtype, shards=self.shards, specs=specs)

    def _grouped(self) -> list[Group]:
        """What an accelerator merges together."""
        members = [
            Member(spec.name, name, self._column[name], self.frozen.base[spec.name], self.frozen.models[spec.name])
            for name, (spec, *others) in self._tied.items()
            if not others
        ]
        return grouped(members, together_numel(self.device, sum(member.base.numel() for member in members)))

    def weights(self, masks: Masks, coefficients: Tensor) -> Weights:
        """Merged weights by output name; those that change are leaves with gradients.

        Args:
            masks: our rows of M by mask name, each broadcastable to its tensors; a missing name keeps everything.
            coefficients: lambda, (T, 1) or (T, P).
        """
        lambdas = self._lambdas(coefficients)
        changed = {spec.name for spec in self.changed}  # which are merged, and not sent as they are
        weights = {n: self.frozen.moved(tensor) for n, tensor in self.frozen.base.items() if n not in changed}
        done: dict[str, Tensor] = {}
        for group in self._groups:
            if group.serves(masks):
                done |= group.merged(masks, lambdas, self.dtype)
        for spec in self.changed:
            found = done[spec.name] if spec.name in done else self._merged(spec, masks, lambdas)
            weights[spec.name] = found.requires_grad_(True)
        return weights

    def _lambdas(self, coefficients: Tensor) -> Tensor:
        """lambda where the merge rule reads it: in the host's memory, unless a kernel does."""
        return coefficients.detach() if triton_merge.runs_on(self.device) else coefficients.detach().cpu()

    def _merged(self, spec: TensorSpec, masks: Masks, lambdas: Tensor) -> Tensor:
        """One merged tensor, whole: our rows are merged here, the others' come from their processes."""
        base = self.frozen.moved(self.frozen.base[spec.name])
        rows = torch.empty(base.shape, dtype=self.dtype, device=self.device)
        if base.numel():  # none where there are fewer rows than processes
            models, mask = self.frozen.models_here(spec.name), masks.get(spec.mask_name)
            merge(base, models, self._of(lambdas, spec), mask, out=rows)
        return self.shards.gather(rows, spec.shape)

    def chain(
        self, weights: Weights, masks: Masks, coefficients: Tensor, coefficient_gradient: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """Use up the gradients that the tasks left in `weights`: each is dropped as soon as it is turned into dL/dM.

        Args:
            weights: from `weights` with the same masks and coefficients.
            coefficient_gradient: zeros shaped like `coefficients`; dL/dlambda is put there on the way, and complete
                at the end.

        Yields:
            Name and our rows of dL/dM of one mask after another, of M's shape, float32; tied tensors add up.
        """
        lambdas = self._lambdas(coefficients)
        for name in self._tied:
            ours = self._mask_gradient(name, weights, masks[name], lambdas, coefficient_gradient)
            if ours is not None:
                yield name, ours
        self._complete(coefficient_gradient)

    def logit_gradients(
        self,
        weights: Weights,
        masks: Mapping[str, MaskProduct],
        coefficients: Tensor,
        coefficient_gradient: Tensor,
        wanted: Sequence[int],
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """`chain`, and on through each mask to the logits of its factors.

        Args:
            wanted: indices of the masks' `parts`, alike for all masks.

        Yields:
            Name and our rows of dL/dlogit of the wanted factors of one tensor after another.
        """
        lambdas, done = self._lambdas(coefficients), set[str]()
        for group in self._groups:
            if group.serves(masks) and tuple(wanted) == tuple(range(group.num_parts(masks))):
                upstreams = [self._taken(weights[member.name]) for member in group.members]
                yield from group.logit_gradients(upstreams, masks, lambdas, coefficient_gradient)
                done |= group.mask_names
        for name, (spec, *others) in self._tied.items():
            if name in done:
                continue
            mask = masks[name]
            if others or not mask.separate or mask.shape != self.frozen.base[spec.name].shape:
                ours = self._mask_gradient(name, weights, mask, lambdas, coefficient_gradient)
                if ours is not None:
                    yield name, mask.logit_gradients(ours, wanted)
                continue
            gradient = self._taken(weights[spec.name])
            if gradient is not None:
                yield (
                    name,
                    logit_gradients(
                        gradient,
                        self.frozen.base[spec.name],
                        self.frozen.models[spec.name],
                        self._of(lambdas, spec),
                        mask,
                        wanted,
                        coefficient_out=self._of(coefficient_gradient, spec),
                    ),
                )
        self._complete(coefficient_gradient)

    def _mask_gradient(
        self, name: str, weights: Weights, mask: Mask, lambdas: Tensor, coefficient_gradient: Tensor
    ) -> Tensor | None:
        """Our rows' share of dL/dM; None if no task used its tensors."""
        found = torch.zeros(gradient_shape(mask), dtype=torch.float32, device=self.device)
        used = False
        for spec in self._tied[name]:
            gradient = self._taken(weights[spec.name])
            used |= gradient is not None
            if gradient is not None and gradient.numel():
                gradients(
                    gradient,
                    self.frozen.base[spec.name],
                    self.frozen.models[spec.name],
                    self._of(lambdas, spec),
                    mask,
                    mask_out=found,
                    coefficient_out=self._of(coefficient_gradient, spec),
                )
        return found if used else None

    def _taken(self, weight: Tensor) -> Tensor | None:
        """Our rows of a merged tensor's gradient, which is then gone from it."""
        gradient = self._rows(weight)
        weight.grad = None
        return gradient

    def _complete(self, coefficient_gradient: Tensor) -> None:
        if self.shards.size > 1:
            coefficient_gradient.copy_(self.shards.sum(coefficient_gradient))

    def coefficient_gradients(self, weights: Weights, masks: Masks, coefficients: Tensor) -> Tensor:
        """dL/dlambda, shaped like `coefficients`, from the gradients that the tasks left in `weights`."""
        total = torch.zeros_like(coefficients)
        for spec in self.changed:
            gradient = self._rows(weights[spec.name])
            if gradient is not None and gradient.numel():
                models, mask = self.frozen.models[spec.name], masks.get(spec.mask_name)
                gradients(
                    gradient, self.frozen.base[spec.name], models, None, mask, coefficient_out=self._of(total, spec)
                )
        return self.shards.sum(total)

    def _rows(self, weight: Tensor) -> Tensor | None:
        """Our rows of the gradient that the tasks of all processes left in a merged tensor; None if it is unused."""
        if self.shards.size == 1:
            return weight.grad
        # other processes may have one where we have none
        return self.shards.scatter((torch.zeros_like(weight) if weight.grad is None else weight.grad).float())

    def _of(self, coefficients: Tensor, spec: TensorSpec) -> Tensor:
        """lambda of the T models for one tensor, a view (T,)."""
        return coefficients[:, 0 if coefficients.shape[1] == 1 else self._column[spec.mask_name]]
