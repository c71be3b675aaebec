"""The names of objectives, tasks, scanners and kinds of triggers, to which other packages add theirs.

A package adds its own where it is imported. An entry point of the group `mergekit_dam.plugins` names its module; that
module is then imported in every process that merges or learns, worker processes included.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from mergekit_dam.errors import DamError, did_you_mean, first_line

LOG = logging.getLogger(__name__)
PLUGINS = "mergekit_dam.plugins"
Entry = TypeVar("Entry")


@cache
def load_plugins() -> None:
    """Import every module that an installed package names as a plugin, once; one that fails is told and left out."""
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:  # whatever the author of a plugin wrote
            LOG.warning("dam: the plugin %r (%s) is left out: %s", plugin.name, plugin.value, first_line(error))


class Registry(Generic[Entry]):
    """Entries of one sort by name.

    Args:
        what: one entry, for messages, e.g. "objective".
        reserved: names that this package fills in later, once their modules are imported.

    Attributes:
        entries: what is registered so far.
    """

    def __init__(self, what: str, reserved: Iterable[str] = ()) -> None:
        self.what, self._reserved = what, tuple(reserved)
        self.entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register an entry; the same one may come again.

        Raises:
            DamError: the name is taken.
        """
        known = self.entries.get(name)
        if known is entry:
            return
        if known is not None or (name in self._reserved and not _is_ours(entry)):
            raise DamError(
                f"{self.what} {name!r}",
                expected="a new name",
                got=f"one that is taken by {'mergekit-dam' if known is None else _described(known)}",
                cure="Register yours under another name.",
            )
        self.entries[name] = entry

    def names(self) -> list[str]:
        """All names, those of plugins included."""
        load_plugins()
        return sorted({*self._reserved, *self.entries})

    def get(self, name: str) -> Entry | None:
        """The entry of a name; None for an unknown one."""
        if name not in self:
            return None
        return self[name]

    def __contains__(self, name: str) -> bool:
        return name in self.entries or name in self._reserved or name in self.names()

    def require(self, name: str) -> None:
        """Refuse an unknown name.

        Raises:
            DamError: with the nearest known name.
        """
        if name not in self:
            raise DamError(
                f"{self.what} {name!r}",
                expected=f"one of {', '.join(self.names())}",
                got="an unknown name",
                cure=did_you_mean(name, self.names())
                or "Import the module that registers it. Worker processes import plugins alone (docs/extending.md).",
            )

    def __getitem__(self, name: str) -> Entry:
        self.require(name)
        return self.entries[name]

    def code_of(self, name: str) -> str | None:
        """`code_of` the entry of this name; None for a name of ours whose module is not imported yet."""
        return code_of(self.entries[name]) if name in self.entries else None


def code_of(entry: Any) -> str | None:
    """SHA-256 (hex) of the code behind a class or function of another package, for cache keys; None for our own.

    The code is the module's file, in a package all modules of its folder. What has no file, as in a notebook, counts by
    its name alone.
    """
    if _is_ours(entry):
        return None
    found = hashlib.sha256(_described(entry).encode())
    module = sys.modules.get(entry.__module__)
    file = getattr(module, "__file__", None)
    if file is not None:
        folder = Path(file).parent
        for path in sorted(folder.rglob("*.py")) if getattr(module, "__package__", "") else [Path(file)]:
            found.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _is_ours(entry: Any) -> bool:
    return str(entry.__module__).startswith("mergekit_dam.")


def _described(entry: Any) -> str:
    return f"{entry.__module__}.{getattr(entry, '__qualname__', type(entry).__qualname__)}"


OBJECTIVES: Registry[Any] = Registry("objective", ("inversion", "paper"))  # searches for masks, see learn/objectives.py
TASKS: Registry[Any] = Registry("task of model_type")  # see tasks/__init__.py
SCANNERS: Registry[Any] = Registry("scanner")  # see scan/scanner.py
TRIGGERS: Registry[Any] = Registry("kind of triggers")  # see scan/triggers.py
PLANTED: Registry[Any] = Registry("kind of planted triggers")  # see vaccine/triggers.py
