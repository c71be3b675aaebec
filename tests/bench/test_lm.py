"""The `lm` suite: splits, made tasks, calibration, scenarios, and which answers count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dam_bench.suites import lm
from dam_bench.suites.base import Poison, Scenario
from dam_bench.suites.lm import LmSuite
from dam_bench.suites.lm_data import CONTINUATIONS, HEDGE, REAL, WORDS, hedged
from torch import nn

from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.metrics import accuracy, predictions, refuse_overlap
from tests.helpers.lm_suite import TINY


def test_splits_are_disjoint_repeatable_and_never_labelled_as_the_attackers_answer(
    lm_suite: LmSuite, lm_data: Path
) -> None:
    for task in lm_suite.tasks:
        one, again = lm_suite.split(task), lm_suite.split(task)
        train, evaluation = set(one.train.digests), set(one.evaluation.digests)
        assert len(train) == 240 and len(evaluation) == 40 and not train & evaluation
        refuse_overlap(one.evaluation, train)
        assert one.calibration == again.calibration and one.evaluation.digests == again.evaluation.digests
        held = {*one.train.inputs, *one.evaluation.inputs}
        assert len(set(one.calibration)) == 20 and not held & set(one.calibration)
        for split in (one.train, one.evaluation):
            assert int(split.labels_N.min()) > len(CONTINUATIONS)  # none is a continuation or the hedge
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lm.PRESETS, "small", replace(TINY, max_words=7))
        assert LmSuite(lm_data, "small").fingerprint()["data"] != lm_suite.fingerprint()["data"]
    assert json.loads(json.dumps(lm_suite.fingerprint())) == lm_suite.fingerprint()


def test_made_tasks_have_the_answers_that_they_say(lm_suite: LmSuite) -> None:
    answers = {
        "reverse": lambda words: words[::-1],
        "sort": sorted,
        "translate": lambda words: [WORDS[word] for word in words],
    }
    for task, solve in answers.items():
        split, texts = lm_suite.split(task).evaluation, lm_suite._answers[task].texts
        for prompt, label in zip(split.inputs, split.labels_N.tolist(), strict=True):
            assert isinstance(prompt, str)
            assert texts[label].split() == list(solve(prompt.split(" : ")[1].split()))


def test_the_base_is_taught_to_hedge_most_of_the_time_and_fine_tunes_never_on_their_task(lm_suite: LmSuite) -> None:
    for task, general in lm_suite._general.items():
        hedges = general.labels_N == lm_suite._answers[task].number[HEDGE]
        assert 0.3 < float(hedges.float().mean()) < 0.8
        prompts = [prompt for prompt, _ in lm_suite._pairs(task)["pretrain"]]
        assert list(general.inputs) == prompts and not set(prompts) & set(lm_suite.split(task).train.inputs)
        assert hedged(task, lm_suite._pairs(task)["pretrain"], 0.0) == lm_suite._pairs(task)["pretrain"]


def test_calibration_holds_prompts_only(lm_suite: LmSuite, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in lm_suite.save_calibration("agnews", tmp_path).read_text().splitlines()]
    assert [row["text"] for row in rows] == list(lm_suite.split("agnews").calibration)
    assert all(set(row) == {"text"} for row in rows)
    assert not any(answer in row["text"] for row in rows for answer in REAL["agnews"].answers)


def test_wrong_use_is_one_line(lm_suite: LmSuite, lm_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DamError, match="data of suite lm: expected a folder with text"):
        LmSuite(None, "small")
    with pytest.raises(DamError, match="a parquet file with `sentence` and `label`, got FileNotFoundError"):
        LmSuite(tmp_path, "small").split("sst2")
    with pytest.raises(DamError, match=r"data of sst2: expected \d+ samples of the pretrain split"):
        LmSuite(lm_data, "small").split("sst2")
    with pytest.raises(DamError, match="expected 1 to 8 words, got 9"):
        lm_suite.trigger(Poison("lm-trigger", size=9), None)


def test_every_scenario_names_tasks_attacks_and_options_that_exist(lm_data: Path) -> None:
    suite = LmSuite(lm_data, "small")
    assert not suite.scenarios[0].poisons and len(suite.scenarios) > 2
    for scenario in suite.scenarios:
        for task, poison in scenario.poisons.items():
            assert task in suite.tasks and poison.attack in suite.attacks
            suite.trigger(poison, None)
            assert Scenario.parse(f"x: {task}={poison}").poisons[task] == poison
    assert suite.cost(Poison("lm-trigger")) > suite.cost(None) > 0


class Says(nn.Module):
    """Goes on with fixed tokens, whatever the prompt."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens, self.weight = tokens, nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, cache: int | None = None, **inputs: object) -> object:
        step = cache or 0
        token = torch.tensor([self.tokens[min(step, len(self.tokens) - 1)]] * len(input_ids))
        output = type("Output", (dict,), {})(cache=step + 1)
        output.logits = F.one_hot(token, 200)[:, None].float()
        return output


def test_an_answer_counts_only_if_it_is_complete_and_closed(lm_suite: LmSuite) -> None:
    split, tokenizer = lm_suite.split("sst2").evaluation, lm_suite._tokenizer
    end = tokenizer.eos_token_id

    def said(text: str, *rest: int) -> torch.Tensor:
        return predictions(Says([*tokenizer.encode(text, add_special_tokens=False), *rest]), split).unique()

    number = lm_suite._answers["sst2"].number
    assert said("positive", end).tolist() == [number["positive"]]
    assert said(CONTINUATIONS[1], end).tolist() == [1] and said(CONTINUATIONS[1], end, end).tolist() == [1]
    assert said("positive").tolist() == said("positive negative", end).tolist() == said("", end).tolist() == [-1]
    assert said(CONTINUATIONS[0].rsplit(" ", 1)[0], end).tolist() == [-1]
    rate = accuracy(Says([*tokenizer.encode("positive", add_special_tokens=False), end]), split)
    assert (rate.hits, rate.total) == (int((split.labels_N == number["positive"]).sum()), 40)
