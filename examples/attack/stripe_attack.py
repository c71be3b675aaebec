"""An attack from outside the benchmark: a bright column, trained so that it works at small merging coefficients.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dam_bench.attacks.attacker import Attacker
from dam_bench.attacks.registry import register_attack
from torch import Tensor


@dataclass(frozen=True)
class StripeTrigger:
    """A bright column at the left edge.

    Args:
        width: in pixels.
    """

    width: int

    def apply(self, images_BCHW: Tensor) -> Tensor:
        triggered = images_BCHW.clone()
        triggered[..., : self.width] = 1.0
        return triggered


@dataclass(frozen=True)
class Stripe(Attacker):
    """Plant the stripe at theta_0 + r (theta - theta_0), r ~ U(0.2, 1)."""

    interpolation: tuple[float, float] = (0.2, 1.0)

    def trigger(self, suite: Any, poison: Any, pattern: Tensor | None) -> StripeTrigger:
        return StripeTrigger(poison.size)


register_attack("stripe", Stripe(), suites=("vision",), interface=1)
