"""Defense-Aware Merging for mergekit: merge fine-tuned models without merging a backdoor."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_dam.api import audit as audit
    from mergekit_dam.api import clean as clean
    from mergekit_dam.api import learn_masks as learn_masks
    from mergekit_dam.api import merge as merge
    from mergekit_dam.errors import DamError as DamError
    from mergekit_dam.learn.objectives import register_objective as register_objective
    from mergekit_dam.models.families import register_family as register_family
    from mergekit_dam.models.load_merged import load_merged as load_merged
    from mergekit_dam.scan.scanner import register_scanner as register_scanner
    from mergekit_dam.scan.triggers import register_trigger as register_trigger
    from mergekit_dam.tasks import register_task as register_task
    from mergekit_dam.vaccine.triggers import register_planted as register_planted

__version__ = "0.1.0"
# name -> module, imported on first use: the autoload hook imports this package, which must stay fast
_EXPORTS = {
    "DamError": "errors",
    "audit": "api",
    "clean": "api",
    "learn_masks": "api",
    "load_merged": "models.load_merged",
    "merge": "api",
    "register_family": "models.families",
    "register_objective": "learn.objectives",
    "register_planted": "vaccine.triggers",
    "register_scanner": "scan.scanner",
    "register_task": "tasks",
    "register_trigger": "scan.triggers",
}
__all__ = [
    "DamError",
    "audit",
    "clean",
    "learn_masks",
    "load_merged",
    "merge",
    "register_family",
    "register_objective",
    "register_planted",
    "register_scanner",
    "register_task",
    "register_trigger",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
