"""Progress bars fit a terminal, whatever the names, and move while one long step is under way."""

from __future__ import annotations

import time

import pytest

from mergekit_dam.engine import progress
from mergekit_dam.engine.progress import progress_bar


class _Terminal:
    """What a bar writes to a terminal of so many columns."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return [line.strip("\x1b[A") for line in self.text.replace("\n", "\r").split("\r")]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_bars_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    values = {"loss": "12345.68", "m1": "0.95", "m2": "0.50"}
    for title in ("masks", "student of " + "a model with a long name " * 9):
        for _ in progress_bar(range(100_000, 100_030), title, quiet=False, shown=lambda: values):
            pass
    assert any("student of" in line for line in terminal.lines)
    assert max(map(len, terminal.lines)) <= min(columns, 80) - 1


def test_a_bar_moves_while_one_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress._REFRESH <= 10
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "_REFRESH", 0.05)
    for _ in progress_bar(range(2), "scan", quiet=False):
        before = len(terminal.text)
        time.sleep(0.4)
        assert len(terminal.text) > before
