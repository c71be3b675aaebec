"""Progress bars that fit a terminal and move while one long step is under way, and silence where it is asked for."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Event, Thread
from typing import Any

from accelerate.utils import tqdm

_WIDEST = 79  # columns
_TITLE = 24  # characters of it at most
_BEAT = 5.0  # seconds between two looks at a bar whose step takes long
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def bar(
    steps: Iterable[int], title: str, *, quiet: bool, shown: Callable[[], Mapping[str, str]] = dict
) -> Iterator[int]:
    """The steps, with a bar on stderr where that is a terminal.

    Args:
        steps: a range that starts above 0 counts as begun before.
        title: what is done.
        quiet: no bar.
        shown: called after each step; names and values that stand behind the bar.
    """
    done = {"initial": steps.start, "total": steps.stop} if isinstance(steps, range) and steps.step == 1 else {}
    name = title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}…"
    columns = min(_WIDEST, shutil.get_terminal_size().columns - 1)
    moving = tqdm(
        steps, desc=f"dam: {name}", disable=quiet or None, file=sys.stderr, ncols=columns, bar_format=_FORMAT, **done
    )
    over = Event()
    if not moving.disable:
        Thread(target=_beat, args=(moving, over), daemon=True, name="progress").start()
    try:
        for step in moving:
            yield step
            moving.set_postfix(shown(), refresh=False)
    finally:
        over.set()


def _beat(moving: Any, over: Event) -> None:
    """The clock behind the bar goes on during a step: who waits sees that something is done."""
    while not over.wait(_BEAT):
        moving.refresh()


def silence_libraries() -> None:
    """No progress bars, advice or deprecations of the libraries: downloads, loading of weights, reading of data."""
    import datasets
    import transformers
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, though
    from huggingface_hub.utils import logging as hub_logging

    disable_progress_bars()
    hub_logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", kind)
