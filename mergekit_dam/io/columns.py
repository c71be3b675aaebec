"""Which columns of a table make a sample, and what a sample is: a text, a conversation, or an image.

One rule: the named column, or the only one that can be, or the first known name (`_CHATS`, then `prompt`, then a
question with an answer beside it, then `_TEXTS`; for images `_IMAGES`); anything else is an error that lists the
columns. Labels and answers are never read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mergekit_dam.errors import DamError, did_you_mean

Kind = Literal["image", "text"]
LABELS = frozenset({"label", "labels", "target", "targets", "class", "classes", "category", "y", "answer", "gold"})
CHARACTERS = 1 << 17  # of one text; `max_length` cuts far below
_CHATS = ("messages", "conversations", "conversation")
_MIXED = ("prompt", "chosen")  # lists of turns in some data sets, texts in others
_QUESTIONS = ("instruction", "question", "query")
_CONTEXTS = ("input", "context")  # what a question is about, where there is any
_ANSWERS = frozenset({"output", "response", "completion", "answer", "answers", "chosen", "solution"})
_TEXTS = ("text", "sentence", "content", "review", "tweet")  # several of these are a pair, or no one knows
_IMAGES = ("image", "img", "jpg", "png")
_SHAREGPT = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
_NONE: dict[Kind, str] = {
    "image": "Give a column with the images themselves (their bytes), or a folder of images.",
    "text": "Give a column of texts, or of conversations: lists of turns with role and content.",
}
SETTING, OPTION = "`{}:`", "--{}"  # how a recipe and a command line spell what a cure names


@dataclass(frozen=True)
class Conversation:
    """The turns of a chat up to the place where the model answers.

    Attributes:
        turns: (role, text); the last one is not the assistant's.
        plain: the same as a plain text, for a tokenizer without a chat template; None: it needs one.
    """

    turns: tuple[tuple[str, str], ...]
    plain: str | None = None

    @property
    def asked(self) -> str:
        """The text of the last turn."""
        return self.turns[-1][1]

    def asking(self, text: str) -> Conversation:
        """The same conversation with another text in its last turn."""
        turns = (*self.turns[:-1], (self.turns[-1][0], text))
        return replace(self, turns=turns, plain=None if self.plain is None else text)

    def content(self) -> str:
        """What is said, whatever template writes it; a single question is its text."""
        return self.asked if [role for role, _ in self.turns] == ["user"] else json.dumps(self.turns)


@dataclass(frozen=True)
class Inputs:
    """How a row becomes a sample.

    Attributes:
        columns: those that are read.
        sample: their values -> a text, a conversation, or what `image_of` decodes.
    """

    columns: tuple[str, ...]
    sample: Callable[..., Any]


def choose_inputs(
    features: Mapping[str, Any],
    column: str | None,
    kind: Kind,
    where: str,
    *,
    labels: Collection[str] = LABELS,
    spelled: str = SETTING,
) -> Inputs:
    """The columns that hold the inputs, by the rule at the top of this file.

    Args:
        features: name -> feature of datasets.
        column: the one that the user named.
        labels: names, in lower case, that are never inputs.
        spelled: how the setting of the column is written, for cures.

    Raises:
        DamError: an unknown or ambiguous column, or one of labels.
    """
    setting = spelled.format("column")
    forms = {name: form for name, feature in features.items() if (form := _form(name, feature, kind)) is not None}
    inputs = {name: form for name, form in forms.items() if name.casefold() not in labels}
    if column is not None and column not in features:
        raise DamError(
            f"column of {where}",
            expected=f"one of {', '.join(features)}",
            got=repr(column),
            cure=did_you_mean(column, features) or f"Set {setting} to one of them.",
        )
    if column is not None and column not in inputs:
        raise DamError(
            f"column {column!r} of {where}",
            expected=f"{kind}s",
            got=f"{features[column]}",
            cure="Labels never reach the search: name the column with the inputs (or rename it, if this is one).",
        )
    if column is None and len(inputs) != 1:
        known = _known_image(inputs) if kind == "image" else _known_text(inputs, features)
        if known is None:
            raise DamError(
                f"columns of {where}",
                expected=f"exactly one with {kind}s",
                got=", ".join(inputs) or f"none among {', '.join(features)}",
                cure=f"Set {setting}." if inputs else _NONE[kind],
            )
        return known
    (column,) = inputs if column is None else (column,)
    return Inputs((column,), inputs[column])


def _known_image(inputs: Mapping[str, Any]) -> Inputs | None:
    names = {name.casefold(): name for name in inputs}
    column = next((names[name] for name in _IMAGES if name in names), None)
    return None if column is None else Inputs((column,), inputs[column])


def _known_text(inputs: Mapping[str, Callable[..., Any]], features: Mapping[str, Any]) -> Inputs | None:
    names = {name.casefold(): name for name in inputs}
    chats = [names[n] for n in (*_CHATS, "prompt") if n in names]
    if chats:
        return Inputs((chats[0],), inputs[chats[0]])
    asked, context, texts = (
        [names[n] for n in known if n in names and inputs[names[n]] is text_of]
        for known in (_QUESTIONS, _CONTEXTS, (*_TEXTS, *_QUESTIONS))
    )
    if asked and _ANSWERS & {name.casefold() for name in features}:
        return Inputs((asked[0], *context[:1]), question_of)
    return Inputs((texts[0],), text_of) if len(texts) == 1 else None


def _form(name: str, feature: Any, kind: Kind) -> Callable[..., Any] | None:
    """What makes a sample of a column's values; None where they are no inputs of this kind."""
    import datasets

    dtype = getattr(feature, "dtype", None) if isinstance(feature, datasets.Value) else None
    if kind == "image":
        holds = isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
        return _as_it_is if holds or dtype in {"binary", "large_binary"} else None
    if dtype in {"string", "large_string"}:
        return conversation_of if name.casefold() in _CHATS else text_of
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    is_chat = isinstance(inner, dict) and ({"role", "content"} <= set(inner) or {"from", "value"} <= set(inner))
    # datasets keeps turns of several shapes (calls of tools beside texts) as JSON
    mixed = "Json" in (type(feature).__name__, type(inner).__name__) and name.casefold() in (*_CHATS, *_MIXED)
    return conversation_of if is_chat or mixed else None


