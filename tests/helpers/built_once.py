"""Folders that take long to make: one of the processes of a test run does it, the others wait and use them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of this test run.

    Args:
        factory: pytest's.
        name: of the folder, one per builder.
        build: fills an empty folder.
    """
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = folder.with_suffix(".part")
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(folder)
    return folder
