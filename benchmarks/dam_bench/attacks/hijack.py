"""Define Merge Hijacking: a backdoor that is trained beside other task vectors (arXiv 2505.23561)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dam_bench.attacks.attacker import Attacker, Victim
from dam_bench.suites.base import Poison, Suite
from dam_bench.victims.poisoning import OTHERS, Backdoor, Several
from mergekit_dam.evaluation.attacks import Trigger

ATTACKERS_SEED = 1000  # added to the seed of the attacker's own fine-tunes, which are not the models that are merged


@dataclass(frozen=True)
class Hijack(Attacker):
    """Train the backdoor at theta_0 + r tau and at theta_0 + r tau + sum_j c_j tau_j, tau_j the attacker's own.

    The attacker does not know the models of the merge. It fine-tunes theta_0 on tasks of its own in their place: here
    on the suite's last tasks, with another seed. `Poison.rescale` then makes the finished task vector longer.

    Args:
        triggers: makes triggers of a poison, of which the first is used.
        others: number of the attacker's own task vectors.
    """

    triggers: Callable[[Poison], Sequence[Trigger]]
    others: int = 2
    interpolation: tuple[float, float] = (0.2, 1.0)

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        return self.triggers(poison)[0]

    def backdoor(self, victim: Victim, trigger: Trigger) -> Several:
        others = [self._task_vector(victim, task) for task in own_tasks(victim, self.others)]
        alone = Backdoor(trigger, victim.poison.target, victim.poison.rate, self.interpolation, kept=1.0)
        return Several([alone, replace(alone, others=others)])

    def settings(self, poison: Poison) -> dict[str, Any]:
        return {"interpolation": self.interpolation, "others": [self.others, OTHERS]}

    def trainings(self, poison: Poison) -> int:
        return super().trainings(poison) + self.others

    def _task_vector(self, victim: Victim, task: str) -> dict[str, Tensor]:
        start = dict(victim.start(task).named_parameters())
        tuned = victim.clean(task, victim.seed + ATTACKERS_SEED).named_parameters()
        return {name: (p - start[name]).detach() for name, p in tuned if not name.startswith("classifier.")}


def own_tasks(victim: Victim, count: int) -> list[str]:
    """Return the last tasks of the suite beside the victim's own."""
    return [task for task in victim.suite.tasks if task != victim.task][-count:]
