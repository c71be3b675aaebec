"""Which columns make a sample: tables as they are on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Sequence, Value

from mergekit_dam.errors import DamError
from mergekit_dam.io.calibration import digest
from mergekit_dam.io.columns import Conversation
from tests.helpers.hostile import load, png

_CHAT = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "dog"}]
_LONG = [{"role": "system", "content": "be"}, *_CHAT, {"role": "user", "content": "cat"}, *_CHAT[1:], *_CHAT[1:]]
_GPT = [{"from": "human", "value": "red"}, {"from": "gpt", "value": "dog"}]
_PARTS = [{"role": "user", "content": [{"type": "text", "text": "red"}, {"type": "text", "text": "dog"}]}]
_ASKED = (("user", "red"),)
_ABOUT = (("user", "red\n\ndog"),)
_TABLES: dict[str, tuple[dict[str, Any], Any]] = {
    "messages": ({"messages": _CHAT}, _ASKED),
    "several turns": (
        {"messages": _LONG},
        (("system", "be"), ("user", "red"), ("assistant", "dog"), ("user", "cat")),
    ),
    "parts": ({"messages": _PARTS}, (("user", "red\ndog"),)),
    "turns of several shapes": ({"messages": [*_CHAT[:1], {**_CHAT[1], "tool_calls": [{"a": 1}]}]}, _ASKED),
    "json": ({"messages": json.dumps(_CHAT)}, _ASKED),
    "ultrachat": ({"prompt": "blue", "prompt_id": "1", "messages": _CHAT}, _ASKED),
    "tulu": ({"id": "1", "messages": _CHAT, "source": "x"}, _ASKED),
    "sharegpt": ({"id": "1", "conversations": _GPT}, _ASKED),
    "preferences": ({"prompt": "red", "chosen": _CHAT, "rejected": _CHAT}, "red"),
    "prompt and completion": ({"prompt": "red", "completion": "dog"}, "red"),
    "prompt of turns": ({"prompt": _CHAT[:1], "completion": _CHAT[1:]}, _ASKED),
    "alpaca": ({"instruction": "red", "input": "dog", "output": "x", "text": "y"}, _ABOUT),
    "alpaca without input": ({"instruction": "red", "input": "", "output": "x"}, _ASKED),
    "dolly": ({"instruction": "red", "context": "dog", "response": "x", "category": "qa"}, _ABOUT),
    "orca": ({"id": "1", "system_prompt": "s", "question": "red", "response": "x"}, _ASKED),
    "openassistant": ({"text": "red"}, "red"),
    "imdb": ({"text": "red", "label": 1}, "red"),
    "names of labels": ({"text": "red", "label": 1, "label_text": "good"}, "red"),
    "news": ({"title": "x", "content": "red", "label": 1}, "red"),
    "glue": ({"sentence": "red", "label": 1, "idx": "1"}, "red"),
    "any single one": ({"phrase": "red", "label": "good"}, "red"),
    "capitals": ({"Text": "red", "Id": "1"}, "red"),
}


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("table", _TABLES)
def test_a_table_of_the_hub_gives_its_inputs(table: str, form: str, tmp_path: Path) -> None:
    row, expected = _TABLES[table]
    file = tmp_path / f"a.{form}"
    data = Dataset.from_list([row] * 3)
    if form == "jsonl":
        file.write_text(f"{json.dumps(row)}\n" * 3)
    else:
        data.to_parquet(file) if form == "parquet" else data.save_to_disk(file)
    samples = load(file)
    assert len(samples) == 3
    for sample in samples:
        assert (sample.turns if isinstance(sample, Conversation) else sample) == expected


@pytest.mark.parametrize("pair", [("premise", "hypothesis"), ("question", "sentence"), ("text", "sentence")])
def test_several_texts_are_listed_and_not_guessed(pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({pair[0]: "red", pair[1]: "dog", "label": 1}) + "\n")
    with pytest.raises(DamError, match=rf"exactly one with texts, got {pair[0]}, {pair[1]}. Set `column:`"):
        load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("row", [{"turns": [{"speaker": "x", "text": "red"}]}, {"tokens": ["red"]}, {"label": "red"}])
def test_what_is_no_text_names_what_is(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    with pytest.raises(DamError, match=r"got none among .*turns with role and content"):
        load(tmp_path / "a.jsonl")


def test_a_named_column_is_taken_as_it_stands(tmp_path: Path) -> None:
    row = {"instruction": "red", "output": "dog", "messages": _CHAT, "chosen": _CHAT}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    assert load(tmp_path / "a.jsonl", column="instruction") == ["red"] * 3
    assert load(tmp_path / "a.jsonl", column="chosen")[0].turns == _ASKED


def test_conversations_in_which_nothing_is_asked_are_left_out(tmp_path: Path) -> None:
    empty = [[], _CHAT[1:], [{"role": "system", "content": "be"}, *_CHAT[1:]], [{"role": "user", "content": " "}]]
    rows = [{"messages": turns} for turns in (*empty, _CHAT, _CHAT)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [sample.turns for sample in load(tmp_path / "a.jsonl", num=9)] == [_ASKED] * 2


def test_one_question_has_one_digest_in_every_form() -> None:
    forms = [Conversation((("user", "red"),)), Conversation((("user", "red"),), plain="red"), "red"]
    assert len({digest(form) for form in forms}) == 1
    others = [Conversation((("user", "x"), ("assistant", "y"), ("user", "red"))), Conversation((("system", "red"),))]
    assert len({digest(form) for form in [*others, "red"]}) == 3


@pytest.mark.parametrize("column", ["image", "img", "picture"])
@pytest.mark.parametrize("form", ["parquet", "saved", "bytes"])
def test_images_are_found_beside_masks_and_labels(column: str, form: str, tmp_path: Path) -> None:
    value = png(4, 6) if form == "bytes" else {"bytes": png(4, 6), "path": None}
    row = {column: value, "label": 1} | ({} if column == "picture" else {"mask": value})
    kinds: dict[str, Any] = {name: Image() if form != "bytes" else Value("binary") for name in row}
    data = Dataset.from_list([row] * 2, features=Features({**kinds, "label": Value("int64")}))
    file = tmp_path / ("saved" if form == "saved" else "a.parquet")
    data.save_to_disk(file) if form == "saved" else data.to_parquet(file)
    assert [image.size for image in load(file, "image")] == [(4, 6)] * 2


def test_images_as_lists_of_numbers_are_no_images(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4), dtype=int).tolist()
    data = Dataset.from_dict({"image": pixels}, Features({"image": Sequence(Value("int64"))}))
    data.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DamError, match=r"exactly one with images, got none among image\. .*bytes"):
        load(tmp_path / "a.parquet", "image")
