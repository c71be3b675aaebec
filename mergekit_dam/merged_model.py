"""The merged weights as leaves of a graph, and the chain rule back to masks and coefficients.

The forward passes of all tasks share one set of merged weights: each task's backward pass adds to their
gradients, and `chain` then turns those into dL/dM and dL/dlambda, tensor by tensor, in one reading of the task vectors.
No per-model product is stored, no mask product, and no graph spans the merge. T models, P masks.

With `offload` the merged weights never exist as a whole: a block's are formed before it runs, formed again for its
backward pass, and their gradients are turned into dL/dM at once, see tasks/streamed.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_dam.gradient_store import GradientStore
from mergekit_dam.merge_rule import Mask, coefficient_gradient, gradients, merge
from mergekit_dam.pages import drop_pages, views_of_files
from mergekit_dam.plan import TensorSpec
from mergekit_dam.task_vectors import TaskVectors
from mergekit_dam.tasks.streamed import StreamedWeights

Offload = Literal["none", "cpu", "disk"]
Weights = Mapping[str, Tensor]
Masks = Mapping[str, Mask]


class MergedModel:
    """theta = theta_0 + M o sum_t lambda_t tau_t for all tensors of a plan.

    Args:
        vectors: where theta_0 and theta_t come from.
        changed: tensors that some model changed; the others are theta_0's.
        device: where merging and the tasks run. On the CPU tensors stay views of the mapped files.
        offload: where theta_0 and theta_t wait: `none` on the device; `cpu` in host memory, pinned for an accelerator;
            `disk` in their files, of which no page stays in memory, beside a file with the gradients.
        dtype: of the merged weights; merging itself is done in float32.
    """

    def __init__(
        self, vectors: TaskVectors, changed: Sequence[TensorSpec], device: torch.device, *,
        offload: Offload = "none", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.device, self.offload, self.dtype = device, offload, dtype
        self.changed = tuple(changed)
        self.mask_names = tuple(dict.fromkeys(spec.mask_name for spec in changed))
        self.mask_shapes = {spec.mask_name: spec.shape for spec in changed}
        self.num_models = len(vectors.plan.models)
        self._column = {name: i for i, name in enumerate(self.mask_names)}
        self._tied: dict[str, list[TensorSpec]] = {name: [] for name in self.mask_names}
        for spec in changed:
            self._tied[spec.mask_name].append(spec)
        self._specs = vectors.plan.tensors
        self._base = {spec.name: self._placed(vectors.base(spec.name)) for spec in self._specs}
        self._models = {
            spec.name: [None if m is None else self._placed(m) for m in vectors.models(spec.name)] for spec in changed
        }
        self._mapped: frozenset[int] = frozenset()
        if offload == "disk":
            models = (m for tensors in self._models.values() for m in tensors if m is not None)
            self._mapped = views_of_files([*self._base.values(), *models])

    def base_weights(self) -> Weights:
        """theta_0 by output name."""
        return self._fixed(dict(self._base))

    def own_weights(self, index: int) -> Weights:
        """theta_t by output name, as stored, without a copy: what no model changed is theta_0's."""
        found = {}
        for spec in self._specs:
            tensor = self._models[spec.name][index] if spec.name in self._models else self._base[spec.name]
            if tensor is not None and spec.sources[index] is not None:
                found[spec.name] = tensor
        return self._fixed(found)

    def weights(self, masks: Masks, coefficients: Tensor) -> Weights:
        """Merged weights by output name; those that change are leaves with gradients.

        Args:
            masks: M by mask name, each broadcastable to its tensors; a missing name keeps everything.
            coefficients: lambda, (T, 1) or (T, P).
        """
        lambdas = coefficients.detach().cpu()
        if self.offload != "none":
            return self._streamed(masks, lambdas)
        weights = dict(self._base)
        for spec in self.changed:
            merged = self._merged(spec, self._base[spec.name], self._models[spec.name], masks, lambdas)
            weights[spec.name] = merged.requires_grad_(True)
        return weights

    def chain(
        self, weights: Weights, masks: Masks, coefficients: Tensor, coefficient_gradient: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """Use up the gradients that the tasks left in `weights`: each is dropped as soon as it is turned into dL/dM.

        Args:
            weights: from `weights` with the same masks and coefficients.
            coefficient_gradient: shaped like `coefficients`; dL/dlambda is added to it on the way.

        Yields:
            Name and dL/dM of one mask after another, of M's shape, float32; tied tensors add up.
        """
        if isinstance(weights, _Streamed):
            coefficient_gradient += weights.store.take_coefficients(coefficient_gradient)
            yield from weights.store.take(self.device)
            return
        lambdas = coefficients.detach().cpu()
        for name, tied in self._tied.items():
            mask = masks[name]
            found = torch.zeros(mask.shape, dtype=torch.float32, device=self.device)
            used = False
            for spec in tied:
                gradient = self._taken(weights[spec.name])
                if gradient is not None:
                    used = True
                    gradients(
                        gradient, self._base[spec.name], self._models[spec.name], self._of(lambdas, spec), mask,
                        mask_out=found, coefficient_out=self._of(coefficient_gradient, spec),
                    )  # fmt: skip
            if used:
                yield name, found

    def coefficient_gradients(self, weights: Weights, masks: Masks, coefficients: Tensor) -> Tensor:
        """dL/dlambda, shaped like `coefficients`, from the gradients that the tasks left in `weights`."""
        total = torch.zeros_like(coefficients)
        if isinstance(weights, _Streamed):
            return weights.store.take_coefficients(total)
        for spec in self.changed:
            gradient = weights[spec.name].grad
            if gradient is not None:
                self._of(total, spec).add_(
                    coefficient_gradient(
                        gradient, self._base[spec.name], self._models[spec.name], masks.get(spec.mask_name)
                    )
                )
        return total

    def _streamed(self, masks: Masks, lambdas: Tensor) -> _Streamed:
        specs = {spec.name: spec for spec in self.changed}
        store = GradientStore(on_disk=self.offload == "disk")

        def form(name: str) -> Tensor:
            base = self._moved(self._base[name])
            if name not in specs:
                return self._computed(base)
            spec = specs[name]
            return self._merged(spec, base, self._moved_models(name), masks, lambdas)

        def consume(name: str, gradient: Tensor) -> None:
            spec = specs.get(name)
            if spec is not None:
                mask = masks[spec.mask_name]
                found = store.of(spec.mask_name, mask.shape, self.device)
                gradients(
                    gradient, self._moved(self._base[name]), self._moved_models(name), self._of(lambdas, spec), mask,
                    mask_out=found, coefficient_out=self._of(store.coefficients(lambdas, self.device), spec),
                )  # fmt: skip
                store.rest(spec.mask_name, found)

        return _Streamed([spec.name for spec in self._specs], form, consume=consume, release=self._release, store=store)

    def _merged(
        self, spec: TensorSpec, base: Tensor, models: Sequence[Tensor | None], masks: Masks, lambdas: Tensor
    ) -> Tensor:
        out = torch.empty(base.shape, dtype=self.dtype, device=self.device)
        return merge(base, models, self._of(lambdas, spec), masks.get(spec.mask_name), out=out)

    def _computed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _fixed(self, tensors: dict[str, Tensor]) -> Weights:
        if self.offload == "none":
            return tensors
        form = lambda name: self._computed(self._moved(tensors[name]))  # noqa: E731
        return StreamedWeights(tensors, form, consume=None, release=self._release)

    def _moved_models(self, name: str) -> list[Tensor | None]:
        return [None if m is None else self._moved(m) for m in self._models[name]]

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device == self.device else tensor.to(self.device, non_blocking=True)

    def _release(self, names: Iterable[str]) -> None:
        """No page of these tensors is needed for now."""
        for name in names if self._mapped else ():
            for tensor in (self._base[name], *self._models.get(name, ())):
                if tensor is not None and tensor.data_ptr() in self._mapped:
                    drop_pages(tensor)

    def _placed(self, tensor: Tensor) -> Tensor:
        """Where a frozen tensor waits."""
        if self.offload == "none":
            return self._moved(tensor)
        if self.offload == "disk":
            return tensor
        return tensor.clone() if self.device.type == "cpu" else tensor.pin_memory()

    def _taken(self, weight: Tensor) -> Tensor | None:
        """The gradient that the tasks left in a merged tensor, and nothing in its place."""
        gradient, weight.grad = weight.grad, None
        return gradient

    def _of(self, coefficients: Tensor, spec: TensorSpec) -> Tensor:
        """lambda of the T models for one tensor, a view (T,)."""
        return coefficients[:, 0 if coefficients.shape[1] == 1 else self._column[spec.mask_name]]


class _Streamed(StreamedWeights):
    """Merged weights of one step, with the gradients that the tasks' backward passes have added up so far."""

    def __init__(self, *args: Any, store: GradientStore, **options: Any) -> None:
        super().__init__(*args, **options)
        self.store = store


def fixed(weights: Weights) -> Weights:
    """The same weights without gradients."""
    if isinstance(weights, StreamedWeights):
        return weights.fixed()
    return {name: weight.detach() for name, weight in weights.items()}
