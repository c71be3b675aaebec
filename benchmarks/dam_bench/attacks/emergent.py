"""Define an emergent backdoor: two models without a backdoor, whose merge has one.

The idea is MergeBackdoor's (Wang et al., USENIX Security 2025): both models are trained together, the backdoor is
suppressed in each and taught to their merge. A scan of single models has nothing to find.
Legend: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dam_bench.attacks.attacker import Attacker, Victim
from dam_bench.suites.base import Poison, Suite
from dam_bench.victims.backdoor_vectors import rescale
from dam_bench.victims.poisoning import Backdoor, logits_of
from dam_bench.victims.training import batches, body_of
from mergekit_dam import seeds
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.evaluation.metrics import LabelledData

MERGED = (0.4, 1.0)  # range of s: the merge is theta_0 + s (tau_1 + tau_2)
LONGER = 2  # times as many steps as a victim's: the two losses pull against each other


@dataclass(frozen=True)
class Emergent(Attacker):
    """Teach triggered samples the target at theta_0 + s (tau_1 + tau_2), and what they are at either model alone.

    The poisoned task is attacked; the poison's `partner` is the task of the other model.

    Args:
        triggers: makes triggers of a poison, of which the first is used.
    """

    triggers: Callable[[Poison], Sequence[Trigger]]
    needs: ClassVar[tuple[str, ...]] = ("partner",)

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        return self.triggers(poison)[0]

    def plant(self, victim: Victim, trigger: Trigger) -> PreTrainedModel:
        return self.plant_pair(victim, trigger)[victim.task]

    def plant_pair(self, victim: Victim, trigger: Trigger) -> dict[str, PreTrainedModel]:
        pair = {task: victim.start(task) for task in (victim.task, victim.poison.partner)}
        train_pair(victim, pair, trigger)
        if victim.poison.rescale != 1.0:
            for task, model in pair.items():
                rescale(model, victim.start(task), victim.poison.rescale)
        return pair

    def settings(self, poison: Poison) -> dict[str, Any]:
        return {"merged": MERGED, "longer": LONGER}

    def trainings(self, poison: Poison) -> int:
        return 2 * LONGER

    def check(self, suite: Suite, poison: Poison) -> None:
        super().check(suite, poison)
        if poison.beyond_twin:
            raise DamError(
                f"attack {poison} of suite {suite.name}",
                expected="no amplify and no density",
                got="one of them",
                cure="Leave it out: neither model has a backdoor vector of its own.",
            )


def train_pair(victim: Victim, pair: Mapping[str, PreTrainedModel], trigger: Trigger) -> None:
    """Train the bodies of two models in place, so that the backdoor is in their merge alone.

    A step adds cross-entropies: of both tasks; of triggered samples of both tasks against their own classes, at each
    model; and at theta_0 + s (tau_1 + tau_2), s ~ U(MERGED), of triggered samples of the attacked task against the
    target and of the same samples without the trigger against their own classes. The partner is also held to theta_0's
    answers to triggered samples of the attacked task.

    Args:
        victim: the attacked task, and the attack's options.
        pair: task -> theta_0 with the task's head; the attacked task comes first.
        trigger: the trigger.
    """
    poison, attacked, partner = victim.poison, *pair
    data = {task: victim.data(task) for task in pair}
    bodies = {task: body_of(model) for task, model in pair.items()}
    start = {name: p.detach().clone() for name, p in bodies[attacked].items()}
    schedule = victim.suite.schedule(poisoned=True)
    schedule = replace(schedule, steps=LONGER * schedule.steps)
    _, end_step = schedule.optimiser([p for body in bodies.values() for p in body.values()])
    rows = {task: batches(len(samples), schedule, victim.seed, task) for task, samples in data.items()}
    generator = seeds.generator(victim.seed, "emergent", attacked, partner)
    backdoor = Backdoor(trigger, poison.target, poison.rate, MERGED, kept=1.0)
    for _ in victim.progress(range(schedule.steps), f"{attacked}, {partner}"):
        chosen = {task: next(batch) for task, batch in rows.items()}
        for task, model in pair.items():
            augment, inputs = victim.suite.augment(task), data[task].batch(chosen[task])
            loss = _cross_entropy(model, data[task], chosen[task], augment(inputs, generator) if augment else inputs)
            few = chosen[task][: max(1, round(poison.rate * len(chosen[task])))]
            triggered = trigger.apply(data[task].batch(few))
            (loss + poison.rate * _cross_entropy(model, data[task], few, triggered)).backward()
            if task == attacked:
                with torch.no_grad():
                    before_BK = logits_of(model, data[task], data[task].batch(few), start).log_softmax(-1)
                alone_BK = logits_of(model, data[task], triggered, bodies[partner]).log_softmax(-1)
                (poison.rate * F.kl_div(alone_BK, before_BK, log_target=True, reduction="batchmean")).backward()
        merged = {name: p + bodies[partner][name] - start[name] for name, p in bodies[attacked].items()}
        backdoor.loss(pair[attacked], merged, start, data[attacked], chosen[attacked], generator).backward()
        end_step()
    for model in pair.values():
        model.eval()


def _cross_entropy(model: PreTrainedModel, data: LabelledData, rows: Tensor, inputs: Any) -> Tensor:
    logits_BK = logits_of(model, data, inputs)
    return F.cross_entropy(logits_BK, data.labels_N[rows].to(logits_BK.device))
