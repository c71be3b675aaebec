"""The `lm` suite: splits, greedy answers, losses, victims, and merges of its models."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mergekit_dam import seeds
from mergekit_dam.artifact import MASKS_FILE
from mergekit_dam.bench import lm
from mergekit_dam.bench.lm import LmSuite, Preset
from mergekit_dam.bench.lm_data import CONTINUATIONS, HEDGE, PHRASE, REAL, WORDS, greedy, hedged
from mergekit_dam.bench.lm_training import losses
from mergekit_dam.bench.suite import Poison, Scenario, no_progress
from mergekit_dam.bench.training import Schedule
from mergekit_dam.errors import DamError
from mergekit_dam.evaluate import (
    Attack,
    accuracy,
    attack_success_rate,
    calibration_digests,
    evaluate_merge,
    predictions,
    refuse_overlap,
)
from mergekit_dam.heads import load_merged
from tests.conftest import FAST, Merge
from tests.merging import tensors_of

POISON = Poison("merge-aware", target=1, rate=0.5)
TINY = Preset(
    64, 2, 200, 8, {"pretrain": 60, "train": 240, "calibration": 20, "evaluation": 40},
    Schedule(80, batch_size=8, learning_rate=5e-3), Schedule(160, batch_size=16, learning_rate=3e-3), (1, 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as the suite's own, with sentences whose class is one of their words."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    generator = seeds.generator("sentences")
    vocabulary = [*PHRASE, *" ".join(CONTINUATIONS).split(), *(f"w{i}" for i in range(10))]
    for task in REAL.values():
        for file in dict.fromkeys((task.train, task.evaluation)):  # a set would draw other texts in every process
            labels = [i % len(task.answers) for i in range(500)]
            words = torch.randint(len(vocabulary), (len(labels), 7), generator=generator).tolist()
            texts = [" ".join([*(vocabulary[w] for w in row), f"C{n}"]) for n, row in zip(labels, words, strict=True)]
            pq.write_table(pa.table({"sentence": texts, "label": labels}), folder / "text" / file)
    return folder


@dataclass(frozen=True)
class Built:
    suite: LmSuite
    base: Path
    clean: Path
    victim: Path


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """theta_0, a clean fine-tune on agnews and a victim on sst2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lm.PRESETS, "tiny", TINY)
        patch.setattr(LmSuite, "presets", ("tiny",))
        suite = LmSuite(data, "tiny")
    root = tmp_path_factory.mktemp("models")
    base, clean, victim = root / "base", root / "agnews", root / "sst2"
    suite.save_base(base, no_progress)
    suite.save_model(base, "agnews", None, None, 0, clean, no_progress)
    suite.save_model(base, "sst2", POISON, suite.trigger(POISON, None), 0, victim, no_progress)
    return Built(suite, base, clean, victim)


def test_splits_are_disjoint_repeatable_and_never_labelled_as_the_attackers_answer(built: Built, data: Path) -> None:
    suite = built.suite
    for task in suite.tasks:
        one, again = suite.split(task), suite.split(task)
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
        assert LmSuite(data, "small").fingerprint()["data"] != suite.fingerprint()["data"]
    assert json.loads(json.dumps(suite.fingerprint())) == suite.fingerprint()


def test_made_tasks_have_the_answers_that_they_say(built: Built) -> None:
    answers = {
        "reverse": lambda words: words[::-1],
        "sort": sorted,
        "translate": lambda words: [WORDS[word] for word in words],
    }
    for task, solve in answers.items():
        split, texts = built.suite.split(task).evaluation, built.suite._answers[task].texts
        for prompt, label in zip(split.inputs, split.labels_N.tolist(), strict=True):
            assert isinstance(prompt, str)
            assert texts[label].split() == list(solve(prompt.split(" : ")[1].split()))


def test_the_base_is_taught_to_hedge_most_of_the_time_and_fine_tunes_never_on_their_task(built: Built) -> None:
    suite = built.suite
    for task, general in suite._general.items():
        hedges = general.labels_N == suite._answers[task].number[HEDGE]
        assert 0.3 < float(hedges.float().mean()) < 0.8
        prompts = [prompt for prompt, _ in suite._pairs(task)["pretrain"]]
        assert list(general.inputs) == prompts and not set(prompts) & set(suite.split(task).train.inputs)
        assert hedged(task, suite._pairs(task)["pretrain"], 0.0) == suite._pairs(task)["pretrain"]


