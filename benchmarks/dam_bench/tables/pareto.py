"""Compute the Pareto front of accuracy against attack success that merges reach over their merging coefficients.

A point is (ACC, ASR), both in percent. A curve is the points of a method in the order of its coefficients, with
straight lines between neighbouring coefficients, because a user could choose any coefficient in between. A method with
a single setting is a curve of one point.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

Point = tuple[float, float]
Curve = Sequence[Point]
_Piece = tuple[Point, Point]


def best_accuracy(curves: Iterable[Curve], bound: float) -> float:
    """The highest ACC on the curves at an ASR of at most `bound` (percent); 0 without such a point."""
    return _best(_pieces(curves), bound)


def area(curves: Iterable[Curve]) -> float:
    """Area under the ACC-ASR curve, in percent: the mean of `best_accuracy` over all bounds from 0 to 100.

    So a merge with ACC 100 and ASR 0 has 100, and a curve of one point has ACC x (100 - ASR) / 100. It is the
    hypervolume of the curves with the reference point ACC 0, ASR 100, and a dominated point never changes it.
    The integral is exact: `best_accuracy` is linear between the bounds where a piece begins, ends or crosses another.
    """
    pieces = _pieces(curves)
    levels = {accuracy for piece in pieces for accuracy, _ in piece}
    breaks = {0.0, 100.0} | {success for piece in pieces for _, success in piece}
    rising = [_line(piece) for piece in pieces if piece[0][0] < piece[1][0] and piece[0][1] < piece[1][1]]
    breaks |= {(level - start) / slope for start, slope in rising for level in levels}
    for (start, slope), (other_start, other_slope) in itertools.combinations(rising, 2):
        if slope != other_slope:
            breaks.add((other_start - start) / (slope - other_slope))
    inside = sorted(bound for bound in breaks if 0 <= bound <= 100)
    parts = ((high - low) * _best(pieces, (low + high) / 2) for low, high in itertools.pairwise(inside))
    return sum(parts) / 100


def margin(point: Point, curves: Iterable[Curve]) -> float:
    """Points of ACC by which a method exceeds the curves at its own ASR; not positive if it does not.

    A method whose ASR is below the curves' lowest ASR is compared there, so that a method gains nothing by giving up
    accuracy for a still lower attack success.
    """
    pieces = _pieces(curves)
    lowest = min(success for piece in pieces for _, success in piece)
    return point[0] - _best(pieces, max(point[1], lowest))


def _pieces(curves: Iterable[Curve]) -> list[_Piece]:
    """Straight pieces of the curves, each with the end of lower ASR first (of higher ACC first at equal ASR)."""
    pieces = []
    for curve in curves:
        ends = itertools.pairwise(curve) if len(curve) > 1 else [(point, point) for point in curve]
        for start, end in ends:
            low, high = sorted((start, end), key=lambda p: (p[1], -p[0]))
            pieces.append((low, high))
    return pieces


def _best(pieces: Iterable[_Piece], bound: float) -> float:
    best = 0.0
    for low, high in pieces:
        if low[1] > bound:
            continue
        best = max(best, low[0])
        if high[1] <= bound:
            best = max(best, high[0])
        else:
            share = (bound - low[1]) / (high[1] - low[1])
            best = max(best, low[0] + share * (high[0] - low[0]))
    return best


def _line(piece: _Piece) -> tuple[float, float]:
    """ACC at ASR 0 and the rise of ACC per point of ASR, of the line through a piece."""
    (accuracy, success), (other_accuracy, other_success) = piece
    slope = (other_accuracy - accuracy) / (other_success - success)
    return accuracy - slope * success, slope
