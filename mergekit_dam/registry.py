"""Register objectives, tasks, scanners and kinds of triggers by name, also those of other packages.

A package registers its entries when it is imported. An entry point of the group `mergekit_dam.plugins` names the module
to import; every process that merges or learns imports it, worker processes included.
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
def load_plugins(group: str) -> None:
    """Import the plugin modules of a group of all installed packages, once; log and skip a plugin that fails."""
    for plugin in entry_points(group=group):
        try:
            plugin.load()
        except Exception as error:  # a plugin may raise anything
            LOG.warning("dam: the plugin %r (%s) is left out: %s", plugin.name, plugin.value, first_line(error))


class Registry(Generic[Entry]):
    """Entries of one kind by name.

    Args:
        what: the kind of entry, for messages, e.g. "objective".
        reserved: names that this package registers later, when their modules are imported.
        group: group of the entry points whose modules register further entries.

    Attributes:
        entries: registered entries by name.
    """

    def __init__(self, what: str, reserved: Iterable[str] = (), *, group: str = PLUGINS) -> None:
        self.what, self._reserved, self._group = what, tuple(reserved), group
        self.entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register an entry; the same entry may be registered twice.

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
                got=f"a name that is taken by {'mergekit-dam' if known is None else _described(known)}",
                cure="Register yours under another name.",
            )
        self.entries[name] = entry

    def names(self) -> list[str]:
        """Return all names, those of plugins included."""
        load_plugins(self._group)
        return sorted({*self._reserved, *self.entries})

    def get(self, name: str) -> Entry | None:
        """Return the entry of a name; None for an unknown name."""
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
        """Return `code_of` the entry of this name; None for a reserved name whose module is not imported yet."""
        return code_of(self.entries[name]) if name in self.entries else None


def code_of(entry: Any) -> str | None:
    """Return the SHA-256 (hex) of the code of a plugin's class or function, for cache keys; None for this package's.

    The code is the module's file, and for a package all modules of its folder. Without a file, as in a notebook, only
    the name is hashed.
    """
    if _is_ours(entry):
        return None
    digest = hashlib.sha256(_described(entry).encode())
    module = sys.modules.get(entry.__module__)
    file = getattr(module, "__file__", None)
    if file is not None:
        folder = Path(file).parent
        for path in sorted(folder.rglob("*.py")) if getattr(module, "__package__", "") else [Path(file)]:
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_ours(entry: Any) -> bool:
    return str(entry.__module__).startswith("mergekit_dam.")


def _described(entry: Any) -> str:
    return f"{entry.__module__}.{getattr(entry, '__qualname__', type(entry).__qualname__)}"


OBJECTIVES: Registry[Any] = Registry("objective", ("inversion", "paper"))  # searches for masks, see learn/objectives.py
TASKS: Registry[Any] = Registry("task of model_type")  # see tasks/__init__.py
SCANNERS: Registry[Any] = Registry("scanner")  # see scan/scanner.py
TRIGGERS: Registry[Any] = Registry("kind of triggers")  # see scan/triggers.py
PLANTED: Registry[Any] = Registry("kind of planted triggers")  # see vaccine/triggers.py
