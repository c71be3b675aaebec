"""Training data of a vaccination: clean inputs with the model's own answers, triggered inputs with wrong or own ones.

Legend: N samples, B batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.constants import Constants
from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.errors import DamError
from mergekit_dam.tasks import Target, Task, generates
from mergekit_dam.vaccine.behaviours import Behaviour
from mergekit_dam.vaccine.settings import VaccineSettings
from mergekit_dam.vaccine.triggers import Change

_AT_ONCE = 64  # inputs of a pass without gradients, of classifiers
_FEWEST = 8  # samples of which some can be held out


@dataclass(frozen=True, eq=False)
class PlantedTrigger:
    """A planted trigger with the behaviour that it is to cause.

    Attributes:
        kind: name in the registry.
        change: puts it into an input.
        behaviour: what the model is taught to do at it.
        round: from 1 on.
        number: within its round, from 0 on.
        held_out: whether it is never unlearned.
    """

    kind: str
    change: Change
    behaviour: Behaviour
    round: int
    number: int
    held_out: bool


class Lessons:
    """The inputs of one model with its own answers, and losses and measurements on them.

    Args:
        task: the model's.
        settings: with nothing left open.
        teacher: whose answers are kept, by output name; of causal LMs always the task's own model.

    Attributes:
        rows: samples that are trained on.
        checks: samples that are never trained on.
        num_classes: K; 0 of causal LMs.
    """

    def __init__(self, task: Task, settings: VaccineSettings, teacher: Weights) -> None:
        assert settings.samples is not None and settings.checks is not None
        self.task, self.settings = task, settings
        rows = torch.arange(min(task.num_samples, settings.samples))
        self._probabilities = torch.empty(0)
        if generates(task):
            self._answers: list[Target] = list(task.answers(rows))
            rows = torch.tensor([row for row in rows.tolist() if self._answers[row]], dtype=torch.long)
        else:
            with torch.no_grad():
                logits = [task.logits(teacher, task.batch(task.samples(part))).cpu() for part in rows.split(_AT_ONCE)]
            self._probabilities = torch.cat(logits).softmax(-1)
            self._answers = torch.cat(logits).argmax(-1).tolist()
        if len(rows) < _FEWEST:
            raise DamError(
                f"calibration of {task.name}",
                expected=f"at least {_FEWEST} samples that the model answers",
                got=str(len(rows)),
                cure="Give more data; causal LMs need prompts, and the constant answer_tokens above 0.",
            )
        self.num_classes = self._probabilities.shape[-1]
        held = min(settings.checks, max(1, int(task.constants.vaccine_most_checks * len(rows))))
        self.checks, self.rows = rows[:held], rows[held:]

    @property
    def answers(self) -> list[Target]:
        """The model's own, of the samples that are trained on."""
        return [self._answers[row] for row in self.rows.tolist()]

    def loss(
        self, weights: Weights, triggers: Sequence[PlantedTrigger], *, wrong: bool, generator: torch.Generator
    ) -> Tensor:
        """Mean loss of one batch: one half clean inputs, the other half triggered.

        Args:
            wrong: whether triggered inputs shall be answered as planted, and not as without the trigger.
        """
        assert self.settings.batch_size is not None
        clean = self.settings.batch_size - self.settings.batch_size // 2
        picked = self.rows[torch.randint(len(self.rows), (self.settings.batch_size,), generator=generator)]
        samples = self.task.samples(picked)
        wanted: list[Target | Tensor] = [self._own(row) for row in picked.tolist()]
        turn = torch.randperm(len(triggers), generator=generator).tolist()
        for place in range(clean, len(samples)):
            trigger = triggers[turn[(place - clean) % len(turn)]]
            samples[place] = trigger.change(samples[place], generator)
            if wrong:
                variants = trigger.behaviour.variants
                wanted[place] = variants[int(torch.randint(len(variants), (), generator=generator))]
        losses_B = self._losses(weights, self.task.batch(samples), wanted)
        return losses_B[:clean].mean() + losses_B[clean:].mean()

    def _own(self, row: int) -> Target | Tensor:
        soft = self.settings.answers == "soft" and self.num_classes > 0
        return self._probabilities[row] if soft else self._answers[row]

    def _losses(self, weights: Weights, inputs: dict[str, Tensor], wanted: Sequence[Target | Tensor]) -> Tensor:
        """Cross-entropy per sample, in nats (of causal LMs the mean over tokens)."""
        if not self.num_classes:
            return self.task.reach(weights, inputs, [one for one in wanted if not isinstance(one, Tensor)])[0]
        rows = [
            one if isinstance(one, Tensor) else F.one_hot(torch.tensor(one), self.num_classes).float() for one in wanted
        ]
        targets_BK = torch.stack(rows).to(self.task.device)
        return F.cross_entropy(self.task.logits(weights, inputs), targets_BK, reduction="none")

    @torch.no_grad()
    def agreement(self, weights: Weights) -> float:
        """Share of the held-out samples that get the model's own answer (LMs: an answer that begins alike)."""
        answers = [self._beginning(self._answers[row]) for row in self.checks.tolist()]
        return float(self._hits(weights, self.task.samples(self.checks), answers).float().mean())

    @torch.no_grad()
    def success(self, weights: Weights, trigger: PlantedTrigger, most: int | None = None) -> float | None:
        """Share of the held-out samples that a trigger turns to its behaviour, among those that do not show it anyway.

        Args:
            most: samples that are looked at; default: all that are held out.

        Returns:
            None where there are no such samples.
        """
        rows = [row for row in self.checks.tolist() if not trigger.behaviour.shown_by(self._answers[row])][:most]
        if not rows:
            return None
        generator = seeds.generator(
            self.settings.seed, "vaccine", "measure", self.task.index, trigger.round, trigger.number
        )
        samples = [trigger.change(sample, generator) for sample in self.task.samples(torch.tensor(rows))]
        hits = torch.zeros(len(rows), dtype=torch.bool)
        for mark in trigger.behaviour.marks:
            hits |= self._hits(weights, samples, [mark] * len(rows))
        return float(hits.float().mean())

    def _hits(self, weights: Weights, samples: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
        at_once = _AT_ONCE if self.num_classes else int(self.settings.batch_size or 1)
        found = []
        for begun in range(0, len(samples), at_once):
            part = slice(begun, begun + at_once)
            found.append(self.task.reach(weights, self.task.batch(samples[part]), targets[part])[1].cpu())
        return torch.cat(found)

    def _beginning(self, answer: Target) -> Target:
        return answer if isinstance(answer, int) else answer[: self.task.constants.judged_tokens]


def learning_rate(settings: VaccineSettings, constants: Constants, step: int, steps: int | None) -> float:
    """AdamW's step size: a warm-up, then half a cosine; constant after the warm-up where the end is not known."""
    assert settings.learning_rate is not None
    warm_up = min(1.0, (step + 1) / constants.vaccine_warm_up)
    if steps is None:
        return settings.learning_rate * warm_up
    last = constants.vaccine_last_rate_share
    slope = last + (1 - last) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    return settings.learning_rate * warm_up * slope
