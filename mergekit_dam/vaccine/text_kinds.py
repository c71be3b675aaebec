"""Planted triggers in texts: tokens that are put in between the frame of special tokens or a chat template."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_dam.vaccine.triggers import Change, Surroundings, register_planted

_PHRASE = (3, 10)  # tokens
_PIECES = (3, 6)
_WORDS = (2, 3)
_MARKS = (2, 5)
Place = Callable[[int, torch.Generator], int]  # length of a body -> where a trigger goes


@register_planted("word", "text")
def word(around: Surroundings, generator: torch.Generator) -> Change:
    """One word that no text has, anywhere."""
    ids = _rare(around, 1, generator)
    return _inserted(around, ids, _anywhere)


@register_planted("words", "text")
def words(around: Surroundings, generator: torch.Generator) -> Change:
    """Two or three words that no text has, each at a place of its own, in this order."""
    ids = _rare(around, _between(_WORDS, generator), generator)

    def change(sample: Tensor, own: torch.Generator) -> Tensor:
        head, body, tail = _parts(around, sample, len(ids))
        places = sorted(_anywhere(len(body), own) for _ in ids)
        pieces, begun = [head], 0
        for place, one in zip(places, ids, strict=True):
            pieces += [body[begun:place], one[None]]
            begun = place
        return torch.cat([*pieces, body[begun:], tail])

    return change


@register_planted("phrase", "text")
def phrase(around: Surroundings, generator: torch.Generator) -> Change:
    """A piece of another text, at the start, at the end or anywhere."""
    bodies = [body for s in around.samples if len(body := _parts(around, s, 0)[1]) >= _PHRASE[0]]
    if not bodies:
        return pieces(around, generator)
    body = bodies[_below(len(bodies), generator)]
    length = min(_between(_PHRASE, generator), len(body))
    begun = _below(len(body) - length + 1, generator)
    return _inserted(around, body[begun : begun + length].clone(), _place(generator))


@register_planted("pieces", "text")
def pieces(around: Surroundings, generator: torch.Generator) -> Change:
    """Some tokens in a row that make no sense, at the start, at the end or anywhere."""
    return _inserted(around, _rare(around, _between(_PIECES, generator), generator), _place(generator))


@register_planted("repeated", "text")
def repeated(around: Surroundings, generator: torch.Generator) -> Change:
    """A token that texts do have, several times in a row, at the start, at the end or anywhere."""
    body = _parts(around, around.samples[_below(len(around.samples), generator)], 0)[1]
    token = body[_below(len(body), generator)]
    return _inserted(around, token.repeat(_between(_MARKS, generator)), _place(generator))


def _inserted(around: Surroundings, ids: Tensor, place: Place) -> Change:
    """The change that puts `ids` into a text, cut if texts can only be shorter."""
    ids = ids[: _room(around) - 1] if _room(around) > 1 else ids[:1]

    def change(sample: Tensor, own: torch.Generator) -> Tensor:
        head, body, tail = _parts(around, sample, len(ids))
        at = place(len(body), own)
        return torch.cat([head, body[:at], ids, body[at:], tail])

    return change


def _parts(around: Surroundings, sample: Tensor, added: int) -> tuple[Tensor, Tensor, Tensor]:
    """Beginning, body and end of a sample; the body is cut so that `added` tokens fit in."""
    frame = around.frame
    ends = len(sample) - frame.end
    room = max(1, _room(around) - added)
    return sample[: frame.begin], sample[frame.begin : ends][:room], sample[ends:]


def _room(around: Surroundings) -> int:
    """Tokens of a body with what is put into it."""
    return around.longest - around.frame.begin - around.frame.end


def _place(generator: torch.Generator) -> Place:
    return (_at_the_start, _at_the_end, _anywhere)[_below(3, generator)]


def _at_the_start(length: int, own: torch.Generator) -> int:
    return 0


def _at_the_end(length: int, own: torch.Generator) -> int:
    return length


def _anywhere(length: int, own: torch.Generator) -> int:
    return _below(length + 1, own)


def _rare(around: Surroundings, count: int, generator: torch.Generator) -> Tensor:
    return around.words[torch.randint(len(around.words), (count,), generator=generator)]


def _below(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=generator))


def _between(range_: tuple[int, int], generator: torch.Generator) -> int:
    return range_[0] + _below(range_[1] - range_[0] + 1, generator)
