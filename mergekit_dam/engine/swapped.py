"""Tensors in place of a module's own parameters and buffers.

torch.func.functional_call does this, too, but looks every name up twice per call: on an accelerator that takes longer
than many a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

Slot = tuple[dict[str, Tensor | None], str]  # the dictionary of its owner, and its key there


def slots_of(module: nn.Module, names: Iterable[str]) -> dict[str, Slot]:
    """Where the parameters and buffers of these names are kept."""
    found: dict[str, Slot] = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        holder = module.get_submodule(owner)
        kept: dict[str, Tensor | None] = holder._buffers if key in holder._buffers else holder._parameters  # type: ignore[assignment]
        found[name] = kept, key
    return found


@contextmanager
def swapped(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While this lasts, `tensors` are in their slots; afterwards what was there before."""
    before = [(kept, key, kept[key]) for kept, key in (slots[name] for name in tensors)]
    for name, tensor in tensors.items():
        kept, key = slots[name]
        kept[key] = tensor
    try:
        yield
    finally:
        for kept, key, own in before:
            kept[key] = own
