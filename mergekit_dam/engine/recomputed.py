"""Gradient checkpointing (arXiv 1604.06174): a block keeps its input, and runs again in the backward pass.

The switch in transformers does not work here: it runs the block again after `functional_call` has removed the block's
parameters. Here each run of a block gets the block's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed_blocks(
    module: nn.Module,
    blocks: Iterable[str],
    take: Callable[[str], Mapping[str, Tensor]],
) -> Iterator[None]:
    """Checkpoint the blocks of `module` during the context: a backward pass runs each block again.

    Args:
        module: owner of the blocks; deterministic, without dropout.
        blocks: names of members of ModuleLists.
        take: returns the tensors of a block by parameter name within it; called for each run of a block.
    """
    changed = [module.get_submodule(name) for name in blocks]
    # a partial pass replaces the forward of blocks that it skips (engine/partial_pass.py): that forward is restored
    before = [vars(block).get("forward") for block in changed]
    for name, block in zip(blocks, changed, strict=True):
        block.forward = _recomputed(block, partial(take, name))
    try:
        yield
    finally:
        for block, replaced in zip(changed, before, strict=True):
            if replaced is None:
                del block.forward  # restores the forward of the class
            else:
                block.forward = replaced


def _recomputed(block: nn.Module, take: Callable[[], Mapping[str, Tensor]]) -> Callable[..., Any]:
    plain, running = block.forward, False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal running
        running = True
        try:
            return functional_call(block, dict(take()), args, kwargs, tie_weights=False)
        finally:
            running = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        if running:
            return plain(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward
