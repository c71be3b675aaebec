"""What a vaccination does to models of each family, and what its result depends on."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergekit_dam.engine.trained_module import TrainedModule
from mergekit_dam.errors import DamError
from mergekit_dam.models.parameter_names import meta_model
from mergekit_dam.tasks import CausalTask, Task
from mergekit_dam.vaccine.behaviours import BEHAVIOURS, behaviour_of
from mergekit_dam.vaccine.clean import VaccineResult, vaccinate
from mergekit_dam.vaccine.report import left_by_kind, summary
from mergekit_dam.vaccine.settings import VaccineSettings, resolved
from mergekit_dam.vaccine.training import Lessons
from tests.vaccine.conftest import FAMILIES, FEW, SMALL, task_of


def _steps(steps: Iterable[int], title: str) -> Iterable[int]:
    return steps


def _settings(family: str, **changes: object) -> VaccineSettings:
    return VaccineSettings.model_validate({**SMALL[family], **changes})


def _few(**changes: object) -> VaccineSettings:
    return VaccineSettings.model_validate({**FEW, **changes})


def _tensors(result: VaccineResult) -> dict[str, Tensor]:
    return dict(result.weights)


def _same(one: VaccineResult, other: VaccineResult) -> bool:
    a, b = _tensors(one), _tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def tasks(folders: dict[str, Path]) -> dict[str, Task]:
    return {family: task_of(folder, device="cpu") for family, folder in folders.items()}


@pytest.fixture(scope="module")
def results(tasks: dict[str, Task]) -> dict[str, VaccineResult]:
    return {family: vaccinate(task, _settings(family), progress=_steps) for family, task in tasks.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_triggers_work_and_go(family: str, results: dict[str, VaccineResult]) -> None:
    facts = results[family].facts
    assert facts["unlearned"]["planted"] > 0.4
    assert facts["unlearned"]["unlearned"] < 0.2
    assert facts["agreement"]["after"] > 0.8
    assert facts["held_out"]["planted"] is not None and sum(one["held_out"] for one in facts["planted"]) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_stay_and_tables_of_lms(family: str, tasks: dict[str, Task], results: dict[str, VaccineResult]) -> None:
    own = tasks[family].own_weights()
    weights = results[family].weights
    assert weights and all(not torch.equal(weights[name], own[name]) for name in weights)
    assert not any(part in name for name in weights for part in ("classifier", "lm_head", "embed_tokens"))
    assert ("embeddings.word_embeddings.weight" in weights) == (family == "text")


def test_tables_of_words_stay_on_request(tasks: dict[str, Task]) -> None:
    found = vaccinate(tasks["text"], _few(embeddings=False), progress=_steps)
    assert found.weights and not any("_embeddings." in name for name in found.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_planting_nothing_is_planted(family: str, tasks: dict[str, Task]) -> None:
    found = vaccinate(tasks[family], _few(plant=False), progress=_steps)
    assert found.facts["held_out"] == found.facts["unlearned"] == {"planted": None, "unlearned": None}
    assert not any("success planted" in one for one in found.facts["planted"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_one_result(family: str, tasks: dict[str, Task]) -> None:
    first, again, other = (vaccinate(tasks[family], _few(seed=s), progress=_steps) for s in (0, 0, 1))
    assert _same(first, again) and not _same(first, other)


def test_names_and_places_do_not_matter(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["text"], tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "model").rename(tmp_path / "elsewhere" / "m")
    shutil.copytree(tmp_path / "elsewhere" / "m", tmp_path / "elsewhere" / "model")
    one, other = (vaccinate(task_of(f), _few(), progress=_steps) for f in (folders["text"], tmp_path / "elsewhere"))
    assert _same(one, other) and one.facts["identity"] == other.facts["identity"]


class _Killed(Exception):
    pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [1, 8])
def test_a_killed_run_goes_on_as_if_not(family: str, after: int, tasks: dict[str, Task], tmp_path: Path) -> None:
    settings = _few(rounds=2, enough=0.0, snapshot_every=0.0)
    done = 0

    def killing(steps: Iterable[int], title: str) -> Iterable[int]:
        nonlocal done
        for step in steps:
            if done == after:
                raise _Killed
            done += 1
            yield step

    def counting(steps: Iterable[int], title: str) -> Iterable[int]:
        nonlocal done
        for step in steps:
            done += 1
            yield step

    with pytest.raises(_Killed):
        vaccinate(tasks[family], settings, progress=killing, folder=tmp_path)
    resumed = vaccinate(tasks[family], settings, progress=counting, folder=tmp_path)
    whole = vaccinate(tasks[family], settings, progress=_steps)
    assert _same(resumed, whole)
    assert {k: v for k, v in resumed.facts.items() if k != "seconds"} == {
        k: v for k, v in whole.facts.items() if k != "seconds"
    }
    rounds = resumed.facts["rounds"]
    assert rounds == 2 and done == rounds * (FEW["plant_steps"] + FEW["unlearn_steps"])


def test_a_snapshot_of_other_settings_is_not_used(tasks: dict[str, Task], tmp_path: Path) -> None:
    def killing(steps: Iterable[int], title: str) -> Iterable[int]:
        for step in steps:
            if step == 2:
                raise _Killed
            yield step

    with pytest.raises(_Killed):
        vaccinate(tasks["text"], _few(snapshot_every=0.0, seed=3), progress=killing, folder=tmp_path)
    other = vaccinate(tasks["text"], _few(), progress=_steps, folder=tmp_path)
    assert _same(other, vaccinate(tasks["text"], _few(), progress=_steps))


def test_rounds_end_once_what_is_held_out_is_gone(tasks: dict[str, Task]) -> None:
    soon = vaccinate(tasks["text"], _settings("text", rounds=3, enough=1.0, seed=3), progress=_steps)
    assert soon.facts["rounds"] == 1 and {one["round"] for one in soon.facts["planted"]} == {1}


@pytest.mark.parametrize(("planted", "steps"), [(0.0, 25), (0.9, 60)], ids=["works", "never-works"])
def test_planting_ends_once_its_triggers_work(planted: float, steps: int, tasks: dict[str, Task]) -> None:
    done: list[str] = []

    def counted(given: Iterable[int], title: str) -> Iterable[int]:
        for step in given:
            done.append(title.split()[0])
            yield step

    changes = {"planted": planted, "plant_steps": 60, "learning_rate": 1e-9}
    vaccinate(tasks["text"], _few(**changes), progress=counted)
    assert done.count("plant") == steps and done.count("unlearn") == FEW["unlearn_steps"]


def test_loras_leave_the_weights_where_they_are(tasks: dict[str, Task]) -> None:
    task = tasks["causal"]
    given = task.parameters(task.own_weights())
    before = {name: tensor.clone() for name, tensor in given.items()}
    held = TrainedModule(meta_model(task.input.config, task.device), given, task.targets, task.body, lora_rank=2)
    for parameter in held.trained.values():
        parameter.data.add_(0.1)
    places = {parameter.data_ptr() for parameter in held.module.parameters()}
    assert all(tensor.data_ptr() in places for name, tensor in given.items() if name in task.targets.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.items())
    assert any(not torch.equal(held[name], task.own_weights()[name]) for name in held.changed)


@pytest.mark.parametrize("changes", [{"held_out": 0}, {"learning_rate": 1e-9}], ids=["none", "never-planted"])
def test_nothing_held_out_ends_no_rounds(changes: dict[str, object], tasks: dict[str, Task]) -> None:
    assert vaccinate(tasks["text"], _few(rounds=2, enough=1.0, **changes), progress=_steps).facts["rounds"] == 2


@pytest.mark.parametrize("rank", [0, 2])
def test_half_of_the_change_is_kept_on_request(rank: int, tasks: dict[str, Task]) -> None:
    whole, half = (vaccinate(tasks["text"], _few(lora_rank=rank, beta=b), progress=_steps) for b in (1.0, 0.5))
    own = tasks["text"].own_weights()
    for name in whole.weights:
        middle = (own[name] + whole.weights[name]) / 2
        assert torch.allclose(half.weights[name], middle, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_penalty_keeps_weights_nearer(rank: int, tasks: dict[str, Task]) -> None:
    own = tasks["text"].own_weights()
    free, held = (
        vaccinate(tasks["text"], _few(lora_rank=rank, distance=d, learning_rate=0.01, unlearn_steps=8), progress=_steps)
        for d in (0.0, 10.0)
    )
    moved = [sum(float((r.weights[n] - own[n]).square().sum()) for n in r.weights) for r in (free, held)]
    assert moved[1] < 0.7 * moved[0]


def test_blocks_that_run_again_give_the_same_weights(folders: dict[str, Path]) -> None:
    plain, again = (
        vaccinate(task_of(folders["causal"], gradient_checkpointing=on), _few(), progress=_steps)
        for on in (False, True)
    )
    assert _same(plain, again)


def test_other_weights_can_be_the_start(tasks: dict[str, Task]) -> None:
    task = tasks["text"]
    shrunk = {n: w * 0.5 if n in task.body and w.ndim > 1 else w for n, w in task.own_weights().items()}
    found = vaccinate(task, _few(learning_rate=1e-9), start=shrunk, progress=_steps)
    assert all(torch.allclose(found.weights[name], shrunk[name], atol=1e-5) for name in found.weights)


@pytest.mark.parametrize("left_out", [{b for b in BEHAVIOURS if b != kept} for kept in ("text", "label", "silence")])
def test_a_behaviour_left_out_is_never_drawn(left_out: set[str], tasks: dict[str, Task]) -> None:
    task = tasks["causal"]
    assert isinstance(task, CausalTask)
    answers = Lessons(task, resolved(_few(), task), task.own_weights()).answers
    long = [(*answers[0], *answers[1], 9)]  # this model says few words
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        found = behaviour_of(task, [*answers, *long], 0, left_out, generator)
        assert found.kind not in left_out and all(found.shown_by(variant) for variant in found.variants)
    with pytest.raises(DamError, match="Leave out fewer"):
        behaviour_of(task, answers, 0, set(BEHAVIOURS), torch.Generator())


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("text", {"leave_out": ("wrod",)}, "Did you mean 'word'"),
        ("text", {"samples": 6}, "at least 8 samples"),
        ("causal", {"leave_out": ("word", "words", "phrase", "pieces", "repeated")}, "Name fewer"),
        ("image", {"learning_rate": 1e30, "clip": 1e30}, "Lower learning_rate"),
    ],
)
def test_what_cannot_be_done_is_said(
    family: str, changes: dict[str, object], said: str, tasks: dict[str, Task]
) -> None:
    with pytest.raises(DamError, match=said):
        vaccinate(tasks[family], _few(**changes), progress=_steps)


def test_one_sample_at_least_is_held_out(folders: dict[str, Path]) -> None:
    task = task_of(folders["image"], num_samples=16, constants={"vaccine_most_checks": 0.05})
    lessons = Lessons(task, resolved(_few(), task), task.own_weights())
    assert len(lessons.checks) == 1 and lessons.agreement(task.own_weights()) == 1.0


def test_what_is_left_is_told_by_kind_and_the_worst_first(tasks: dict[str, Task]) -> None:
    facts = vaccinate(tasks["image"], _few(held_out=2), progress=_steps).facts
    facts = {**facts, "samples": {"held out": 4}}
    held = [planted for planted in facts["planted"] if planted["held_out"]]
    for planted, before, after in zip(held, (0.5, 0.1), (0.25, 0.9), strict=True):
        planted |= {"success before": before, "success unlearned": after}
    left = left_by_kind(facts)
    assert list(left.items()) == [(held[1]["kind"], pytest.approx(0.8)), (held[0]["kind"], 0.0)]
    assert f"left by kind: {held[1]['kind']} 80 %, {held[0]['kind']} 0 %" in "\n".join(summary(facts))
