"""Hold theta_0 and theta_t while masks are learned.

With several processes each process holds its own rows of the tensors that change. `own_weights` and `base_weights` are
whole in each process, since a forward pass needs whole tensors. T models.
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
        vectors: source of theta_0 and theta_t.
        changed: tensors that some model changed; all other tensors equal theta_0's.
        device: device that computes with them. On the CPU tensors stay views of the mapped files.
        shards: processes that share the rows.
        specs: tensors to hold; default: all tensors of the plan.
        lazy: leave tensors in their files until they are used.

    Attributes:
        base: theta_0 in storage: this process's rows of tensors that change, other tensors whole.
        models: this process's rows of theta_1..T of each tensor that changes; None where a model lacks the tensor.
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
        masked = {spec.name for spec in changed}
        # slices of mapped files: rows of other processes are never read
        stored = {spec.name: vectors.base(spec.name) for spec in self._specs}
        self.base = {n: self._store(shards.local(base) if n in masked else base) for n, base in stored.items()}
        self.models = {
            spec.name: [None if m is None else self._store(shards.local(m)) for m in vectors.models(spec.name)]
            for spec in changed
        }

    def base_weights(self) -> Weights:
        """Return theta_0 by output name, whole tensors."""
        return self._all_to_device(self.base | self._whole({s.name: self._vectors.base(s.name) for s in self._changed}))

    def own_weights(self, index: int) -> Weights:
        """Return theta_t by output name, whole tensors in their stored type; unchanged tensors are theta_0's."""
        held = {}
        for spec in self._specs:
            tensor = self.models[spec.name][index] if spec.name in self.models else self.base[spec.name]
            if tensor is not None and spec.sources[index] is not None:
                held[spec.name] = tensor
        stored = {name: self._vectors.models(name)[index] for name in held if name in self.models}
        whole = self._whole(stored)
        read = held if self._lazy else whole  # unless lazy, held tensors are in memory already
        self._vectors.bytes_read += sum(tensor.nbytes for tensor in read.values())
        return self._all_to_device(held | whole)

    def local_models(self, name: str) -> list[Tensor | None]:
        """Return this process's rows of theta_1..T of one tensor, on the device."""
        return [None if m is None else self.to_device(m) for m in self.models[name]]

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device."""
        return tensor.to(self.device)

    def _whole(self, stored: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Return the stored tensors, to replace this process's rows of them; nothing for one process."""
        if self.shards.size == 1:
            return {}
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    def _all_to_device(self, tensors: Mapping[str, Tensor]) -> Weights:
        return {name: self.to_device(tensor) for name, tensor in tensors.items()}

    def _store(self, tensor: Tensor) -> Tensor:
        """Return a frozen tensor as it is kept: in its file if lazy, else on the device."""
        if self._lazy:
            return tensor
        self._vectors.bytes_read += tensor.nbytes
        return self.to_device(tensor)