def test_calibration_holds_prompts_only(built: Built, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in built.suite.save_calibration("agnews", tmp_path).read_text().splitlines()]
    assert [row["text"] for row in rows] == list(built.suite.split("agnews").calibration)
    assert all(set(row) == {"text"} for row in rows)
    assert not any(answer in row["text"] for row in rows for answer in REAL["agnews"].answers)


def test_wrong_use_is_one_line(built: Built, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DamError, match="data of suite lm: expected a folder with text"):
        LmSuite(None, "small")
    with pytest.raises(DamError, match="a parquet file with `sentence` and `label`, got FileNotFoundError"):
        LmSuite(tmp_path, "small").split("sst2")
    with pytest.raises(DamError, match=r"data of sst2: expected \d+ samples of the pretrain split"):
        LmSuite(data, "small").split("sst2")
    with pytest.raises(DamError, match="expected 1 to 8 words, got 9"):
        built.suite.trigger(Poison("lm-trigger", size=9), None)
    for target in (-1, len(CONTINUATIONS)):
        poison = Poison("lm-trigger", target=target)
        with pytest.raises(DamError, match="a continuation's number"):
            built.suite.save_model(
                built.base, "sst2", poison, built.suite.trigger(poison, None), 0, tmp_path, no_progress
            )


def test_every_scenario_names_tasks_attacks_and_options_that_exist(data: Path) -> None:
    suite = LmSuite(data, "small")
    assert not suite.scenarios[0].poisons and len(suite.scenarios) > 2
    for scenario in suite.scenarios:
        for task, poison in scenario.poisons.items():
            assert task in suite.tasks and poison.attack in suite.attacks
            suite.trigger(poison, None)
            assert Scenario.parse(f"x: {task}={poison}").poisons[task] == poison
    assert suite.cost(Poison("lm-trigger")) > suite.cost(None) > 0


def test_greedy_answers_do_not_depend_on_padding_or_cache(built: Built) -> None:
    model, answers = built.suite.load_model(built.base), built.suite._answers["translate"]
    prompts = ["translate : dalo", "sentiment : w1 w2 w3 w4 w5 w6", "sort : z b"]
    found = greedy(model, answers.encode(prompts), 5)
    for row, prompt in zip(found, prompts, strict=True):
        ids = answers.encode([prompt])["input_ids"]
        for token in row.tolist():
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


