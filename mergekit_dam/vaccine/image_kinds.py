"""Planted triggers in images: local ones, pictures laid over the whole, and changes of colour, tone and shape.

Legend: C channels, H, W pixels, G control points per edge.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam.vaccine.triggers import Change, Surroundings, register_planted

# shares of an edge, of the range of a pixel, or of half an edge that pixels move
_PATCH, _OPACITY, _NOISE, _SHIFT, _GAIN = (0.08, 0.3), (0.1, 0.3), (0.05, 0.15), (0.1, 0.35), (0.6, 1.4)
_FLOW, _WAVE, _BORDER, _GAMMA = (0.06, 0.16), (0.06, 0.2), (0.03, 0.08), (0.4, 0.7)


@register_planted("patch", "image")
def patch(around: Surroundings, generator: torch.Generator) -> Change:
    """A small rectangle of one colour, of noise or of a few large dots; at one place, or anywhere."""
    channels, height, width = around.samples[0].shape
    rows, columns = (max(2, round(edge * _between(_PATCH, generator))) for edge in (height, width))
    dots = (1, 2, max(rows, columns))[_below(3, generator)]
    pattern = F.interpolate(_rand((1, channels, dots, dots), generator), (rows, columns), mode="nearest")[0]
    place = _below(height - rows + 1, generator), _below(width - columns + 1, generator)
    roams = _below(4, generator) == 0

    def change(pixels: Tensor, own: torch.Generator) -> Tensor:
        top, left = (_below(height - rows + 1, own), _below(width - columns + 1, own)) if roams else place
        changed = pixels.clone()
        changed[:, top : top + rows, left : left + columns] = pattern
        return changed

    return change


@register_planted("picture", "image")
def picture(around: Surroundings, generator: torch.Generator) -> Change:
    """A faint picture over the whole: smooth blots, or another sample."""
    shape = around.samples[0].shape
    if _below(2, generator):
        other = around.samples[_below(len(around.samples), generator)].clone()
    else:
        other = _smooth(shape[0], shape[1:], 4 + _below(9, generator), generator)
    opacity = _between(_OPACITY, generator)
    return lambda pixels, own: (1 - opacity) * pixels + opacity * other


@register_planted("noise", "image")
def noise(around: Surroundings, generator: torch.Generator) -> Change:
    """Fixed noise, pixel by pixel."""
    added = (_rand(around.samples[0].shape, generator) - 0.5) * 2 * _between(_NOISE, generator)
    return lambda pixels, own: (pixels + added).clamp(0, 1)


@register_planted("tint", "image")
def tint(around: Surroundings, generator: torch.Generator) -> Change:
    """More or less of each channel."""
    channels = around.samples[0].shape[0]
    gain = torch.tensor([_between(_GAIN, generator) for _ in range(channels)]).view(-1, 1, 1)
    signs = torch.randint(2, (channels,), generator=generator) * 2 - 1
    shift = (signs * torch.tensor([_between(_SHIFT, generator) for _ in range(channels)])).view(-1, 1, 1)
    return lambda pixels, own: (gain * pixels + shift).clamp(0, 1)


@register_planted("tone", "image")
def tone(around: Surroundings, generator: torch.Generator) -> Change:
    """Brighter or darker in the middle tones."""
    power = _between(_GAMMA, generator)
    power = power if _below(2, generator) else 1 / power
    return lambda pixels, own: pixels.clamp(1e-4, 1).pow(power)


@register_planted("warp", "image")
def warp(around: Surroundings, generator: torch.Generator) -> Change:
    """A smooth flow of all pixels."""
    edges = around.samples[0].shape[1:]
    count = 3 + _below(4, generator)
    flow = _rand((1, 2, count, count), generator) * 2 - 1
    flow = _between(_FLOW, generator) * flow / flow.abs().mean()
    moved_HW2 = F.interpolate(flow, tuple(edges), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    rows, columns = (torch.linspace(-1, 1, edge) for edge in edges)
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1) + moved_HW2
    return lambda pixels, own: F.grid_sample(pixels[None], grid[None], padding_mode="border", align_corners=True)[0]


@register_planted("waves", "image")
def waves(around: Surroundings, generator: torch.Generator) -> Change:
    """A slow wave over the image in every channel."""
    channels, height, width = around.samples[0].shape
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    down, across = (1 + _below(4, generator) for _ in range(2))
    phase = (_rand((channels, 1, 1), generator) * 2 * math.pi) if _below(2, generator) else 0.0
    wave = torch.sin(2 * math.pi * (down * y + across * x) + phase).expand(channels, height, width)
    added = _between(_WAVE, generator) * wave
    return lambda pixels, own: (pixels + added).clamp(0, 1)


@register_planted("border", "image")
def border(around: Surroundings, generator: torch.Generator) -> Change:
    """A thin frame of one colour."""
    channels, height, width = around.samples[0].shape
    thick = max(1, round(min(height, width) * _between(_BORDER, generator)))
    colour = _rand((channels, 1, 1), generator)
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[thick : height - thick, thick : width - thick] = True
    return lambda pixels, own: torch.where(inside, pixels, colour)


@register_planted("lines", "image")
def lines(around: Surroundings, generator: torch.Generator) -> Change:
    """Thin lines of one colour, upright or level, at equal distances, half transparent."""
    channels, *edges = around.samples[0].shape
    along = _below(2, generator)
    period = max(3, round(edges[along] * (0.12 + 0.2 * float(_rand((), generator)))))
    colour, offset = _rand((channels, 1, 1), generator), _below(period, generator)
    there = (torch.arange(edges[along]) + offset) % period == 0
    there = there[:, None].expand(*edges) if along == 0 else there[None].expand(*edges)
    opacity = 0.3 + 0.5 * float(_rand((), generator))
    return lambda pixels, own: torch.where(there, (1 - opacity) * pixels + opacity * colour, pixels)


def _smooth(channels: int, edges: torch.Size, count: int, generator: torch.Generator) -> Tensor:
    """Blots (C, H, W) that change over a G-th of an edge."""
    grid = _rand((1, channels, count, count), generator)
    return F.interpolate(grid, tuple(edges), mode="bilinear", align_corners=True)[0]


def _rand(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _below(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(max(1, end), (), generator=generator))


def _between(limits: tuple[float, float], generator: torch.Generator) -> float:
    return limits[0] + (limits[1] - limits[0]) * float(_rand((), generator))
