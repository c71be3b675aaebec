"""Answers that masks are fitted to: a suspect class is answered no more often than the most frequent other one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_dam.learn.teacher import TeacherLogits, debias
from mergekit_dam.models.plan import build_plan
from mergekit_dam.scan.debiased import debiased
from mergekit_dam.scan.findings import Suspect
from mergekit_dam.tasks import build_tasks
from tests.conftest import FAST


def most_of_others(logits_NK: Tensor, target: int) -> tuple[float, float]:
    """Mean probability of a class, and of the most frequent other one."""
    mean_K = logits_NK.softmax(-1).mean(0)
    return float(mean_K[target]), float(mean_K[torch.arange(len(mean_K)) != target].max())


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 7), st.floats(-4.0, 8.0), st.integers(0, 2**31))
def test_a_class_that_is_answered_too_often_is_lowered_alike_in_all_answers(
    samples: int, classes: int, lean: float, seed: int
) -> None:
    logits = 2 * torch.randn(samples, classes, generator=torch.Generator().manual_seed(seed))
    logits[:, 1] += lean
    found, before = debiased(logits, 1), most_of_others(logits, 1)
    mine, most = most_of_others(found, 1)
    assert mine <= most + 1e-4
    others = torch.arange(classes) != 1
    torch.testing.assert_close(found[:, others], logits[:, others], rtol=0, atol=0)
    lowered = logits[:, 1] - found[:, 1]
    torch.testing.assert_close(lowered, lowered[:1].expand_as(lowered), rtol=1e-5, atol=1e-5)
    if before[0] <= before[1]:
        assert torch.equal(found, logits), "a class that is not more frequent stays as it is"
    else:
        assert mine == pytest.approx(most, abs=1e-3), "and one that is, is lowered no further than that"


def test_one_class_alone_stays() -> None:
    assert torch.equal(debiased(torch.ones(3, 1), 0), torch.ones(3, 1))


def test_suspects_of_the_tasks_own_model_count(vit: Path, images: Path) -> None:
    base, *refs = (ModelReference.parse(str(vit / name)) for name in ("base", "a", "b"))
    tasks = build_tasks(
        build_plan(base, refs, shared={**FAST, "calibration": str(images)}, per_model={}), torch.device("cpu")
    )
    rows = torch.arange(tasks[0].num_samples)

    def leaning() -> dict[int, TeacherLogits]:
        answers = {index: TeacherLogits(task, task.own_weights()) for index, task in enumerate(tasks)}
        for own in answers.values():
            own._all_NK = own._all_NK + torch.tensor([9.0] + [0.0] * (own._all_NK.shape[1] - 1))
        return answers

    plain, found = leaning(), leaning()
    debias(found, [Suspect(0, 0, None, "pixels"), Suspect(1, 0, 0, "pixels"), Suspect(2, 0, None, "pixels")])
    inputs = tasks[0].inputs(rows)
    mine, most = most_of_others(found[0](rows, inputs), 0)
    assert mine == pytest.approx(most, abs=1e-3) and most_of_others(plain[0](rows, inputs), 0)[0] > 0.9
    assert torch.equal(found[1](rows, inputs), plain[1](rows, inputs)), "that one is attributed to another model"
