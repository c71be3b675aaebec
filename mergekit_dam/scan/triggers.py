"""Kinds of triggers that the scan recovers: what their parameters are, and how they change an input.

R triggers of one kind are held at once, one per row. Legend: B batch, C channels, H, W pixels, G control points per
edge, L tokens, K inserted tokens, D embedding width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam.constants import Constants
from mergekit_dam.registry import TRIGGERS
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.bounds import Bounds, Perturb, insert_tokens


class TriggerBatch(ABC):
    """R universal triggers of one kind.

    Args:
        parameters: what the kind says, R rows each.
        bounds: box of what is perturbed.
        constants: of the plan.

    Attributes:
        kind: name in files.
    """

    kind: ClassVar[str]
    largest: ClassVar[float] = math.inf  # size of a trigger that could be anything

    def __init__(self, parameters: Sequence[Tensor], bounds: Bounds, constants: Constants) -> None:
        self.parameters, self.bounds, self.constants = list(parameters), bounds, constants

    @classmethod
    @abstractmethod
    def start(
        cls, count: int, shape: tuple[int, ...], bounds: Bounds, generator: torch.Generator, constants: Constants
    ) -> TriggerBatch:
        """`count` triggers at random for inputs of `shape`: (C, H, W) or (K, D)."""

    @staticmethod
    def stack(triggers: Sequence[TriggerBatch]) -> TriggerBatch:
        """Join batches of one kind into one with all their rows."""
        parts = zip(*(t.parameters for t in triggers), strict=True)
        return triggers[0].like([torch.cat(part) for part in parts])

    def like(self, parameters: Sequence[Tensor]) -> TriggerBatch:
        """A batch of the same kind and bounds with other parameters."""
        return type(self)(parameters, self.bounds, self.constants)

    def __len__(self) -> int:
        return len(self.parameters[0])

    def rows(self, rows: Sequence[int]) -> TriggerBatch:
        """Copy some rows into a new batch."""
        return self.like([p.detach()[list(rows)].clone() for p in self.parameters])

    @abstractmethod
    def size(self) -> Tensor:
        """Size of each trigger, (R,), in the unit of its kind; differentiable."""

    @abstractmethod
    def perturb(self, rows_B: Tensor) -> Perturb:
        """A function that applies trigger `rows_B[i]` to sample i of a batch."""

    @abstractmethod
    def shown(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The first row for people to look at, as artifact/triggers_file.py describes it.

        Args:
            shape: of an input, (C, H, W) or (K, D).

        Returns:
            `mask` (1, H, W) and `pattern` (C, H, W) in float16, or `embeddings` (K, D) in float32.
        """


