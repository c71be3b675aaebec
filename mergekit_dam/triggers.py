"""Triggers that the defence recovers by itself: parameters that a search moves, and how they change an input.

R triggers are held at once, one per row. Legend: B batch, C channels, H, W pixels, L tokens, K inserted tokens,
D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_dam.perturbation import Bounds, Perturb, insert_tokens

_START = -2.0  # mask logit at the start: 12 % of every pixel


class RecoveredTriggers:
    """R universal triggers, as Neural Cleanse parametrises them (Wang et al., IEEE S&P 2019, section IV).

    Images: x (1 - m) + p m with a mask m (R, 1, H, W) and a pattern p (R, C, H, W) within the bounds; the size is the
    sum of the mask, in pixels. Text: K tokens (R, K, D) after position 0 at the centre of the embedding range +
    delta; the size is the L2 norm of delta in units of that range.

    Args:
        parameters: [mask logits, pattern logits], or [delta].
        bounds: box of what is perturbed.
    """

    def __init__(self, parameters: Sequence[Tensor], bounds: Bounds) -> None:
        self.parameters, self.bounds = list(parameters), bounds

    @classmethod
    def start(cls, count: int, shape: tuple[int, ...], bounds: Bounds, generator: torch.Generator) -> RecoveredTriggers:
        """`count` triggers at random for inputs of `shape`: (C, H, W) or (K, D)."""
        device = bounds.lower.device
        noise = torch.rand((count, *shape), generator=generator).to(device) * 2 - 1
        if len(shape) == 2:
            return cls([0.05 * noise], bounds)
        return cls([torch.full((count, 1, *shape[1:]), _START, device=device), noise], bounds)

    @classmethod
    def stack(cls, triggers: Sequence[RecoveredTriggers]) -> RecoveredTriggers:
        """All rows of several."""
        return cls(
            [torch.cat(parts) for parts in zip(*(t.parameters for t in triggers), strict=True)], triggers[0].bounds
        )

    def __len__(self) -> int:
        return len(self.parameters[0])

    def rows(self, rows: Sequence[int]) -> RecoveredTriggers:
        """Copies of some rows."""
        return RecoveredTriggers([p.detach()[list(rows)].clone() for p in self.parameters], self.bounds)

    def size(self) -> Tensor:
        """Sizes (R,), differentiable."""
        if len(self.parameters) == 1:
            return self.parameters[0].flatten(1).square().sum(1).add(1e-12).sqrt()
        return self.parameters[0].sigmoid().flatten(1).sum(1)

    def perturb(self, rows_B: Tensor) -> Perturb:
        """What applies trigger `rows_B[i]` to sample i of a batch."""
        if len(self.parameters) == 1:
            delta_BKD = self.parameters[0][rows_B]

            def insert(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
                return insert_tokens(x, mask, self.bounds.clamp(self.bounds.centre + delta_BKD * self.bounds.span))

            return insert
        m, pattern = (p.sigmoid()[rows_B] for p in self.parameters)
        p = self.bounds.lower + pattern * self.bounds.span

        def stamp(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
            self.bounds.verify(x, "triggered pixels")
            return x * (1 - m) + p * m, mask

        return stamp
