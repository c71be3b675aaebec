"""theta_0 and theta_t while masks are learned: where they wait, and how they come to where they are used.

With several processes each one holds its own rows of the tensors that change; `own_weights` and `base_weights` are
whole in each process, since a task needs them so. T models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mergekit_dam.engine.host_memory import Transfers, drop_pages, read_ahead, views_of_files
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.engine.streamed_weights import StreamedWeights, Weights
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.models.plan import TensorSpec

Offload = Literal["none", "cpu", "disk"]


class FrozenModels:
    """Base and models by output name.

    Args:
        vectors: where theta_0 and theta_t come from.
        changed: tensors that some model changed; the others are theta_0's.
        device: where they are used. On the CPU tensors stay views of the mapped files.
        offload: where they wait: `none` on the device; `cpu` in host memory, pinned for an accelerator; `disk` in
            their files, of which no page stays in memory.
        dtype: of floating tensors where they are used block by block.
        shards: processes that share the rows.
        specs: the tensors in question; default: all of the plan.
        lazy: leave them in their files until they are asked for.

    Attributes:
        base: our rows of theta_0 where it changes, all of it elsewhere, as it waits.
        models: our rows of theta_1..T of each tensor that changes; None where a model lacks it.
    """

    def __init__(
        self, vectors: TaskVectors, changed: Sequence[TensorSpec], device: torch.device, *, offload: Offload = "none",
        dtype: torch.dtype = torch.float32, shards: Shards = ALONE, specs: Sequence[TensorSpec] | None = None,
        lazy: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.offload, self.dtype, self.shards, self._lazy = device, offload, dtype, shards, lazy
        self._vectors, self._changed = vectors, tuple(changed)
        self._specs = vectors.plan.tensors if specs is None else tuple(specs)
        self._transfers = Transfers(device) if offload != "none" and device.type == "cuda" else None
        masked = {spec.name for spec in changed}
        # rows of mapped files: what is not ours is never read; what no model changed is whole
        stored = {spec.name: vectors.base(spec.name) for spec in self._specs}
        self.base = {n: self._placed(shards.local(base) if n in masked else base) for n, base in stored.items()}
        self.models = {
            spec.name: [None if m is None else self._placed(shards.local(m)) for m in vectors.models(spec.name)]
            for spec in changed
        }
        self._mapped: frozenset[int] = frozenset()
        if offload == "disk":
            models = (m for tensors in self.models.values() for m in tensors if m is not None)
            self._mapped = views_of_files([*self.base.values(), *models])

    def base_weights(self, names: Collection[str] | None = None) -> Weights:
        """theta_0 by output name, whole; of all tensors, or of those named."""
        found = {name: tensor for name, tensor in self.base.items() if names is None or name in names}
        return self._fixed(
            found | self._whole({s.name: self._vectors.base(s.name) for s in self._changed if s.name in found})
        )

    def own_weights(self, index: int, names: Collection[str] | None = None) -> Weights:
        """theta_t by output name, whole, as stored: what no model changed is theta_0's. Of all tensors, or of some."""
        found = {}
        for spec in (spec for spec in self._specs if names is None or spec.name in names):
            tensor = self.models[spec.name][index] if spec.name in self.models else self.base[spec.name]
            if tensor is not None and spec.sources[index] is not None:
                found[spec.name] = tensor
        stored = {name: self._vectors.models(name)[index] for name in found if name in self.models}
        return self._fixed(found | self._whole(stored))

    def models_here(self, name: str) -> list[Tensor | None]:
        """Our rows of theta_1..T of one tensor, on the device."""
        return [None if m is None else self.moved(m) for m in self.models[name]]

    def moved(self, tensor: Tensor) -> Tensor:
        """On the device."""
        if tensor.device == self.device:
            return tensor
        return tensor.to(self.device) if self._transfers is None else self._transfers.take(tensor)

    def computed(self, tensor: Tensor) -> Tensor:
        """In the type that passes are computed in."""
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def release(self, names: Iterable[str]) -> None:
        """No page of these tensors is needed for now."""
        for tensor in self._waiting(names) if self._mapped else ():
            if tensor.data_ptr() in self._mapped:
                drop_pages(tensor)

    def ahead(self, names: Iterable[str]) -> None:
        """Base and models of these tensors are needed next."""
        self._ahead(self._waiting(names))

    def _ahead(self, tensors: Iterable[Tensor]) -> None:
        """They are read from the disk, and sent to an accelerator, in the background."""
        coming = list(tensors)
        for tensor in coming if self._mapped else ():
            if tensor.data_ptr() in self._mapped:
                read_ahead(tensor)
        if self._transfers is not None:
            self._transfers.begin(coming)

    def _waiting(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Our rows of theta_0 and of theta_1..T."""
        for name in names:
            yield from (m for m in (self.base[name], *self.models.get(name, ())) if m is not None)

    def _whole(self, stored: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The stored tensors in place of our rows of them."""
        if self.shards.size == 1:
            return {}
        found = {name: tensor for name, tensor in stored.items() if tensor is not None}
        return {n: self.moved(t) for n, t in found.items()} if self.offload == "none" else found

    def _fixed(self, tensors: dict[str, Tensor]) -> Weights:
        if self.offload == "none":
            return {name: self.moved(tensor) for name, tensor in tensors.items()}
        return StreamedWeights(
            tensors, lambda name: self.computed(self.moved(tensors[name])), consume=None, release=self.release,
            ahead=lambda names: self._ahead(tensors[name] for name in names),
        )  # fmt: skip

    def _placed(self, tensor: Tensor) -> Tensor:
        """Where a frozen tensor waits."""
        if self._lazy:
            return tensor
        if self.offload == "none":
            return self.moved(tensor)
        if self.offload == "disk":
            return tensor
        return tensor.clone() if self.device.type == "cpu" else tensor.pin_memory()
