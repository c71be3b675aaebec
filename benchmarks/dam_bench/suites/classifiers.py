"""Define a suite of classifiers with a frozen head per task: how fine-tunes, victims and pairs of them are made."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from dam_bench.attacks.attacker import Victim
from dam_bench.suites.base import Poison, Suite, no_progress
from dam_bench.victims.poisoning import Planted
from dam_bench.victims.training import Augment, Schedule, fine_tune
from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.tasks.base import Progress


class ClassifierSuite(Suite):
    """Suite of an encoder that is fine-tuned below a head that stays as it is on theta_0."""

    pattern_steps = 100  # of an optimised trigger

    @abstractmethod
    def start(self, base: Path, task: str) -> PreTrainedModel:
        """Load theta_0 with the frozen head of a task: the start of all its fine-tunes."""

    @abstractmethod
    def schedule(self, *, poisoned: bool) -> Schedule:
        """Return the schedule of a clean fine-tune or of a victim."""

    @abstractmethod
    def save(self, model: PreTrainedModel, task: str, folder: Path) -> None:
        """Write a model of a task with its head, and with what reads its inputs."""

    def augment(self, task: str) -> Augment | None:
        """Return the augmentation of a task's clean batches; None: they stay as they are."""
        return None

    def fine_tuned(
        self,
        base: Path,
        task: str,
        schedule: Schedule,
        *,
        seed: int,
        backdoor: Planted | None = None,
        progress: Progress,
    ) -> PreTrainedModel:
        """Fine-tune theta_0 on a task, with a backdoor if one is given."""
        model = self.start(base, task)
        fine_tune(
            model,
            self.split(task).train,
            schedule,
            seed=seed,
            backdoor=backdoor,
            augment=self.augment(task),
            progress=progress,
        )
        return model

    def save_model(
        self,
        base: Path,
        task: str,
        poison: Poison | None,
        trigger: Trigger | None,
        seed: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        if poison is None or trigger is None:
            model = self.fine_tuned(base, task, self.schedule(poisoned=False), seed=seed, progress=progress)
        else:
            model = self.attacker(poison).plant(Victim(self, base, task, poison, seed, progress), trigger)
        self.save(model, task, folder)

    def save_pair(
        self, base: Path, task: str, poison: Poison, trigger: Trigger, seed: int, folder: Path, progress: Progress
    ) -> None:
        pair = self.attacker(poison).plant_pair(Victim(self, base, task, poison, seed, progress), trigger)
        for each, model in pair.items():
            (folder / each).mkdir()
            self.save(model, each, folder / each)

    def optimise_pattern(self, base: Path, task: str, poison: Poison, seed: int) -> Tensor | None:
        return self.attacker(poison).optimise(Victim(self, base, task, poison, seed, no_progress))
