"""The merged weights as leaves of a graph, and the chain rule back to masks and coefficients.

All tasks share one set of merged weights: each backward pass adds to their gradients, and `chain` turns those into
dL/dM and dL/dlambda, tensor by tensor, in one reading of the task vectors. No per-model product is stored, no mask
product, and no graph spans the merge. T models, P masks.

With several processes each one reads and merges its own rows of every tensor; merged tensors are gathered, and their
gradients summed over the processes and handed out by rows, one tensor at a time. With `offload`, or if blocks are
gathered one by one, the merged weights never exist as a whole, see tasks/streamed.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_dam.distributed.shards import ALONE, Shards
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
        shards: processes that share the rows.
        dtype: of the merged weights; merging itself is done in float32.
        blockwise: whether the merged weights exist block by block only; with `offload` they do so anyhow. Several
            processes must then run equally many passes in the same order, since a block waits for all of them.
    """

    def __init__(
        self, vectors: TaskVectors, changed: Sequence[TensorSpec], device: torch.device, *, offload: Offload = "none",
        dtype: torch.dtype = torch.float32, shards: Shards = ALONE, blockwise: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.offload, self.dtype, self.shards, self._vectors = device, offload, dtype, shards, vectors
        self.blockwise = blockwise or offload != "none"
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
        # rows of mapped files: what is not ours is never read; what no model changed is whole
        stored = {spec.name: vectors.base(spec.name) for spec in self._specs}
        self._base = {n: self._placed(shards.local(base) if n in masked else base) for n, base in stored.items()}
        self._models = {
            spec.name: [None if m is None else self._placed(shards.local(m)) for m in vectors.models(spec.name)]
            for spec in changed
        }
        self._mapped: frozenset[int] = frozenset()
        if offload == "disk":
            models = (m for tensors in self._models.values() for m in tensors if m is not None)
            self._mapped = views_of_files([*self._base.values(), *models])

    def base_weights(self) -> Weights:
        """theta_0 by output name, whole."""
        return self._fixed(self._base | self._whole({s.name: self._vectors.base(s.name) for s in self.changed}))

    def own_weights(self, index: int) -> Weights:
        """theta_t by output name, whole, as stored: what no model changed is theta_0's."""
        found = {}
        for spec in self._specs:
            tensor = self._models[spec.name][index] if spec.name in self._models else self._base[spec.name]
            if tensor is not None and spec.sources[index] is not None:
                found[spec.name] = tensor
        stored = {name: self._vectors.models(name)[index] for name in found if name in self._models}
        return self._fixed(found | self._whole(stored))

    def _whole(self, stored: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The stored tensors in place of our rows of them."""
        if self.shards.size == 1:
            return {}
        found = {name: tensor for name, tensor in stored.items() if tensor is not None}
        return {n: self._moved(t) for n, t in found.items()} if self.offload == "none" else found

    def weights(self, masks: Masks, coefficients: Tensor, *, in_step: bool = True) -> Weights:
        """Merged weights by output name; those that change are leaves with gradients.

        Args:
            masks: our rows of M by mask name, each broadcastable to its tensors; a missing name keeps everything.
            coefficients: lambda, (T, 1) or (T, P).
            in_step: whether all processes make the same passes with them; else they are whole from the start.
        """
        lambdas = coefficients.detach().cpu()
        if self.blockwise and (in_step or self.shards.size == 1):
            return self._streamed(masks, lambdas)
        weights = {name: self._moved(tensor) for name, tensor in self._base.items()}
        for spec in self.changed:
            weights[spec.name] = self._merged(spec, masks, lambdas).requires_grad_(True)
        return weights

    def _merged(self, spec: TensorSpec, masks: Masks, lambdas: Tensor) -> Tensor:
        """One merged tensor, whole."""
        base = self._moved(self._base[spec.name])
        rows = torch.empty(base.shape, dtype=self.dtype, device=self.device)
        if base.numel():  # none where there are fewer rows than processes
            models, mask = self._moved_models(spec.name), masks.get(spec.mask_name)
            merge(base, models, self._of(lambdas, spec), mask, out=rows)
        return self.shards.gather(rows, spec.shape)

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
        if isinstance(weights, _Streamed):
            coefficient_gradient += self.shards.sum(weights.store.take_coefficients(coefficient_gradient))
            for name, found in weights.store.take(self.device):
                yield name, self.shards.sum(found) if whole else found
            return
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
        if isinstance(weights, _Streamed):
            return self.shards.sum(weights.store.take_coefficients(total))
        for spec in self.changed:
            gradient = self._rows(weights[spec.name])
            if gradient is not None and gradient.numel():
                models, mask = self._models[spec.name], masks.get(spec.mask_name)
                self._of(total, spec).add_(coefficient_gradient(gradient, self._base[spec.name], models, mask))
        return self.shards.sum(total)

    def _streamed(self, masks: Masks, lambdas: Tensor) -> _Streamed:
        specs = {spec.name: spec for spec in self.changed}
        store = GradientStore(on_disk=self.offload == "disk")

        def form(name: str) -> Tensor:
            if name in specs:
                return self._merged(specs[name], masks, lambdas)
            return self._computed(self._moved(self._base[name]))

        def consume(name: str, gradient: Tensor) -> None:
            spec = specs.get(name)
            if spec is not None:
                mask = masks[spec.mask_name]
                found = store.of(spec.mask_name, mask.shape, self.device)
                gradient = gradient if self.shards.size == 1 else self.shards.scatter(gradient.float())
                if not gradient.numel():
                    return
                gradients(
                    gradient, self._moved(self._base[name]), self._moved_models(name), self._of(lambdas, spec), mask,
                    mask_out=found, coefficient_out=self._of(store.coefficients(lambdas, self.device), spec),
                )  # fmt: skip
                store.rest(spec.mask_name, found)

        return _Streamed([spec.name for spec in self._specs], form, consume=consume, release=self._release, store=store)

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

    def _rows(self, weight: Tensor) -> Tensor | None:
        """Our rows of the gradient that the tasks of all processes left in a merged tensor; None if it is unused."""
        if self.shards.size == 1:
            return weight.grad
        # other processes may have one where we have none
        return self.shards.scatter((torch.zeros_like(weight) if weight.grad is None else weight.grad).float())

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
