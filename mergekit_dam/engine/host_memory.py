"""Tensors on their way from host memory to an accelerator, while it computes.

Copies are begun ahead, on a stream of their own, by a thread that first brings what is not pinned (maps of files) into
pinned memory. What arrived stays until the block after next is announced, since a backward pass asks for a tensor
twice. So the device holds the frozen tensors of two blocks at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_Arrival = tuple[Tensor, torch.cuda.Event]
_Key = tuple[int, torch.Size]  # address in the host; a tensor and its first rows share it


class Transfers:
    """Copies to one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transfers")
        self._now: dict[_Key, Future[_Arrival]] = {}  # of the block that was announced last
        self._before: dict[_Key, Future[_Arrival]] = {}

    def begin(self, tensors: Iterable[Tensor]) -> None:
        """Announce the tensors of the next block; those of the block before the one at hand are let go of."""
        held = self._before | self._now
        wanted = {_key(tensor): tensor for tensor in tensors if tensor.numel()}
        ahead = {
            key: held[key] if key in held else self._thread.submit(self._copied, tensor)
            for key, tensor in wanted.items()
        }
        self._before, self._now = self._now, ahead

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, for work on the current stream; one that was not announced is copied now."""
        coming = self._now.get(_key(tensor)) or self._before.get(_key(tensor))
        if coming is None:
            return tensor.to(self._device, non_blocking=tensor.is_pinned())
        copy, arrived = coming.result()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrived)
        copy.record_stream(current)  # its memory is not given to others before what runs there is done
        return copy

    def _copied(self, tensor: Tensor) -> _Arrival:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
            copy = pinned.to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
            return copy, arrived


def _key(tensor: Tensor) -> _Key:
    return tensor.data_ptr(), tensor.shape
