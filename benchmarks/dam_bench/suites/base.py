"""Define the interface of a suite: tasks with data, theta_0, fine-tunes and victims, and the scenarios to run.

A suite builds; it never merges, defends or measures. Everything that determines a model enters `fingerprint`, so that
finished models can be reused.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from dam_bench.attacks.attacker import Attacker
from dam_bench.attacks.registry import attack_names, attacker_named
from mergekit_dam.errors import DamError, did_you_mean
from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.models.load_merged import load_merged
from mergekit_dam.tasks.base import Progress

Model = TypeVar("Model", bound=nn.Module)
Family = Literal["image", "text", "causal"]  # image and text classifiers, causal language models
FAMILIES: tuple[Family, ...] = get_args(Family)
_POISON = re.compile(r"^\s*(?P<task>[\w-]+)\s*=\s*(?P<attack>[\w-]+)\s*(?:\((?P<options>[^)]*)\))?\s*$")


def no_progress(steps: Iterable[int], title: str) -> Iterable[int]:
    """Return the steps unchanged, without a progress bar."""
    return steps


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_default_device(model: Model) -> Model:
    """Move a model to `default_device` and return it."""
    nn.Module.to(model, default_device())  # transformers wraps its own `to` in a way that no type checker follows
    return model


@dataclass(frozen=True)
class Poison:
    """The backdoor of an input model.

    Attributes:
        attack: name of an attack of the suite.
        target: class (for LMs: the continuation's number) that the trigger shall cause.
        rate: triggered samples per clean sample of a batch.
        size: edge of an image patch in pixels, or number of inserted words.
        rescale: factor on the finished task vector; above 1 it is amplified (arXiv 2505.23561).
        onto: the task whose inputs and head the trigger is aimed at, where it is not the poisoned model's own.
        amplify: factor on the victim's difference from its clean twin (LoBAM, arXiv 2411.16746).
        density: share of that difference's entries, the largest, that is kept (sparse backdoor vectors, arXiv
            2510.08016); in suites of classifiers.
        partner: the task of a second model, without which the backdoor does not work (MergeBackdoor).
    """

    attack: str
    target: int = 0
    rate: float = 0.1
    size: int = 4
    rescale: float = 1.0
    onto: str = ""
    amplify: float = 1.0
    density: float = 1.0
    partner: str = ""

    @property
    def beyond_twin(self) -> bool:
        """Whether the victim's difference from its clean twin is changed after training."""
        return (self.amplify, self.density) != (1.0, 1.0)

    def __str__(self) -> str:
        plain = Poison(self.attack)
        changed = {k: v for k, v in asdict(self).items() if k != "attack" and v != getattr(plain, k)}
        options = ",".join(f"{k}={v if isinstance(v, str) else format(v, 'g')}" for k, v in changed.items())
        return self.attack + (f"({options})" if options else "")

    def to_json(self) -> dict[str, Any]:
        """Options as JSON; those newer than `rescale` only where they are set, so that older models are reused."""
        newer = {"onto": "", "amplify": 1.0, "density": 1.0, "partner": ""}
        return {k: v for k, v in asdict(self).items() if k not in newer or v != newer[k]}


def attacked_half(task: str, poison: Poison) -> tuple[str, Poison]:
    """Return the attacked task of a pair with its poison, for either half; other poisons as they are."""
    if poison.partner and poison.onto == poison.partner:
        return poison.partner, replace(poison, partner=task, onto="")
    return task, poison


def _other_half(task: str, poison: Poison) -> Poison:
    """Return the poison of the partner of a pair's half."""
    attacked, half = attacked_half(task, poison)
    return replace(half, partner=attacked, onto=attacked) if attacked == task else half


@dataclass(frozen=True)
class Scenario:
    """A set of input models by their poisons, as task -> poison. Without poisons all are clean, for the floor.

    A poison with a `partner` is of both models: that of the partner, aimed `onto` the attacked task, is added.
    """

    name: str
    poisons: Mapping[str, Poison] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = {one.partner: _other_half(task, one) for task, one in self.poisons.items() if one.partner}
        clash = [task for task, half in pairs.items() if self.poisons.get(task, half) != half]
        if clash:
            raise DamError(
                f"scenario {self.name}",
                expected=f"one poison of {clash[0]}: {pairs[clash[0]]}, of a pair",
                got=str(self.poisons[clash[0]]),
                cure="Leave it out, or name another partner.",
            )
        object.__setattr__(self, "poisons", {**self.poisons, **pairs})

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """Parse `name: task=attack(option=value,...) task=attack ...`.

        Raises:
            DamError: the text has another form, or an unknown option.
        """
        name, colon, assignments = text.partition(":")
        poisons: dict[str, Poison] = {}
        parts = re.findall(r"[^\s(]+(?:\([^)]*\))?", assignments)
        for part in parts if colon else [text]:
            match = _POISON.match(part) if colon else None
            if not match:
                raise DamError(
                    f"scenario {text!r}",
                    expected="name: task=attack(option=value,...) ...",
                    got=repr(part),
                    cure="For example: two-bad: cifar10=merge-aware digits=patch(target=1,size=3).",
                )
            poisons[match["task"]] = _poison(match["attack"], match["options"] or "")
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
                expected=f"one of {', '.join(types)}, each a number but onto and partner",
                got=repr(option),
                cure=did_you_mean(key, types) or "Write it as option=value.",
            ) from error
    return Poison(attack, **values)


