"""theta_0 and theta_t while masks are learned.

With several processes each one holds its own rows of the tensors that change; `own_weights` and `base_weights` are
whole in each process, since a task needs them so. T models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.models.plan import TensorSpec


class FrozenModels:
    """Base and models by output name.

    Args:
        vectors: where theta_0 and theta_t come from.
        changed: tensors that some model changed; the others are theta_0's.
        device: where they are used. On the CPU tensors stay views of the mapped files.
        shards: processes that share the rows.
        specs: the tensors in question; default: all of the plan.
        lazy: leave them in their files until they are asked for.

    Attributes:
        base: our rows of theta_0 where it changes, all of it elsewhere, as it waits.
        models: our rows of theta_1..T of each tensor that changes; None where a model lacks it.
        bytes_read: that were taken from files so far, for these tensors: our rows of all models, and whole models.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        changed: Sequence[TensorSpec],
        device: torch.device,
        *,
        shards: Shards = ALONE,
        specs: Sequence[TensorSpec] | None = None,
        lazy: bool = False,
    ) -> None:
        self.device, self.shards, self._lazy = device, shards, lazy
        self._vectors, self._changed = vectors, tuple(changed)
        self._specs = vectors.plan.tensors if specs is None else tuple(specs)
        self.bytes_read = 0
        masked = {spec.name for spec in changed}
        # rows of mapped files: what is not ours is never read; what no model changed is whole
        stored = {spec.name: vectors.base(spec.name) for spec in self._specs}
        self.base = {n: self._placed(shards.local(base) if n in masked else base) for n, base in stored.items()}
        self.models = {
            spec.name: [None if m is None else self._placed(shards.local(m)) for m in vectors.models(spec.name)]
            for spec in changed
        }

    def base_weights(self) -> Weights:
        """theta_0 by output name, whole."""
        return self._all_moved(self.base | self._whole({s.name: self._vectors.base(s.name) for s in self._changed}))

    def own_weights(self, index: int) -> Weights:
        """theta_t by output name, whole, as stored: what no model changed is theta_0's."""
        found = {}
        for spec in self._specs:
            tensor = self.models[spec.name][index] if spec.name in self.models else self.base[spec.name]
            if tensor is not None and spec.sources[index] is not None:
                found[spec.name] = tensor
        stored = {name: self._vectors.models(name)[index] for name in found if name in self.models}
        whole = self._whole(stored)
        read = found if self._lazy else whole  # the others are here
        self.bytes_read += sum(tensor.nbytes for tensor in read.values())
        return self._all_moved(found | whole)

    def models_here(self, name: str) -> list[Tensor | None]:
        """Our rows of theta_1..T of one tensor, on the device."""
        return [None if m is None else self.moved(m) for m in self.models[name]]

    def moved(self, tensor: Tensor) -> Tensor:
        """On the device."""
        return tensor.to(self.device)

    def _whole(self, stored: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The stored tensors in place of our rows of them."""
        if self.shards.size == 1:
            return {}
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    def _all_moved(self, tensors: Mapping[str, Tensor]) -> Weights:
        return {name: self.moved(tensor) for name, tensor in tensors.items()}

    def _placed(self, tensor: Tensor) -> Tensor:
        """Where a frozen tensor waits."""
        if self._lazy:
            return tensor
        self.bytes_read += tensor.nbytes
        return self.moved(tensor)
