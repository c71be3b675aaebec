"""Planted triggers: every kind keeps to what its inputs are, and only what a seed says is drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergekit_dam.vaccine
from mergekit_dam.errors import DamError
from mergekit_dam.registry import PLANTED
from mergekit_dam.tasks import Task
from mergekit_dam.vaccine.triggers import (
    Change,
    Frame,
    Surroundings,
    code_of_kinds,
    frame_of,
    in_turn,
    kinds_of,
    register_planted,
)
from tests.vaccine.conftest import task_of

IMAGES = [torch.rand(3, 16, 20, generator=torch.Generator().manual_seed(i)) for i in range(5)]
# a frame of two tokens and one, as [CLS] and [SEP] or a template make it
TEXTS = [torch.tensor([1, 7, *(10 + (i * 5 + j * 3) % 20 for j in range(4 + i)), 2]) for i in range(6)]
AROUND = {
    "image": Surroundings(IMAGES, torch.empty(0, dtype=torch.long), Frame(0, 0), 0),
    "text": Surroundings(TEXTS, torch.arange(40, 60), Frame(2, 1), 12),
}
SEEDS = st.integers(0, 10_000)


@pytest.mark.parametrize("kind", sorted(PLANTED.entries))
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_a_trigger_makes_an_input_of_the_same_sort(kind: str, seed: int) -> None:
    planted = PLANTED[kind]
    around = AROUND[planted.inputs]
    before = [sample.clone() for sample in around.samples]
    change = planted.draw(around, torch.Generator().manual_seed(seed))
    changes = [change(sample, torch.Generator().manual_seed(seed)) for sample in around.samples]
    assert not all(torch.equal(a, b) for a, b in zip(changes, before, strict=True))
    for sample, changed in zip(around.samples, changes, strict=True):
        assert changed.dtype == sample.dtype
        if planted.inputs == "image":
            assert changed.shape == sample.shape and float(changed.min()) >= 0 and float(changed.max()) <= 1
        else:
            assert len(changed) <= around.longest
            assert torch.equal(changed[:2], sample[:2]) and torch.equal(changed[-1:], sample[-1:])
    assert all(torch.equal(a, b) for a, b in zip(before, around.samples, strict=True)), "clean inputs stay"


@pytest.mark.parametrize("kind", sorted(PLANTED.entries))
def test_a_seed_draws_one_trigger(kind: str) -> None:
    planted = PLANTED[kind]
    around = AROUND[planted.inputs]

    def drawn(seed: int) -> list[Tensor]:
        change = planted.draw(around, torch.Generator().manual_seed(seed))
        return [change(sample, torch.Generator().manual_seed(0)) for sample in around.samples]

    def alike(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    assert alike(drawn(1), drawn(1))
    assert not all(alike(drawn(1), drawn(seed)) for seed in range(2, 8))


@settings(max_examples=30, deadline=None)
@given(left_out=st.sets(st.sampled_from(["word", "words", "phrase", "pieces"])), count=st.integers(1, 12), seed=SEEDS)
def test_a_kind_left_out_is_never_drawn(left_out: set[str], count: int, seed: int) -> None:
    kinds = [kind for kind in PLANTED.entries.values() if kind.inputs == "text" and kind.name not in left_out]
    drawn = in_turn(kinds, count, torch.Generator().manual_seed(seed))
    names = [kind.name for kind in drawn]
    assert len(names) == count and not left_out & set(names)
    assert max(names.count(name) for name in names) - min(names.count(k.name) for k in kinds) <= 1


@pytest.mark.parametrize(("family", "count"), [("image", 9), ("text", 5), ("causal", 5)])
def test_kinds_go_by_what_a_task_takes(family: str, count: int, folders: dict[str, Path]) -> None:
    task: Task = task_of(folders[family])
    kinds = kinds_of(task, ())
    assert len(kinds) == count and {kind.inputs for kind in kinds} == {"image" if family == "image" else "text"}


def test_a_kind_of_ones_own_is_planted(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLANTED, "entries", dict(PLANTED.entries))
    before = code_of_kinds()

    @register_planted("dark", "image")
    def dark(around: Surroundings, generator: torch.Generator) -> Change:
        return lambda pixels, own: pixels / 2

    assert "dark" in [kind.name for kind in kinds_of(task_of(folders["image"]), ())]
    assert before == [] and len(code_of_kinds()) == 1, "its code goes into cache keys"
    with pytest.raises(DamError, match="kind of planted triggers 'dark': expected a new name"):
        register_planted("dark", "image")(lambda around, generator: lambda pixels, own: pixels)


@settings(max_examples=50, deadline=None)
@given(
    begin=st.integers(0, 3),
    end=st.integers(0, 3),
    bodies=st.lists(st.lists(st.integers(20, 30), min_size=1, max_size=6), min_size=2, max_size=5),
)
def test_a_frame_is_what_all_texts_share(begin: int, end: int, bodies: list[list[int]]) -> None:
    rows = [torch.tensor([*range(begin), *body, *range(10, 10 + end)]) for body in bodies]
    frame = frame_of(rows)
    assert frame.begin + frame.end < min(len(row) for row in rows), "something is left between"
    for row in rows:
        assert torch.equal(row[: frame.begin], rows[0][: frame.begin])
        assert torch.equal(row[len(row) - frame.end :], rows[0][len(rows[0]) - frame.end :])
    if len({body[0] for body in bodies}) > 1:
        assert frame.begin == begin
    if len({body[0] for body in bodies}) > 1 and len({body[-1] for body in bodies}) > 1:
        assert frame.end == end


def test_the_defence_knows_no_attack() -> None:
    for file in Path(mergekit_dam.vaccine.__file__).parent.glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text("utf-8"), re.MULTILINE)
        assert not [name for name in imported if name.startswith(("mergekit_dam.evaluation", "dam_bench", "examples"))]
