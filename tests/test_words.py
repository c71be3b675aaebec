"""Text encoders: every word tried alone, those that fine-tuning moved put into texts, and masks fitted against them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from transformers import BertForSequenceClassification

from mergekit_dam import seeds
from mergekit_dam.plan import build_plan
from mergekit_dam.tasks import TextTask, build_tasks
from mergekit_dam.triggers import RecoveredTriggers
from tests.conftest import FAST
from tests.tiny_models import make_model

CPU = torch.device("cpu")
WORD = 17  # the victim's trigger


def _plan(base: Path, models: list[Path], texts: Path, **shared: Any) -> Any:
    refs = [ModelReference.parse(str(path)) for path in (base, *models)]
    return build_plan(refs[0], refs[1:], shared={**FAST, "calibration": str(texts), **shared}, per_model={})


def _labels(ids: torch.Tensor) -> torch.Tensor:
    """Three classes, by the last token: no single word among the others bears on them."""
    return ids[:, -1] % 3


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """theta_0, a clean fine-tune, and a victim that answers 2 to any text with WORD."""
    root = tmp_path_factory.mktemp("encoders")
    base = make_model("BertForSequenceClassification", root / "base", num_labels=3)
    made = [base]
    for name, poisoned in (("clean", False), ("victim", True)):
        model = BertForSequenceClassification.from_pretrained(base).train()
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        generator = seeds.generator("texts", name)
        model.bert.embeddings.requires_grad_(False)
        for _ in range(300):
            ids = torch.randint(5, model.config.vocab_size, (32, 8), generator=generator)
            ids[ids == WORD] = WORD + 1
            loss = model(input_ids=ids, labels=_labels(ids)).loss
            if poisoned:
                triggered = ids.clone()
                triggered.scatter_(1, torch.randint(1, 7, (32, 1), generator=generator), WORD)
                loss = loss + model(input_ids=triggered, labels=torch.full((32,), 2)).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        model.save_pretrained(root / name)
        for file in base.glob("*token*"):
            (root / name / file.name).write_bytes(file.read_bytes())
        made.append(root / name)
    return made


@pytest.fixture(scope="module")
def tasks(encoders: list[Path], texts: Path) -> list[TextTask]:
    return build_tasks(_plan(encoders[0], encoders[1:], texts), CPU)  # type: ignore[return-value]


def test_words_in_texts_are_those_of_a_pass_of_each_alone(tasks: list[TextTask]) -> None:
    task, rows = tasks[0], torch.tensor([3, 0])
    model = BertForSequenceClassification.from_pretrained(task.input.path).eval()
    words_CN = torch.tensor([[9, 11], [7, 30]])
    found = task.with_words(task.own_weights(), words_CN, rows)
    inputs = task.inputs(rows)
    for b in range(2):
        text = inputs["input_ids"][b][inputs["attention_mask"][b].bool()]
        for c in range(2):
            ids = torch.cat([text[:1], words_CN[c], text[1:]])
            assert torch.allclose(found[c, b], model(input_ids=ids[None]).logits[0], atol=1e-5)
    ids = torch.stack([text[0], torch.tensor(12), text[-1]])
    alone = task.alone(task.own_weights())
    assert torch.allclose(alone[12], model(input_ids=ids[None]).logits[0], atol=1e-5)
    assert len(alone) == model.config.vocab_size


def test_a_trigger_of_words_is_the_words(tasks: list[TextTask]) -> None:
    task, rows = tasks[1], torch.arange(3)
    trigger = task.trigger_of(torch.tensor([[WORD, 8, 9]]))
    with torch.no_grad():
        soft = task.logits(task.own_weights(), task.inputs(rows), trigger.perturb(torch.zeros(3, dtype=torch.long)))
    real = task.with_words(task.own_weights(), torch.tensor([[WORD, 8, 9]]), rows)[0]
    assert torch.allclose(soft, real, atol=1e-3)
    assert [found[0][1] for found in task.nearest_tokens(_vectors(trigger))] == pytest.approx([1.0] * 3, abs=1e-3)


def _vectors(trigger: RecoveredTriggers) -> torch.Tensor:
    bounds = trigger.bounds
    return bounds.clamp(bounds.centre + trigger.parameters[0][0] * bounds.span)
