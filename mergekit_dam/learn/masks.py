"""Concrete (Gumbel-sigmoid) masks over the task vectors (arXiv 1611.00712), one logit per masked unit.

Two masks, Task-Shared (M1) and Backdoor-Detection (M2), give the mask M = M1 o M2 of the merge equation
(DAM, arXiv 2410.13910). Keys are checkpoint tensor names. `density` is the kept fraction, the mean of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.engine.snapshots import State, adam_state
from mergekit_dam.merging.checks import finite_flags, require_flags
from mergekit_dam.merging.foreach import groups, sums_of_sigmoids
from mergekit_dam.merging.mask_bytes import to_bytes, to_probabilities
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED, mask_shape, own_key, owned_name
from mergekit_dam.merging.mask_product import SMALLEST, MaskProduct, chunk_numel, means_of, together_numel
from mergekit_dam.seeds import generator

_INSIDE = 2.0**-24  # smallest distance of a sample from 0 and from 1; half of float32's step below 1
ProbabilityBytes = dict[str, dict[str, Tensor]]  # mask name -> tensor name -> whole probabilities, uint8
_IN_USE = {"dual": (TASK_SHARED, BACKDOOR_DETECTION), "m1": (TASK_SHARED,), "m2": (BACKDOOR_DETECTION,)}


class ConcreteMask:
    """Mask logits for a set of tensors.

    Args:
        shapes: tensor name -> shape of its mask; where each model has its own mask, `own_key` of the tensor name.
        name: `task_shared` or `backdoor_detection`; also seeds the noise.
        temperature: temperature of the relaxation; lower values give samples closer to 0 and 1.
        rescale: divide each tensor's mask by its mean, so that its density does not scale the task vector.
        initial_logit: initial value of all logits.
        device: device of the logits.
        shards: processes that share the masks' rows; ALONE for masks that every process holds whole.
        owners: T if each model has its own mask, 0 if all models share one.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        name: str,
        temperature: float,
        rescale: bool,
        initial_logit: float,
        device: torch.device,
        shards: Shards = ALONE,
        owners: int = 0,
    ) -> None:
        self.name, self.temperature, self.rescale, self.shards = name, temperature, rescale, shards
        self.owners = owners
        self.shapes = dict(shapes)
        self.logits = {
            key: torch.full(shards.local_shape(shape), initial_logit, dtype=torch.float32, device=device)
            for key, shape in shapes.items()
        }

    def keys_of(self, name: str) -> list[str]:
        """Return the keys of a tensor's logits: one key, or one per model."""
        return [own_key(model, name) for model in range(self.owners)] if self.owners else [name]

    def sample(self, key: str, *, seed: int, step: int) -> Tensor:
        """Draw a relaxed sample in (0, 1) of a tensor's mask: sigmoid((logit + logistic noise) / temperature).

        The noise depends on (seed, step, mask, tensor) only, not on the order of calls, nor on chunks or device.
        """
        logits = self.logits[key]
        source = generator(self.name, key, seed, step)
        sample = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        size = chunk_numel(logits.device)
        for unused in range(self._units_before(key), 0, -size):  # skip the noise of rows that earlier processes hold
            torch.empty(min(size, unused)).uniform_(generator=source)
        for part, logit in zip(sample.view(-1).split(size), logits.view(-1).split(size), strict=True):
            noise = part if part.device.type == "cpu" else torch.empty(part.shape)
            noise.uniform_(generator=source).logit_(eps=SMALLEST)
            part.copy_(noise).add_(logit).div_(self.temperature).sigmoid_()
            part.clamp_(_INSIDE, 1.0 - _INSIDE)  # the sigmoid of a float32 above 17 is 1
        return sample

    def _units_before(self, key: str) -> int:
        """Return the number of units of a mask in the rows of earlier processes."""
        shape = self.shapes[key] or (1,)
        return int(self.shards.rows(shape[0]).start) * math.prod(shape[1:])

    def mean(self, key: str, values: Tensor) -> Tensor:
        """Return the mean of a whole mask from this process's rows of it, 0-dim, at least `SMALLEST`."""
        if self.shards.size == 1:
            return means_of([values])[0]
        total = self.shards.all_reduce(to_probabilities(values).sum())
        return (total / math.prod(self.shapes[key])).clamp_min(SMALLEST)

    def expectation(self, key: str) -> Tensor:
        """Return the probability that a unit is kept, sigmoid(logit); the masks file stores these probabilities."""
        return torch.sigmoid(self.logits[key])

    def density(self) -> float:
        """Return the kept fraction over all masked units."""
        kept = self.shards.all_reduce(self._local_sum().to(torch.float64))
        return float(kept) / max(1, sum(math.prod(shape) for shape in self.shapes.values()))

    def _local_sum(self) -> Tensor:
        """Return the sum of the probabilities of all units of this process."""
        every = list(self.logits.values())
        size = chunk_numel(every[0].device)
        if every[0].device.type != "cpu":
            sums = [sums_of_sigmoids(group).double().sum() for group in groups(every, size, Tensor.numel)]
        else:
            sums = [part.sigmoid().sum().double() for logits in every for part in logits.view(-1).split(size)]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=every[0].device)


