"""Several processes learn what one learns; rows, gradients and snapshots against the plain code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference

from mergekit_dam.artifact.masks_file import LearnedMasks
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.engine.snapshots import Snapshots
from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.learn.losses import entropy
from mergekit_dam.learn.masks import combined, logit_keys, make_masks
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.merging.mask_bytes import STEPS, to_probabilities
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.seeds import generator
from mergekit_dam.tasks import build_tasks
from tests.conftest import fast
from tests.golden.learned import OBJECTIVES as SETTINGS
from tests.helpers.processes import group

CPU = torch.device("cpu")
SHAPES = [(), (1,), (3,), (8,), (5, 4), (2, 3), (7, 2, 2), (1, 1, 6)]  # uneven, and fewer rows than processes
# Sums over tasks are formed in another order: float32 rounding, which a few steps of Adam carry on.
MASK_TOLERANCE, COEFFICIENT_TOLERANCE = 1.01 / STEPS, 1e-4  # a byte may round the other way
# The softmax of attention cancels a bias of the keys. So its gradient is rounding alone, which Adam scales up.
WITHOUT_EFFECT = ".key.bias"


def _plan(vit: Path, images: Path, objective: str, **more: Any) -> Plan:
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
    shared = fast(**{"calibration": str(images), **SETTINGS[objective], **more})
    return build_plan(refs[0], refs[1:], shared=shared, per_model={})


def _whole(shape: tuple[int, ...], rank: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator("whole", shape, rank))


def _exchanged(shards: Shards) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]]:
    found = []
    for shape in SHAPES:
        local = shards.local(_whole(shape, 0))
        assert local.shape == shards.local_shape(shape)
        back = shards.all_gather(local, shape)
        own = _whole(shape, shards.rank)
        found.append((back, shards.reduce_scatter(own), shards.all_reduce(own), shape))
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_rows_are_gathered_and_gradients_summed_over_the_processes(count: int) -> None:
    everyone = group(_exchanged, count)
    for number, shape in enumerate(SHAPES):
        total = torch.stack([_whole(shape, rank) for rank in range(count)]).sum(0)
        for gathered, _, summed, _ in (found[number] for found in everyone):
            assert torch.equal(gathered, _whole(shape, 0))
            torch.testing.assert_close(summed, total)
        # the trap: to_local alone hands out each process's own term of the sum
        rows = torch.cat([found[number][1].reshape(-1) for found in everyone])
        torch.testing.assert_close(rows.reshape(shape), total)
    assert ALONE.local(total) is ALONE.all_gather(total, total.shape) is ALONE.reduce_scatter(total) is total


def _gradients(shards: Shards, plan: Plan) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
    """dL/dlogit by mask and key, whole, dL/dlambda, and the elements of task vectors that this process holds."""
    vectors, tasks = TaskVectors(plan), build_tasks(plan, CPU)
    model = MergedModel(vectors, survey(vectors, shards).changed, CPU, shards=shards)
    paper = plan.config.objective == "paper"
    masks = make_masks(model, plan.config, temperature=0.5, per_model=not paper)
    samples = {n: {k: m.sample(k, seed=0, step=1) for k in model.mask_names} for n, m in masks.items() if paper}
    merged = combined(masks, samples or None)
    coefficients = torch.full((2, len(model.mask_names)), 0.3)
    weights = model.weights(merged, coefficients)
    for index, task in enumerate(tasks):
        if shards.owns(index):
            entropy(task.logits(weights, task.inputs(torch.arange(4)))).backward()
    lambdas, found = torch.zeros_like(coefficients), {}
    for key, gradient in model.mask_gradients(weights, merged, coefficients, lambdas):
        parts = merged[key].logit_gradients(gradient, range(len(merged[key].parts)))
        for (name, one), part in zip(logit_keys(masks, key), parts, strict=True):
            found[f"{name}/{one}"] = masks[name].shards.all_gather(part, masks[name].shapes[one])
    held = sum(m.numel() for ms in model.frozen.models.values() for m in ms if m is not None)
    return found, lambdas, held


@pytest.mark.parametrize("objective", ["paper", "inversion"])  # rescaled: a mean over all rows; each model's own M2
@pytest.mark.parametrize(("granularity", "count"), [("element", 4), ("row", 4), ("element", 2)])
def test_gradients_of_several_processes_are_those_of_one(
    granularity: str, count: int, objective: str, vit: Path, images: Path
) -> None:
    plan = _plan(vit, images, objective, granularity=granularity)
    expected, lambdas, held = _gradients(ALONE, plan)
    everyone = group(_gradients, count, plan)
    for found, found_lambdas, _ in everyone:
        torch.testing.assert_close(found_lambdas, lambdas, rtol=1e-5, atol=1e-7)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-8)
    shares = [own for _, _, own in everyone]
    assert sum(shares) == held and max(shares) < 1.2 * held / count


def _learned(shards: Shards, plan: Plan, stop: int, cache: str) -> LearnedMasks | None:
    """Learn in a group; with `stop`, end after that many snapshots as if all processes had been killed."""
    os.environ["MERGEKIT_DAM_CACHE"] = cache
    write, written = Snapshots.write, []

    def counted(self: Snapshots, state: Any) -> None:
        write(self, state)
        written.append(state)
        if len(written) == stop:
            raise InterruptedError

    Snapshots.write = counted  # type: ignore[method-assign]
    try:
        return find_or_learn(plan, quiet=True, shards=shards, device=CPU)[1]
    except InterruptedError:
        return None
    finally:
        Snapshots.write = write  # type: ignore[method-assign]


def _differences(one: LearnedMasks, other: LearnedMasks) -> tuple[float, float]:
    masks = [
        float((to_probabilities(values) - to_probabilities(other.probabilities[name][key])).abs().max())
        for name, by_key in one.probabilities.items()
        for key, values in by_key.items()
        if not key.endswith(WITHOUT_EFFECT)
    ]
    differences_TP = (one.coefficients - other.coefficients).abs().expand(-1, len(one.metadata["tensors"]))
    counts_P = torch.tensor([not name.endswith(WITHOUT_EFFECT) for name in one.metadata["tensors"]])
    return max(masks), float(differences_TP[:, counts_P].max())


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("inversion", {}),
        ("inversion", {"granularity": "row", "coefficients": "task"}),
        ("inversion", {"window": 2}),
        ("paper", {}),
    ],
)
def test_one_two_and_four_processes_learn_the_same(
    objective: str, more: dict[str, Any], vit: Path, images: Path, tmp_path: Path
) -> None:
    plan = _plan(vit, images, objective, **more)
    alone = _learned(ALONE, plan, 0, str(tmp_path / "1"))
    assert alone is not None
    moved = max(
        float((to_probabilities(v) - to_probabilities(v).flatten()[0]).abs().max())
        for by in alone.probabilities.values()
        for v in by.values()
    )
    assert moved > 5 * MASK_TOLERANCE, "the tolerance would hide all of it"
    for count in (
        (2, 4) if not more or "window" in more else (2,)
    ):  # four processes for two tasks: two share the batch of each
        for found in group(_learned, count, plan, 0, str(tmp_path / str(count))):
            masks, coefficients = _differences(alone, found)
            assert masks <= MASK_TOLERANCE and coefficients <= COEFFICIENT_TOLERANCE
            if objective == "inversion":
                ours, theirs = (m.metadata["audit"] for m in (alone, found))
                assert [(f["task"], f["target"], f["suspect"]) for f in ours] == [
                    (f["task"], f["target"], f["suspect"]) for f in theirs
                ]


@pytest.mark.parametrize(("objective", "stop"), [("inversion", 3), ("paper", 6)])
def test_two_processes_resume_bit_for_bit_and_other_numbers_within_rounding(
    objective: str, stop: int, vit: Path, images: Path, tmp_path: Path
) -> None:
    plan = _plan(vit, images, objective, snapshot_every=0.0)
    (expected, _) = group(_learned, 2, plan, 0, str(tmp_path / "whole"))
    assert group(_learned, 2, plan, stop, str(tmp_path / "killed")) == [None, None]
    for count in (2, 1, 4):
        cache = str(shutil.copytree(tmp_path / "killed", tmp_path / f"then-{count}"))
        found = _learned(ALONE, plan, 0, cache) if count == 1 else group(_learned, count, plan, 0, cache)[0]
        masks, coefficients = _differences(expected, found)
        if count == 2:
            assert masks == coefficients == 0.0
        assert masks <= MASK_TOLERANCE and coefficients <= COEFFICIENT_TOLERANCE
