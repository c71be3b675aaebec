"""Encode samples as tokens: conversations through the model's own chat template, each text with one first token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import date
from typing import Any

from torch import Tensor

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.columns import Conversation

LOG = logging.getLogger(__name__)
# some templates write today's date: masks would then depend on the day on which they are learned. The second is for
# those that ask for it by a function, which no argument can replace; the empty string keeps a line break after it
_DAY = date(2024, 7, 26)
_ALWAYS = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f" | replace('%{code}', '{_DAY.strftime(f'%{code}')}')" for code in "aAbBdmyYHMSjp")
    + " }}{% endmacro %}{{ '' }}"
)


def as_text(tokenizer: Any, sample: str | Conversation, owner: str) -> str:
    """Write a sample as the text that the model reads; a conversation ends where the model is to answer.

    Args:
        owner: of the tokenizer, for errors.

    Raises:
        DamError: a conversation for a tokenizer without a chat template, or one that its template refuses.
    """
    if isinstance(sample, str):
        return sample
    if getattr(tokenizer, "chat_template", None) is None:
        if sample.plain is not None:
            return sample.plain
        raise DamError(
            f"data of {owner}",
            expected="texts, since its tokenizer has no chat template",
            got="conversations",
            cure="Save the tokenizer with its chat_template into the model's directory, or name a column of texts.",
        )
    messages = [{"role": role, "content": text} for role, text in sample.turns]
    try:
        template = tokenizer.get_chat_template()
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=_ALWAYS + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=True,
            date_string=f"{_DAY:%d %b %Y}",
        )
    except Exception as error:  # Jinja raises what the template's author wrote, and what that writes wrongly
        raise DamError(
            f"data of {owner}",
            expected="conversations that its chat template can write",
            got=f"{first_line(error)} (roles {', '.join(dict.fromkeys(role for role, _ in sample.turns))})",
            cure="Leave out the turns that it does not know, or name a column of texts.",
        ) from error
    return text


def encoded(tokenizer: Any, samples: Sequence[str | Conversation], max_length: int, owner: str) -> list[list[int]]:
    """Encode each sample with one first token, at most `max_length` token ids.

    A chat template writes all special tokens itself, so the tokenizer adds none to a conversation. One that is too
    long loses its oldest turns, and then the end of its last one, but never the place where the model answers. A text
    that begins with the first token, as a template wrote it, gets neither a second one nor a token that ends it; other
    texts are encoded as the tokenizer does by itself.

    Args:
        owner: of the tokenizer, for errors.

    Raises:
        DamError: as for `as_text`.
    """
    through_template = getattr(tokenizer, "chat_template", None) is not None
    chats = {i: s for i, s in enumerate(samples) if isinstance(s, Conversation) and through_template}
    texts = [as_text(tokenizer, sample, owner) for i, sample in enumerate(samples) if i not in chats]
    found = iter(_texts(tokenizer, texts, max_length))
    shortened = 0
    rows = []
    for i in range(len(samples)):
        if i in chats:
            ids, short = _fitting(tokenizer, chats[i], max_length, owner)
            shortened += short
            rows.append(ids)
        else:
            rows.append(next(found))
    if shortened:
        LOG.warning(
            "%s: %d of %d conversations have more than %d tokens (max_length); they lose older turns, or the end of "
            "the last one",
            owner,
            shortened,
            len(samples),
            max_length,
        )
    return rows


def padded_left(tokenizer: Any, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Pad at the left: input_ids and attention_mask (B, L) end with the texts, where a causal LM continues them."""
    encoding = tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding_side="left", return_tensors="pt")
    return {key: encoding[key] for key in ("input_ids", "attention_mask")}


def _texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    if not texts:
        return []
    options = {"truncation": True, "max_length": max_length}
    found: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    begins, first = tokenizer.bos_token, {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    for i, (text, ids) in enumerate(zip(texts, found, strict=True)):
        if begins and tokenizer.cls_token is None and text.startswith(begins):
            found[i] = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        elif len(ids) > 1 and ids[0] == ids[1] and ids[0] in first:
            found[i] = ids[1:]
    return found


def _fitting(tokenizer: Any, chat: Conversation, max_length: int, owner: str) -> tuple[list[int], bool]:
    """Encode a conversation, and say whether it had to be shortened."""
    current = chat
    while True:
        ids: list[int] = tokenizer(as_text(tokenizer, current, owner), add_special_tokens=False)["input_ids"]
        if len(ids) <= max_length:
            return ids, current is not chat
        shorter = _shorter(tokenizer, current, len(ids) - max_length + 1)  # room left says that nothing was cut off
        if shorter is None:
            return ids[-max_length:], True  # the template alone is longer
        current = shorter


def _shorter(tokenizer: Any, chat: Conversation, excess: int) -> Conversation | None:
    """Shorten a conversation: drop its older turns, else cut its last turn, else drop its system prompt.

    None where nothing is left to drop. The older half of the turns goes; a last turn loses about `excess` tokens.
    """
    system = tuple(turn for turn in chat.turns[:1] if turn[0] == "system")
    turns = chat.turns[len(system) :]
    if len(turns) > 1:
        later = turns[(len(turns) + 1) // 2 :]
        start = next((i for i, (role, _) in enumerate(later) if role == "user"), len(later) - 1)
        return Conversation((*system, *later[start:]))
    length = len(tokenizer(chat.last_message, add_special_tokens=False)["input_ids"])
    if length > excess:
        text = chat.last_message
        return chat.with_last_message(text[: min(len(text) - 1, len(text) * (length - excess) // length)])
    return Conversation(turns) if system else None
