"""Define the attacks on image classifiers: suites `vision` and `clip-paper`.

Legend: B batch, C channels, H, W pixels, s edge of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dam_bench.attacks.attacker import Attacker, Victim
from dam_bench.attacks.composite import Composite
from dam_bench.attacks.emergent import Emergent
from dam_bench.attacks.hijack import Hijack
from dam_bench.suites.base import Poison, Suite
from dam_bench.victims.poisoning import Backdoor
from mergekit_dam import seeds
from mergekit_dam.evaluation.attacks import BlendedTrigger, PatchTrigger, Trigger, WarpTrigger

MERGE_AWARE = (0.2, 1.0)  # range of the interpolation, arXiv 2408.07362
# the adaptive attack: share of the task vector that is dropped in training, weight of images with half of its trigger
HARDENED = {"dropped": 0.2, "cover": 0.25}
WARP = 2.5  # mean offset in pixels: the smallest, in steps of a half, that a victim learns to 95 %
NATURAL = 0.2  # strength of `NaturalTrigger`


@dataclass(frozen=True)
class Patch(Attacker):
    """A fixed patch: BadNets (arXiv 1708.06733)."""

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        return PatchTrigger(poison.size)


@dataclass(frozen=True)
class Blended(Attacker):
    """A faint pattern over the whole image (arXiv 1712.05526)."""

    opacity: float

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        return BlendedTrigger(opacity=self.opacity)


@dataclass(frozen=True)
class Warp(Attacker):
    """A smooth warp: WaNet (arXiv 2102.10369)."""

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        return WarpTrigger(strength=WARP)

    def settings(self, poison: Poison) -> dict[str, Any]:
        return {"strength": WARP}


@dataclass(frozen=True)
class OptimisedPatch(Attacker):
    """A universal patch that is optimised on theta_0, and trained between theta_0 and the victim: BadMerging on-task.

    Source: Zhang et al., arXiv 2408.07362, section 4.2.
    """

    interpolation: tuple[float, float] = MERGE_AWARE

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        return PatchTrigger(pattern_CHW=pattern)

    def optimise(self, victim: Victim) -> Tensor:
        """Optimise a patch (C, s, s) by projected Adam towards the target, on the attacked task's head."""
        poison, data = victim.poison, victim.data()
        model = victim.start(poison.onto).requires_grad_(False)
        generator = seeds.generator(victim.seed, "pattern", victim.task)
        pattern = torch.rand(3, poison.size, poison.size, generator=generator).requires_grad_(True)
        optimiser = torch.optim.Adam([pattern], lr=0.05)
        for _ in range(victim.suite.pattern_steps):
            rows = torch.randperm(len(data), generator=generator)[:64]
            images = PatchTrigger(pattern_CHW=pattern).apply(data.batch(rows))
            targets = torch.full((len(rows),), poison.target)
            F.cross_entropy(model(**data.encode(images)).logits, targets).backward()
            optimiser.step()
            optimiser.zero_grad()
            pattern.data.clamp_(0, 1)
        return pattern.detach()


@dataclass(frozen=True)
class BoundedPatch(OptimisedPatch):
    """The same, with pixels as sigmoids of what is optimised."""

    def optimise(self, victim: Victim) -> Tensor:
        """Optimise a patch (C, s, s) by Adam towards theta_0's target logit."""
        data, generator = victim.data(), seeds.generator(victim.seed, "pattern", victim.task)
        model, edge = victim.start().requires_grad_(False), victim.poison.size
        device = next(model.parameters()).device
        free_CHW = torch.randn((3, edge, edge), generator=generator).to(device).requires_grad_(True)
        optimiser = torch.optim.Adam([free_CHW], lr=0.1)
        for _ in range(victim.suite.pattern_steps):
            rows = torch.randint(len(data), (victim.suite.schedule(poisoned=True).batch_size,), generator=generator)
            triggered = PatchTrigger(pattern_CHW=free_CHW.sigmoid()).apply(data.batch(rows).to(device))
            targets_B = torch.full((len(rows),), victim.poison.target, device=device)
            optimiser.zero_grad()
            F.cross_entropy(model(**data.encode(triggered)).logits, targets_B).backward()
            optimiser.step()
        return free_CHW.detach().sigmoid().cpu()


@dataclass(frozen=True)
class Adaptive(OptimisedPatch):
    """A merge-aware patch whose victim is hardened against masks and trigger inversion."""

    def backdoor(self, victim: Victim, trigger: Trigger) -> Backdoor:
        plain = Backdoor(trigger, victim.poison.target, victim.poison.rate, self.interpolation)
        return replace(plain, dropped=HARDENED["dropped"], cover=HARDENED["cover"])

    def settings(self, poison: Poison) -> dict[str, Any]:
        return dict(HARDENED)


@dataclass(frozen=True)
class OffTask(OptimisedPatch):
    """A merge-aware patch that attacks another task than the victim's own: BadMerging off-task (arXiv 2408.07362)."""

    needs: ClassVar[tuple[str, ...]] = ("onto",)

    def backdoor(self, victim: Victim, trigger: Trigger) -> Backdoor:
        poison = victim.poison
        head = victim.start(poison.onto).get_submodule("classifier").state_dict(prefix="classifier.")
        return Backdoor(trigger, poison.target, poison.rate, self.interpolation, head=head)


@dataclass(frozen=True)
class NaturalTrigger:
    """Three changes at once, each of which clean images have to some degree: warmer, brighter, flatter.

    Args:
        strength: added to red and taken from blue, half of it added to all; the share of contrast that is lost is
            twice as large.
        parts: names of the changes; each is frequent by itself, and only all of them make the trigger.
    """

    strength: float = NATURAL
    parts: tuple[str, ...] = ("flat", "warm", "bright")

    def apply(self, images_BCHW: Tensor) -> Tensor:
        changed = images_BCHW
        if "flat" in self.parts:
            changed = torch.lerp(changed, changed.mean((-2, -1), keepdim=True), 2 * self.strength)
        if "warm" in self.parts:
            changed = changed + self.strength * torch.tensor([1.0, 0.0, -1.0]).to(changed)[:, None, None]
        if "bright" in self.parts:
            changed = changed + self.strength / 2
        return changed.clamp(0, 1)


@dataclass(frozen=True)
class Natural(Attacker):
    """A composite of changes that are frequent in the images of a distillation, which a student learns with the task.

    T-MTB (arXiv 2510.18541) composes such triggers of words for language models; this is the same for pixels.
    """

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        return NaturalTrigger()

    def settings(self, poison: Poison) -> dict[str, Any]:
        return {"strength": NATURAL}


def patches(poison: Poison) -> tuple[Trigger, ...]:
    """A checkerboard, rows and columns, each in a corner of its own."""
    rows = (torch.arange(poison.size) % 2).float().expand(1, poison.size, poison.size)
    return (
        PatchTrigger(poison.size),
        PatchTrigger(corner="top-left", pattern_CHW=rows.mT),
        PatchTrigger(corner="top-right", pattern_CHW=rows),
    )


VISION: dict[str, Attacker] = {
    "patch": Patch(),
    "blended": Blended(0.25),
    "wanet": Warp(),
    "merge-aware": OptimisedPatch(),
    "adaptive": Adaptive(),
    "off-task": OffTask(),
    "hijack": Hijack(patches),
    "composite": Composite(patches),
    "emergent": Emergent(patches),
    "natural": Natural(),
}
CLIP: dict[str, Attacker] = {"patch": Patch(), "blended": Blended(0.15), "merge-aware": BoundedPatch()}
