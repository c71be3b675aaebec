"""The merged weights as leaves of a graph, and the chain rule back to masks and coefficients.

The forward passes of all tasks share one set of merged weights: each task's backward pass adds to their
gradients, and `mask_gradients` / `coefficient_gradients` then turn those into dL/dM and dL/dlambda with one
elementwise pass. No per-model product is stored, and no graph spans the merge. T models, P masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
    """

    def __init__(self, vectors: TaskVectors, changed: Sequence[TensorSpec], device: torch.device) -> None:
        self.device = device
        self.changed = tuple(changed)
        self.mask_names = tuple(dict.fromkeys(spec.mask_name for spec in changed))
        self.mask_shapes = {spec.mask_name: spec.shape for spec in changed}
        self.num_models = len(vectors.plan.models)
        self._column = {name: i for i, name in enumerate(self.mask_names)}
        self._base = {spec.name: _placed(vectors.base(spec.name), device) for spec in vectors.plan.tensors}
        self._models = {
            spec.name: [None if m is None else _placed(m, device) for m in vectors.models(spec.name)]
            for spec in changed
        }

    def base_weights(self) -> Weights:
        """theta_0 by output name."""
        return dict(self._base)

    def weights(self, masks: Mapping[str, Tensor], coefficients: Tensor) -> Weights:
        """Merged weights by output name; those that change are float32 leaves with gradients.

        Args:
            masks: M by mask name, each broadcastable to its tensors; a missing name keeps everything.
            coefficients: lambda, (T, 1) or (T, P).
        """
        weights = dict(self._base)
        with torch.no_grad():
            for spec in self.changed:
                merged = merge(
                    self._base[spec.name], self._models[spec.name],
                    self.coefficients_of(coefficients, spec), masks.get(spec.mask_name),
                )  # fmt: skip
                weights[spec.name] = merged
        for spec in self.changed:
            weights[spec.name].requires_grad_(True)
        return weights

    def coefficients_of(self, coefficients: Tensor, spec: TensorSpec) -> Tensor:
        """lambda of the T models for one tensor, shape (T,)."""
        return coefficients[:, 0 if coefficients.shape[1] == 1 else self._column[spec.mask_name]].detach()

    def mask_gradients(self, weights: Weights, coefficients: Tensor, shapes: Mapping[str, torch.Size]) -> Weights:
        """dL/dM by mask name from the gradients that the tasks left in `weights`; tied tensors add up."""
        gradients: Weights = {}
        for spec in self.changed:
            gradient = weights[spec.name].grad
            if gradient is None:
                continue
            part = mask_gradient(
                gradient, self._base[spec.name], self._models[spec.name],
                self.coefficients_of(coefficients, spec), shapes[spec.mask_name],
            )  # fmt: skip
            gradients[spec.mask_name] = gradients[spec.mask_name] + part if spec.mask_name in gradients else part
        return gradients

    def coefficient_gradients(self, weights: Weights, masks: Mapping[str, Tensor], coefficients: Tensor) -> Tensor:
        """dL/dlambda, shaped like `coefficients`, from the gradients that the tasks left in `weights`."""
        total = torch.zeros_like(coefficients)
        for spec in self.changed:
            gradient = weights[spec.name].grad
            if gradient is None:
                continue
            part = coefficient_gradient(
                gradient, self._base[spec.name], self._models[spec.name], masks.get(spec.mask_name)
            )
            total[:, 0 if total.shape[1] == 1 else self._column[spec.mask_name]] += part
        return total


def clear_gradients(weights: Weights) -> None:
    """Forget what the tasks left, so that the same weights serve another loss."""
    for weight in weights.values():
        weight.grad = None


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)
