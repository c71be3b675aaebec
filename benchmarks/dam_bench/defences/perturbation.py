"""Find perturbations of inputs and of hidden states that raise a loss, by steps along the sign of its gradient.

Legend: B batch, C channels, H, W pixels, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mergekit_dam.engine.partial_pass import BlockChain
from mergekit_dam.errors import DamError
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.bounds import Perturb


def chain_of(task: Task) -> BlockChain:
    """The task's blocks.

    Raises:
        DamError: it has several towers.
    """
    if task.chain is None:
        raise DamError(
            f"model {task.name}",
            expected="one chain of blocks",
            got="several towers",
            cure="Choose a defence that does not act on hidden states.",
        )
    return task.chain


def added(task: Task, delta: Tensor) -> Perturb:
    """Make a change of inputs: pixels or word embeddings plus delta, in units of their range, kept within it."""

    def perturb(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return task.bounds.clamp(x + delta * task.bounds.span), mask

    return perturb


def worst(loss: Callable[[Tensor], Tensor], start: Tensor, *, eps: float, steps: int) -> Tensor:
    """Maximise a loss over |delta| <= eps, from `start`, by signed steps of 2 eps / steps.

    Args:
        loss: of a perturbation of the shape of `start`.
        start: in units of eps, within [-1, 1].
    """
    delta = eps * start
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(delta), delta)
        delta = (delta + 2 * eps / steps * slope.sign()).clamp(-eps, eps)
    return delta.detach()


def random_start(task: Task, generator: torch.Generator, *, samples: int = 1) -> Tensor:
    """Draw a perturbation from [-1, 1]: (samples, C, H, W) for images, (samples, 1, D) for texts, all tokens alike."""
    shape = task.perturbation_shape
    kept = shape if task.modality == "image" else (1, shape[-1])
    return torch.empty(samples, *kept).uniform_(-1, 1, generator=generator).to(task.device)


@contextmanager
def shifted(chain: BlockChain, stop: int, delta_D: Tensor) -> Iterator[None]:
    """Add delta to the states (B, L, D) that position `stop` reads, at every token, in units of their mean norm.

    Args:
        stop: 2 to N + 1, the position after a block; see engine/partial_pass.py.
    """

    def shift(_: object, __: object, hidden_BLD: Tensor) -> Tensor:
        size: Tensor = hidden_BLD.detach().norm(dim=-1).mean()
        return hidden_BLD + delta_D * size

    handle = chain.blocks[stop - 2].register_forward_hook(shift)
    try:
        yield
    finally:
        handle.remove()
