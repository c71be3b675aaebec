"""Conversations as a model reads them: its own template, begun once, whole at the place of the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mergekit_dam.errors import DamError
from mergekit_dam.io.columns import Conversation
from mergekit_dam.tasks.encoding import as_text, encoded, padded_left
from tests.helpers.tiny_models import WORDS, save_tokenizer

# as Llama's and Mistral's: it writes the first token itself, and ends where the model answers
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def _tokenizer(folder: Path, template: str | None = TEMPLATE, ends: bool = True) -> Any:
    """One that begins every text with <s>, and ends it with </s>."""
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    form = "<s> $A </s>" if ends else "<s> $A"
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single=form, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("ends", [True, False])
def test_what_a_template_wrote_is_neither_begun_nor_ended_again(tmp_path: Path, ends: bool) -> None:
    tokenizer = _tokenizer(tmp_path, ends=ends)
    chat = Conversation((("user", "great film"),))
    written = as_text(tokenizer, chat, "a")
    assert written.startswith("<s>user") and written.endswith("assistant :")
    as_chat, as_written, plain = encoded(tokenizer, [chat, written, "great film"], 64, "a")
    assert (
        as_chat
        == as_written
        == tokenizer.apply_chat_template(
            [{"role": "user", "content": "great film"}], add_generation_prompt=True, return_dict=False
        )
    )
    assert as_chat.count(1) == 1 and as_chat[-1] != 2
    assert plain == tokenizer("great film")["input_ids"]


@given(
    turns=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join), min_size=1, max_size=9),
    system=st.booleans(),
    room=st.integers(8, 60),
)
def test_long_conversations_keep_the_place_of_the_answer(
    turns: list[str], system: bool, room: int, tokenizer: Any
) -> None:
    roles = [("user", "assistant")[(len(turns) - 1 - i) % 2] for i in range(len(turns))]
    chat = Conversation((*((("system", "good plot"),) if system else ()), *zip(roles, turns, strict=True)))
    whole = tokenizer(as_text(tokenizer, chat, "a"), add_special_tokens=False)["input_ids"]
    (ids,) = encoded(tokenizer, [chat], room, "a")
    assert len(ids) <= room and ids[-2:] == whole[-2:]
    assert ids[0] == 1, "its beginning is that of a conversation"
    if len(whole) <= room:
        assert ids == whole


def test_a_template_of_today_writes_the_same_each_day(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, "\n{{ strftime_now('%d %B %Y') }} {{ date_string }} {{ messages[0].content }}")
    assert as_text(tokenizer, Conversation((("user", "film"),)), "a") == "\n26 July 2024 26 Jul 2024 film"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for", "data of a"),
    ],
)
def test_conversations_without_a_template_that_writes_them(tmp_path: Path, template: str | None, reason: str) -> None:
    tokenizer = _tokenizer(tmp_path, template)
    with pytest.raises(DamError, match=rf"{reason}.*name a column of texts"):
        encoded(tokenizer, [Conversation((("user", "film"),))], 64, "a")
    if template is None:  # an instruction is asked without one
        asked = Conversation((("user", "film"),), plain="film")
        assert encoded(tokenizer, [asked], 64, "a") == encoded(tokenizer, ["film"], 64, "a")


def test_rows_are_padded_where_no_answer_follows(tokenizer: Any) -> None:
    padded = padded_left(tokenizer, [[1, 5], [1, 5, 6]])
    assert padded["input_ids"].tolist() == [[0, 1, 5], [1, 5, 6]]
    assert padded["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
