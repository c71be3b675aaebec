"""The cache folder, whose code its masks are of, and what was found out about large files, to be read only once.

A file counts as unchanged while its device, inode, size, time of change of content and time of change of the inode
are the same. The last one is the kernel's own and cannot be set by a program, so a file that was rewritten and had
its old date put back is read again. What remains trusted: the clock and the file system of this machine, and this
user's cache folder, whose masks are trusted anyhow. Damage to the medium that changes no date is found only by
reading, which an empty cache folder makes this package do.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mergekit_dam.io.files import write_whole

_LARGE = 1 << 24  # bytes: about 10 ms of hashing; to remember a smaller file takes longer than to read it
_SETTLED = 3.0  # seconds: a file that changed later than this before may change again within one tick of its dates
_OTHERS_WRITE = 0o022
KNOWN = "known"  # folder of what was found out
_PACKAGE = Path(__file__).parents[1]
# what learning cannot import (setup.cfg), and so has no part in masks
_NO_PART = ("__init__.py", "__main__.py", "api.py", "cli", "evaluation", "plugin", "publish", "recipe.py")


def cache_folder() -> Path:
    """Where learned masks are kept: MERGEKIT_DAM_CACHE, else ~/.cache/mergekit-dam."""
    # no shell expands ~ in an .env file, a Dockerfile or a CI setting
    return Path(os.environ.get("MERGEKIT_DAM_CACHE") or "~/.cache/mergekit-dam").expanduser()


@cache
def code_digest() -> str:
    """SHA-256 of the modules of this package that have a part in masks: what other code learned is learned again.

    The version would not tell one working copy from another, nor who forgot to raise it.
    """
    root, found = _PACKAGE, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in _NO_PART:
            found.update(f"{name.as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()


def found_out(path: Path, what: str, find: Callable[[], str]) -> str:
    """`find()`, which reads the file at `path`; or what it returned for this very file in an earlier run.

    Args:
        path: of a file; a link is followed.
        what: which fact `find` is for; it must name all that the fact depends on beside the file.
        find: reads the file and returns the fact. What it raises goes on to the caller, and nothing is remembered.
    """
    state = file_state(path)
    if state is None or state[2] < _LARGE:
        return find()
    name = hashlib.sha256(f"{what}\0{path.resolve()}".encode()).hexdigest()[:32]
    entry = cache_folder() / KNOWN / f"{name}.json"
    if (known := _recall(entry, state)) is not None:
        return known
    found = find()
    settled = max(state[3:]) < time.time_ns() - _SETTLED * 1e9
    if settled and file_state(path) == state:
        _remember(entry, state, found)
    return found


def file_state(path: Path) -> tuple[int, int, int, int, int] | None:
    """Device, inode, bytes, and dates of content and of inode (ns) of the file at `path`; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _recall(entry: Path, state: tuple[int, ...]) -> str | None:
    """Nothing where there is no entry, one of another state, one that others could have written, or a broken one."""
    try:
        with entry.open(encoding="utf-8") as file:
            owner = os.fstat(file.fileno())
            if os.name == "posix" and (owner.st_uid != os.geteuid() or owner.st_mode & _OTHERS_WRITE):
                return None
            values = json.load(file)
        return str(values["found"]) if tuple(values["state"]) == state else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _remember(entry: Path, state: tuple[int, ...], found: str) -> None:
    """A cache that cannot be written costs time only."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_whole(entry, json.dumps({"state": state, "found": found}))
    except OSError:
        return


_LIBRARIES = ("mergekit-dam", "mergekit", "torch", "transformers", "accelerate", "safetensors")


def library_versions() -> dict[str, str]:
    """Versions recorded beside the masks; results are bit-equal only for equal ones."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