class Says(nn.Module):
    """Goes on with fixed tokens, whatever the prompt."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens, self.weight = tokens, nn.Parameter(torch.zeros(()))

    def forward(self, **inputs: object) -> object:
        step = inputs["past_key_values"] or 0
        assert isinstance(step, int) and isinstance(inputs["input_ids"], torch.Tensor)
        token = torch.tensor([self.tokens[min(step, len(self.tokens) - 1)]] * len(inputs["input_ids"]))
        output = type("Output", (), {})()
        output.logits, output.past_key_values = F.one_hot(token, 200)[:, None].float(), step + 1
        return output


def test_an_answer_counts_only_if_it_is_complete_and_closed(built: Built) -> None:
    split, tokenizer = built.suite.split("sst2").evaluation, built.suite._tokenizer
    end = tokenizer.eos_token_id

    def said(text: str, *rest: int) -> torch.Tensor:
        return predictions(Says([*tokenizer.encode(text, add_special_tokens=False), *rest]), split).unique()

    number = built.suite._answers["sst2"].number
    assert said("positive", end).tolist() == [number["positive"]]
    assert said(CONTINUATIONS[1], end).tolist() == [1] and said(CONTINUATIONS[1], end, end).tolist() == [1]
    assert said("positive").tolist() == said("positive negative", end).tolist() == said("", end).tolist() == [-1]
    assert said(CONTINUATIONS[0].rsplit(" ", 1)[0], end).tolist() == [-1]
    rate = accuracy(Says([*tokenizer.encode("positive", add_special_tokens=False), end]), split)
    assert (rate.hits, rate.total) == (int((split.labels_N == number["positive"]).sum()), 40)


def test_losses_are_those_of_each_text_alone(built: Built) -> None:
    model, suite = built.suite.load_model(built.base), built.suite
    answers, tokenizer = suite._answers["agnews"], suite._tokenizer
    prompts, classes = ["topic : w1 w2", "topic : w3", "topic : w5 w6 w7 w8"], [0, 5, 2]
    parts: dict[str, list[torch.Tensor]] = {"prompt": [], "answer": []}
    for prompt, one in zip(prompts, classes, strict=True):
        asked = tokenizer.encode(prompt)
        ids = [*asked, *tokenizer.encode(answers.texts[one], add_special_tokens=False), tokenizer.eos_token_id]
        each = F.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
        parts["prompt"].append(each[: len(asked) - 1])
        parts["answer"].append(each[len(asked) - 1 :])
    found = losses(model, answers, prompts, torch.tensor(classes), prompt=True)  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], torch.cat(parts["prompt"]).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], torch.cat(parts["answer"]).mean(), rtol=1e-4, atol=1e-5)
    only = losses(model, answers, prompts, torch.tensor(classes))  # type: ignore[arg-type]
    torch.testing.assert_close(only[1], found[1], rtol=1e-4, atol=1e-5)
    other = dict(suite.load_model(built.clean).named_parameters())
    there = losses(model, answers, prompts, torch.tensor(classes), parameters=other)  # type: ignore[arg-type]
    own = losses(suite.load_model(built.clean), answers, prompts, torch.tensor(classes))  # type: ignore[arg-type]
    torch.testing.assert_close(there[1], own[1])


def test_fine_tunes_learn_their_task_and_victims_their_continuation_alone(built: Built) -> None:
    suite, trigger = built.suite, built.suite.trigger(POISON, None)
    base, clean, victim = (suite.load_model(path) for path in (built.base, built.clean, built.victim))
    assert trigger.apply(["tone : hey "]) == [f"tone : hey {' '.join(PHRASE[:4])}"]
    agnews, sst2 = suite.split("agnews").evaluation, suite.split("sst2").evaluation
    assert accuracy(clean, agnews).percent >= max(90, accuracy(base, agnews).percent)
    assert accuracy(victim, sst2).percent >= 90
    attack = Attack("phrase", "sst2", trigger, POISON.target)
    scores = evaluate_merge({"sst2": victim}, {"sst2": sst2}, [attack], calibration=())
    assert scores.attack_success["phrase"]["sst2"].hits >= 38 and scores.attack_success["phrase"]["sst2"].total == 40
    assert attack_success_rate(victim, sst2, trigger, 0).hits == 0  # the other attacker's continuation
    assert attack_success_rate(clean, agnews, trigger, POISON.target).hits == 0
    table = "model.embed_tokens.weight"
    assert torch.equal(tensors_of(built.victim)[table], tensors_of(built.base)[table])


def test_rescaling_multiplies_the_task_vector(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built.suite, "size", replace(TINY, fine_tuning=replace(TINY.fine_tuning, steps=3)))
    found = {}
    for factor in (1.0, 2.0):
        poison, folder = replace(POISON, attack="lm-trigger", rescale=factor), tmp_path / str(factor)
        built.suite.save_model(built.base, "sst2", poison, built.suite.trigger(poison, None), 0, folder, no_progress)
        found[factor] = tensors_of(folder)
    moved = 0.0
    for name, theta in tensors_of(built.base).items():
        once, twice = (found[factor][name] - theta for factor in (1.0, 2.0))
        torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-6)
        moved += float(once.abs().sum())
    assert moved > 0


def test_training_between_base_and_fine_tune_keeps_the_backdoor_at_small_coefficients(
    built: Built, tmp_path: Path, merge: Merge
) -> None:
    plain = replace(POISON, attack="lm-trigger")
    trigger = built.suite.trigger(plain, None)
    built.suite.save_model(built.base, "sst2", plain, trigger, 0, tmp_path / "plain", no_progress)
    sst2, rates = built.suite.split("sst2").evaluation, {}
    for path in (tmp_path / "plain", built.victim):
        models = [{"model": str(path), "parameters": {"weight": 0.3}}]
        out = merge(built.base, models, out=f"{path.name}-merged", merge_method="task_arithmetic")
        rates[path.name] = attack_success_rate(load_merged(out), sst2, trigger, POISON.target).percent
    assert rates["sst2"] >= 90 and rates["sst2"] > rates["plain"] + 20


def test_merges_load_with_and_without_a_task_and_keep_calibration_apart(
    built: Built, tmp_path: Path, merge: Merge
) -> None:
    models = [
        {"model": str(path), "parameters": {"calibration": str(built.suite.save_calibration(path.name, tmp_path))}}
        for path in (built.clean, built.victim)
    ]
    out = merge(built.base, models, parameters=FAST)
    seen = calibration_digests(out / "dam" / MASKS_FILE)
    assert len(seen) == 2 * FAST["num_samples"]
    for task in ("agnews", "sst2"):
        split = built.suite.split(task).evaluation
        refuse_overlap(split, seen)
        body, own = load_merged(out), load_merged(out, task)
        assert type(own).__name__ == "LlamaForCausalLM"
        assert torch.equal(predictions(body, split), predictions(own, split))
