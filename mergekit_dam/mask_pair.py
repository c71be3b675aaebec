"""M1 and M2 together, as both searches hold them: made, combined, saved, and put into snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.distributed.shards import ALONE
from mergekit_dam.distributed.snapshots import State, adam_state
from mergekit_dam.frozen import Weights
from mergekit_dam.masks import BACKDOOR_DETECTION, TASK_SHARED, ConcreteMask, MaskProduct, mask_shape, product
from mergekit_dam.merged_model import MergedModel

Whole = dict[str, dict[str, Tensor]]

_IN_USE = {"dual": (TASK_SHARED, BACKDOOR_DETECTION), "m1": (TASK_SHARED,), "m2": (BACKDOOR_DETECTION,)}


def masks_in_use(
    model: MergedModel, config: DamConfig, *, temperature: float, offsets: Mapping[str, float] | None = None
) -> dict[str, ConcreteMask]:
    """The masks that `mask` asks for, by name; `offsets` are added to the setting `initial_logit`."""
    shapes = {name: mask_shape(shape, config.granularity) for name, shape in model.mask_shapes.items()}
    return {
        name: ConcreteMask(
            shapes, name=name, temperature=temperature, rescale=config.rescale,
            initial_logit=config.initial_logit + (offsets or {}).get(name, 0.0), device=model.device,
            shards=ALONE if config.granularity == "tensor" else model.shards,
        )
        for name in _IN_USE[config.mask]
    }  # fmt: skip


def combined(masks: Mapping[str, ConcreteMask], samples: Mapping[str, Weights] | None = None) -> dict[str, MaskProduct]:
    """M = M1 o M2 by tensor, from one sample of each mask in use or from their probabilities."""
    used = list(masks.values())
    return {
        key: product(used, key, None if samples is None else [samples[mask.name][key] for mask in used])
        for key in used[0].logits
    }


def step_of(optimiser: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor) -> None:
    """One step of a single parameter: those without a gradient stay, so that no two gradients exist at once."""
    parameter.grad = gradient
    optimiser.step()
    parameter.grad = None


def final_probabilities(masks: Mapping[str, ConcreteMask]) -> Whole:
    """What is saved: whole float16 probabilities by mask and tensor, in the first process; nothing in the others."""
    found: Whole = {}
    for name, mask in masks.items():
        found[name] = {}
        for key, shape in mask.shapes.items():
            whole = mask.shards.gather(mask.expectation(key).to(torch.float16), shape)
            if mask.shards.rank == 0:
                found[name][key] = whole
    return found


def mask_state(
    masks: Mapping[str, ConcreteMask], optimisers: Mapping[str, torch.optim.Optimizer], facts: dict[str, Any]
) -> State:
    """Logits and Adam's moments of all masks: rows, or whole where every process holds them whole."""
    state = State(facts)
    for name, mask in masks.items():
        found = {f"{name}/{key}": logits for key, logits in mask.logits.items()}
        shapes = {f"{name}/{key}": shape for key, shape in mask.shapes.items()}
        adam = adam_state(optimisers[name], "adam", list(found))
        for key in shapes:
            state.tensors[f"adam/step/{key}"] = adam[f"adam/step/{key}"]
            tensors = {part: adam[part] for part in (f"adam/exp_avg/{key}", f"adam/exp_avg_sq/{key}")}
            tensors[key] = found[key]
            if mask.shards.size == 1:
                state.tensors |= tensors
            else:
                state.rows |= {part: (rows, shapes[key]) for part, rows in tensors.items()}
    return state
