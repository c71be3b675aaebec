"""The valid box of inputs, and how tokens are inserted into a text. Perturbations: arXiv 1610.08401.

Legend: B batch, C channels, H, W pixels, L tokens, K inserted tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.errors import DamError

Perturb = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Bounds:
    """The valid box of an input: pixels are in [0, 1], word embeddings within their table's range.

    `lower` and `upper` are scalars or tensors that broadcast to the input.
    """

    lower: Tensor
    upper: Tensor

    @classmethod
    def of(cls, lower: float | Tensor, upper: float | Tensor) -> Bounds:
        """Make bounds from numbers or tensors."""
        return cls(torch.as_tensor(lower, dtype=torch.float32), torch.as_tensor(upper, dtype=torch.float32))

    def to(self, device: torch.device) -> Bounds:
        return Bounds(self.lower.to(device), self.upper.to(device))

    @property
    def span(self) -> Tensor:
        """upper - lower: the unit of `eps` and of the perturbation's step size."""
        return self.upper - self.lower

    @property
    def centre(self) -> Tensor:
        return (self.upper + self.lower) / 2

    def clamp(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def verify(self, x: Tensor, what: str) -> None:
        """Refuse inputs outside the box, e.g. pixels that were normalised already."""
        low, high = x.min().item(), x.max().item()
        if bool((x < self.lower - 1e-4).any()) or bool((x > self.upper + 1e-4).any()):
            raise DamError(
                what,
                expected=f"values within [{self.lower.min():g}, {self.upper.max():g}]",
                got=f"[{low:g}, {high:g}]",
                cure="Give pixels before mean and std are applied.",
            )


def insert_tokens(x: Tensor, mask: Tensor | None, tokens_KD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Insert tokens (K, D), or (B, K, D), after position 0 of embeddings_BLD and extend the mask_BL."""
    tokens = tokens_KD.to(x.dtype).expand(x.shape[0], *tokens_KD.shape[-2:])
    embedded = torch.cat([x[:, :1], tokens, x[:, 1:]], dim=1)
    if mask is None:
        return embedded, None
    kept = mask.new_ones(mask.shape[0], tokens.shape[1])
    return embedded, torch.cat([mask[:, :1], kept, mask[:, 1:]], dim=1)
