"""Calls to the Hub that are made again where that may help, and end in one line with a cure where it does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import LocalEntryNotFoundError

from mergekit_dam.io.hub_errors import hub_cause, hub_error, is_transient, status_of

LOG = logging.getLogger(__name__)
T = TypeVar("T")
ATTEMPTS = 4  # per call, besides those that huggingface_hub makes itself
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the Hub asks for


def patiently(call: Callable[[], T], subject: str, *, write: bool = False, repeat_lost: bool = True) -> T:
    """Call the Hub, again after a pause where that may help.

    Args:
        call: may be repeated without harm.
        subject: for the error.
        write: whether it changes something there; the cures differ.
        repeat_lost: also after a lost connection, where nobody knows whether the call was carried out.

    Raises:
        DamError: with the cure.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            cause = _cause(error)
            if cause is None:
                raise
            lost = status_of(cause) is None
            last = attempt == ATTEMPTS or isinstance(error, RuntimeError)  # uploads that had attempts of their own
            if last or not is_transient(cause) or (lost and not repeat_lost):
                raise hub_error(cause, subject, write=write) from error
            pause = min(_asked_pause(cause) or 2.0 ** (attempt - 1), LONGEST_WAIT)
            LOG.warning("%s: %s; again in %.0f s", subject, status_of(cause) or type(cause).__name__, pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _cause(error: Exception) -> BaseException | None:
    """What the Hub or the way to it did; None for faults that have nothing to do with it."""
    cause = hub_cause(error)
    if isinstance(cause, LocalEntryNotFoundError) and cause.__cause__ is not None:
        return hub_cause(cause.__cause__) or cause
    # hf_xet, which is not written in Python, has no errors of its own
    return cause or (error if isinstance(error, (RuntimeError, ConnectionError, TimeoutError)) else None)


def _asked_pause(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, where it does."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = str(headers.get("Retry-After", ""))
    return float(value) if value.isdigit() else None
