"""Make seeds that are equal in all processes and do not depend on the order of calls."""

from __future__ import annotations

import hashlib

import torch


def stable_seed(*parts: object) -> int:
    """Return a 63-bit seed from any printable parts (`hash` would differ between processes)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by `stable_seed`."""
    return torch.Generator().manual_seed(stable_seed(*parts))