def mask_product(masks: Sequence[ConcreteMask], key: str, samples: Sequence[Tensor] | None = None) -> MaskProduct:
    """Return M = M1 o M2 of one tensor, from a sample of each mask or from their probabilities.

    Args:
        samples: samples of the masks that all models share; None: probabilities.
    """
    shared = [mask for mask in masks if not mask.owners]
    factors = tuple(samples) if samples is not None else tuple(mask.logits[key] for mask in shared)
    own = tuple(mask.logits[model_key] for mask in masks if mask.owners for model_key in mask.keys_of(key))
    means = None
    if masks[0].rescale:
        values = factors if samples is not None else tuple(mask.expectation(key) for mask in shared)
        means = tuple(mask.mean(key, value) for mask, value in zip(shared, values, strict=True))
    first = masks[0]
    entries = math.prod(first.shapes[first.keys_of(key)[0]])
    return MaskProduct(factors, samples is None, means, first.temperature, first.shards.all_reduce, entries, own)


def detects_per_model(config: DamConfig, *, suspects: bool) -> bool:
    """Whether each model has its own Backdoor-Detection mask, given whether some class is suspect."""
    wanted = config.detection == "model" or (config.detection == "auto" and suspects)
    return wanted and config.objective != "paper" and not config.constants.rescale and config.mask != "m1"


def make_masks(
    model: MergedModel,
    config: DamConfig,
    *,
    temperature: float,
    offsets: Mapping[str, float] | None = None,
    per_model: bool = False,
    by_token: bool = False,
) -> dict[str, ConcreteMask]:
    """Make the masks that the setting `mask` names, by name.

    Args:
        temperature: temperature of the relaxation.
        offsets: by mask name, added to the constant `initial_logit`.
        per_model: whether each model has its own Backdoor-Detection mask.
        by_token: whether tensors with a row per token get one mask entry per row, whatever the granularity.
    """
    shapes = {
        name: mask_shape(shape, "row" if by_token and name in model.vocabulary else config.granularity)
        for name, shape in model.mask_shapes.items()
    }
    masks = {}
    for name in _IN_USE[config.mask]:
        owners = model.num_models if name == BACKDOOR_DETECTION and per_model else 0
        masks[name] = ConcreteMask(
            {own_key(t, key): shape for t in range(owners) for key, shape in shapes.items()} if owners else shapes,
            name=name,
            temperature=temperature,
            rescale=config.constants.rescale,
            initial_logit=config.constants.initial_logit + (offsets or {}).get(name, 0.0),
            device=model.device,
            shards=model.shards,
            owners=owners,
        )
    return masks


def combined(masks: Mapping[str, ConcreteMask], samples: Mapping[str, Weights] | None = None) -> dict[str, MaskProduct]:
    """Return M = M1 o M2 by tensor, from one sample of each mask or from their probabilities."""
    used = list(masks.values())
    first = used[0]
    return {
        key: mask_product(used, key, None if samples is None else [samples[mask.name][key] for mask in used])
        for key in dict.fromkeys(map(owned_name, first.logits) if first.owners else first.logits)
    }


