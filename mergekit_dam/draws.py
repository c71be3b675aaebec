"""Which recovered triggers the samples of a step get. Legend: B batch, C channels, H, W pixels, K tokens, D width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.tasks import Target
from mergekit_dam.triggers import RecoveredTriggers

_SHARE = 0.25  # of the samples of a task with a suspect that get a trigger of another task's
_EVERY = 4  # steps from one pass with other tasks' triggers to the next, where a task has no suspect

Pools = Mapping[tuple[int, Target], Sequence[RecoveredTriggers]]  # triggers by task and target


@dataclass(frozen=True, eq=False)
class Draw:
    """Triggers for one pass of a task's samples.

    A backdoor also works on tasks that it was not planted for (transfer), so each suspect's triggers are tried on the
    samples of all tasks that take triggers of that form.

    Attributes:
        target: the suspect's; None for a task without a suspect.
        own: triggers of the suspect.
        others: of the other tasks' suspects.
    """

    target: Target | None
    own: Sequence[RecoveredTriggers]
    others: Sequence[RecoveredTriggers]

    def of(self, count: int, generator: torch.Generator) -> tuple[RecoveredTriggers, Tensor]:
        """All triggers, and which of them each of `count` samples gets, (count,)."""
        which_B = torch.randint(len(self.own) or len(self.others), (count,), generator=generator)
        if self.own and self.others:
            others_B = len(self.own) + torch.randint(len(self.others), (count,), generator=generator)
            which_B = torch.where(torch.rand(count, generator=generator) < _SHARE, others_B, which_B)
        return RecoveredTriggers.stack([*self.own, *self.others]), which_B


def draws(pools: Pools, task: int, form: tuple[int, ...], step: int) -> list[Draw]:
    """What a task's samples get in a step: one pass per suspect of its own, or one every few steps.

    Args:
        pools: of all suspects.
        task: its index.
        form: shape of a perturbation of its inputs, (C, H, W) or (K, D).
        step: of the masks.
    """
    others = [t for (owner, _), pool in pools.items() if owner != task for t in pool if t.form == form]
    own = [Draw(target, pool, others) for (owner, target), pool in pools.items() if owner == task]
    if own or not others or step % _EVERY:
        return own
    return [Draw(None, (), others)]
