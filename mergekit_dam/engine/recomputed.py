"""Gradient checkpointing (arXiv 1604.06174): a block keeps its input, and runs again in the backward pass.

transformers' own switch does not serve here: it runs the block again after `functional_call` has taken its parameters
away. Here a block's tensors come with each run of it.
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
    """While this lasts, each block of `module` runs so that its backward pass runs it again.

    Args:
        module: the blocks' owner; it does nothing at random.
        blocks: names of members of ModuleLists.
        take: tensors of a block by parameter name within it; called for each run, also later in the backward pass.
    """
    changed = [module.get_submodule(name) for name in blocks]
    # a part of a pass has replaced the forward of blocks that it skips (engine/partial_pass.py): that one comes back
    before = [vars(block).get("forward") for block in changed]
    for name, block in zip(blocks, changed, strict=True):
        block.forward = _recomputed(block, partial(take, name))
    try:
        yield
    finally:
        for block, replaced in zip(changed, before, strict=True):
            if replaced is None:
                del block.forward  # the class's own is there again
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
