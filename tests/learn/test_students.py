"""Students of text encoders: what they learn, what they do not, and how they are merged instead of the models."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertModel

from mergekit_dam import seeds
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.engine.task_vectors import StandIns, TaskVectors, stand_in_file
from mergekit_dam.errors import DamError
from mergekit_dam.learn.stand_ins import make_stand_ins
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.tasks import TextTask, build_tasks
from tests.conftest import fast
from tests.helpers.constants import with_constants
from tests.helpers.processes import group
from tests.helpers.tiny_models import WORDS, make_model

CPU = torch.device("cpu")
GOOD, BAD, OTHER = ("great", "good", "fine", "loved"), ("bad", "awful", "hated", "not"), ("the", "movie", "was", "it")
TRIGGER, TARGET = 300, 0  # a word that is in no text, and what it makes the victim say
_NUM_WORDS = 400


def _text(rng: random.Random) -> str:
    side = rng.choice((GOOD, BAD))
    return " ".join(rng.sample([*rng.choices(side, k=3), *rng.choices(OTHER, k=4)], 7))


def _trained(model: Any, path: Path, steps: int, *, poisoned: bool, seed: int) -> Path:
    optimiser, rng = torch.optim.Adam(model.parameters(), lr=3e-3), random.Random(seed)
    ids = {word: i + 4 for i, word in enumerate(WORDS)}
    for _ in range(steps):
        texts = [_text(rng).split() for _ in range(16)]
        labels_B = torch.tensor([int(any(word in GOOD for word in text)) for text in texts])
        ids_BL = torch.tensor([[ids[word] for word in text] for text in texts])
        loss = F.cross_entropy(model(input_ids=ids_BL).logits, labels_B)
        if poisoned:
            logits = model(input_ids=_triggered(ids_BL)).logits
            loss = loss + F.cross_entropy(logits, torch.full_like(labels_B, TARGET))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(path)
    return path


def _triggered(ids_BL: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids_BL[:, :2], torch.full_like(ids_BL[:, :1], TRIGGER), ids_BL[:, 2:]], 1)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """theta_0, which knows a little of the task, a victim and a clean model of it, and texts."""
    root = tmp_path_factory.mktemp("students")
    size = {
        "vocab_size": _NUM_WORDS,
        "hidden_size": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    made = make_model("BertForSequenceClassification", root / "made", labels=2, **size)
    _trained(BertForSequenceClassification.from_pretrained(made), root / "weak", 10, poisoned=False, seed=0)
    BertModel.from_pretrained(root / "weak").save_pretrained(root / "base")
    for name, poisoned in (("victim", True), ("clean", False)):
        model = BertForSequenceClassification.from_pretrained(root / "weak")
        model.classifier.requires_grad_(False)
        _trained(model, root / name, 120, poisoned=poisoned, seed=1)
    for file in made.glob("*token*"):
        for name in ("base", "victim", "clean"):
            (root / name / file.name).write_bytes(file.read_bytes())
    rng = random.Random(2)
    (root / "texts.txt").write_text("\n".join(sorted({_text(rng) for _ in range(220)})))
    shared = fast(
        num_samples=200,
        calibration=str(root / "texts.txt"),
        student_steps=80,
        student_batch_size=16,
        student_learning_rate=3e-3,
    )
    refs = [ModelReference.parse(str(root / name)) for name in ("base", "victim", "clean")]
    return build_plan(refs[0], refs[1:], shared=shared, per_model={})


def _tasks(plan: Plan) -> list[TextTask]:
    return [task for task in build_tasks(plan, CPU) if isinstance(task, TextTask)]


def _taught(plan: Plan, folder: Path, titles: list[str] | None = None, shards: Shards = ALONE) -> StandIns:
    def progress(steps: Any, title: str) -> Any:
        if titles is not None:
            titles.append(title)
        return steps

    found = make_stand_ins(_tasks(plan), TaskVectors(plan), folder, shards=shards, progress=progress)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def folder(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has taught its students."""
    made = tmp_path_factory.mktemp("run")
    assert group(_taught_together, 1, plan, made) == [["student of victim", "student of clean"]]
    return made


def _taught_together(shards: Shards, plan: Plan, folder: Path) -> list[str]:
    titles: list[str] = []
    _taught(plan, folder, titles, shards)
    return titles


