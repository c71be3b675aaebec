"""The output directory: one merge writes to it at a time, and what is half written does not look finished.

mergekit writes shards, renames them, and saves config.json last, so a directory with a config.json counts as a model.
Before a merge puts its first file over an older output, that older config.json is therefore taken away. The lock is
the kernel's (flock): it ends with the process, however that ends.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mergekit_dam.artifact.folder import copy_artifact
from mergekit_dam.errors import DamError
from mergekit_dam.io.untrusted import require_no_links_out

FOLDER = "dam"  # of masks, metrics and heads below the output
LOCK_FILE = ".lock"
# names that mergekit gives at the very end; shards under way are called model-1.safetensors
_FINISHED = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class OutputLocks:
    """The outputs that merges of this process write to."""

    def __init__(self) -> None:
        self._held: dict[Path, tuple[FileLock, int]] = {}
        self._guard = threading.Lock()

    def claim(self, out_path: Path, inputs: Iterable[Path], *, until: Any) -> None:
        """Take the output for this merge, until `until` (an object that lives as long as the merge) is gone.

        Raises:
            DamError: another merge writes there, a link in it leads elsewhere, or it is one of the inputs.
        """
        for path in inputs:
            if path.resolve() == out_path.resolve():
                raise DamError(
                    f"output {out_path}", expected="a directory of its own", got="one of the models that are merged",
                    cure="Choose another output directory: this one would be overwritten while it is read.",
                )  # fmt: skip
        require_no_links_out(out_path)
        path = out_path.resolve() / FOLDER / LOCK_FILE
        with self._guard:
            earlier = self._held.get(path)
            if earlier is not None and earlier[1] == threading.get_ident():
                self._release(path, earlier[0])  # this thread is here again, so its earlier merge is over
            lock = FileLock(path, thread_local=False)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=False)
            except Timeout as error:
                raise DamError(
                    f"output {out_path}", expected="no other merge that writes there", got="one under way",
                    cure="Wait until it ends, or choose another output directory.",
                ) from error  # fmt: skip
            except OSError as error:
                raise cannot_write(out_path, error) from error
            self._held[path] = lock, threading.get_ident()
        weakref.finalize(until, self.release, path, lock)

    def release(self, path: Path, lock: FileLock) -> None:
        """Give the output back, if it still is this merge's."""
        with self._guard:
            self._release(path, lock)

    def _release(self, path: Path, lock: FileLock) -> None:
        if path in self._held and self._held[path][0] is lock:
            del self._held[path]
        lock.release(force=True)


def keep(folder: Path, out_path: Path) -> None:
    """Masks, metrics and heads beside the output; mergekit reads only the directory's top level as weights.

    From here on an older output is replaced, so its config.json goes first, and then its weights: left beside new
    ones in other shards they would be loaded instead.

    Args:
        folder: where they were learned.
        out_path: mergekit's output directory.

    Raises:
        DamError: no space, or no right to write.
    """
    target = out_path / FOLDER
    try:
        (out_path / "config.json").unlink(missing_ok=True)
        for file in out_path.glob("model*.safetensors*") if out_path.is_dir() else ():
            if _FINISHED.fullmatch(file.name):
                file.unlink()
        if folder.resolve() == target.resolve():
            return
        for stale in (f for name in ("", "heads/", "figures/") for f in target.glob(f"{name}.*.tmp")):
            stale.unlink()  # of a run that was killed; no other run is here, since this one holds the lock
        copy_artifact(folder, target)
    except OSError as error:
        raise cannot_write(out_path, error) from error


def cannot_write(where: Path, error: Exception) -> DamError:
    """No space, no right or a broken disk, as one line."""
    return DamError(
        f"output {where}", expected="a folder that can be written", got=str(error) or type(error).__name__,
        cure="Free space or choose another directory, and run again: nothing half written is used.",
    )  # fmt: skip
