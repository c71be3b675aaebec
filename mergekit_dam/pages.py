"""Pages of mapped files: let go of them once they were read, so that resident memory does not grow with the models."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_DONT_NEED = 4  # MADV_DONTNEED on Linux; a clean page of a file is read again when it is touched again


def drop_pages(tensor: Tensor) -> None:
    """Give back the whole pages under a contiguous tensor of a mapped file. Does nothing where that is not Linux.

    The tensor stays valid. It must be a view of a file (or a shared map of one): other memory would lose its values.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if end > start:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)
