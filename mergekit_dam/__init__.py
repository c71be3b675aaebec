"""Defense-Aware Merging for mergekit: merge fine-tuned models without merging a backdoor."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_dam.api import clean as clean
    from mergekit_dam.api import learn_masks as learn_masks
    from mergekit_dam.api import merge as merge
    from mergekit_dam.errors import DamError as DamError
    from mergekit_dam.models.load_merged import load_merged as load_merged

__version__ = "0.1.0"
# name -> its module: imported on first use, since the autoload hook imports this package and that must stay cheap
_EXPORTS = {
    "DamError": "errors",
    "clean": "api",
    "learn_masks": "api",
    "load_merged": "models.load_merged",
    "merge": "api",
}
__all__ = ["DamError", "clean", "learn_masks", "load_merged", "merge"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
