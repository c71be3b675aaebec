"""Translate errors of libraries into one-line `DamError`s; commands do it only here.

Expected faults are refused where they arise, each with its cure. This module handles all other errors. An error of a
library is most likely a fault in its input or in the environment, so it is reported without a traceback. An error of
this package's own code is a bug, and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.hub_client import hub_cause, hub_error

TRACEBACK = "MERGEKIT_DAM_TRACEBACK"  # if set, errors of libraries keep their traceback, for a bug report
_REPORT = f"If no input is at fault, set {TRACEBACK}=1, run it again and report what it prints."
_DAMAGED = "A file is damaged or of another format: download or save it again. " + _REPORT
_MEMORY = "Set a smaller batch_size or num_samples, granularity: row, or window: 1 (docs/scaling.md)."
_SYSTEM = "Check that the path exists, its rights, and the space on that disk, and run it again."
_CURES = {
    "safetensors": _DAMAGED,
    "pyarrow": _DAMAGED,
    "PIL": _DAMAGED,
    "tokenizers": _DAMAGED,
    "datasets": _DAMAGED,
    "yaml": _DAMAGED,
    "json": _DAMAGED,
    "pydantic_core": _DAMAGED,
    "fsspec": _SYSTEM,
    "filelock": _SYSTEM,
    "httpx": _SYSTEM,
    "requests": _SYSTEM,
    "peft": "Check the adapter and its base. " + _REPORT,
    "mergekit": "Check the recipe, models and options. " + _REPORT,
    "transformers": "Check config.json, tokenizer and weights of the models. " + _REPORT,
    "huggingface_hub": "Check the network and HF_ENDPOINT, and run it again. " + _REPORT,
    "accelerate": _REPORT,
    "jinja2": _REPORT,
    "lm_eval": _REPORT,
    "matplotlib": _REPORT,
    "numpy": _REPORT,
    "pydantic": _DAMAGED,
    "torch": _REPORT,
}


@contextmanager
def translated_errors(command: str) -> Iterator[None]:
    """Translate errors of libraries that are raised in this context.

    Args:
        command: the command that the user ran.

    Raises:
        DamError: for an error of a library, of the system, or of the Hub.
    """
    try:
        yield
    except Exception as error:
        translated = translate_error(error, command)
        if translated is None or translated is error:
            raise
        raise translated from error


def translate_error(error: Exception, command: str) -> DamError | None:
    """Translate an error; return None for a bug of this package, a closed pipe, and if tracebacks are wanted."""
    if isinstance(error, DamError):
        return error
    if os.environ.get(TRACEBACK) or (isinstance(error, OSError) and error.errno == errno.EPIPE):
        return None
    subject = f"`mergekit-dam {command}`"
    cause = hub_cause(error)
    if cause is not None:
        return hub_error(cause, subject)
    library = _library_of(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return DamError(subject, expected="enough memory", got=_error_text(error), cure=_MEMORY)
    if library is not None:
        return DamError(subject, expected=f"no fault in {library}", got=_error_text(error), cure=_CURES[library])
    if isinstance(error, OSError):
        return DamError(subject, expected="files that can be read and written", got=_error_text(error), cure=_SYSTEM)
    return None


def _library_of(error: Exception) -> str | None:
    """Return the library that defines the error's class, or whose code raised it; None for another module."""
    for kind in type(error).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in _CURES:
            return root
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    root = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return root if root in _CURES else None


def _error_text(error: Exception) -> str:
    """Return the class and the first line of an error."""
    try:
        text = first_line(error)
    except Exception:  # some errors fail to print
        text = ""
    return f"{type(error).__name__}: {text}" if text and text != type(error).__name__ else type(error).__name__
