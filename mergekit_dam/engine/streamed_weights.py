"""Weights that exist only while the block of the model runs that they belong to.

A block is a member of a ModuleList (an encoder layer), as FSDP wraps them; what lies outside of all blocks lives for
one pass. A hook forms a block's tensors before it runs and lets go of them afterwards. What autograd would keep of
them for the backward pass is kept as a name instead and formed again there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Weights = Mapping[str, Tensor]
Slot = tuple[dict[str, Tensor | None], str]  # the dictionary of its owner, and its key there


class StreamedWeights(Mapping[str, Tensor]):
    """Tensors by output name, formed when they are asked for.

    Args:
        names: of all tensors.
        form: makes one tensor; it is called again for the backward pass and must give the same values.
        consume: takes the name and the gradient of a tensor, once per pass that used it; None for fixed weights.
        ahead: is told which tensors come next, when those of a block are first asked for.
    """

    def __init__(
        self,
        names: Iterable[str],
        form: Callable[[str], Tensor],
        *,
        consume: Callable[[str, Tensor], None] | None,
        ahead: Callable[[Iterable[str]], None] = lambda names: None,
    ) -> None:
        self._names = dict.fromkeys(names)
        self.form, self.consume, self.ahead = form, consume, ahead
        self._token = torch.zeros((), requires_grad=True)  # so that autograd walks back to `consume`
        self._order: list[tuple[str, ...]] = []  # tensors by block, as blocks run
        self._block_of: dict[str, int] = {}
        self._kept: set[str] = set()  # what the backward pass will ask for
        self._at: tuple[int, bool] | None = None  # the block that runs, and whether backward
        self._names_of: dict[int, str] = {}  # storage -> name of what is formed right now

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        self._announce(name)
        if self.consume is None or not torch.is_grad_enabled():
            tensor = self.form(name)
        else:
            tensor = _Formed.apply(self._token, self, name)
        self._names_of[tensor.untyped_storage().data_ptr()] = name
        return tensor

    def _announce(self, name: str) -> None:
        """With the first tensor of a block: what the next one needs, which in a backward pass is the one before."""
        block = self._block_of.get(name)
        backward = torch._C._current_graph_task_id() != -1  # there is no public way to ask
        if block is None or self._at == (block, backward):
            return
        self._at = block, backward
        following = block - 1 if backward else block + 1
        if 0 <= following < len(self._order):
            names = self._order[following]
            # a block that is run again (gradient checkpointing) keeps nothing and needs all
            needed = [n for n in names if n in self._kept] if backward else []
            self.ahead(needed or names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a tensor need not be formed for that

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def fixed(self) -> StreamedWeights:
        """The same weights without gradients."""
        return StreamedWeights(self._names, self.form, consume=None, ahead=self.ahead)

    def let_go(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors by output name that a block has done with."""
        for tensor in tensors.values():
            self._names_of.pop(tensor.untyped_storage().data_ptr(), None)

    def kept_as_names(self, blocks: Mapping[str, Mapping[str, str]]) -> saved_tensors_hooks:
        """Context in which autograd keeps names in place of tensors that were formed here.

        Args:
            blocks: block -> parameter name -> output name, in the order in which they run.
        """
        self._order = [tuple(by_target.values()) for by_target in blocks.values()]
        self._block_of = {name: number for number, names in enumerate(self._order) for name in names}
        self._at = None

        def pack(tensor: Tensor) -> Any:
            name = self._names_of.get(tensor.untyped_storage().data_ptr())
            if name is None:
                return tensor
            self._kept.add(name)
            return name, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            name, size, stride, offset = kept
            self._announce(name)
            again = self.form(name).as_strided(size, stride, offset)
            return again

        return saved_tensors_hooks(pack, unpack)


class _Formed(torch.autograd.Function):
    """A merged tensor whose gradient goes to `consume` at once."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, weights: StreamedWeights, name: str) -> Tensor:
        ctx.weights, ctx.name = weights, name
        return weights.form(name)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.weights.consume(ctx.name, gradients[0])
        return None, None, None


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


@contextmanager
def streamed_blocks(
    module: nn.Module, weights: StreamedWeights, targets: Mapping[str, Mapping[str, str]]
) -> Iterator[None]:
    """While this lasts, each block of `module` gets its tensors before it runs and loses them afterwards.

    Args:
        module: with parameters on the meta device.
        weights: by output name.
        targets: block -> parameter name -> output name.
    """
    handles = []
    for block, names in targets.items():
        found = module.get_submodule(block)
        handles += _hooked(module, found, weights, names)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooked(module: nn.Module, block: nn.Module, weights: StreamedWeights, names: Mapping[str, str]) -> list[Any]:
    slots = slots_of(module, names)
    meta = {target: kept[key] for target, (kept, key) in slots.items()}
    held: dict[str, Tensor] = {}

    def before(*_: Any) -> None:
        for target, name in names.items():
            kept, key = slots[target]
            held[name] = kept[key] = weights[name]

    def after(*_: Any) -> None:
        for target, (kept, key) in slots.items():
            kept[key] = meta[target]
        weights.let_go(held)
        held.clear()

    return [block.register_forward_pre_hook(before), block.register_forward_hook(after, always_call=True)]


def fixed(weights: Weights) -> Weights:
    """The same weights without gradients."""
    if isinstance(weights, StreamedWeights):
        return weights.fixed()
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
