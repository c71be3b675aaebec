"""Cache folder, digest of this package's code, and cached facts about large files, which are read only once.

A file counts as unchanged while its device, inode, size, time of change of content and time of change of the inode
are the same. The kernel sets the last of these and no program can, so a file that was rewritten and had its old date
restored is read again. This trusts the clock and the file system of this machine, and this user's cache folder, whose
masks are trusted anyhow. Damage to the medium that changes no date is found only by reading, which an empty cache
folder makes this package do.
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

from mergekit_dam.io.files import write_atomic

_CACHED_FROM = 1 << 24  # bytes: about 10 ms of hashing; a cache entry for a smaller file costs more than reading it
_MIN_AGE = 3.0  # seconds: a file that changed later than this before may change again within one tick of its dates
_WRITABLE_BY_OTHERS = 0o022
KNOWN = "known"  # folder of the cached facts
_PACKAGE = Path(__file__).parents[1]
# modules that learning cannot import (setup.cfg), so that they cannot change masks
_NOT_DIGESTED = ("__init__.py", "__main__.py", "api.py", "cli", "evaluation", "plugin", "publish", "recipe.py")


def cache_folder() -> Path:
    """Where learned masks are kept: MERGEKIT_DAM_CACHE, else ~/.cache/mergekit-dam."""
    # no shell expands ~ in an .env file, a Dockerfile or a CI setting
    return Path(os.environ.get("MERGEKIT_DAM_CACHE") or "~/.cache/mergekit-dam").expanduser()


@cache
def code_digest() -> str:
    """SHA-256 of the modules of this package that masks depend on; masks of other code are learned again.

    The version does not suffice: two working copies may share it, and it may not have been raised.
    """
    root, sha = _PACKAGE, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in _NOT_DIGESTED:
            sha.update(f"{name.as_posix()}\0".encode() + path.read_bytes())
    return sha.hexdigest()


def cached_fact(path: Path, fact: str, compute: Callable[[], str]) -> str:
    """Return `compute()` for the file at `path`, from the cache if the file is unchanged since an earlier run.

    Args:
        path: of a file; a link is followed.
        fact: name of the fact; it must name everything that the fact depends on beside the file.
        compute: reads the file and returns the fact. Its errors reach the caller, and nothing is cached then.
    """
    state = file_state(path)
    if state is None or state[2] < _CACHED_FROM:
        return compute()
    name = hashlib.sha256(f"{fact}\0{path.resolve()}".encode()).hexdigest()[:32]
    entry = cache_folder() / KNOWN / f"{name}.json"
    if (cached := _read_entry(entry, state)) is not None:
        return cached
    value = compute()
    old_enough = max(state[3:]) < time.time_ns() - _MIN_AGE * 1e9
    if old_enough and file_state(path) == state:
        _write_entry(entry, state, value)
    return value


def file_state(path: Path) -> tuple[int, int, int, int, int] | None:
    """Device, inode, size (bytes), and times of content and inode change (ns) of a file; None if it is missing."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _read_entry(entry: Path, state: tuple[int, ...]) -> str | None:
    """The cached fact; None if the entry is missing, damaged, of another file state, or writable by other users."""
    try:
        with entry.open(encoding="utf-8") as file:
            owner = os.fstat(file.fileno())
            if os.name == "posix" and (owner.st_uid != os.geteuid() or owner.st_mode & _WRITABLE_BY_OTHERS):
                return None
            values = json.load(file)
        return str(values["found"]) if tuple(values["state"]) == state else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write_entry(entry: Path, state: tuple[int, ...], value: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(entry, json.dumps({"state": state, "found": value}))
    except OSError:
        return  # a cache that cannot be written costs time only


_LIBRARIES = ("mergekit-dam", "mergekit", "torch", "transformers", "accelerate", "safetensors")


def library_versions() -> dict[str, str]:
    """Versions of Python and libraries, recorded beside the masks; only equal versions give bit-equal results."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
