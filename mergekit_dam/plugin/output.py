"""The output directory: one merge writes to it at a time, and what is half written does not look finished.

mergekit writes shards, renames them, and saves config.json last, so a directory with a config.json counts as a model.
Before a merge puts its first file over an older output, that older config.json is therefore taken away. The lock is
the kernel's (flock): it ends with the process, however that ends.
"""

from __future__ import annotations

import logging
import re
import stat
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
# what transformers, tokenizers and peft read beside the weights: an older model's would be taken for the new one's
_BESIDE = re.compile(
    r"adapter_.*|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\..*"
    r"|generation_config\.json|(video_)?(pre)?processor_config\.json|.*\.model|pytorch_model.*"
)


def expect_no_tokenizer(until: Any) -> None:
    """Let mergekit not report, with a traceback, that it could not copy a tokenizer that is known not to be there.

    Args:
        until: an object that lives as long as the merge; other merges, and other records, are left alone.
    """
    alive = weakref.ref(until)

    def drop(record: logging.LogRecord) -> bool:
        there = alive() is not None
        if not there:
            logger.removeFilter(drop)
        return not (there and str(record.msg).startswith("Failed to copy tokenizer"))

    logger = logging.getLogger("mergekit.merge")
    logger.addFilter(drop)
    weakref.finalize(until, logger.removeFilter, drop)


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
                    f"output {out_path}",
                    expected="a directory of its own",
                    got="one of the models that are merged",
                    cure="Choose another output directory: this one would be overwritten while it is read.",
                )
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
                    f"output {out_path}",
                    expected="no other merge that writes there",
                    got="one under way",
                    cure="Wait until it ends, or choose another output directory.",
                ) from error
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

    From here on an older output is replaced, so its config.json goes first, and then its weights, tokenizer and
    adapter: left beside new ones they would be loaded instead, or on top.

    Args:
        folder: where they were learned.
        out_path: mergekit's output directory.

    Raises:
        DamError: no space, or no right to write.
    """
    target = out_path / FOLDER
    try:
        (out_path / "config.json").unlink(missing_ok=True)
        for file in _of_a_model(out_path):
            file.unlink()
        if folder.resolve() == target.resolve():
            return
        for stale in (f for name in ("", "heads/", "figures/") for f in target.glob(f"{name}.*.tmp")):
            stale.unlink()  # of a run that was killed; no other run is here, since this one holds the lock
        copy_artifact(folder, target)
    except OSError as error:
        raise cannot_write(out_path, error) from error


@contextmanager
def replaced_whole(out_path: Path) -> Iterator[None]:
    """What an older model left in the output and the merge in this block did not write is gone afterwards.

    mergekit copies files with their mode, and fails quietly at one that is read-only, so their owner can write them.

    Raises:
        DamError: no right to write.
    """
    try:
        before = {file: _stamp(file) for file in _of_a_model(out_path)}
        _let_write(out_path)
    except OSError as error:
        raise cannot_write(out_path, error) from error
    yield
    try:
        for file, stamp in before.items():
            if file.exists() and _stamp(file) == stamp:
                file.unlink()
        _let_write(out_path)
    except OSError as error:
        raise cannot_write(out_path, error) from error


def _of_a_model(out_path: Path) -> list[Path]:
    files = [file for file in out_path.iterdir() if file.is_file() or file.is_symlink()] if out_path.is_dir() else []
    return [file for file in files if _FINISHED.fullmatch(file.name) or _BESIDE.fullmatch(file.name)]


def _stamp(file: Path) -> tuple[int, int, int]:
    found = file.lstat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _let_write(out_path: Path) -> None:
    for file in _of_a_model(out_path):
        if not file.is_symlink() and not (mode := file.stat().st_mode) & stat.S_IWUSR:
            file.chmod(stat.S_IMODE(mode) | stat.S_IWUSR)


def cannot_write(where: Path, error: Exception) -> DamError:
    """No space, no right or a broken disk, as one line."""
    return DamError(
        f"output {where}",
        expected="a folder that can be written",
        got=str(error) or type(error).__name__,
        cure="Free space or choose another directory, and run again: nothing half written is used.",
    )
