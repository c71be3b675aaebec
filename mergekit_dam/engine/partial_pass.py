"""Passes through a part of a model: from one block to another, starting from hidden states that were kept.

Positions: 0 is what comes before the blocks (embeddings), 1..N are the blocks, N + 1 what follows (norm and head).
Legend: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class BlockChain:
    """The blocks of a module, each of which reads the hidden states of the one before.

    Args:
        module: their owner.
        names: of the blocks, in order; members of one ModuleList. Each takes hidden states first and returns them.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.blocks = [module.get_submodule(name) for name in names]

    @property
    def end(self) -> int:
        """One more than the last position."""
        return len(self.blocks) + 2

    def run(self, call: Callable[[], Any], first: int, stop: int, entering_BLD: Tensor | None = None) -> Any:
        """Compute positions first..stop-1.

        Args:
            call: runs the module; whatever blocks at other positions need may be missing.
            first: the first position.
            stop: one more than the last one.
            entering_BLD: hidden states that position `first` reads; None if `first` is 0.

        Returns:
            The hidden states (B, L, D) that position `stop` would read, or what `call` returns if that is the end.
        """
        with ExitStack() as around:
            if first > 0:
                assert entering_BLD is not None
                around.enter_context(self._entered(first, entering_BLD))
            if stop == self.end:
                return call()
            around.enter_context(self._stopped(stop))
            try:
                call()
            except _Reached as reached:
                return reached.hidden_BLD
            raise AssertionError("the module ran past its blocks")

    @contextmanager
    def observed(self, stops: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """While this lasts, a pass leaves the states that these positions read; they take part in gradients.

        Args:
            stops: positions 1..N + 1.
        """
        found: dict[int, Tensor] = {}

        def noted(stop: int, hidden_BLD: Tensor) -> Tensor:
            found[stop] = hidden_BLD if hidden_BLD.requires_grad else hidden_BLD.detach().requires_grad_()
            found[stop].retain_grad()
            return found[stop]

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return _replacing(noted(1, _read(arguments, named)))(_, arguments, named)

        handles = [
            self.blocks[stop - 2].register_forward_hook(lambda _, __, hidden_BLD, stop=stop: noted(stop, hidden_BLD))
            for stop in stops
            if stop > 1
        ]
        if 1 in stops:
            handles.append(self.blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _entered(self, first: int, entering_BLD: Tensor) -> Iterator[None]:
        """While this lasts, position `first` reads these states, and blocks before it do nothing."""
        skipped = self.blocks[: first - 1]
        for block in skipped:
            block.forward = lambda *_, **__: entering_BLD
        handle = self.blocks[0].register_forward_pre_hook(_replacing(entering_BLD), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for block in skipped:
                del block.forward  # the class's own is there again

    @contextmanager
    def _stopped(self, stop: int) -> Iterator[None]:
        """While this lasts, a pass ends with `_Reached` once the states are there that position `stop` reads."""

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            raise _Reached(_read(arguments, named))

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
    """The pass has come as far as it should."""

    def __init__(self, hidden_BLD: Tensor) -> None:
        super().__init__()
        self.hidden_BLD = hidden_BLD


def _read(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    return torch.as_tensor(arguments[0] if arguments else named["hidden_states"])


def _replacing(entering_BLD: Tensor) -> Callable[..., Any]:
    def replace(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if arguments:
            return (entering_BLD, *arguments[1:]), named
        return arguments, {**named, "hidden_states": entering_BLD}

    return replace
