"""Register the defences by name, with their settings in one place, also those of other packages.

An outside package registers a defence when it is imported; an entry point of the group `dam_bench.defences` names the
module to import, in every process of the benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dam_bench.defences.afterwards import FineTuned, MergedAgain, Quantised, Rescaled
from dam_bench.defences.averaging import WeightAveraging
from dam_bench.defences.base import Defence
from dam_bench.defences.consistency import Consistency
from dam_bench.defences.feature_path import FeaturePath
from dam_bench.defences.flushing import Flushing
from dam_bench.defences.latent import LatentAdversarial
from dam_bench.defences.masking import WeightMasking
from dam_bench.defences.pruning import FinePruning
from dam_bench.defences.switching import ModuleSwitching
from dam_bench.defences.unlearning import SharedUnlearning
from dam_bench.suites.base import Family
from mergekit_dam.config import parse
from mergekit_dam.errors import DamError
from mergekit_dam.registry import Registry

GROUP = "dam_bench.defences"
DEFENCES: Registry[type[Defence]] = Registry("defence", group=GROUP)

# Starting values: the papers' where their scale carries over, else of the size that `dam` and `clean` use. None has
# been chosen by a result; what is chosen later is chosen on seed 0 alone.
_START = "task_arithmetic-0.3"
_TUNED = {"start": _START, "steps": 100, "batch_size": 16, "learning_rate": 1e-4}
_TUNED_LM = {"start": _START, "steps": 100, "batch_size": 4, "learning_rate": 2e-4, "lora_rank": 8}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "wag": {"start": "linear"},
    "msd": {"start": "linear", "population": 50, "generations": 200, "candidates": 10, "mutation": 0.05},
    "fine-pruning": {**_TUNED, "share": 0.2, "last_blocks": 1},
    "awm": {**_TUNED, "learning_rate": 1e-2, "eps": 0.1, "inner_steps": 5, "beta": 0.5, "gamma": 1e-2},
    "sau": {**_TUNED, "eps": 0.1, "inner_steps": 5, "share": 0.01, "weight": 1.0},
    "lfpm": {**_TUNED, "eps": 0.1, "inner_steps": 5, "points": 3, "scale": 1.0},
    "crow": {**_TUNED_LM, "eps": 0.1, "alpha": 5.5},
    "beear": {**_TUNED_LM, "depth": 0.3, "radius": 0.5, "inner_steps": 5},
    "backflush": {**_TUNED, "steps": 200, "plant_steps": 100, "triggers": 6},
}
# What users do to a merge afterwards; `start` names the merge.
AFTERWARDS: Mapping[str, Mapping[str, Any]] = {
    "quantised": {},
    "fine-tuned-on": {**_TUNED, "steps": 200},
    "rescaled": {"factor": 2.0},
    "merged-again": {"by": "ties", "weight": 0.5, "density": 0.2},
}


def register_defence(name: str, defence: type[Defence]) -> None:
    """Have the benchmark run a defence as a method of this name.

    Args:
        name: a new one.
        defence: its fields are its settings; those without a default need an entry of SETTINGS.

    Raises:
        DamError: the name is taken.
    """
    DEFENCES.add(name, defence)


for _name, _defence in (
    ("wag", WeightAveraging),
    ("msd", ModuleSwitching),
    ("fine-pruning", FinePruning),
    ("awm", WeightMasking),
    ("sau", SharedUnlearning),
    ("lfpm", FeaturePath),
    ("crow", Consistency),
    ("beear", LatentAdversarial),
    ("backflush", Flushing),
    ("quantised", Quantised),
    ("fine-tuned-on", FineTuned),
    ("rescaled", Rescaled),
    ("merged-again", MergedAgain),
):
    register_defence(_name, _defence)


def defence_of(name: str, settings: Mapping[str, Any] | None = None) -> Defence:
    """Make a registered defence.

    Args:
        settings: in place of those of SETTINGS, of AFTERWARDS and of the class.

    Raises:
        DamError: an unknown name or setting, or a value that does not fit.
    """
    return parse(
        DEFENCES[name],
        {**SETTINGS.get(name, {}), **AFTERWARDS.get(name, {}), **(settings or {})},
        where=f"defence {name}",
    )


def require_suited(name: str, family: Family) -> None:
    """Refuse a defence for models that it cannot defend.

    Raises:
        DamError: with the defences that can.
    """
    names = {"image": "image classifiers", "text": "text classifiers", "causal": "causal language models"}
    suited = DEFENCES[name].families
    if family not in suited:
        others = [other for other, one in sorted(DEFENCES.entries.items()) if family in one.families]
        raise DamError(
            f"defence {name}",
            expected=" or ".join(names[one] for one in suited),
            got=names[family],
            cure=f"For them there are {', '.join(others)}.",
        )