class PatchTriggers(TriggerBatch):
    """Patches: x (1 - m) + p m, with m and p alike for all x.

    As in Neural Cleanse (Wang et al., IEEE S&P 2019, section IV).

    Parameters are the logits of a mask m (R, 1, H, W) and of a pattern p (R, C, H, W) within the bounds; the size is
    the sum of the mask, in pixels.
    """

    kind = "pixels"

    @classmethod
    def start(
        cls, count: int, shape: tuple[int, ...], bounds: Bounds, generator: torch.Generator, constants: Constants
    ) -> PatchTriggers:
        device = bounds.lower.device
        noise = torch.rand((count, *shape), generator=generator).to(device) * 2 - 1
        mask = torch.full((count, 1, *shape[1:]), constants.stamp_start, device=device)
        return cls([mask, noise], bounds, constants)

    def size(self) -> Tensor:
        return self.parameters[0].sigmoid().flatten(1).sum(1)

    def perturb(self, rows_B: Tensor) -> Perturb:
        m, pattern = (p.sigmoid()[rows_B] for p in self.parameters)
        p = self.bounds.lower + pattern * self.bounds.span

        def stamp(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
            self.bounds.verify(x, "triggered pixels")
            return x * (1 - m) + p * m, mask

        return stamp

    @torch.no_grad()
    def shown(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        mask, pattern = (parameter[0].sigmoid() for parameter in self.parameters)
        return {"mask": mask.half(), "pattern": (self.bounds.lower + pattern * self.bounds.span).half()}


class StyleTriggers(TriggerBatch):
    """Smooth changes of the whole image, which a patch cannot be: contrast, a shade, a warp.

    So few parameters cannot hold much but what was implanted, by backdoors that change the style of an image (warps as
    in WaNet, arXiv 2102.10369; filters as in ABS, Liu et al., CCS 2019). A pixel is read from its place plus a flow
    (R, 2, G, G) and multiplied per channel (R, C, 1, 1), and something is added per channel (R, C, G, G); grids are
    interpolated. The size is the mean share of the largest change, in percent, summed over the three.
    """

    kind = "style"
    largest = 300.0

    @classmethod
    def start(
        cls, count: int, shape: tuple[int, ...], bounds: Bounds, generator: torch.Generator, constants: Constants
    ) -> StyleTriggers:
        grid = constants.style_grid
        shapes = (shape[0], 1, 1), (shape[0], grid, grid), (2, grid, grid)
        noise = (torch.rand((count, *one), generator=generator) * 2 - 1 for one in shapes)
        return cls([0.1 * one.to(bounds.lower.device) for one in noise], bounds, constants)

    def size(self) -> Tensor:
        return 100 * torch.stack([p.tanh().abs().flatten(1).mean(1) for p in self.parameters]).sum(0)

    def perturb(self, rows_B: Tensor) -> Perturb:
        gain, shade, flow = (p.tanh()[rows_B] for p in self.parameters)
        constants = self.constants

        def change(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
            self.bounds.verify(x, "triggered pixels")
            edges = x.shape[-2:]
            moved_BHW2 = _stretched(constants.style_flow * flow, edges, "bicubic").permute(0, 2, 3, 1)
            rows, columns = (torch.linspace(-1, 1, edge, device=x.device) for edge in edges)
            still_HW2 = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
            warped = F.grid_sample(x, still_HW2 + moved_BHW2, padding_mode="border", align_corners=True)
            added = _stretched(constants.style_shift * shade, edges, "bilinear") * self.bounds.span
            return self.bounds.clamp(warped * (1 + constants.style_gain * gain) + added), mask

        return change

    @torch.no_grad()
    def shown(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        device = self.parameters[0].device
        changed, _ = self.perturb(torch.zeros(1, dtype=torch.long, device=device))(_chequer(shape).to(device), None)
        return {"mask": torch.ones_like(changed[0, :1]).half(), "pattern": changed[0].half()}


def _chequer(shape: tuple[int, ...]) -> Tensor:
    """Squares of two greys, on which shades and warps are seen, (1, C, H, W)."""
    _, height, width = shape
    rows, columns = (torch.arange(edge) * 8 // edge % 2 for edge in (height, width))
    return (0.35 + 0.3 * (rows[:, None] ^ columns)).expand(1, *shape)


def _stretched(grid_BCGG: Tensor, edges: Sequence[int], mode: str) -> Tensor:
    """`F.interpolate` from corner to corner, as products: on accelerators its own backward pass adds in any order."""
    count, device = grid_BCGG.shape[-1], grid_BCGG.device
    identity_GG = torch.eye(count, device=device)[None, None]
    rows, columns = (F.interpolate(identity_GG, (edge, count), mode=mode, align_corners=True)[0, 0] for edge in edges)
    return rows @ grid_BCGG @ columns.T


class TokenTriggers(TriggerBatch):
    """K vectors inserted after position 0: the centre of the embedding range + delta (R, K, D).

    The size is the L2 norm of delta in units of that range.
    """

    kind = "tokens"

    @classmethod
    def start(
        cls, count: int, shape: tuple[int, ...], bounds: Bounds, generator: torch.Generator, constants: Constants
    ) -> TokenTriggers:
        noise = torch.rand((count, *shape), generator=generator).to(bounds.lower.device) * 2 - 1
        return cls([0.05 * noise], bounds, constants)

    def size(self) -> Tensor:
        return self.parameters[0].flatten(1).square().sum(1).add(1e-12).sqrt()

    def perturb(self, rows_B: Tensor) -> Perturb:
        delta_BKD = self.parameters[0][rows_B]

        def insert(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return insert_tokens(x, mask, self.bounds.clamp(self.bounds.centre + delta_BKD * self.bounds.span))

        return insert

    @torch.no_grad()
    def shown(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        tokens_KD = self.bounds.clamp(self.bounds.centre + self.parameters[0][0] * self.bounds.span)
        return {"embeddings": tokens_KD.float()}


def register_trigger(kind: type[TriggerBatch]) -> None:
    """Let tasks name a kind of triggers in their `trigger_kinds`.

    Raises:
        DamError: another kind has this name.
    """
    TRIGGERS.add(kind.kind, kind)


for _kind in (PatchTriggers, StyleTriggers, TokenTriggers):
    register_trigger(_kind)


def kinds_of(task: Task) -> list[type[TriggerBatch]]:
    """The kinds that a task's scan recovers, the plainest first.

    Raises:
        DamError: the task names an unknown kind.
    """
    return [TRIGGERS[name] for name in task.trigger_kinds]


def started(task: Task, kind: type[TriggerBatch], count: int, generator: torch.Generator) -> TriggerBatch:
    """`count` triggers of a kind at random for a task's inputs."""
    return kind.start(count, task.perturbation_shape, task.bounds, generator, task.constants)