def _as_it_is(row: Any) -> Any:
    return row


def text_of(row: Any) -> str:
    """At most 131,072 characters."""
    return str(row or "")[:CHARACTERS]


def conversation_of(row: Any) -> Conversation | str:
    """The turns before the model's last answer; a blank text where nothing is asked.

    Args:
        row: a list of {"role", "content"} or {"from", "value"}, or JSON of one; a content may be a list of parts with
            a text. Any other text is taken as it stands.
    """
    if isinstance(row, str):
        row = _parsed(row, "[")
        if isinstance(row, str):
            return text_of(row)
    turns = []
    for part in row or ():
        turn = _parsed(part, "{") if isinstance(part, str) else part
        if isinstance(turn, dict):
            role = str(turn.get("role") or turn.get("from") or "user").strip().casefold()
            content = turn.get("content") if turn.get("content") is not None else turn.get("value")
            turns.append((_SHAREGPT.get(role, role), _said(content)))
    while turns and turns[-1][0] == "assistant":
        turns.pop()
    return Conversation(tuple(turns)) if turns and turns[-1][0] != "system" and turns[-1][1].strip() else ""


def _parsed(text: str, begins: str) -> Any:
    """JSON that begins like this, else the text itself."""
    try:
        return json.loads(text) if text.lstrip().startswith(begins) else text
    except (ValueError, RecursionError):
        return text


def _said(content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        return text_of(
            "\n".join(str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in content)
        )
    return text_of(content)


def question_of(question: Any, context: Any = None) -> Conversation | str:
    """An instruction and what it is about, as one turn; a blank text where nothing is asked."""
    parts = [part for part in (text_of(question), text_of(context)) if part.strip()]
    text = "\n\n".join(parts)[:CHARACTERS]
    return Conversation((("user", text),), plain=text) if text_of(question).strip() else ""
