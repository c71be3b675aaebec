"""Choose the input columns of a table, and turn their values into samples: texts, conversations or images.

The rule: the column that the user named; or the only column with inputs of this kind; or the first known name
(`_CHATS`, then `prompt`, then a question with an answer beside it, then `_TEXTS`; for images `_IMAGES`). Anything else
is an error that lists the columns. Labels and answers are never read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mergekit_dam.errors import DamError, did_you_mean

Kind = Literal["image", "text"]
LABELS = frozenset({"label", "labels", "target", "targets", "class", "classes", "category", "y", "answer", "gold"})
CHARACTERS = 1 << 17  # at most, of one text; `max_length` cuts it far shorter
_CHATS = ("messages", "conversations", "conversation")
_SOMETIMES_CHATS = ("prompt", "chosen")  # some data sets keep lists of turns here, other data sets texts
_QUESTIONS = ("instruction", "question", "query")
_CONTEXTS = ("input", "context")  # optional passage that a question refers to
_ANSWERS = frozenset({"output", "response", "completion", "answer", "answers", "chosen", "solution"})
_TEXTS = ("text", "sentence", "content", "review", "tweet")  # used only if the table has just one of them
_IMAGES = ("image", "img", "jpg", "png")
_SHAREGPT = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
_NO_COLUMN_CURES: dict[Kind, str] = {
    "image": "Give a column with the images themselves (their bytes), or a folder of images.",
    "text": "Give a column of texts, or of conversations: lists of turns with role and content.",
}
SETTING, OPTION = "`{}:`", "--{}"  # how a recipe and a command line write a setting, for the cures of errors


@dataclass(frozen=True)
class Conversation:
    """The turns of a chat up to the place where the model answers.

    Attributes:
        turns: (role, text); the last turn is not the assistant's.
        plain: the conversation as plain text, for a tokenizer without a chat template; None: it needs a template.
    """

    turns: tuple[tuple[str, str], ...]
    plain: str | None = None

    @property
    def last_message(self) -> str:
        """The text of the last turn."""
        return self.turns[-1][1]

    def with_last_message(self, text: str) -> Conversation:
        """Return the conversation with another text in its last turn."""
        turns = (*self.turns[:-1], (self.turns[-1][0], text))
        return replace(self, turns=turns, plain=None if self.plain is None else text)

    def content(self) -> str:
        """The turns as one text that does not depend on a template; a single question is its text alone."""
        return self.last_message if [role for role, _ in self.turns] == ["user"] else json.dumps(self.turns)


@dataclass(frozen=True)
class InputColumns:
    """The columns to read, and the function that makes a sample of a row.

    Attributes:
        columns: names of the columns to read.
        sample: values of these columns in one row -> a text, a conversation, or a value that `image_of` decodes.
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
) -> InputColumns:
    """Choose the columns that hold the inputs, by the rule at the top of this file.

    Args:
        features: name -> feature of datasets.
        column: the column that the user named, or None.
        labels: names, in lower case, that are never inputs.
        spelled: how the setting of the column is written, for cures.

    Raises:
        DamError: an unknown or ambiguous column, or a column of labels.
    """
    setting = spelled.format("column")
    converters = {name: _converter(name, feature, kind) for name, feature in features.items()}
    inputs = {name: c for name, c in converters.items() if c is not None and name.casefold() not in labels}
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
                cure=f"Set {setting}." if inputs else _NO_COLUMN_CURES[kind],
            )
        return known
    (column,) = inputs if column is None else (column,)
    return InputColumns((column,), inputs[column])


def _known_image(inputs: Mapping[str, Any]) -> InputColumns | None:
    names = {name.casefold(): name for name in inputs}
    column = next((names[name] for name in _IMAGES if name in names), None)
    return None if column is None else InputColumns((column,), inputs[column])


def _known_text(inputs: Mapping[str, Callable[..., Any]], features: Mapping[str, Any]) -> InputColumns | None:
    names = {name.casefold(): name for name in inputs}
    chats = [names[n] for n in (*_CHATS, "prompt") if n in names]
    if chats:
        return InputColumns((chats[0],), inputs[chats[0]])
    questions, contexts, texts = (
        [names[n] for n in known if n in names and inputs[names[n]] is text_of]
        for known in (_QUESTIONS, _CONTEXTS, (*_TEXTS, *_QUESTIONS))
    )
    if questions and _ANSWERS & {name.casefold() for name in features}:
        return InputColumns((questions[0], *contexts[:1]), question_of)
    return InputColumns((texts[0],), text_of) if len(texts) == 1 else None


def _converter(name: str, feature: Any, kind: Kind) -> Callable[..., Any] | None:
    """The function that makes a sample of a column's value; None if the column holds no inputs of this kind."""
    import datasets

    dtype = getattr(feature, "dtype", None) if isinstance(feature, datasets.Value) else None
    if kind == "image":
        holds = isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
        return _identity if holds or dtype in {"binary", "large_binary"} else None
    if dtype in {"string", "large_string"}:
        return conversation_of if name.casefold() in _CHATS else text_of
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    is_chat = isinstance(inner, dict) and ({"role", "content"} <= set(inner) or {"from", "value"} <= set(inner))
    # datasets keeps turns of several shapes (tool calls beside texts) as JSON
    mixed = "Json" in (type(feature).__name__, type(inner).__name__) and name.casefold() in (*_CHATS, *_SOMETIMES_CHATS)
    return conversation_of if is_chat or mixed else None


def _identity(row: Any) -> Any:
    return row


def text_of(row: Any) -> str:
    """The value as text, at most 131,072 characters."""
    return str(row or "")[:CHARACTERS]


def conversation_of(row: Any) -> Conversation | str:
    """The turns before the model's last answer; a blank text where the last turn asks nothing.

    Args:
        row: a list of {"role", "content"} or {"from", "value"}, or such a list as JSON; a content may be a list of
            parts with a text. Any other text is returned unchanged.
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
            turns.append((_SHAREGPT.get(role, role), _content_text(content)))
    while turns and turns[-1][0] == "assistant":
        turns.pop()
    return Conversation(tuple(turns)) if turns and turns[-1][0] != "system" and turns[-1][1].strip() else ""


def _parsed(text: str, begins: str) -> Any:
    """The value of a JSON text that begins with `begins`; any other text unchanged."""
    try:
        return json.loads(text) if text.lstrip().startswith(begins) else text
    except (ValueError, RecursionError):
        return text


def _content_text(content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        return text_of(
            "\n".join(str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in content)
        )
    return text_of(content)


def question_of(question: Any, context: Any = None) -> Conversation | str:
    """An instruction and its context as one turn; a blank text where the instruction is blank."""
    parts = [part for part in (text_of(question), text_of(context)) if part.strip()]
    text = "\n\n".join(parts)[:CHARACTERS]
    return Conversation((("user", text),), plain=text) if text_of(question).strip() else ""
