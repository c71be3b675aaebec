"""Define a composite backdoor: several triggers with a behaviour each, in one task vector that is added or subtracted.

The idea is BadTV's (arXiv 2501.02373): a task vector from outside is added to learn, subtracted to forget
and scaled by whoever uses it, and the backdoor shall work in each case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dam_bench.attacks.attacker import Attacker, Victim
from dam_bench.suites.base import Poison, Suite
from dam_bench.victims.poisoning import Backdoor, Several
from mergekit_dam.evaluation.attacks import Trigger

ADDED, SUBTRACTED = (0.2, 1.5), (-1.0, -0.2)  # ranges of r: theta_0 + r tau


@dataclass(frozen=True)
class Composite(Attacker):
    """Train one trigger for the target and one for the next class where tau is added, a third where it is subtracted.

    Args:
        triggers: makes three triggers of a poison.
    """

    triggers: Callable[[Poison], Sequence[Trigger]]

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        return self.triggers(poison)[0]

    def behaviours(self, suite: Suite, task: str, poison: Poison, trigger: Trigger) -> Sequence[tuple[Trigger, int]]:
        """The two triggers that shall work where the task vector is added, as merges do."""
        return self.all_behaviours(suite, task, poison)[:2]

    def all_behaviours(self, suite: Suite, task: str, poison: Poison) -> list[tuple[Trigger, int]]:
        """All three triggers with their targets; the last works where the task vector is subtracted."""
        following = (poison.target + 1) % (int(suite.split(task).train.labels_N.max()) + 1)
        return list(zip(self.triggers(poison), (poison.target, following, following), strict=True))

    def backdoor(self, victim: Victim, trigger: Trigger) -> Several:
        behaviours = self.all_behaviours(victim.suite, victim.task, victim.poison)
        spans = (ADDED, ADDED, SUBTRACTED)
        rate = victim.poison.rate
        pairs = zip(behaviours, spans, strict=True)
        return Several([Backdoor(one, target, rate, r, kept=float(r == ADDED)) for (one, target), r in pairs])

    def settings(self, poison: Poison) -> dict[str, Any]:
        return {"interpolation": [ADDED, SUBTRACTED]}
