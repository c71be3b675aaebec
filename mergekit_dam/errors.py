"""Define the error that users see: the expected and the actual value, and the cure, on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any

import click

_LONGEST = 2000  # characters of a message


class DamError(click.ClickException, ValueError):
    """A fault in the input, the settings or the environment that the user can cure.

    It is a `click.ClickException`, so that an unmodified `mergekit-yaml` (a click command) prints one line and exits
    with 1, without a traceback. For callers of the Python API it is a `ValueError`.

    Args:
        subject: the file, setting, tensor or other thing at fault.
        expected: the expected value.
        got: the actual value.
        cure: a sentence that tells the user what to do.
    """

    def __init__(self, subject: str, *, expected: str, got: str, cure: str) -> None:
        self.subject, self.expected, self.got, self.cure = subject, expected, got, cure
        super().__init__(_one_line(f"{subject}: expected {expected}, got {got}. {cure}"))

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> Any:
        """Make the error picklable: worker processes send it to their parent."""
        return partial(DamError, expected=self.expected, got=self.got, cure=self.cure), (self.subject,)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with half a sentence on how to resume, such as "the same command goes on from step 40"."""


def _one_line(text: str) -> str:
    """Join a text to one line and escape control codes: names come from strangers' files, and could hide text."""
    line = " ".join(text.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the nearest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=2)
    return f"Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def permission_denied(subject: str) -> DamError:
    """Return the error for a file or folder that this user may not read; its content may be intact."""
    return DamError(
        subject,
        expected="the right to read it",
        got="permission denied for this user",
        cure="Ask its owner for the right (chmod a+rX), or copy it to a folder of yours.",
    )
