"""Tensors on their way from host memory to an accelerator, while it computes.

Copies are begun ahead, on a stream of their own, by a thread that first brings what is not pinned (maps of files) into
pinned memory. What arrived stays until the block after next is announced, since a backward pass asks for a tensor
twice. So the device holds the frozen tensors of two blocks at most.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

_Arrival = tuple[Tensor, torch.cuda.Event]
_Key = tuple[int, torch.Size]  # address in the host; a tensor and its first rows share it
# advice to Linux: a clean page of a file is read again when it is touched again; or is read now, in the background
_WILL_NEED, _DONT_NEED = 3, 4


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


def drop_pages(tensor: Tensor) -> None:
    """Give back the whole pages under a contiguous tensor of a mapped file. Does nothing where that is not Linux.

    The tensor stays valid. It must be a view of a file (or a shared map of one): other memory would lose its values.
    """
    _advise(tensor, _DONT_NEED)


def read_ahead(tensor: Tensor) -> None:
    """Have the system read the whole pages under a contiguous tensor of a mapped file while this process goes on.

    Does nothing where that is not Linux, and nothing to pages that are in memory.
    """
    _advise(tensor, _WILL_NEED)


def _advise(tensor: Tensor, advice: int) -> None:
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if end > start:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def views_of_files(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Addresses of those tensors whose memory is a map of a file, as the system tells; none where that is not Linux.

    They hold for as long as the tensors live. A library may have copied what it was asked to map.
    """
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or not maps.is_file():
        return frozenset()
    ranges = []
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            start, end = (int(part, 16) for part in fields[0].split("-"))
            ranges.append((start, end))
    return frozenset(t.data_ptr() for t in tensors if any(start <= t.data_ptr() < end for start, end in ranges))