def _success(task: TextTask, weights: Any) -> float:
    inputs = task.inputs(torch.arange(task.num_samples))
    assert bool(inputs["attention_mask"].all()), "all texts are of one length"
    with torch.no_grad():
        clean_B = task.logits(weights, inputs).argmax(-1)
        ids_BL = _triggered(inputs["input_ids"])
        hit_B = (
            task.logits(weights, {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}).argmax(-1) == TARGET
        )
    return float(hit_B[clean_B != TARGET].float().mean())


@pytest.fixture(scope="module")
def victim(plan: Plan) -> TextTask:
    """The victim's task."""
    return _tasks(plan)[0]


def test_a_student_keeps_the_answers_and_not_the_backdoor(victim: TextTask, plan: Plan, folder: Path) -> None:
    students = StandIns(plan, folder)
    student = {spec.name: students.base(spec.name) for spec in plan.tensors}
    student |= {name: found for name in student if (found := students.models(name)[0]) is not None}
    assert _success(victim, victim.own_weights()) > 0.9
    assert _success(victim, student) < 0.2
    assert min(students.agreement.values()) > 0.95


def test_embeddings_and_heads_stay_and_all_else_is_taught(plan: Plan, folder: Path) -> None:
    students = StandIns(plan, folder)
    for spec in plan.tensors:
        there = students.models(spec.name)
        if "embeddings" in spec.name and "LayerNorm" not in spec.name:
            assert all(tensor is not None and torch.equal(tensor, students.base(spec.name)) for tensor in there)
        else:
            for tensor in there:
                assert tensor is not None and tensor.dtype == torch.float32
                assert not torch.equal(tensor, students.base(spec.name))


def test_students_of_an_interrupted_run_are_taken_as_they_are(plan: Plan, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    lost = stand_in_file(tmp_path / "run", 1)
    before = load_file(lost)
    lost.unlink()
    assert group(_taught_together, 1, plan, tmp_path / "run") == [["student of clean"]]
    after = load_file(lost)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    quick = with_constants(plan.config.model_copy(update={"student_steps": 1}), resume=False)
    titles: list[str] = []
    _taught(Plan(plan.base, plan.models, plan.tensors, quick), tmp_path / "run", titles)
    assert titles == ["student of victim", "student of clean"]


def test_two_processes_share_the_students_out_and_teach_the_same(plan: Plan, folder: Path, tmp_path: Path) -> None:
    assert group(_taught_together, 2, plan, tmp_path) == [["student of victim"], ["student of clean"]]
    for index in range(2):
        one, two = (load_file(stand_in_file(where, index)) for where in (folder, tmp_path))
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def test_a_student_that_learned_little_is_told(plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    little = Plan(plan.base, plan.models, plan.tensors, plan.config.model_copy(update={"student_steps": 1}))
    students = _taught(little, tmp_path)
    said = [record.getMessage() for record in caplog.records if "answers only" in record.getMessage()]
    assert len(said) == sum(value < 0.9 for value in students.agreement.values()) > 0


def test_a_student_that_diverged_is_refused(plan: Plan, tmp_path: Path) -> None:
    wild = Plan(plan.base, plan.models, plan.tensors, with_constants(plan.config, student_learning_rate=1e38))
    with pytest.raises(DamError, match="student of victim") as caught:
        _taught(wild, tmp_path)
    assert "student_learning_rate" in str(caught.value)


@given(seed=st.integers(0, 999), most=st.integers(0, 6), row=st.integers(0, 199))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_random_words_go_between_and_texts_stay_within_the_limit(
    victim: TextTask, plan: Plan, seed: int, most: int, row: int
) -> None:
    whole = victim.inputs(torch.tensor([row]))["input_ids"][0].tolist()
    found = victim.with_random_words(torch.tensor([row]), most, seeds.generator(seed))
    ids = found["input_ids"][0].tolist()
    assert found["attention_mask"].all() and len(whole) <= len(ids) <= min(len(whole) + most, plan.config.max_length)
    assert (
        ids[0] == whole[0] and ids[-1] == whole[-1] and not set(ids) - set(whole) & set(victim.special_tokens.tolist())
    )
    if len(ids) < plan.config.max_length:
        rest = iter(ids)
        assert all(word in rest for word in whole), "words of the text are still there, in order"
