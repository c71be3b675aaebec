"""Protect the output directory: one merge writes to it at a time, and an unfinished output does not look finished.

mergekit writes shards, renames them, and saves config.json last, so a directory with a config.json counts as a model.
Therefore an older config.json is removed before a merge writes its first file. The lock is the kernel's (flock): it
ends with the process, however the process ends.
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

from mergekit_dam.artifact.folder import AUDIT_HTML, AUDIT_JSON, AUDIT_TRIGGERS, copy_artifact
from mergekit_dam.errors import DamError
from mergekit_dam.io.files import cannot_write
from mergekit_dam.io.untrusted import require_no_links_out

FOLDER = "dam"  # folder in the output for masks, metrics and heads
LOCK_FILE = ".lock"
# names that mergekit gives finished shards; before that a shard is called model-1.safetensors
_WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# files that transformers, tokenizers and peft read beside the weights; an older model's files must not stay
_TOKENIZER_FILES = re.compile(
    r"adapter_.*|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\..*"
    r"|generation_config\.json|(video_)?(pre)?processor_config\.json|.*\.model|pytorch_model.*"
)


def silence_tokenizer_warning(until: Any) -> None:
    """Drop mergekit's log record, with a traceback, of a tokenizer that it could not copy because there is none.

    Args:
        until: an object that lives as long as the merge; then the filter is removed.
    """
    alive = weakref.ref(until)

    def drop(record: logging.LogRecord) -> bool:
        is_running = alive() is not None
        if not is_running:
            logger.removeFilter(drop)
        return not (is_running and str(record.msg).startswith("Failed to copy tokenizer"))

    logger = logging.getLogger("mergekit.merge")
    logger.addFilter(drop)
    weakref.finalize(until, logger.removeFilter, drop)


class OutputLocks:
    """Locks on the outputs that merges of this process write to."""

    def __init__(self) -> None:
        self._held: dict[Path, tuple[FileLock, int]] = {}
        self._guard = threading.RLock()  # a finalizer may release a lock while this thread claims another

    def claim(self, out_path: Path, inputs: Iterable[Path], *, until: Any) -> None:
        """Lock the output for this merge, until the object `until`, which lives as long as the merge, is deleted.

        Raises:
            DamError: another merge writes there, a link in it leads elsewhere, or the output is an input.
        """
        for path in inputs:
            if path.resolve() == out_path.resolve():
                raise DamError(
                    f"output {out_path}",
                    expected="a directory of its own",
                    got="a model that is merged",
                    cure="Choose another output directory: this one would be overwritten while it is read.",
                )
        require_no_links_out(out_path)
        path = out_path.resolve() / FOLDER / LOCK_FILE
        with self._guard:
            earlier = self._held.get(path)
            if earlier is not None and earlier[1] == threading.get_ident():
                self._release(path, earlier[0])  # a thread runs one merge at a time, so the earlier merge is over
            lock = FileLock(path, thread_local=False)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=False)
            except Timeout as error:
                raise DamError(
                    f"output {out_path}",
                    expected="no other merge that writes there",
                    got="a running merge",
                    cure="Wait until it ends, or choose another output directory.",
                ) from error
            except OSError as error:
                raise cannot_write(out_path, error) from error
            self._held[path] = lock, threading.get_ident()
        weakref.finalize(until, self.release, path, lock)

    def release(self, path: Path, lock: FileLock) -> None:
        """Unlock the output, if this merge still holds it."""
        with self._guard:
            self._release(path, lock)

    def _release(self, path: Path, lock: FileLock) -> None:
        if path in self._held and self._held[path][0] is lock:
            del self._held[path]
        lock.release(force=True)


def place_artifact(folder: Path, out_path: Path) -> None:
    """Copy masks, metrics and heads into the folder `dam` of the output, and remove an older output.

    The older config.json is removed first, then weights, tokenizer and adapter: beside new files they would be loaded,
    too. mergekit reads weights of the directory's top level only.

    Args:
        folder: folder of the artefact.
        out_path: mergekit's output directory.

    Raises:
        DamError: no space, or no permission to write.
    """
    target = out_path / FOLDER
    try:
        (out_path / "config.json").unlink(missing_ok=True)
        for file in _model_files(out_path):
            file.unlink()
        for name in (AUDIT_JSON, AUDIT_HTML, AUDIT_TRIGGERS):  # a scan of the older merge
            (target / name).unlink(missing_ok=True)
        if folder.resolve() == target.resolve():
            return
        for stale in (f for name in ("", "heads/", "figures/") for f in target.glob(f"{name}.*.tmp")):
            stale.unlink()  # of a killed run; no other run writes here, since this merge holds the lock
        copy_artifact(folder, target)
    except OSError as error:
        raise cannot_write(out_path, error) from error


@contextmanager
def remove_stale_files(out_path: Path) -> Iterator[None]:
    """Remove an older model's files from the output that the merge in this context did not replace.

    Files are also made writable for their owner: mergekit copies files with their mode, and ignores that it cannot
    overwrite a read-only file.

    Raises:
        DamError: no permission to write.
    """
    try:
        before = {file: _stamp(file) for file in _model_files(out_path)}
        _make_writable(out_path)
    except OSError as error:
        raise cannot_write(out_path, error) from error
    yield
    try:
        for file, stamp in before.items():
            if file.exists() and _stamp(file) == stamp:
                file.unlink()
        _make_writable(out_path)
    except OSError as error:
        raise cannot_write(out_path, error) from error


def _model_files(out_path: Path) -> list[Path]:
    """List the weight, tokenizer and adapter files in an output."""
    files = [file for file in out_path.iterdir() if file.is_file() or file.is_symlink()] if out_path.is_dir() else []
    return [file for file in files if _WEIGHT_FILES.fullmatch(file.name) or _TOKENIZER_FILES.fullmatch(file.name)]


def _stamp(file: Path) -> tuple[int, int, int]:
    """Return inode, size and time of a file, which differ once it is rewritten."""
    status = file.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _make_writable(out_path: Path) -> None:
    """Let the owner write the model files in an output."""
    for file in _model_files(out_path):
        if not file.is_symlink() and not (mode := file.stat().st_mode) & stat.S_IWUSR:
            file.chmod(stat.S_IMODE(mode) | stat.S_IWUSR)
