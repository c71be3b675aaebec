"""What other libraries raise, in one line: the only place where a command turns their errors into ours.

Faults that we foresee are refused where they arise, with their own cure. This is for the rest: an error of a library
is a fault in its input or in the environment, so it is told as one, without a traceback. An error of our own code is
a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.hub_client import hub_cause, hub_error

TRACEBACK = "MERGEKIT_DAM_TRACEBACK"  # set to anything: errors of libraries keep their traceback, for a bug report
_REPORT = f"If no input is at fault, set {TRACEBACK}=1, run it again and report what is then shown."
_DAMAGED = "A file is damaged or of another format: download or save it again. " + _REPORT
_MEMORY = "Take a smaller batch_size or num_samples, granularity: row, or window: 1 (docs/scaling.md)."
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
def explaining(command: str) -> Iterator[None]:
    """Errors of libraries in this block become ours.

    Args:
        command: that the user ran.

    Raises:
        DamError: in place of an error of a library, of the system, or of the Hub.
    """
    try:
        yield
    except Exception as error:
        known = explained(error, command)
        if known is None or known is error:
            raise
        raise known from error


def explained(error: Exception, command: str) -> DamError | None:
    """The error as one of ours; None for one of our own code, for a closed pipe, and where tracebacks are wanted."""
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
        return DamError(subject, expected="enough memory", got=_told(error), cure=_MEMORY)
    if library is not None:
        return DamError(subject, expected=f"no fault in {library}", got=_told(error), cure=_CURES[library])
    if isinstance(error, OSError):
        return DamError(subject, expected="files that can be read and written", got=_told(error), cure=_SYSTEM)
    return None


def _library_of(error: Exception) -> str | None:
    """The library whose class the error has, or whose code raised it."""
    for kind in type(error).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in _CURES:
            return root
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    root = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return root if root in _CURES else None


def _told(error: Exception) -> str:
    try:
        text = first_line(error)
    except Exception:  # some cannot be printed without the parts that they were to be made of
        text = ""
    return f"{type(error).__name__}: {text}" if text and text != type(error).__name__ else type(error).__name__
