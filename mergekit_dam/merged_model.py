"""The merged weights as leaves of a graph, and the chain rule back to masks and coefficients.

The forward passes of all tasks share one set of merged weights: each task's backward pass adds to their
gradients, and `chain` then turns those into dL/dM and dL/dlambda, tensor by tensor, in one reading of the task vectors.
No per-model product is stored, no mask product, and no graph spans the merge. T models, P masks.

With several processes each one reads and merges its own rows of every tensor; the merged tensors are gathered, and
their gradients are summed over the processes and handed out by rows, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mergekit_dam.distributed.shards import ALONE, Shards
from mergekit_dam.merge_rule import Mask, coefficient_gradient, gradients, merge
from mergekit_dam.plan import TensorSpec
from mergekit_dam.task_vectors import TaskVectors

Weights = dict[str, Tensor]
Masks = Mapping[str, Mask]


class MergedModel:
    """theta = theta_0 + M o sum_t lambda_t tau_t for all tensors of a plan.

    Args:
        vectors: where theta_0 and theta_t come from.
        changed: tensors that some model changed; the others are theta_0's.
        device: where merging and the tasks run. On the CPU tensors stay views of the mapped files.
        shards: processes that share the rows.
        streamed: output names that the tasks gather themselves, block by block.
    """

    def __init__(
        self, vectors: TaskVectors, changed: Sequence[TensorSpec], device: torch.device, shards: Shards = ALONE,
        streamed: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.device, self.shards, self._vectors = device, shards, vectors
        self.streamed = streamed if shards.size > 1 else frozenset()
        self.changed = tuple(changed)
        self.mask_names = tuple(dict.fromkeys(spec.mask_name for spec in changed))
        self.mask_shapes = {spec.mask_name: spec.shape for spec in changed}
        self.num_models = len(vectors.plan.models)
        self._column = {name: i for i, name in enumerate(self.mask_names)}
        self._tied: dict[str, list[TensorSpec]] = {name: [] for name in self.mask_names}
        for spec in changed:
            self._tied[spec.mask_name].append(spec)
        self._specs = vectors.plan.tensors
        masked = {spec.name for spec in changed}
        self._unchanged = {
            spec.name: _placed(vectors.base(spec.name), device) for spec in self._specs if spec.name not in masked
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
        return self._unchanged | {s.name: _placed(self._vectors.base(s.name), self.device) for s in self.changed}

    def own_weights(self, index: int) -> Weights:
        """theta_t by output name, whole, as stored (a view, for one process)."""
        found = {}
        for spec in self._specs:
            if spec.name in self._unchanged:
                tensor: Tensor | None = self._unchanged[spec.name]
            elif self.shards.size == 1:
                tensor = self._models[spec.name][index]
            else:
                whole = self._vectors.models(spec.name)[index]
                tensor = None if whole is None else _placed(whole, self.device)
            if tensor is not None and spec.sources[index] is not None:
                found[spec.name] = tensor
        return found

    def weights(self, masks: Masks, coefficients: Tensor, *, whole: bool = False) -> Weights:
        """Merged weights by output name; those that change are float32 leaves with gradients.

        They are whole, except for streamed ones, which stay rows (DTensor) unless `whole` is asked for.

        Args:
            masks: our rows of M by mask name, each broadcastable to its tensors; a missing name keeps everything.
            coefficients: lambda, (T, 1) or (T, P).
        """
        weights = dict(self._unchanged)
        lambdas = coefficients.detach().cpu()
        for spec in self.changed:
            base = self._base[spec.name]
            if base.numel():
                rows = merge(base, self._models[spec.name], self._of(lambdas, spec), masks.get(spec.mask_name))
            else:  # fewer rows than processes
                rows = torch.empty(base.shape, dtype=torch.float32, device=base.device)
            join = self.shards.distributed if spec.name in self.streamed and not whole else self.shards.gather
            weights[spec.name] = join(rows, spec.shape).requires_grad_(True)
        return weights

    def chain(
        self, weights: Weights, masks: Masks, coefficients: Tensor, coefficient_gradient: Tensor, *, whole: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Use up the gradients that the tasks left in `weights`: each is dropped as soon as it is turned into dL/dM.

        Args:
            weights: from `weights` with the same masks and coefficients.
            coefficient_gradient: zeros shaped like `coefficients`; dL/dlambda is put there on the way, and complete
                at the end.
            whole: whether every process holds the masks whole, and not rows of them.

        Yields:
            Name and our rows of dL/dM of one mask after another, of M's shape, float32; tied tensors add up.
        """
        lambdas = coefficients.detach().cpu()
        for name, tied in self._tied.items():
            mask = masks[name]
            found = torch.zeros(mask.shape, dtype=torch.float32, device=self.device)
            used = False
            for spec in tied:
                gradient = self._rows(weights[spec.name])
                weights[spec.name].grad = None
                used |= gradient is not None
                if gradient is not None and gradient.numel():
                    gradients(
                        gradient, self._base[spec.name], self._models[spec.name], self._of(lambdas, spec), mask,
                        mask_out=found, coefficient_out=self._of(coefficient_gradient, spec),
                    )  # fmt: skip
            if used:
                yield name, self.shards.sum(found) if whole else found
        if self.shards.size > 1:
            coefficient_gradient.copy_(self.shards.sum(coefficient_gradient))

    def coefficient_gradients(self, weights: Weights, masks: Masks, coefficients: Tensor) -> Tensor:
        """dL/dlambda, shaped like `coefficients`, from the gradients that the tasks left in `weights`."""
        total = torch.zeros_like(coefficients)
        for spec in self.changed:
            gradient = self._rows(weights[spec.name])
            if gradient is not None and gradient.numel():
                self._of(total, spec).add_(
                    coefficient_gradient(
                        gradient, self._base[spec.name], self._models[spec.name], masks.get(spec.mask_name)
                    )
                )
        return self.shards.sum(total)

    def _rows(self, weight: Tensor) -> Tensor | None:
        """Our rows of the gradient that the tasks of all processes left in a merged tensor; None if it is unused."""
        if self.shards.size == 1:
            return weight.grad
        if isinstance(weight, DTensor):  # summed already
            return weight.grad.to_local() if isinstance(weight.grad, DTensor) else torch.zeros_like(weight.to_local())
        # other processes may have one where we have none
        return self.shards.scatter(torch.zeros_like(weight) if weight.grad is None else weight.grad)

    def _of(self, coefficients: Tensor, spec: TensorSpec) -> Tensor:
        """lambda of the T models for one tensor, a view (T,)."""
        return coefficients[:, 0 if coefficients.shape[1] == 1 else self._column[spec.mask_name]]


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)
