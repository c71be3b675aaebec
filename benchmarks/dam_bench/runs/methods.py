"""Define the merge methods that the benchmark compares, as mergekit recipes. T models.

All learned methods get the same calibration samples: baselines take 200 steps of 16 samples, `dam` 300 steps of 8 and
its scan. Baselines are settings of mergekit or of our own search, except the public DAM step, which fusion_bench's
classes perform in a separate environment. Rival defences are in `dam_bench.defences`, each a method of its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from dam_bench.defences.registry import DEFENCES, SETTINGS, defence_of
from dam_bench.suites.base import Suite
from mergekit_dam.config import DamConfig, parse
from mergekit_dam.constants import Constants
from mergekit_dam.errors import DamError, did_you_mean
from mergekit_dam.vaccine.settings import VaccineSettings

Family = Literal["reference", "baseline", "defence"]
COEFFICIENTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
LEARNED_STEPS = 100


@dataclass(frozen=True)
class Method:
    """A merge method: a row of the tables.

    Attributes:
        name: name in tables and file names.
        family: reference (no merge that a user would publish), baseline (no defence), or defence.
        merge_method: mergekit's name; None where the runner does the work (`base`, `fine-tuned`, fusion_bench).
        parameters: shared settings of the recipe, and constants of `dam` beside them (mergekit_dam/constants.py).
        passes: forward and backward passes of one batch per task, for the estimate of time.
        cleaned: settings of the vaccination of every input model before the merge; None merges the models themselves.
        defence: name of a rival defence, whose settings `parameters` then are; None of other methods.
    """

    name: str
    family: Family
    merge_method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 0
    cleaned: Mapping[str, Any] | None = None
    defence: str | None = None

    @property
    def learns(self) -> bool:
        """Whether the method learns a merge by `dam`."""
        return self.merge_method == "dam"

    def recipe(
        self,
        suite: Suite,
        base: Path,
        models: Mapping[str, Path],
        calibration: Mapping[str, Path],
        seed: int,
        folder: Path,
    ) -> dict[str, Any]:
        """Make the mergekit configuration; constants go to a file in `folder`.

        Args:
            suite: gives the recipe's entries for its kind of model.
            base: theta_0.
            models: task -> directory.
            calibration: task -> file; used by methods that learn.
            seed: of methods that learn.
            folder: for the file of constants; it is there.
        """
        entries: list[dict[str, Any]] = [{"model": str(path)} for path in models.values()]
        parameters = dict(self.parameters)
        if self.learns:
            for entry, (task, path) in zip(entries, models.items(), strict=True):
                entry["parameters"] = {"calibration": str(calibration[task]), **suite.model_parameters(path)}
            constants = {key: parameters.pop(key) for key in list(parameters) if key in Constants.model_fields}
            if constants:
                file = folder / "constants.json"
                file.write_text(json.dumps(constants, indent=1) + "\n", "utf-8")
                parameters["constants"] = str(file)
            parameters = {"seed": seed, **suite.shared_parameters(base), **parameters}
        config = {"merge_method": self.merge_method, "models": entries, "parameters": parameters, "dtype": "float32"}
        return config | {"base_model": suite.base_entry(base)}


def _mergekit() -> list[Method]:
    plain = [
        Method(f"task_arithmetic-{c}", "baseline", "task_arithmetic", {"weight": c, "normalize": False})
        for c in COEFFICIENTS
    ]
    # densities of the papers: TIES keeps 20 % (arXiv 2306.01708), DARE drops 80 % and rescales (arXiv 2311.03099)
    sparse = [
        Method(f"{m}-{c}", "baseline", m, {"weight": c, "normalize": False, "density": 0.2})
        for m in ("ties", "dare_ties")
        for c in (0.5, 1.0)
    ]
    return [
        *plain,
        *sparse,
        Method("model_stock", "baseline", "model_stock"),
        # the average of the bodies, since heads differ and are not merged: equal weights of the task vectors
        Method("linear", "baseline", "task_arithmetic", {"weight": 1.0, "normalize": True}),
    ]


def _learned() -> list[Method]:
    steps = {"objective": "paper", "steps": LEARNED_STEPS, "coefficient_steps": LEARNED_STEPS}
    adamerging = {"objective": "paper", "mask": "m1", "steps": 0, "coefficient_steps": 2 * LEARNED_STEPS}
    return [
        Method("adamerging", "baseline", "dam", adamerging, passes=2 * LEARNED_STEPS),
        Method("concrete", "baseline", "dam", {**steps, "mask": "m1"}, passes=4 * LEARNED_STEPS),
        Method("fusion_bench-dam", "defence", passes=6 * LEARNED_STEPS),
        Method("paper-m2", "defence", "dam", {**steps, "mask": "m2"}, passes=5 * LEARNED_STEPS),
        Method("paper-dual", "defence", "dam", {**steps, "mask": "dual"}, passes=5 * LEARNED_STEPS),
        Method("dam", "defence", "dam", {}, passes=8 * LEARNED_STEPS),
    ]


def _defended(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Make the method of a rival defence; its parameters are all its settings."""
    defence = defence_of(name, settings)
    return Method(name, "defence", parameters=defence.model_dump(), passes=defence.passes, defence=name)


