"""The setting `objective`: which search for masks it stands for, and how others register theirs."""

from __future__ import annotations

from mergekit_dam.config import DamConfig
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.paper_search import PaperSearch
from mergekit_dam.learn.search import MaskSearch
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.registry import OBJECTIVES


def register_objective(name: str, search: type[MaskSearch]) -> None:
    """Let recipes name a search for masks in the setting `objective`.

    Args:
        name: a new one.
        search: a subclass of `MaskSearch`, such as `InversionSearch` with one step changed.

    Raises:
        DamError: the name is taken.
    """
    OBJECTIVES.add(name, search)


register_objective("inversion", InversionSearch)
register_objective("paper", PaperSearch)


def search_of(config: DamConfig) -> type[MaskSearch]:
    """The class that learns the masks by these settings.

    Raises:
        DamError: an objective that is not registered in this process.
    """
    if config.objective == "inversion" and isinstance(config.window, int):
        return WindowSearch
    found: type[MaskSearch] = OBJECTIVES[config.objective]
    return found


def scans(config: DamConfig) -> bool:
    """Whether the objective scans the models for backdoors before it learns masks."""
    return search_of(config).scans