def logit_keys(masks: Mapping[str, ConcreteMask], name: str) -> list[tuple[str, str]]:
    """Return the mask names and keys of a tensor's logits, in the order of `MaskProduct.parts`."""
    return [(mask_name, key) for mask_name, mask in masks.items() for key in mask.keys_of(name)]


class LogitSteps:
    """One optimiser step of all masks, made in parts while gradients arrive tensor by tensor.

    Args:
        masks: masks by name.
        optimisers: optimisers of the logits, by name of the masks that learn.
    """

    def __init__(self, masks: Mapping[str, ConcreteMask], optimisers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.masks, self.optimisers = masks, optimisers
        self._waiting: dict[str, list[str]] = {name: [] for name in optimisers}
        self._seen: list[str] = []
        self._finite: list[Tensor] = []
        self._held = 0
        every = list(next(iter(masks.values())).logits.values())
        total = sum(logits.numel() for logits in every)
        self._most = together_numel(every[0].device, total) * len(optimisers)

    def add(self, keys: Sequence[tuple[str, str]], gradients: Sequence[Tensor]) -> None:
        """Add dL/dlogit of one tensor.

        Args:
            keys: mask name and key of each gradient, see `logit_keys`.
        """
        for (name, key), gradient in zip(keys, gradients, strict=True):
            logits = self.masks[name].logits[key]
            logits.grad = gradient
            self._waiting[name].append(key)
            self._held += gradient.numel()
        if self._held >= self._most:
            self._step()

    def finish(self, step: int) -> None:
        """Step the remaining logits.

        Raises:
            DamError: a gradient was not finite.
        """
        self._step()
        if self._seen:
            require_flags(self._seen, torch.cat(self._finite), step)

    def _step(self) -> None:
        """Step all logits with a gradient, and drop the gradients."""
        for name, keys in self._waiting.items():
            parameters = [self.masks[name].logits[key] for key in keys]
            if not parameters:
                continue
            self._seen += [f"mask {name} for {key}" for key in keys]
            self._finite.append(finite_flags([p.grad for p in parameters if p.grad is not None]))
            self.optimisers[name].step()
            for parameter in parameters:
                parameter.grad = None
            keys.clear()
        self._held = 0


def final_probabilities(masks: Mapping[str, ConcreteMask]) -> ProbabilityBytes:
    """Return the probabilities to save, whole and as bytes, in the first process; elsewhere empty mappings."""
    probabilities: ProbabilityBytes = {}
    for name, mask in masks.items():
        probabilities[name] = {}
        for key, shape in mask.shapes.items():
            whole = mask.shards.all_gather(to_bytes(mask.expectation(key)), shape)
            if mask.shards.rank == 0:
                probabilities[name][key] = whole
    return probabilities


def mask_facts(masks: Mapping[str, ConcreteMask]) -> dict[str, Any]:
    """Return densities and kinds of the masks, for the masks file."""
    return {
        "densities": {name: mask.density() for name, mask in masks.items()},
        "own_masks": [name for name, mask in masks.items() if mask.owners],
    }


def mask_state(
    masks: Mapping[str, ConcreteMask], optimisers: Mapping[str, torch.optim.Optimizer], facts: dict[str, Any]
) -> State:
    """Return logits and Adam's moments of all masks: rows with several processes, else whole tensors."""
    state = State(facts)
    for name, mask in masks.items():
        by_key = {f"{name}/{key}": logits for key, logits in mask.logits.items()}
        shapes = {f"{name}/{key}": shape for key, shape in mask.shapes.items()}
        adam = adam_state(optimisers[name], "adam", list(by_key))
        for key in shapes:
            state.tensors[f"adam/step/{key}"] = adam[f"adam/step/{key}"]
            tensors = {part: adam[part] for part in (f"adam/exp_avg/{key}", f"adam/exp_avg_sq/{key}")}
            tensors[key] = by_key[key]
            if mask.shards.size == 1:
                state.tensors |= tensors
            else:
                state.rows |= {part: (rows, shapes[key]) for part, rows in tensors.items()}
    return state
