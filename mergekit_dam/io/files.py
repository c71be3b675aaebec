"""Write files atomically, lock the report of a merge, and check that folders are private."""

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
    """Yield a temporary file beside `target`, and replace `target` by it when the block ends without error.

    The file is flushed to the disk first. Its name is random, so that nobody can prepare a link there; a link at
    `target` is replaced, not followed. A killed process leaves a file `.<target's name>.*.tmp`.

    Raises:
        OSError: no space, or no right to write; `target` is then unchanged.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        flush(temporary)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; the other files of a model are not
        os.replace(temporary, target)
        flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(target: Path, content: str | bytes) -> None:
    """Write a file so that it has either its old content or the whole new content (text as UTF-8).

    Raises:
        OSError: see `replacing`.
    """
    with replacing(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    if os.name != "posix" and path.is_dir():
        return  # such systems cannot open folders, and need no flush
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_readable_file(path: Path, subject: str) -> bool:
    """Whether the path is a file that this user may read; False for a text too long for a file's name.

    Raises:
        DamError: the file exists, or may exist, and the right to read it is missing.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except PermissionError as error:
        raise permission_denied(f"{subject} ({path})") from error
    except (OSError, ValueError):
        return False
    if is_file and not os.access(path, os.R_OK):
        raise permission_denied(f"{subject} ({path})")
    return is_file


def report_lock(folder: Path) -> FileLock:
    """The lock that a process holds while it changes the report and measurements beside a merge."""
    return FileLock(folder / _LOCK)


def require_own(folder: Path, cure: str) -> None:
    """Refuse a folder of trusted files that is a link, or that another user may write to.

    Root's folders are accepted for all users, and root may use any user's folder (containers).

    Raises:
        DamError: the folder is a link, belongs to another user, or all users may write to it.
    """
    if os.name != "posix":
        return
    status, user = folder.lstat(), os.geteuid()
    if stat.S_ISLNK(status.st_mode):
        got = "a link"
    elif user != 0 and status.st_uid not in (user, 0):
        got = f"a folder of user {status.st_uid}"
    elif status.st_mode & stat.S_IWOTH:
        got = "a folder that all users may write to"
    else:
        return
    raise DamError(f"folder {folder}", expected="a folder that only you can write to", got=got, cure=cure)


def cannot_write(where: Path, error: Exception) -> DamError:
    """Return the error for an output that cannot be written: no space, no permission or a broken disk."""
    return DamError(
        f"output {where}",
        expected="a folder that can be written",
        got=str(error) or type(error).__name__,
        cure="Free space or choose another directory, and run again: no unfinished file is used.",
    )
