"""Define an attacker: how it makes a trigger, what it trains a victim to do, and what becomes of the task vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from dam_bench.victims.backdoor_vectors import amplify, rescale
from dam_bench.victims.poisoning import Backdoor, Planted
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.tasks.base import Progress

if TYPE_CHECKING:
    from dam_bench.suites.base import Poison, Suite
    from dam_bench.suites.classifiers import ClassifierSuite


@dataclass(frozen=True)
class Victim:
    """A classifier that is to be backdoored, with all that its attacker has: theta_0 and data.

    Attributes:
        suite: of the model.
        base: folder of theta_0.
        task: task of the model.
        poison: the attack's options.
        seed: of the model.
        progress: wraps the steps of training.
    """

    suite: ClassifierSuite
    base: Path
    task: str
    poison: Poison
    seed: int
    progress: Progress

    def data(self, task: str = "") -> LabelledData:
        """Training data of a task, by default the victim's own."""
        return self.suite.split(task or self.task).train

    def start(self, task: str = "") -> PreTrainedModel:
        """Load theta_0 with the frozen head of a task, by default the victim's own."""
        return self.suite.start(self.base, task or self.task)

    def trained(self, backdoor: Planted | None) -> PreTrainedModel:
        """Fine-tune theta_0 as the suite's victims are; without a backdoor this is the victim's clean twin."""
        schedule = self.suite.schedule(poisoned=True)
        return self.suite.fine_tuned(
            self.base, self.task, schedule, seed=self.seed, backdoor=backdoor, progress=self.progress
        )

    def clean(self, task: str, seed: int) -> PreTrainedModel:
        """Fine-tune theta_0 on another task, as the suite's clean models are."""
        schedule = self.suite.schedule(poisoned=False)
        return self.suite.fine_tuned(self.base, task, schedule, seed=seed, progress=self.progress)


class Attacker(ABC):
    """An attack on the models of a suite. A subclass gives a trigger, and changes what else differs from BadNets.

    Attributes:
        interpolation: range of r, see `Backdoor`; plain poisoning by default.
        needs: options of a poison that name another task, and that this attack needs; other attacks refuse them.
    """

    interpolation: tuple[float, float] = (1.0, 1.0)
    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        """Make the trigger, for training and for evaluation.

        Args:
            suite: gives the data folder and sizes.
            poison: the attack's options.
            pattern: what `optimise` returned.
        """

    def optimise(self, victim: Victim) -> Tensor | None:
        """Optimise the trigger's pattern on theta_0; None for a fixed trigger."""
        return None

    def settings(self, poison: Poison) -> dict[str, Any]:
        """JSON of all that determines trigger and victim beside the poison, this code and the suite's fingerprint."""
        return {}

    def backdoor(self, victim: Victim, trigger: Trigger) -> Planted:
        """Say what the victim is trained to do beside its task."""
        return Backdoor(trigger, victim.poison.target, victim.poison.rate, self.interpolation)

    def plant(self, victim: Victim, trigger: Trigger) -> PreTrainedModel:
        """Train a victim, and change its task vector as the poison says: LoBAM, sparse backdoor vectors, rescaling."""
        model, poison = victim.trained(self.backdoor(victim, trigger)), victim.poison
        if poison.beyond_twin:
            amplify(model, victim.trained(None), poison.amplify, density=poison.density)
        if poison.rescale != 1.0:
            rescale(model, victim.start(), poison.rescale)
        return model

    def plant_pair(self, victim: Victim, trigger: Trigger) -> dict[str, PreTrainedModel]:
        """Train the models of the victim's task and of the poison's `partner` together; only attacks of pairs do."""
        raise NotImplementedError(f"{type(self).__name__} attacks one model, and refuses the option partner")

    def behaviours(self, suite: Suite, task: str, poison: Poison, trigger: Trigger) -> Sequence[tuple[Trigger, int]]:
        """Triggers, each with its target, that shall work in a merge; the first is `trigger` itself."""
        return ((trigger, poison.target),)

    def trainings(self, poison: Poison) -> int:
        """Number of fine-tunes that a victim takes beside its own, for estimates of time."""
        return int(poison.beyond_twin)

    def check(self, suite: Suite, poison: Poison) -> None:
        """Refuse a poison whose options name no other task of the suite, or one that this attack has no use for.

        Raises:
            DamError: with the option.
        """
        for option in ("onto", "partner"):
            second_half = option == "onto" and poison.onto == poison.partner
            given = "" if second_half else getattr(poison, option)
            if given not in ("", *suite.tasks) or bool(given) != (option in self.needs):
                raise DamError(
                    f"attack {poison} of suite {suite.name}",
                    expected=f"{option}=TASK of the suite" if option in self.needs else f"no {option}=TASK",
                    got=given or f"no {option}",
                    cure=f"Name one of {', '.join(suite.tasks)}." if option in self.needs else "Leave it out.",
                )
