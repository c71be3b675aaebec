"""Compute merged weights as leaves of a graph, and their gradients with respect to masks and coefficients.

All tasks share one set of merged weights: each backward pass adds to their gradients, and `mask_gradients` turns those
into dL/dM and dL/dlambda, tensor by tensor, in one reading of the task vectors. No per-model product and no mask
product is stored, and no graph spans the merge. T models, P masks.

With several processes each process reads and merges its own rows of every tensor. Merged tensors are gathered, and
their gradients are summed over the processes and scattered by rows, one tensor at a time.
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
        vectors: source of theta_0 and theta_t.
        changed: tensors that some model changed; all other tensors equal theta_0's.
        device: device that merges and runs the tasks. On the CPU tensors stay views of the mapped files.
        shards: processes that share the rows.
        dtype: type of the merged weights; the merge is computed in float32.
        specs: tensors of the model; default: all tensors of the plan.
        lazy: leave theta_0 and theta_t in their files until they are used.
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
        self.device, self.dtype, self.shards, self.vectors = device, dtype, shards, vectors
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

    def submodel(self, names: Collection[str]) -> MergedModel:
        """Return a merged model of these tensors only, on the device."""
        specs = [spec for spec in self.specs if spec.name in names]
        changed = [spec for spec in self.changed if spec.name in names]
        return MergedModel(self.vectors, changed, self.device, dtype=self.dtype, shards=self.shards, specs=specs)

    def _grouped(self) -> list[Group]:
        """Group the tensors that an accelerator merges together; tied tensors are left out."""
        members = [
            Member(spec.name, name, self._column[name], self.frozen.base[spec.name], self.frozen.models[spec.name])
            for name, (spec, *tied) in self._tied.items()
            if not tied
        ]
        return grouped(members, together_numel(self.device, sum(member.base.numel() for member in members)))

    def weights(self, masks: Masks, coefficients: Tensor) -> Weights:
        """Return merged weights by output name; tensors that change are leaves that require gradients.

        Args:
            masks: this process's rows of M by mask name, each broadcastable to its tensors; a missing mask is all ones.
            coefficients: lambda, (T, 1) or (T, P).
        """
        lambdas = self._lambdas(coefficients)
        changed = {spec.name for spec in self.changed}
        weights = {n: self.frozen.to_device(tensor) for n, tensor in self.frozen.base.items() if n not in changed}
        done: dict[str, Tensor] = {}
        for group in self._groups:
            if group.serves(masks):
                done |= group.merged(masks, lambdas, self.dtype)
        for spec in self.changed:
            tensor = done[spec.name] if spec.name in done else self._merged(spec, masks, lambdas)
            weights[spec.name] = tensor.requires_grad_(True)
        return weights

    def _lambdas(self, coefficients: Tensor) -> Tensor:
        """Return lambda in the memory that the merge rule reads: the accelerator's for a kernel, else the host's."""
        return coefficients.detach() if triton_merge.runs_on(self.device) else coefficients.detach().cpu()

    def _merged(self, spec: TensorSpec, masks: Masks, lambdas: Tensor) -> Tensor:
        """Return one merged tensor, whole: merge this process's rows and gather the rows of all processes."""
        base = self.frozen.to_device(self.frozen.base[spec.name])
        rows = torch.empty(base.shape, dtype=self.dtype, device=self.device)
        if base.numel():  # with fewer rows than processes some processes have no row
            models, mask = self.frozen.local_models(spec.name), masks.get(spec.mask_name)
            merge(base, models, self._column_of(lambdas, spec), mask, out=rows)
        return self.shards.all_gather(rows, spec.shape)

    def mask_gradients(
        self, weights: Weights, masks: Masks, coefficients: Tensor, coefficient_gradient: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """Turn the gradients of `weights` into dL/dM, and drop each gradient as soon as it is used.

        Args:
            weights: result of `weights` with the same masks and coefficients, after the backward passes.
            coefficient_gradient: zeros shaped like `coefficients`; holds dL/dlambda once the iterator is exhausted.

        Yields:
            Mask name, and this process's rows of dL/dM in M's shape, float32; the terms of tied tensors are summed.
        """
        lambdas = self._lambdas(coefficients)
        for name in self._tied:
            gradient = self._mask_gradient(name, weights, masks[name], lambdas, coefficient_gradient)
            if gradient is not None:
                yield name, gradient
        self._reduce(coefficient_gradient)

    def logit_gradients(
        self,
        weights: Weights,
        masks: Mapping[str, MaskProduct],
        coefficients: Tensor,
        coefficient_gradient: Tensor,
        wanted: Sequence[int],
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """Turn the gradients of `weights` into gradients of the mask logits; otherwise as `mask_gradients`.

        Args:
            wanted: indices into `parts` of every mask, the factors whose gradients are computed.

        Yields:
            Mask name, and this process's rows of dL/dlogit of the wanted factors.
        """
        lambdas, done = self._lambdas(coefficients), set[str]()
        for group in self._groups:
            if group.serves(masks) and tuple(wanted) == tuple(range(group.num_parts(masks))):
                upstreams = [self._take_gradient(weights[member.name]) for member in group.members]
                yield from group.logit_gradients(upstreams, masks, lambdas, coefficient_gradient)
                done |= group.mask_names
        for name, (spec, *tied) in self._tied.items():
            if name in done:
                continue
            mask = masks[name]
            if tied or not mask.separate or mask.shape != self.frozen.base[spec.name].shape:
                mask_gradient = self._mask_gradient(name, weights, mask, lambdas, coefficient_gradient)
                if mask_gradient is not None:
                    yield name, mask.logit_gradients(mask_gradient, wanted)
                continue
            gradient = self._take_gradient(weights[spec.name])
            if gradient is not None:
                yield (
                    name,
                    logit_gradients(
                        gradient,
                        self.frozen.base[spec.name],
                        self.frozen.models[spec.name],
                        self._column_of(lambdas, spec),
                        mask,
                        wanted,
                        coefficient_out=self._column_of(coefficient_gradient, spec),
                    ),
                )
        self._reduce(coefficient_gradient)

    def _mask_gradient(
        self, name: str, weights: Weights, mask: Mask, lambdas: Tensor, coefficient_gradient: Tensor
    ) -> Tensor | None:
        """Return this process's rows of dL/dM; None if no task used the mask's tensors."""
        mask_gradient = torch.zeros(gradient_shape(mask), dtype=torch.float32, device=self.device)
        used = False
        for spec in self._tied[name]:
            gradient = self._take_gradient(weights[spec.name])
            used |= gradient is not None
            if gradient is not None and gradient.numel():
                gradients(
                    gradient,
                    self.frozen.base[spec.name],
                    self.frozen.models[spec.name],
                    self._column_of(lambdas, spec),
                    mask,
                    mask_out=mask_gradient,
                    coefficient_out=self._column_of(coefficient_gradient, spec),
                )
        return mask_gradient if used else None

    def _take_gradient(self, weight: Tensor) -> Tensor | None:
        """Return this process's rows of a merged tensor's gradient, and remove the gradient from the tensor."""
        gradient = self._rows(weight)
        weight.grad = None
        return gradient

    def _reduce(self, coefficient_gradient: Tensor) -> None:
        """Sum dL/dlambda over all processes, in place."""
        if self.shards.size > 1:
            coefficient_gradient.copy_(self.shards.all_reduce(coefficient_gradient))

    def coefficient_gradients(self, weights: Weights, masks: Masks, coefficients: Tensor) -> Tensor:
        """Return dL/dlambda, shaped like `coefficients`, from the gradients of `weights`, which are kept."""
        total = torch.zeros_like(coefficients)
        for spec in self.changed:
            gradient = self._rows(weights[spec.name])
            if gradient is not None and gradient.numel():
                models, mask = self.frozen.models[spec.name], masks.get(spec.mask_name)
                column_T = self._column_of(total, spec)
                gradients(gradient, self.frozen.base[spec.name], models, None, mask, coefficient_out=column_T)
        return self.shards.all_reduce(total)

    def _rows(self, weight: Tensor) -> Tensor | None:
        """Return this process's rows of a merged tensor's gradient, summed over processes; None if no task used it."""
        if self.shards.size == 1:
            return weight.grad
        # this process may lack a gradient that another process has
        return self.shards.reduce_scatter((torch.zeros_like(weight) if weight.grad is None else weight.grad).float())

    def _column_of(self, coefficients: Tensor, spec: TensorSpec) -> Tensor:
        """Return lambda of the T models for one tensor, a view (T,)."""
        return coefficients[:, 0 if coefficients.shape[1] == 1 else self._column[spec.mask_name]]