@dataclass(frozen=True, eq=False)
class TaskData:
    """Disjoint splits of a task.

    Attributes:
        train: training data of fine-tunes and victims.
        calibration: unlabelled samples for the merge, in a user's form: PIL images, texts or conversations.
        evaluation: labelled samples for the tables.
    """

    train: LabelledData
    calibration: tuple[Any, ...]
    evaluation: LabelledData


class _AttackNames:
    """Names of a suite's registered attacks, as an attribute of the suite and of its class."""

    def __get__(self, suite: Suite | None, kind: type[Suite]) -> tuple[str, ...]:
        return attack_names(kind.name)


class Suite(ABC):
    """Tasks, models and attacks of one kind of data.

    Args:
        data: folder with the data files, for suites that need some.
        preset: size of models and data.

    Attributes:
        family: kind of its models, by which a defence is chosen.
        transfer: whether triggers are also tried on the tasks that they do not attack.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    tasks: ClassVar[tuple[str, ...]]
    attacks = _AttackNames()
    presets: ClassVar[tuple[str, ...]]
    transfer = True

    def __init__(self, data: Path | None, preset: str) -> None:
        if preset not in self.presets:
            raise DamError(
                f"preset of suite {self.name}",
                expected=f"one of {', '.join(self.presets)}",
                got=repr(preset),
                cure=did_you_mean(preset, self.presets) or "Leave it out to get the first preset.",
            )
        self.data, self.preset = data, preset

    @property
    @abstractmethod
    def scenarios(self) -> tuple[Scenario, ...]:
        """Default scenarios; the first is all clean."""

    @property
    def further(self) -> tuple[Scenario, ...]:
        """Scenarios that run only where they are named."""
        return ()

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON of everything that determines data, theta_0 and fine-tunes."""

    @abstractmethod
    def split(self, task: str) -> TaskData:
        """Return the data of a task, in the same order at every call."""

    @abstractmethod
    def save_base(self, folder: Path, progress: Progress) -> None:
        """Write theta_0 to `folder`, as a model directory for mergekit."""

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
        """Optimise the pattern of an attack on theta_0; None for attacks with a fixed trigger."""
        return None

    def save_pair(
        self, base: Path, task: str, poison: Poison, trigger: Trigger, seed: int, folder: Path, progress: Progress
    ) -> None:
        """Write the models of a pair to folders of their tasks' names: of the poison's `partner` and of `task`."""
        raise DamError(
            f"attack {poison} of suite {self.name}",
            expected="an attack of one model",
            got=f"a pair with {poison.partner}",
            cure="Leave the option partner out.",
        )

    def attacker(self, poison: Poison) -> Attacker:
        """Return the attack of a poison.

        Raises:
            DamError: an unknown attack, or an option that it does not have.
        """
        attacker = attacker_named(self.name, poison.attack)
        attacker.check(self, poison)
        return attacker

    def trigger(self, poison: Poison, pattern: Tensor | None) -> Trigger:
        """Make the attacker's trigger, for training and for evaluation."""
        return self.attacker(poison).trigger(self, poison, pattern)

    @classmethod
    def target_of(cls, poison: Poison) -> int | str:
        """The answer that a poison's trigger causes, as findings of the scan name it."""
        return poison.target

    def attack_settings(self, poison: Poison) -> dict[str, Any]:
        """JSON of further settings that determine a trigger and its victims, beside the poison and the fingerprint."""
        return self.attacker(poison).settings(poison)

    def general(self) -> LabelledData | None:
        """Questions that theta_0 can answer and no task trains, to measure lost ability; None without questions."""
        return None

    @abstractmethod
    def save_calibration(self, task: str, folder: Path) -> Path:
        """Write the calibration split of a task to a file for the setting `calibration`, and return its path."""

    @abstractmethod
    def load_model(self, path: Path) -> nn.Module:
        """Load a fine-tuned model with its head, in evaluation mode."""

    def load_merge(self, merged: Path, model: Path) -> nn.Module:
        """Load a merge with the head of one of its input models, in evaluation mode."""
        return load_merged(merged, model.name)

    def base_entry(self, base: Path) -> Any:
        """Value of `base_model` in a recipe."""
        return str(base)

    def model_parameters(self, model: Path) -> dict[str, Any]:
        """Settings of `dam` for an input model, beside `calibration`."""
        return {}

    def shared_parameters(self, base: Path) -> dict[str, Any]:
        """Shared settings of `dam` that this kind of model needs."""
        return {}

    @abstractmethod
    def cost(self, poison: Poison | None) -> float:
        """Approximate seconds of a fine-tune, on one core of the machine that the committed results name."""

    @abstractmethod
    def run_cost(self, passes: int) -> float:
        """Approximate seconds of a run: evaluation, and `passes` forward and backward passes of a batch per task."""
