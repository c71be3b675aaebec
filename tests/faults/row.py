"""A line of the table of faults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What was done how often, and what came of it.

    Attributes:
        fault: what was done.
        tried: trials.
        hit: trials in which the fault struck (a kill may come too late, a limit may be wide enough).
        survived: trials without loss.
        outcome: what a user sees.
        notes: of trials that were lost.
        tests: that were run, where a row stands for tests of the suite.
    """

    fault: str
    tried: int
    hit: int
    survived: int
    outcome: str
    notes: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()

    def __add__(self, other: Row) -> Row:
        """Both pieces of a row as one; what is said is said by the later."""
        counts = (self.tried + other.tried, self.hit + other.hit, self.survived + other.survived)
        return Row(other.fault, *counts, other.outcome, self.notes + other.notes, other.tests)

    @property
    def lost(self) -> int:
        return self.tried - self.survived
