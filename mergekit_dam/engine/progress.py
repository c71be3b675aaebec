"""Show progress bars that fit a terminal and keep moving during long steps, and silence libraries."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Event, Thread
from typing import Any

from accelerate.utils import tqdm

_WIDEST = 79  # columns
_TITLE = 24  # characters of a title, at most
_REFRESH = 5.0  # seconds between refreshes of a bar during a long step
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def progress_bar(
    steps: Iterable[int], title: str, *, quiet: bool, shown: Callable[[], Mapping[str, str]] = dict
) -> Iterator[int]:
    """Yield the steps and show a bar on stderr if stderr is a terminal.

    Args:
        steps: with a range that starts above 0, the earlier steps count as done.
        title: text before the bar.
        quiet: no bar.
        shown: called after each step; returns names and values to show after the bar.
    """
    done = {"initial": steps.start, "total": steps.stop} if isinstance(steps, range) and steps.step == 1 else {}
    name = title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}…"
    columns = min(_WIDEST, shutil.get_terminal_size().columns - 1)
    shown_bar = tqdm(
        steps, desc=f"dam: {name}", disable=quiet or None, file=sys.stderr, ncols=columns, bar_format=_FORMAT, **done
    )
    over = Event()
    if not shown_bar.disable:
        Thread(target=_keep_refreshing, args=(shown_bar, over), daemon=True, name="progress").start()
    try:
        for step in shown_bar:
            yield step
            shown_bar.set_postfix(shown(), refresh=False)
    finally:
        over.set()


def _keep_refreshing(shown_bar: Any, over: Event) -> None:
    """Refresh the clock of a bar until `over` is set, so that users see progress during a long step."""
    while not over.wait(_REFRESH):
        shown_bar.refresh()


def silence_libraries() -> None:
    """Switch off progress bars, advice and deprecation warnings of transformers, datasets and huggingface_hub."""
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
