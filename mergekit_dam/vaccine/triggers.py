"""The registry of planted triggers: each kind draws a change of inputs at random.

A kind is a function of what the inputs look like and a generator; it returns the change, which may draw again for each
sample (a place in the text). To add one: `@register_planted("name", "image")` above such a function. None of them is
fitted to a known attack: they shall be many and unlike each other.

Legend: C channels, H, W pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_dam.errors import DamError, did_you_mean
from mergekit_dam.tasks import Task, reads_text
from mergekit_dam.tasks.base import Modality

Change = Callable[[Tensor, torch.Generator], Tensor]  # pixels_CHW in [0, 1], or token ids (L,) -> the same, triggered


class Frame(NamedTuple):
    """Numbers of tokens that all inputs of a model begin and end with, e.g. special tokens or a chat template."""

    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Surroundings:
    """Facts about a task's inputs, from which triggers are drawn.

    Attributes:
        samples: clean inputs.
        words: token ids that stand in none of them (text).
        frame: of all of them (text).
        longest: tokens that an input may have (text).
    """

    samples: Sequence[Tensor]
    words: Tensor
    frame: Frame
    longest: int

    @classmethod
    def of(cls, task: Task, samples: Sequence[Tensor]) -> Surroundings:
        """Take the facts from some samples of a task."""
        if not reads_text(task):
            return cls(samples, torch.empty(0, dtype=torch.long), Frame(0, 0), 0)
        unseen = torch.ones(task.num_words, dtype=torch.bool)
        unseen[torch.cat(list(samples))] = False
        unseen[task.special_tokens] = False
        if not unseen.any():  # a tiny vocabulary
            unseen[:] = True
            unseen[task.special_tokens] = False
        return cls(samples, unseen.nonzero().flatten(), frame_of(samples), task.longest)


Draw = Callable[[Surroundings, torch.Generator], Change]


@dataclass(frozen=True)
class Kind:
    """One kind of planted triggers."""

    name: str
    inputs: Modality
    draw: Draw


PLANTED: dict[str, Kind] = {}


def register_planted(name: str, inputs: Modality) -> Callable[[Draw], Draw]:
    """Register a function as a kind of planted triggers.

    Args:
        name: in settings and reports; a kind of this name is replaced.
        inputs: what it changes.
    """

    def register(draw: Draw) -> Draw:
        PLANTED[name] = Kind(name, inputs, draw)
        return draw

    return register


def kinds_of(task: Task, leave_out: Collection[str]) -> list[Kind]:
    """List the kinds for a task's inputs by name, without those in `leave_out`.

    Raises:
        DamError: none is left.
    """
    found = sorted((k for k in PLANTED.values() if k.inputs == task.modality), key=lambda kind: kind.name)
    left = [kind for kind in found if kind.name not in leave_out]
    if not left:
        raise DamError(
            "setting 'leave_out'",
            expected="at least one kind of trigger left",
            got=f"all of {', '.join(kind.name for kind in found)}",
            cure="Name fewer of them.",
        )
    return left


def require_known(leave_out: Collection[str], behaviours: Collection[str]) -> None:
    """Refuse a name that is neither a kind of trigger nor of behaviour: it would leave out nothing.

    Raises:
        DamError: with the nearest known name.
    """
    known = [*PLANTED, *behaviours]
    for name in leave_out:
        if name not in known:
            raise DamError(
                f"setting 'leave_out', {name!r}",
                expected=f"one of {', '.join(known)}",
                got="an unknown name",
                cure=did_you_mean(name, known) or "Correct it.",
            )


def in_turn(kinds: Sequence[Kind], count: int, generator: torch.Generator) -> list[Kind]:
    """Draw `count` kinds in random order, each again only after all others."""
    found: list[Kind] = []
    while len(found) < count:
        found += [kinds[i] for i in torch.randperm(len(kinds), generator=generator).tolist()]
    return found[:count]


def frame_of(samples: Sequence[Tensor]) -> Frame:
    """Count the tokens that all sequences begin and end with alike; at least one token of each stays between."""
    shortest = min(len(ids) for ids in samples)
    begin = _alike([ids[: shortest - 1] for ids in samples])
    end = _alike([ids[begin + 1 :].flip(0)[: shortest - begin - 1] for ids in samples])
    return Frame(begin, end)


def _alike(rows: Sequence[Tensor]) -> int:
    """Length of the beginning that rows of one length share."""
    same = torch.stack(list(rows)).eq(rows[0]).all(0)
    return int(same.long().cumprod(0).sum())
