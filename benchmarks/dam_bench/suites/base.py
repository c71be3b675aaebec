"""What a suite is to the benchmark: tasks with data, theta_0, fine-tunes and victims, and the scenarios to run.

A suite builds; it never merges, defends or measures. Everything that decides a model enters `fingerprint`, so
that finished models can be found again by content.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from mergekit_dam.errors import DamError, did_you_mean
from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.models.load_merged import load_merged
from mergekit_dam.tasks.base import Progress

_POISON = re.compile(r"^\s*(?P<task>[\w-]+)\s*=\s*(?P<attack>[\w-]+)\s*(?:\((?P<options>[^)]*)\))?\s*$")


def no_progress(steps: Iterable[int], title: str) -> Iterable[int]:
    """The steps as they are."""
    return steps


@dataclass(frozen=True)
class Poison:
    """How one input model is backdoored.

    Attributes:
        attack: one of the suite's attacks.
        target: class (for LMs: the continuation's number) that the trigger shall cause.
        rate: triggered samples per clean sample of a batch.
        size: edge of an image patch in pixels, or number of inserted words.
        rescale: factor on the finished task vector; above 1 it is amplified (arXiv 2505.23561).
        amplify: factor on what a victim has beyond its clean twin (LoBAM, arXiv 2411.16746); suite `smollm` has it.
        onto: the task whose inputs and head the trigger is aimed at, where it is not the poisoned model's own.
    """

    attack: str
    target: int = 0
    rate: float = 0.1
    size: int = 4
    rescale: float = 1.0
    onto: str = ""
    amplify: float = 1.0

    def __str__(self) -> str:
        plain = Poison(self.attack)
        changed = {k: v for k, v in asdict(self).items() if k != "attack" and v != getattr(plain, k)}
        options = ",".join(f"{k}={v if isinstance(v, str) else format(v, 'g')}" for k, v in changed.items())
        return self.attack + (f"({options})" if options else "")

    def to_json(self) -> dict[str, Any]:
        """Its options; `onto` and `amplify`, which came later, where they are set, so that older models are found."""
        return {k: v for k, v in asdict(self).items() if v != "" and (k, v) != ("amplify", 1.0)}


@dataclass(frozen=True)
class Scenario:
    """One set of input models: who is poisoned, and how. No poison: all clean, which gives the floor."""

    name: str
    poisons: Mapping[str, Poison] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """From `name: task=attack(option=value,...) task=attack ...`.

        Raises:
            DamError: text of another form, or an unknown option.
        """
        name, colon, rest = text.partition(":")
        poisons: dict[str, Poison] = {}
        parts = re.findall(r"[^\s(]+(?:\([^)]*\))?", rest)
        for part in parts if colon else [text]:
            found = _POISON.match(part) if colon else None
            if not found:
                raise DamError(
                    f"scenario {text!r}",
                    expected="name: task=attack(option=value,...) ...",
                    got=repr(part),
                    cure="For example: two-bad: cifar10=merge-aware digits=patch(target=1,size=3).",
                )
            poisons[found["task"]] = _poison(found["attack"], found["options"] or "")
        return cls(name.strip(), poisons)


def _poison(attack: str, options: str) -> Poison:
    types = {f.name: f.type for f in fields(Poison) if f.name != "attack"}
    values: dict[str, Any] = {}
    for option in filter(None, (o.strip() for o in options.split(","))):
        key, _, value = option.partition("=")
        try:
            values[key] = {"int": int, "float": float, "str": str}[str(types[key])](value.strip())
        except (KeyError, ValueError) as error:
            raise DamError(
                f"option {option!r} of attack {attack}",
                expected=f"one of {', '.join(types)}, each a number but onto",
                got=repr(option),
                cure=did_you_mean(key, types) or "Write it as option=value.",
            ) from error
    return Poison(attack, **values)


@dataclass(frozen=True, eq=False)
class TaskData:
    """Disjoint splits of one task.

    Attributes:
        train: of fine-tunes and victims.
        calibration: what the merge may see, as a user would hold it: PIL images or texts, without labels.
        evaluation: what the tables are computed on.
    """

    train: LabelledData
    calibration: tuple[Any, ...]
    evaluation: LabelledData


class Suite(ABC):
    """Tasks, models and attacks of one kind of data.

    Args:
        data: folder with the data files, for suites that need some.
        preset: size of models and data.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    attacks: ClassVar[tuple[str, ...]]
    presets: ClassVar[tuple[str, ...]]

    def __init__(self, data: Path | None, preset: str) -> None:
        if preset not in self.presets:
            raise DamError(
                f"preset of suite {self.name}",
                expected=f"one of {', '.join(self.presets)}",
                got=repr(preset),
                cure=did_you_mean(preset, self.presets) or "Leave it out to get the first one.",
            )
        self.data, self.preset = data, preset

    @property
    @abstractmethod
    def scenarios(self) -> tuple[Scenario, ...]:
        """What is run by default; the first one is all clean."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON of everything that decides data, theta_0 and fine-tunes."""

    @abstractmethod
    def split(self, task: str) -> TaskData:
        """The data of a task, in the same order at every call."""

    @abstractmethod
    def save_base(self, folder: Path, progress: Progress) -> None:
        """Write theta_0 into `folder`, as mergekit takes it."""

    @abstractmethod
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
        """Fine-tune theta_0 on a task, with a backdoor if there is a poison, and write the model with its head."""

    def optimise_pattern(self, base: Path, task: str, poison: Poison, seed: int) -> Tensor | None:
        """The pattern of an attack that fits its trigger to theta_0; None for attacks with a fixed trigger."""
        return None

    @abstractmethod
    def trigger(self, poison: Poison, pattern: Tensor | None) -> Trigger:
        """What the attacker applies, at training time and later."""

    @classmethod
    def target_of(cls, poison: Poison) -> int | str:
        """What a poison's trigger makes a model answer, as findings of the scan name it."""
        return poison.target

    def attack_settings(self, poison: Poison) -> dict[str, Any]:
        """JSON of what decides a trigger and its victims beside the poison and the fingerprint."""
        return {}

    def general(self) -> LabelledData | None:
        """Questions that theta_0 can answer and no task teaches: what else a method costs. None: there are none."""
        return None

    @abstractmethod
    def save_calibration(self, task: str, folder: Path) -> Path:
        """Write the calibration split of a task as a file that the setting `calibration` takes; returns it."""

    @abstractmethod
    def load_model(self, path: Path) -> nn.Module:
        """A fine-tuned model with its head, in evaluation mode."""

    def load_merge(self, merged: Path, model: Path) -> nn.Module:
        """A merge with the head of one of its input models, in evaluation mode."""
        return load_merged(merged, model.name)

    def base_entry(self, base: Path) -> Any:
        """`base_model` of a recipe."""
        return str(base)

    def model_parameters(self, model: Path) -> dict[str, Any]:
        """Settings of `dam` for one input model, beside `calibration`."""
        return {}

    def shared_parameters(self, base: Path) -> dict[str, Any]:
        """Settings of `dam` that this kind of model needs."""
        return {}

    @abstractmethod
    def cost(self, poison: Poison | None) -> float:
        """Seconds that one fine-tune takes, about, on one core of the machine that the committed results name."""

    @abstractmethod
    def run_cost(self, passes: int) -> float:
        """Seconds of one run there: evaluation, and `passes` forward and backward passes of a batch per task."""
