"""Find the blocks of a module and the dictionaries that hold its tensors, and swap tensors in them.

A block is a member of a ModuleList, such as an encoder layer; FSDP wraps the same units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

Weights = Mapping[str, Tensor]
Slot = tuple[dict[str, Tensor | None], str]  # a dictionary of the owning module, and a key of it


def blocks_of(module: nn.Module) -> dict[str, str]:
    """Map each parameter name to the name of its outermost block; parameters outside of blocks are left out."""
    blocks = [
        f"{name}.{index}"
        for name, member in module.named_modules()
        if isinstance(member, nn.ModuleList)
        for index in range(len(member))
    ]
    outermost = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    return {
        parameter: block
        for parameter, _ in module.named_parameters(remove_duplicate=False)
        for block in outermost
        if parameter.startswith(f"{block}.")
    }


def without_gradients(weights: Weights) -> Weights:
    """Return the same weights as tensors that require no gradient."""
    return {name: weight.detach() for name, weight in weights.items()}


def slots_of(module: nn.Module, names: Iterable[str]) -> dict[str, Slot]:
    """Find the slots of the parameters and buffers of these names."""
    slots: dict[str, Slot] = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        holder = module.get_submodule(owner)
        tensors: dict[str, Tensor | None] = holder._buffers if key in holder._buffers else holder._parameters  # type: ignore[assignment]
        slots[name] = tensors, key
    return slots


@contextmanager
def swapped(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put `tensors` into their slots for the duration of the context, then restore the previous tensors."""
    before = [(holder, key, holder[key]) for holder, key in (slots[name] for name in tensors)]
    for name, tensor in tensors.items():
        holder, key = slots[name]
        holder[key] = tensor
    try:
        yield
    finally:
        for holder, key, previous in before:
            holder[key] = previous
