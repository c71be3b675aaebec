"""Parse triggers from a command line, written `name(option=value,...)`; for evaluation only."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch

from mergekit_dam.errors import DamError, did_you_mean
from mergekit_dam.evaluation.attacks import (
    BlendedTrigger,
    Corner,
    PatchTrigger,
    PhraseTrigger,
    RareTokenTrigger,
    SentenceTrigger,
    Trigger,
    WarpTrigger,
)
from mergekit_dam.io.image_files import image_of

TRIGGERS: dict[str, Callable[..., Trigger]] = {
    "patch": PatchTrigger,
    "blended": BlendedTrigger,
    "warp": WarpTrigger,
    "words": RareTokenTrigger,
    "sentence": SentenceTrigger,
    "phrase": PhraseTrigger,
}
EXAMPLE = 'E.g. patch(size=5,corner=top-left), blended(image=x.png,opacity=0.2) or sentence(sentence="Buy now.").'
_FORM = re.compile(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_OPTION = re.compile(r'\s*([\w-]+)\s*=\s*("[^"]*"|[^,"]*)\s*(?:,|$)')
_IMAGE_FIELD = "pattern_CHW"


def parse_trigger(text: str) -> Trigger:
    """Make the trigger that a text describes.

    Options are the fields of the classes in `attacks`; a pattern is given as `image=FILE`, words are separated by
    blanks.

    Raises:
        DamError: an unknown trigger or option, or a value of the wrong kind.
    """
    form = _FORM.fullmatch(text)
    if form is None or form[1] not in TRIGGERS:
        name = form[1] if form else text
        raise DamError(
            f"trigger {text!r}",
            expected=f"one of {', '.join(TRIGGERS)}",
            got=repr(name),
            cure=did_you_mean(name, TRIGGERS) or EXAMPLE,
        )
    kind, arguments = TRIGGERS[form[1]], (form[2] or "").strip()
    types: dict[str, Any] = get_type_hints(kind)
    allowed = ["image" if f.name == _IMAGE_FIELD else f.name for f in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    end = 0
    while end < len(arguments):
        option = _OPTION.match(arguments, end)
        if option is None or option[1] not in allowed:
            raise DamError(
                f"trigger {text!r}",
                expected=f"options among {', '.join(allowed)}",
                got=repr(arguments[end:]),
                cure=EXAMPLE,
            )
        key, value = option[1], option[2].strip().strip('"')
        if key == "image":
            values[_IMAGE_FIELD] = _read_pattern(value)
        else:
            values[key] = _value(value, types[key], f"option {key} of trigger {form[1]}")
        end = option.end()
    try:
        return kind(**values)
    except TypeError as error:
        raise DamError(f"trigger {text!r}", expected=allowed[0], got="none", cure=EXAMPLE) from error


def _value(text: str, kind: Any, where: str) -> Any:
    if kind == tuple[str, ...]:
        return tuple(text.split())
    try:
        if kind in (int, float):
            return kind(text)
        if kind == Corner and text not in get_args(Corner):
            raise ValueError
    except ValueError as error:
        wanted = ", ".join(get_args(kind)) or kind.__name__
        raise DamError(where, expected=wanted, got=repr(text), cure=EXAMPLE) from error
    return text


def _read_pattern(path: str) -> torch.Tensor:
    """Read an image as pattern_CHW in [0, 1]."""
    pixels = np.asarray(image_of(Path(path).expanduser(), f"trigger picture {path}"), dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)
