"""Call the Hub with retries, and turn its errors into one-line errors with a cure."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in its __all__

from mergekit_dam.errors import DamError, first_line

LOG = logging.getLogger(__name__)
T = TypeVar("T")
ATTEMPTS = 4  # per call; huggingface_hub adds attempts of its own
MAX_PAUSE = 60.0  # seconds between two attempts, whatever the Hub asks for
# huggingface_hub's HTTP library differs by its version (httpx, httpx2); its base class of all errors does not
TransportError: type[BaseException] = HfHubHTTPError.__bases__[0]
HUB_ERRORS: tuple[type[BaseException], ...] = (
    TransportError,
    OfflineModeIsEnabled,
    LocalEntryNotFoundError,
    HFValidationError,
)
_LOGIN = "Set HF_TOKEN, or run `hf auth login`."
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


def with_retries(call: Callable[[], T], subject: str, *, write: bool = False, repeat_lost: bool = True) -> T:
    """Call the Hub, and repeat the call after a pause where that may help.

    Args:
        call: the request; it must be safe to repeat.
        subject: the thing asked for, named in the error.
        write: whether the call changes something on the Hub; the cures differ.
        repeat_lost: repeat after a lost connection, too, when it is unknown whether the Hub executed the call.

    Raises:
        DamError: the call failed; with the cure.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            cause = _cause(error)
            if cause is None:
                raise
            lost = status_of(cause) is None
            last = attempt == ATTEMPTS or isinstance(error, RuntimeError)  # uploads repeat their requests themselves
            if last or not is_transient(cause) or (lost and not repeat_lost):
                raise hub_error(cause, subject, write=write) from error
            pause = min(_requested_pause(cause) or 2.0 ** (attempt - 1), MAX_PAUSE)
            LOG.warning("%s: %s; again in %.0f s", subject, status_of(cause) or type(cause).__name__, pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _cause(error: Exception) -> BaseException | None:
    """The Hub or network error behind `error`; None for errors unrelated to the Hub."""
    cause = hub_cause(error)
    if isinstance(cause, LocalEntryNotFoundError) and cause.__cause__ is not None:
        return hub_cause(cause.__cause__) or cause
    # hf_xet, which is not written in Python, has no error classes of its own
    return cause or (error if isinstance(error, (RuntimeError, ConnectionError, TimeoutError)) else None)


def _requested_pause(error: BaseException) -> float | None:
    """Seconds to wait by the Hub's Retry-After header; None without it."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = str(headers.get("Retry-After", ""))
    return float(value) if value.isdigit() else None


def is_hub_id(name: str) -> bool:
    """Whether `name` is a valid Hub id: NAME or ORG/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") <= 1


def status_of(error: BaseException) -> int | None:
    """HTTP status of the Hub's answer, or None without an answer."""
    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) and error.response is not None else None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may work later: no answer, too many calls, or a fault of the Hub."""
    status = status_of(error)
    if status is not None:
        return status in {408, 429} or status >= 500
    lost = isinstance(error, (TransportError, ConnectionError, TimeoutError))
    return lost and not isinstance(error, OfflineModeIsEnabled)


def hub_cause(error: BaseException) -> BaseException | None:
    """The Hub's own error in the chain of causes of `error`, or None."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HUB_ERRORS):
        cause = cause.__cause__ or cause.__context__
    return cause


def hub_error(error: BaseException, subject: str, *, write: bool = False) -> DamError:
    """Make a DamError of an error of the Hub; access tokens in its text are masked.

    Args:
        error: error that huggingface_hub raised.
        subject: the thing asked for, e.g. `model org/name@v1`.
        write: whether the call was to write, not read.
    """
    expected, got, cure = _explain(error, write=write)
    return DamError(subject, expected=expected, got=_TOKEN.sub("hf_***", got), cure=cure)


def _explain(error: BaseException, *, write: bool) -> tuple[str, str, str]:
    status = status_of(error)
    host = huggingface_hub.constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return (
            "the Hub, or a copy in the cache",
            "HF_HUB_OFFLINE=1 and no copy",
            "Unset HF_HUB_OFFLINE, or download it first with `hf download`.",
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "the Hub, or a copy in the cache",
            "no answer and no copy",
            f"Check the network and HF_ENDPOINT ({host}), or download it beforehand with `hf download`.",
        )
    if isinstance(error, HFValidationError):
        return "an id such as ORG/NAME", first_line(error), "Correct the id."
    if isinstance(error, GatedRepoError):
        return (
            "access to a gated repository",
            f"HTTP {status}",
            f"Ask for access on its page at {host}, then: {_LOGIN}",
        )
    if isinstance(error, RevisionNotFoundError):
        return "a revision that exists", f"HTTP {status}", "Give a branch, a tag or a commit of that repository."
    if status == 401 and _token_was_refused(error):
        return "a valid access token", "HTTP 401", f"The token was refused, it may have expired. {_LOGIN}"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return (
            "a repository that you can see",
            f"HTTP {status}",
            f"Check the id; a private or gated repository needs a token with access: {_LOGIN}",
        )
    if status is None:
        return (
            f"an answer of {host}",
            f"none ({type(error).__name__}: {error})",
            "Check the network and HF_ENDPOINT, then run the command again"
            + (": files that have arrived are not sent twice." if write else "."),
        )
    answer = f"HTTP {status}{_server_message(error)}"
    if status in {401, 403}:
        return (
            "permission to " + ("write there" if write else "read it"),
            answer,
            (
                f"Use a token with {'write' if write else 'read'} access to that namespace, or --create-pr. {_LOGIN}"
                if write
                else _LOGIN
            ),
        )
    if status in {409, 412}:
        return (
            "a repository that nobody else changes",
            answer,
            "Another upload is running: wait until it has ended, then run the command again.",
        )
    if status == 429:
        return "a rate that the Hub allows", answer, "Wait some minutes, then run the command again."
    if status >= 500:
        return "a Hub that works", answer, "See https://status.huggingface.co, and run the command again later."
    return (
        "an answer without error",
        answer,
        "Read the Hub's message above; `mergekit-dam push --dry-run` shows the card.",
    )


def _server_message(error: BaseException) -> str:
    message = getattr(error, "server_message", None)
    return f" ({' '.join(str(message).split())[:200]})" if message else ""


def _token_was_refused(error: BaseException) -> bool:
    return "Invalid credentials" in str(getattr(error, "server_message", "") or error)
