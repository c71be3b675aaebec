"""Weights by output name, the blocks of a module, and the places where a module keeps its tensors.

A block is a member of a ModuleList (an encoder layer), as FSDP wraps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

Weights = Mapping[str, Tensor]
Slot = tuple[dict[str, Tensor | None], str]  # the dictionary of its owner, and its key there


def blocks_of(module: nn.Module) -> dict[str, str]:
    """Parameter name -> name of the block that it lives in; parameters outside of all blocks are left out."""
    blocks = [
        f"{name}.{index}"
        for name, found in module.named_modules()
        if isinstance(found, nn.ModuleList)
        for index in range(len(found))
    ]
    outermost = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    return {
        parameter: block
        for parameter, _ in module.named_parameters(remove_duplicate=False)
        for block in outermost
        if parameter.startswith(f"{block}.")
    }


def without_gradients(weights: Weights) -> Weights:
    """Return the same weights as tensors that need no gradient."""
    return {name: weight.detach() for name, weight in weights.items()}


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
