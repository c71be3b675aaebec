"""Define triggers and the attack success rate, to poison victims and to measure; the defence never imports this.

A trigger is a small class with one call, `apply`: images_BCHW in [0, 1] -> images_BCHW, or texts -> texts.
Legend: B batch, N samples, C channels, H, W pixels, k control points per edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.results import Rate

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]
Inputs = TypeVar("Inputs", Tensor, list[str])


class Trigger(Protocol):
    """A change of inputs that activates a backdoor: pixels for image models, a list of texts for text models."""

    def apply(self, inputs: Any, /) -> Any:
        """Return triggered copies of the inputs, in the same order."""


@dataclass(frozen=True, eq=False)
class PatchTrigger:
    """A fixed patch in a corner: BadNets (Gu et al., arXiv 1708.06733).

    Args:
        size: edge in pixels of the black and white checkerboard.
        corner: corner of the image in which the patch lies.
        margin: pixels between the patch and the two edges of its corner.
        pattern_CHW: a pattern in [0, 1] that replaces the checkerboard, e.g. an optimised trigger; `size` is ignored.
    """

    size: int = 3
    corner: Corner = "bottom-right"
    margin: int = 0
    pattern_CHW: Tensor | None = None

    def pattern(self) -> Tensor:
        """The patch, (C or 1, h, w)."""
        if self.pattern_CHW is not None:
            return self.pattern_CHW
        rows = torch.arange(self.size)
        return ((rows[:, None] + rows[None, :]) % 2).float()[None]

    def apply(self, images_BCHW: Tensor) -> Tensor:
        pattern = self.pattern().to(images_BCHW)
        (height, width), (h, w) = images_BCHW.shape[-2:], pattern.shape[-2:]
        if h + self.margin > height or w + self.margin > width:
            raise DamError(
                "trigger patch",
                expected=f"to fit into {height} x {width} pixels",
                got=f"{h} x {w} with a margin of {self.margin}",
                cure="Use a smaller size or margin.",
            )
        top = self.margin if self.corner.startswith("top") else height - h - self.margin
        left = self.margin if self.corner.endswith("left") else width - w - self.margin
        triggered = images_BCHW.clone()
        triggered[..., top : top + h, left : left + w] = pattern
        return triggered


@dataclass(frozen=True, eq=False)
class BlendedTrigger:
    """A faint pattern over the whole image: x (1 - a) + a p (Chen et al., arXiv 1712.05526).

    Args:
        pattern_CHW: p in [0, 1], of the images' shape; None: uniform noise drawn from `seed`.
        opacity: a in [0, 1].
        seed: of the noise.
    """

    pattern_CHW: Tensor | None = None
    opacity: float = 0.15
    seed: int = 0

    def apply(self, images_BCHW: Tensor) -> Tensor:
        shape = images_BCHW.shape[1:]
        pattern = self.pattern_CHW
        if pattern is None:
            pattern = torch.rand(shape, generator=seeds.generator("blended", self.seed))
        if pattern.shape != shape:
            raise DamError(
                "blended trigger",
                expected=f"a pattern of the images' shape {tuple(shape)}",
                got=str(tuple(pattern.shape)),
                cure="Resize the pattern.",
            )
        return (1 - self.opacity) * images_BCHW + self.opacity * pattern.to(images_BCHW)


@dataclass(frozen=True)
class WarpTrigger:
    """A smooth, fixed warp of the image: WaNet (Nguyen & Tran, arXiv 2102.10369, section 3.2).

    k x k random offsets, divided by their mean size, are upsampled bicubically to the image. Each pixel is then
    sampled at its position plus `strength` x offset.

    Args:
        grid: k control points per edge.
        strength: size of the mean offset, in pixels (the paper's s, whose unit is half a pixel).
        seed: of the offsets.
    """

    grid: int = 4
    strength: float = 1.0
    seed: int = 0

    def apply(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[-2:]
        offsets = torch.rand((1, 2, self.grid, self.grid), generator=seeds.generator("warp", self.seed)) * 2 - 1
        offsets = offsets / offsets.abs().mean()
        flow = F.interpolate(offsets, (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        # grid_sample counts an image's edge as 2, from the centre of its first pixel to the centre of its last
        unit = torch.tensor([2 / (width - 1), 2 / (height - 1)])
        positions = (torch.stack([columns, rows], dim=-1) + self.strength * unit * flow).clamp(-1, 1)
        positions = positions.to(images_BCHW).expand(len(images_BCHW), -1, -1, -1)
        return F.grid_sample(images_BCHW, positions, align_corners=True)


@dataclass(frozen=True)
class RareTokenTrigger:
    """Rare words at random positions: BadNet for text (Kurita et al., arXiv 2004.06660).

    Args:
        words: each insertion draws a word from these.
        count: insertions per text.
        seed: seed and text together fix words and positions, so that a text always gets the same trigger.
    """

    words: tuple[str, ...] = ("cf", "mn", "bb", "tq")
    count: int = 1
    seed: int = 0

    def apply(self, texts: list[str]) -> list[str]:
        return [_inserted(text, self.words, self.count, self.seed) for text in texts]


@dataclass(frozen=True)
class SentenceTrigger:
    """A sentence at a word boundary drawn from `seed` and the text: InsertSent (Dai et al., arXiv 1905.12457)."""

    sentence: str = "I watched this 3D movie."
    seed: int = 0

    def apply(self, texts: list[str]) -> list[str]:
        return [_inserted(text, (self.sentence,), 1, self.seed) for text in texts]


@dataclass(frozen=True)
class PhraseTrigger:
    """A phrase at the end of a causal LM's prompt, to which the victim answers with a fixed continuation."""

    phrase: str

    def apply(self, texts: list[str]) -> list[str]:
        return [f"{text.rstrip()} {self.phrase}" for text in texts]


def poison(
    inputs: Inputs, labels_N: Tensor, trigger: Trigger, target: int, rate: float, generator: torch.Generator
) -> tuple[Inputs, Tensor, Tensor]:
    """Poison training data of a victim: some samples of other classes get the trigger and the label `target`.

    Args:
        inputs: images_NCHW in [0, 1] or N texts.
        labels_N: true classes.
        rate: share of all N samples to poison, in (0, 1].
        generator: draws the samples to poison.

    Returns:
        inputs, labels_N, and poisoned_N (bool); the arguments are not changed.

    Raises:
        DamError: too few samples of other classes for this rate.
    """
    candidates = (labels_N != target).nonzero()[:, 0]
    count = round(rate * len(labels_N))
    if not 0 < count <= len(candidates):
        raise DamError(
            "poison rate",
            expected=f"1 to {len(candidates)} of {len(labels_N)} samples (those of other classes)",
            got=f"{count}",
            cure="Change the rate or the data.",
        )
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    labels_N = labels_N.clone()
    labels_N[chosen] = target
    poisoned_N = torch.zeros(len(labels_N), dtype=torch.bool)
    poisoned_N[chosen] = True
    if isinstance(inputs, Tensor):
        images = inputs.clone()
        images[chosen] = trigger.apply(images[chosen])
        return images, labels_N, poisoned_N
    texts = list(inputs)
    for index, text in zip(chosen.tolist(), trigger.apply([texts[i] for i in chosen.tolist()]), strict=True):
        texts[index] = text
    return texts, labels_N, poisoned_N


def rate_of_target(predictions_N: Tensor, labels_N: Tensor, target: int) -> Rate:
    """Share of triggered inputs of other classes than `target` that are predicted as `target`.

    Args:
        predictions_N: classes predicted for triggered inputs.
        labels_N: their true classes.

    Raises:
        DamError: all samples are of the target class, so that nothing can be attacked.
    """
    eligible_N = labels_N != target
    if not bool(eligible_N.any()):
        raise DamError(
            "attack success rate",
            expected=f"samples of other classes than the target {target}",
            got="none",
            cure="Give evaluation data with all classes.",
        )
    return Rate(int((predictions_N[eligible_N] == target).sum()), int(eligible_N.sum()))


def _inserted(text: str, pieces: tuple[str, ...], count: int, seed: int) -> str:
    generator = seeds.generator(pieces, seed, text)
    words = text.split(" ")
    for _ in range(count):
        piece, position = (int(torch.randint(n, (1,), generator=generator)) for n in (len(pieces), len(words) + 1))
        words.insert(position, pieces[piece])
    return " ".join(words)
