"""Models whose blocks are gathered only while they run: for merged weights that do not fit beside their gradients.

A block is a member of a model's list of layers. Its tensors stay spread by rows (DTensor) until its forward pass; they
are gathered for it, dropped after it, gathered again for the backward pass, which runs the block anew (activation
checkpointing, arXiv 1604.06174), and their gradient is summed by rows at once. The processes must run equally many
passes in the same order, since every block waits for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def stream_blocks(module: nn.Module) -> frozenset[str]:
    """Have every block of a model gather its own tensors where they come as rows.

    Returns:
        Names of the parameters that may then be rows.
    """
    names: set[str] = set()
    for prefix, block in _blocks(module):
        names |= {f"{prefix}.{name}" for name, _ in block.named_parameters()}
        # an instance's own `forward` is found before the class's
        block.forward = _Streamed(block)
    return frozenset(names)


def gathered(rows: DTensor) -> Tensor:
    """The whole tensor, differentiable: its gradient is summed over the processes and comes back by rows."""
    # without `grad_placements` each process would keep only its own term of the sum
    return rows.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


class _Streamed:
    """The forward pass of a block whose parameters, as a caller swapped them in, may be rows."""

    def __init__(self, block: nn.Module) -> None:
        self._block, self._plain = block, _Plain(block, block.forward)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        tensors = dict(self._block.named_parameters())
        if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            return self._plain.run(*inputs, **options)
        # what a caller swapped in is gone when the backward pass runs the block anew: it is kept here
        return checkpoint(self._with, tensors, inputs, options, use_reentrant=False, preserve_rng_state=False)

    def _with(self, tensors: dict[str, Tensor], inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        whole = {f"block.{n}": gathered(t) if isinstance(t, DTensor) else t for n, t in tensors.items()}
        return functional_call(self._plain, whole, inputs, options, tie_weights=False)


class _Plain(nn.Module):
    """A block's own forward pass."""

    def __init__(self, block: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.run = block, run

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.run(*inputs, **options)


def _blocks(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Members of the outermost lists of layers, with their names."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        inner = _blocks(child, f"{prefix}{name}.")
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            inner = [(f"{prefix}{name}.{i}", block) for i, block in child.named_children()]
        found += inner
    return found
