"""Pages of mapped files: let go of them once they were read, so that resident memory does not grow with the models."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

# advice to Linux: a clean page of a file is read again when it is touched again; or is read now, in the background
_WILL_NEED, _DONT_NEED = 3, 4


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
