"""Run a range of a model's blocks, starting from stored hidden states.

Positions: 0 is everything before the blocks (embeddings), 1..N are the blocks, N + 1 is everything after them (norm and
head). Legend: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class BlockChain:
    """The blocks of a module, each of which reads the hidden states of the previous block.

    Args:
        module: owner of the blocks.
        names: names of the blocks in order, members of one ModuleList. A block takes hidden states as its first
            argument and returns hidden states.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.blocks = [module.get_submodule(name) for name in names]

    @property
    def end(self) -> int:
        """The last position plus 1."""
        return len(self.blocks) + 2

    def run(self, call: Callable[[], Any], first: int, stop: int, entering_BLD: Tensor | None = None) -> Any:
        """Compute positions first..stop-1.

        Args:
            call: runs the module; tensors of blocks at other positions may be missing.
            first: the first position.
            stop: the last position plus 1.
            entering_BLD: hidden states that position `first` reads; None if `first` is 0.

        Returns:
            The hidden states (B, L, D) that position `stop` would read, or the result of `call` if `stop` is the end.
        """
        with ExitStack() as contexts:
            if first > 0:
                assert entering_BLD is not None
                contexts.enter_context(self._starting_at(first, entering_BLD))
            if stop == self.end:
                return call()
            contexts.enter_context(self._stopping_at(stop))
            try:
                call()
            except _Reached as reached:
                return reached.hidden_BLD
            raise AssertionError("the module ran past its blocks")

    @contextmanager
    def observed(self, stops: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Record, during the context, the hidden states that these positions read, with their gradients.

        Args:
            stops: positions 1..N + 1.

        Yields:
            Position -> hidden states (B, L, D), filled by a forward pass.
        """
        states: dict[int, Tensor] = {}

        def record(stop: int, hidden_BLD: Tensor) -> Tensor:
            states[stop] = hidden_BLD if hidden_BLD.requires_grad else hidden_BLD.detach().requires_grad_()
            states[stop].retain_grad()
            return states[stop]

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return _replacing(record(1, _hidden_argument(arguments, named)))(_, arguments, named)

        handles = [
            self.blocks[stop - 2].register_forward_hook(lambda _, __, hidden_BLD, stop=stop: record(stop, hidden_BLD))
            for stop in stops
            if stop > 1
        ]
        if 1 in stops:
            handles.append(self.blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _starting_at(self, first: int, entering_BLD: Tensor) -> Iterator[None]:
        """Make position `first` read these states, and skip the blocks before it."""
        skipped = self.blocks[: first - 1]
        for block in skipped:
            block.forward = lambda *_, **__: entering_BLD
        handle = self.blocks[0].register_forward_pre_hook(_replacing(entering_BLD), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for block in skipped:
                del block.forward  # restores the forward of the class

    @contextmanager
    def _stopping_at(self, stop: int) -> Iterator[None]:
        """End a pass with `_Reached` as soon as the states that position `stop` reads are computed."""

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            raise _Reached(_hidden_argument(arguments, named))

        def after(_: nn.Module, __: Any, hidden_BLD: Tensor) -> None:
            raise _Reached(hidden_BLD)

        if stop == self.end - 1:
            handle = self.blocks[-1].register_forward_hook(after)
        else:
            handle = self.blocks[stop - 1].register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class _Reached(Exception):
    """The pass reached its last position."""

    def __init__(self, hidden_BLD: Tensor) -> None:
        super().__init__()
        self.hidden_BLD = hidden_BLD


def _hidden_argument(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """Return the hidden states among a block's arguments."""
    return torch.as_tensor(arguments[0] if arguments else named["hidden_states"])


def _replacing(entering_BLD: Tensor) -> Callable[..., Any]:
    """Make a pre-forward hook that replaces a block's hidden states."""

    def replace(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if arguments:
            return (entering_BLD, *arguments[1:]), named
        return arguments, {**named, "hidden_states": entering_BLD}

    return replace
