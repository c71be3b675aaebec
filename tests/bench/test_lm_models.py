"""Models of the `lm` suite: greedy answers, losses, victims, and merges of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dam_bench.suites.base import Poison, no_progress
from dam_bench.suites.lm import LmSuite
from dam_bench.suites.lm_data import CONTINUATIONS, PHRASE, greedy
from dam_bench.suites.lm_training import losses

from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.metrics import (
    Attack,
    accuracy,
    attack_success_rate,
    calibration_digests,
    evaluate_merge,
    predictions,
    refuse_overlap,
)
from mergekit_dam.models.load_merged import load_merged
from tests.conftest import FAST, Merge
from tests.helpers.lm_suite import TINY
from tests.helpers.merging import tensors_of

POISON = Poison("merge-aware", target=1, rate=0.5)


@dataclass(frozen=True)
class Built:
    suite: LmSuite
    base: Path
    clean: Path
    victim: Path


@pytest.fixture(scope="module")
def built(lm_suite: LmSuite, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """theta_0, a clean fine-tune on agnews and a victim on sst2."""
    root = tmp_path_factory.mktemp("models")
    base, clean, victim = root / "base", root / "agnews", root / "sst2"
    lm_suite.save_base(base, no_progress)
    lm_suite.save_model(base, "agnews", None, None, 0, clean, no_progress)
    lm_suite.save_model(base, "sst2", POISON, lm_suite.trigger(POISON, None), 0, victim, no_progress)
    return Built(lm_suite, base, clean, victim)


def test_a_target_that_is_no_continuation_is_refused(built: Built, tmp_path: Path) -> None:
    for target in (-1, len(CONTINUATIONS)):
        poison = Poison("lm-trigger", target=target)
        trigger = built.suite.trigger(poison, None)
        with pytest.raises(DamError, match="a continuation's number"):
            built.suite.save_model(built.base, "sst2", poison, trigger, 0, tmp_path, no_progress)


def test_greedy_answers_do_not_depend_on_padding_or_cache(built: Built) -> None:
    model, answers = built.suite.load_model(built.base), built.suite._answers["translate"]
    prompts = ["translate : dalo", "sentiment : w1 w2 w3 w4 w5 w6", "sort : z b"]
    found = greedy(model, answers.encode(prompts), 5)
    for row, prompt in zip(found, prompts, strict=True):
        ids = answers.encode([prompt])["input_ids"]
        for token in row.tolist():
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


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
