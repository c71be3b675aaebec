"""Map the setting `objective` to a search for masks, and register searches of plugins."""

from __future__ import annotations

from mergekit_dam.config import DamConfig
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.paper_search import PaperSearch
from mergekit_dam.learn.search import MaskSearch
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.registry import OBJECTIVES


def register_objective(name: str, search: type[MaskSearch]) -> None:
    """Register a search for masks under a name of the setting `objective`.

    Args:
        name: a name that is not taken.
        search: a subclass of `MaskSearch`, such as `InversionSearch` with one step changed.

    Raises:
        DamError: the name is taken.
    """
    OBJECTIVES.add(name, search)


register_objective("inversion", InversionSearch)
register_objective("paper", PaperSearch)


def search_class(config: DamConfig) -> type[MaskSearch]:
    """Return the class that learns masks with these settings.

    Raises:
        DamError: no search of this name is registered in this process.
    """
    if config.objective == "inversion" and isinstance(config.window, int):
        return WindowSearch
    registered: type[MaskSearch] = OBJECTIVES[config.objective]
    return registered


def scans(config: DamConfig) -> bool:
    """Whether the objective scans the models for backdoors before it learns masks."""
    return search_class(config).scans
