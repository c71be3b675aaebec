"""Read the results of the benchmark: one JSON per run, `ROOT/SUITE/SCENARIO/METHOD-seedK.json`, of schema `Run`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mergekit_dam.errors import DamError

CLEAN = "clean"
_ONTO = re.compile(r"[(,]onto=([\w-]+)")
_COEFFICIENT = re.compile(r"^(?P<stem>.+)-(?P<value>\d+(?:\.\d+)?)$")

# Rows of a table, in this order; undefended merges use no data, and make the Pareto front to beat. "defence": rivals',
# "afterwards": what users do to a merge.
GROUPS = {
    "reference": ("base", "fine-tuned"),
    "undefended": ("task_arithmetic", "ties", "dare_ties", "linear", "model_stock"),
    "learned": ("adamerging", "concrete"),
    "other baseline": (),
    "defence": ("wag", "msd", "fine-pruning", "awm", "sau", "lfpm", "crow", "beear", "backflush"),
    "public DAM": ("fusion_bench-dam",),
    "ours": ("paper-m1", "paper-m2", "paper-dual", "dam"),
    "afterwards": ("quantised", "fine-tuned-on", "rescaled", "merged-again"),
}
RIVALS = ("defence", "public DAM")  # groups of the defences of others
_UNKNOWN = {"reference": "reference", "baseline": "other baseline", "defence": "ours"}


def _counts(counts: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= counts[0] <= counts[1] or not counts[1]:
        raise ValueError("Input should be [hits, total] with 0 <= hits <= total and total > 0")
    return counts


Counts = Annotated[tuple[int, int], AfterValidator(_counts)]


class Run(BaseModel):
    """A run of a method on a scenario with a seed.

    Attributes:
        poisons: task -> attack, as `Poison` prints it; empty for the all-clean scenario.
        accuracy: task -> clean counts.
        attack_success: "task=attack" -> task -> counts of triggered samples of other classes; in the all-clean
            scenario for every attack of the suite, which gives the floor.
        without_trigger: the same counts, of the same samples without the trigger.
        general: model ("merge" for a merge) -> counts of correct answers to general questions, if the suite has any.
        wall_s: seconds of the merge with its learning; None for models that are not merged.
        peak_bytes: peak memory.
        defence: registered name of a rival defence; None of other methods.
        density: layer (its number, or "other") -> mask -> kept fraction, for methods with masks.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = Field(alias="schema")
    suite: str
    preset: str
    scenario: str
    poisons: dict[str, str]
    method: str
    family: Literal["baseline", "reference", "defence"]
    settings: dict[str, Any]
    seed: int
    accuracy: dict[str, Counts] = Field(min_length=1)
    attack_success: dict[str, dict[str, Counts]]
    without_trigger: dict[str, dict[str, Counts]] = {}
    general: dict[str, Counts] = {}
    calibration_samples: int | None = None
    wall_s: float | None = None
    peak_bytes: int | None = None
    versions: dict[str, str] = {}
    hardware: str = "not recorded"
    defence: str | None = None
    density: dict[str, dict[str, float]] = {}

    @property
    def stem(self) -> str:
        """The method without its coefficient."""
        match = _COEFFICIENT.match(self.method)
        return match["stem"] if match else self.method

    @property
    def coefficient(self) -> float | None:
        """The merging coefficient that the method's name ends with."""
        match = _COEFFICIENT.match(self.method)
        return float(match["value"]) if match else None

    @property
    def group(self) -> str:
        """The method's part of a table."""
        if self.defence is not None:
            return "afterwards" if self.defence in GROUPS["afterwards"] else "defence"
        groups = [group for group, stems in GROUPS.items() if self.method in stems or self.stem in stems]
        return groups[0] if groups else _UNKNOWN[self.family]

    @property
    def order(self) -> tuple[int, int, str, float]:
        """Sort key of the method in tables."""
        stems = GROUPS[self.group]
        name = next((n for n in (self.method, self.defence) if n in stems), self.stem)
        place = stems.index(name) if name in stems else len(stems)
        return list(GROUPS).index(self.group), place, name, self.coefficient or 0.0


def percent(counts: tuple[int, int]) -> float:
    """100 x hits / total."""
    return 100.0 * counts[0] / counts[1]


def attacked_task(attack: str) -> str:
    """The task of "task=attack", or the attacked task of an off-task attack."""
    aimed = _ONTO.search(attack)
    return aimed[1] if aimed else attack.partition("=")[0]


@dataclass(frozen=True)
class Spread:
    """A number per seed.

    Attributes:
        values: seed -> number, without missing seeds.
        seeds: all seeds of the suite.
    """

    values: dict[int, float]
    seeds: tuple[int, ...]

    @property
    def missing(self) -> tuple[int, ...]:
        """Seeds without a number."""
        return tuple(seed for seed in self.seeds if seed not in self.values)

    @property
    def mean(self) -> float:
        """Mean over the seeds with a number; NaN without any."""
        return sum(self.values.values()) / len(self.values) if self.values else float("nan")

    @property
    def low(self) -> float:
        """Smallest number; NaN without any."""
        return min(self.values.values(), default=float("nan"))

    @property
    def high(self) -> float:
        """Largest number; NaN without any."""
        return max(self.values.values(), default=float("nan"))

    def text(self, digits: int = 1) -> str:
        """Format mean (smallest to largest), and the missing seeds if any."""
        if not self.values:
            return "missing"
        spread = f" ({_plain(self.low, digits)} to {_plain(self.high, digits)})" if len(self.values) > 1 else ""
        return _plain(self.mean, digits) + spread + self.gap()

    def gap(self) -> str:
        """Format the missing seeds as ", no seed 1, 2"; empty without any."""
        return f", no seed {', '.join(map(str, self.missing))}" if self.missing else ""


def _plain(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def read_runs(root: Path) -> list[Run]:
    """Read every run below `root`, sorted by path.

    Raises:
        DamError: no result, a file of another schema, or a file whose path contradicts its content.
    """
    paths = sorted(root.glob("*/*/*.json"), key=lambda p: p.relative_to(root).parts)
    if not paths:
        raise DamError(
            f"results in {root}",
            expected="SUITE/SCENARIO/METHOD-seedK.json",
            got="no such file",
            cure="Run the benchmark first, or name the folder with --root.",
        )
    return [_read(path) for path in paths]


def _read(path: Path) -> Run:
    try:
        run = Run.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        wanted = str(first["msg"]).removeprefix("Value error, ")
        raise DamError(
            f"{place} in {path}",
            expected=wanted,
            got=repr(first["input"])[:80],
            cure="Delete the file and run the benchmark again: it writes missing files.",
        ) from error
    except ValueError as error:
        raise DamError(
            str(path), expected="JSON", got=str(error), cure="Delete the file and run the benchmark again."
        ) from error
    folder, scenario, name = path.parts[-3:]
    wanted = f"{run.suite}/{run.scenario}/{run.method}-seed{run.seed}.json"
    if folder not in (run.suite, f"{run.suite}-{run.preset}") or wanted.split("/")[1:] != [scenario, name]:
        raise DamError(
            str(path),
            expected=f"the path {wanted} (or {run.suite}-{run.preset}/...)",
            got="/".join(path.parts[-3:]),
            cure="Move the file there, or delete it.",
        )
    return run
