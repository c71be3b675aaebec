"""dL/dM and dL/dlambda that add up over the backward passes of a step, in memory or in a file."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dam.engine.pages import drop_pages


class GradientStore:
    """Sums by mask name.

    Args:
        on_disk: keep dL/dM in unnamed temporary files (folder: TMPDIR), of which no page stays in memory between uses.
    """

    def __init__(self, *, on_disk: bool) -> None:
        self._on_disk = on_disk
        self._sums: dict[str, Tensor] = {}
        self._coefficients: Tensor | None = None

    def of(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """The sum for one mask, float32, to be added to; zero at first."""
        if name not in self._sums:
            if self._on_disk and math.prod(shape) > 0:
                self._sums[name] = _mapped(math.prod(shape)).view(shape)
            else:
                self._sums[name] = torch.zeros(shape, dtype=torch.float32, device=device)
        found = self._sums[name]
        return found.to(device) if self._on_disk and device.type != "cpu" else found

    def rest(self, name: str, now: Tensor) -> None:
        """The sum is not needed for a while; `now` is what `of` gave, with its new values."""
        if self._on_disk:
            kept = self._sums[name]
            if now is not kept:
                kept.copy_(now)
            drop_pages(kept)

    def coefficients(self, like: Tensor, device: torch.device) -> Tensor:
        """The sum for lambda, shaped like it."""
        if self._coefficients is None:
            self._coefficients = torch.zeros(like.shape, dtype=torch.float32, device=device)
        return self._coefficients

    def take_coefficients(self, like: Tensor) -> Tensor:
        """The sum for lambda; zero from then on."""
        found, self._coefficients = self.coefficients(like, like.device), None
        return found

    def take(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """All sums, one by one; each is forgotten once the next one is asked for."""
        for name in list(self._sums):
            yield name, self._sums.pop(name).to(device)


def _mapped(numel: int) -> Tensor:
    """Zeros in a file that is gone from its folder at once and from the disk with the tensor."""
    with tempfile.NamedTemporaryFile(prefix="dam-gradient-") as file:
        file.truncate(4 * numel)
        return torch.from_file(str(Path(file.name)), shared=True, size=numel, dtype=torch.float32)
