"""The merged weights as leaves of a graph, and the chain rule back to masks and coefficients.

The forward passes of all tasks share one set of merged weights: each task's backward pass adds to their
gradients, and `mask_gradients` / `coefficient_gradients` then turn those into dL/dM and dL/dlambda with one
elementwise pass. No per-model product is stored, and no graph spans the merge. T models, P masks.

With several processes each one reads and merges its own rows of every tensor; `weights` gathers the merged tensors,
and `gradients` sums what the processes' tasks left and hands each its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.distributed.shards import ALONE, Shards
from mergekit_dam.merge_rule import coefficient_gradient, mask_gradient, merge
from mergekit_dam.plan import TensorSpec
from mergekit_dam.task_vectors import TaskVectors

Weights = dict[str, Tensor]


class MergedModel:
    """theta = theta_0 + M o sum_t lambda_t tau_t for all tensors of a plan.

    Args:
        vectors: where theta_0 and theta_t come from.
        changed: tensors that some model changed; the others are theta_0's.
        device: where merging and the tasks run. On the CPU tensors stay views of the mapped files.
        shards: processes that share the rows.
    """

    def __init__(
        self, vectors: TaskVectors, changed: Sequence[TensorSpec], device: torch.device, shards: Shards = ALONE
    ) -> None:
        self.device, self.shards, self._vectors = device, shards, vectors
        self.changed = tuple(changed)
        self.mask_names = tuple(dict.fromkeys(spec.mask_name for spec in changed))
        self.mask_shapes = {spec.mask_name: spec.shape for spec in changed}
        self.num_models = len(vectors.plan.models)
        self._column = {name: i for i, name in enumerate(self.mask_names)}
        masked = {spec.name for spec in changed}
        self._unchanged = {
            spec.name: _placed(vectors.base(spec.name), device)
            for spec in vectors.plan.tensors
            if spec.name not in masked
        }
        # rows of mapped files: what is not ours is never read
        self._base = {spec.name: _placed(shards.local(vectors.base(spec.name)), device) for spec in changed}
        self._models = {
            spec.name: [None if m is None else _placed(shards.local(m), device) for m in vectors.models(spec.name)]
            for spec in changed
        }

    def base_weights(self) -> Weights:
        """theta_0 by output name, whole."""
        if self.shards.size == 1:
            return self._unchanged | self._base
        return self._unchanged | {
            spec.name: _placed(self._vectors.base(spec.name), self.device) for spec in self.changed
        }

    def weights(self, masks: Mapping[str, Tensor], coefficients: Tensor) -> Weights:
        """Merged weights by output name, whole; those that change are float32 leaves with gradients.

        Args:
            masks: our rows of M by mask name, each broadcastable to its tensors; a missing name keeps everything.
            coefficients: lambda, (T, 1) or (T, P).
        """
        weights = dict(self._unchanged)
        with torch.no_grad():
            for spec in self.changed:
                merged = merge(
                    self._base[spec.name], self._models[spec.name],
                    self.coefficients_of(coefficients, spec), masks.get(spec.mask_name),
                )  # fmt: skip
                weights[spec.name] = self.shards.gather(merged, spec.shape)
        for spec in self.changed:
            weights[spec.name].requires_grad_(True)
        return weights

    def coefficients_of(self, coefficients: Tensor, spec: TensorSpec) -> Tensor:
        """lambda of the T models for one tensor, shape (T,)."""
        return coefficients[:, 0 if coefficients.shape[1] == 1 else self._column[spec.mask_name]].detach()

    def gradients(self, weights: Weights) -> Weights:
        """Our rows of dL/dtheta by output name, summed over the processes; takes them away from `weights`.

        A tensor that no task of a single process uses has none.
        """
        found: Weights = {}
        for spec in self.changed:
            weight = weights[spec.name]
            gradient, weight.grad = weight.grad, None
            if gradient is None and self.shards.size > 1:
                gradient = torch.zeros_like(weight)  # others may have one
            if gradient is not None:
                found[spec.name] = self.shards.scatter(gradient)
        return found

    def mask_gradients(
        self, found: Weights, coefficients: Tensor, shapes: Mapping[str, torch.Size], *, whole: bool = False
    ) -> Weights:
        """Our rows of dL/dM by mask name from `gradients`; tied tensors add up.

        Args:
            found: what `gradients` returned.
            coefficients: lambda, (T, 1) or (T, P).
            shapes: of our rows of the masks.
            whole: masks have no rows of ours but are the same in all processes.
        """
        gradients: Weights = {}
        for spec in self.changed:
            if (gradient := found.get(spec.name)) is None:
                continue
            part = mask_gradient(
                gradient, self._base[spec.name], self._models[spec.name],
                self.coefficients_of(coefficients, spec), shapes[spec.mask_name],
            )  # fmt: skip
            gradients[spec.mask_name] = gradients[spec.mask_name] + part if spec.mask_name in gradients else part
        return {name: self.shards.sum(gradient) for name, gradient in gradients.items()} if whole else gradients

    def coefficient_gradients(self, found: Weights, masks: Mapping[str, Tensor], coefficients: Tensor) -> Tensor:
        """dL/dlambda, shaped like `coefficients`, from `gradients`."""
        total = torch.zeros_like(coefficients)
        for spec in self.changed:
            if (gradient := found.get(spec.name)) is None:
                continue
            part = coefficient_gradient(
                gradient, self._base[spec.name], self._models[spec.name], masks.get(spec.mask_name)
            )
            total[:, 0 if total.shape[1] == 1 else self._column[spec.mask_name]] += part
        return self.shards.sum(total)


def clear_gradients(weights: Weights) -> None:
    """Forget what the tasks left, so that the same weights serve another loss."""
    for weight in weights.values():
        weight.grad = None


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)
