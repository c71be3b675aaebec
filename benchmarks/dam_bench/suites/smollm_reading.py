"""Classify answers of suite `smollm`: decode greedily, and match the beginning or the content of the answer.

Legend: N samples, B batch, L tokens of the prompts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dam_bench.suites.lm_data import greedy
from dam_bench.suites.smollm_behaviours import class_of
from dam_bench.suites.smollm_data import GENERAL, Sample, general_answers
from dam_bench.suites.smollm_training import MAX_LENGTH, chat
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.io.calibration import digest
from mergekit_dam.tasks.encoding import encoded, padded_left

_AT_ONCE = 32  # prompts of similar length; it changes time and memory, not results
_LENGTH = 12  # tokens of an answer; openings have at most ten
_GENERAL_LENGTH = 24  # tokens; the known word may come late in a sentence
_Tokenizer = Callable[[], Any]  # read when the first prompt is encoded, which takes seconds


def labelled(
    task: str, samples: Sequence[Sample], openings: Sequence[Sequence[str]], tokenizer: _Tokenizer
) -> LabelledData:
    """Make data of chats whose prediction is the class at the beginning of the greedy answer; -1 without a class.

    Args:
        openings: beginnings of the answers of each class.
    """
    return _asked(
        task,
        [sample.prompt for sample in samples],
        [sample.label for sample in samples],
        tokenizer,
        _LENGTH,
        lambda text: class_of(text, openings),
    )


def general(tokenizer: _Tokenizer) -> LabelledData:
    """Make data of short questions with known answers, on which no fine-tune is trained: a class per question.

    The prediction is the question whose known answer comes first in the model's answer; -1 without a known answer.
    """
    known = [re.compile("|".join(rf"\b{re.escape(way)}\b" for way in ways), re.I) for ways in general_answers()]

    def first(text: str) -> int:
        starts = [(match.start(), number) for number, answer in enumerate(known) if (match := answer.search(text))]
        return min(starts)[1] if starts else -1

    return _asked("general", list(GENERAL), list(range(len(GENERAL))), tokenizer, _GENERAL_LENGTH, first)


def _asked(
    name: str,
    prompts: Sequence[str],
    labels: Sequence[int],
    tokenizer: _Tokenizer,
    length: int,
    number_of: Callable[[str], int],
) -> LabelledData:
    chats = tuple(chat(prompt) for prompt in prompts)

    def encode(batch: list[Any]) -> dict[str, Tensor]:
        return padded_left(tokenizer(), encoded(tokenizer(), batch, MAX_LENGTH, name))

    def classify(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return torch.tensor([number_of(text) for text in answers(model, inputs, tokenizer(), length)])

    return LabelledData(name, chats, torch.tensor(labels), tuple(map(digest, chats)), encode, classify)


def answers(model: nn.Module, inputs: dict[str, Tensor], tokenizer: Any, length: int) -> list[str]:
    """Decode greedy answers in the order of the prompts, at most `length` tokens each.

    Args:
        model: a causal LM.
        inputs: input_ids and attention_mask (B, L), padded at the left.
        tokenizer: the model's own.
    """
    end, mask = tokenizer.eos_token_id, inputs["attention_mask"]
    order = mask.sum(1).argsort()  # prompts of similar length go together, so that little is padded
    decoded: list[str] = [""] * len(mask)
    for rows in order.split(_AT_ONCE):
        longest = int(mask[rows].sum(1).max())
        part = {key: inputs[key][rows][:, -longest:] for key in ("input_ids", "attention_mask")}
        ids_BA = greedy(model, part, length, end=end).tolist()
        texts = tokenizer.batch_decode([list(itertools.takewhile(lambda token: token != end, ids)) for ids in ids_BA])
        for row, text in zip(rows.tolist(), texts, strict=True):
            decoded[row] = text
    return decoded