# theta_0 with the heads of the tasks is a merge with coefficients of 0
REFERENCES = (
    Method("base", "reference", "task_arithmetic", {"weight": 0.0, "normalize": False}),
    Method("fine-tuned", "reference"),
)
METHODS: dict[str, Method] = {
    method.name: method for method in (*REFERENCES, *_mergekit(), *_learned(), *map(_defended, SETTINGS))
}
_CLEANED = re.compile(r"^clean(\((?P<settings>[^()]*)\))?\+(?P<method>.+)$")
_VARIANT = re.compile(r"^(?P<method>[\w.-]+)\((?P<settings>[^()]+)\)$")


def method_named(name: str) -> Method:
    """Return a method of METHODS, or a variant of a learned one, for ablations: `dam(mask=m1,alpha=2,pool_size=4)`.

    A defence is a method, also one of an outside package, with variants such as `crow(alpha=11,start=ties-0.5)`.

    `clean+NAME`, or `clean(plant=false,rounds=2)+NAME`, merges cleaned models by the method NAME.

    Raises:
        DamError: an unknown method, or what is no setting of a defence, nor a setting or constant of `dam`.
    """
    if cleaned := _CLEANED.match(name):
        settings = _settings_of(cleaned["settings"] or "")
        parse(VaccineSettings, settings, where=f"method {name}")
        return replace(method_named(cleaned["method"]), name=name, cleaned=settings)
    variant = _VARIANT.match(name)
    known = variant["method"] if variant else name
    if known in DEFENCES and (variant or known not in METHODS):
        method = replace(_defended(known, _settings_of(variant["settings"]) if variant else {}), name=name)
        start = method_named(str(method.parameters["start"]))
        if start.merge_method is None:
            raise DamError(
                f"setting 'start' in defence {known}",
                expected="a method that is a recipe of mergekit",
                got=start.name,
                cure="Start from, for example, task_arithmetic-0.3.",
            )
        return method
    if known not in METHODS or (variant and not METHODS[known].learns):
        raise DamError(
            "method",
            expected=f"one of {', '.join({**METHODS, **DEFENCES.entries})}, or a learned one or a defence as "
            "name(setting=value,...), constants included",
            got=repr(name),
            cure=did_you_mean(known, METHODS) or "Leave --method out to run all.",
        )
    if not variant:
        return METHODS[known]
    parameters = {**METHODS[known].parameters, **_settings_of(variant["settings"])}
    where = f"method {name}"
    constants = {key: value for key, value in parameters.items() if key in Constants.model_fields}
    parse(DamConfig, {key: value for key, value in parameters.items() if key not in constants}, where=where)
    parse(Constants, constants, where=where)
    return replace(METHODS[known], name=name, parameters=parameters)


def _settings_of(text: str) -> dict[str, Any]:
    """Read `name=value,...`, values as YAML."""
    pairs = (part.partition("=") for part in text.split(",") if part.strip())
    return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


GATES = tuple(name for name in METHODS if name in ("base", "fine-tuned") or name.startswith("task_arithmetic"))
