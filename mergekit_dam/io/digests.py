"""SHA-256 of files and of tensors, which identifies content whatever its name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

_HASH_CHUNK = 1 << 24  # bytes read at a time: large enough that hashing takes the time, not the calls


def file_digest(path: Path) -> str:
    """SHA-256 of a file (hex)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes (hex); shape and type do not count."""
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
