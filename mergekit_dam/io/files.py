"""Files that are complete under their name or not there, and folders that nobody else can write to."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from mergekit_dam.errors import DamError, permission_denied

_LOCK = ".report.lock"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside `target`, to be written in the block; when that ends well, it takes the target's place.

    It is flushed to the disk first. Its name cannot be foretold, so no link can lie in wait for it; a link at
    `target` is replaced, not followed. What a killed process leaves behind is called `.<target's name>.*.tmp`.

    Raises:
        OSError: no space, or no right to write; `target` is then as it was.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        flush(temporary)
        os.chmod(temporary, 0o644)  # mkstemp makes it private, other files of a model are not
        os.replace(temporary, target)
        flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(target: Path, content: str | bytes) -> None:
    """Replace a file by this content (a text in UTF-8).

    Raises:
        OSError: see `replacing`.
    """
    with replacing(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, are on the disk afterwards."""
    if os.name != "posix" and path.is_dir():
        return  # such systems cannot open folders, and need not
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_readable_file(path: Path, subject: str) -> bool:
    """Whether a file is there that this user may read; a text too long for a file's name is none.

    Raises:
        DamError: it is there, or may be, and the right to read it is missing.
    """
    try:
        found = stat.S_ISREG(path.stat().st_mode)
    except PermissionError as error:
        raise permission_denied(f"{subject} ({path})") from error
    except (OSError, ValueError):
        return False
    if found and not os.access(path, os.R_OK):
        raise permission_denied(f"{subject} ({path})")
    return found


def writing_facts(folder: Path) -> FileLock:
    """One at a time changes the report and the measurements beside a merge; the lock ends with the process."""
    return FileLock(folder / _LOCK)


def require_own(folder: Path, cure: str) -> None:
    """Refuse a folder of believed files in which another user may put some, or that is a link.

    Root's own folders are fine for all, and root itself works in folders of others (containers).

    Raises:
        DamError: it belongs to another user, or all users may write to it.
    """
    if os.name != "posix":
        return
    found, user = folder.lstat(), os.geteuid()
    if stat.S_ISLNK(found.st_mode):
        got = "a link"
    elif user != 0 and found.st_uid not in (user, 0):
        got = f"one of user {found.st_uid}"
    elif found.st_mode & stat.S_IWOTH:
        got = "one that all users may write to"
    else:
        return
    raise DamError(f"folder {folder}", expected="one that only you can write to", got=got, cure=cure)
