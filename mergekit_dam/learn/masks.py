"""Concrete (Gumbel-sigmoid) masks over the task vectors (arXiv 1611.00712), one logit per masked unit.

Two of them, Task-Shared (M1) and Backdoor-Detection (M2), make the mask M = M1 o M2 of the merge equation
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

_INSIDE = 2.0**-24  # from 0 or 1 to the nearest sample; half of float32's step below 1
Whole = dict[str, dict[str, Tensor]]
_IN_USE = {"dual": (TASK_SHARED, BACKDOOR_DETECTION), "m1": (TASK_SHARED,), "m2": (BACKDOOR_DETECTION,)}


class ConcreteMask:
    """Mask logits for a set of tensors.

    Args:
        shapes: tensor name, or `own_key` of it where each model has a mask of its own -> shape of the mask.
        name: `task_shared` or `backdoor_detection`; it seeds the noise, too.
        temperature: of the relaxation; lower is closer to 0/1.
        rescale: divide each tensor's mask by its mean, so that its density does not scale the task vector.
        initial_logit: start of all logits.
        device: where logits live.
        shards: processes that hold the masks' rows; ALONE for masks that every process holds whole.
        owners: T where each model has a mask of its own, 0 where one is for all.
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
        """Of a tensor's logits: one, or one per model."""
        return [own_key(model, name) for model in range(self.owners)] if self.owners else [name]

    def sample(self, key: str, *, seed: int, step: int) -> Tensor:
        """One relaxed sample in (0, 1) of the mask of a tensor: sigmoid((logit + logistic noise) / temperature).

        The noise depends on (seed, step, mask, tensor) alone, not on the order of calls, nor on chunks or device.
        """
        logits = self.logits[key]
        source = generator(self.name, key, seed, step)
        sample = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        size = chunk_numel(logits.device)
        for unused in range(self._before(key), 0, -size):  # rows of other processes come first
            torch.empty(min(size, unused)).uniform_(generator=source)
        for part, logit in zip(sample.view(-1).split(size), logits.view(-1).split(size), strict=True):
            noise = part if part.device.type == "cpu" else torch.empty(part.shape)
            noise.uniform_(generator=source).logit_(eps=SMALLEST)
            part.copy_(noise).add_(logit).div_(self.temperature).sigmoid_()
            part.clamp_(_INSIDE, 1.0 - _INSIDE)  # the sigmoid of a float32 above 17 is 1
        return sample

    def _before(self, key: str) -> int:
        """Units of a mask that other processes hold and that come before ours."""
        shape = self.shapes[key] or (1,)
        return int(self.shards.rows(shape[0]).start) * math.prod(shape[1:])

    def mean(self, key: str, values: Tensor) -> Tensor:
        """Mean over the whole of a mask from our values of it, 0-dim, not zero."""
        if self.shards.size == 1:
            return means_of([values])[0]
        total = self.shards.all_reduce(to_probabilities(values).sum())
        return (total / math.prod(self.shapes[key])).clamp_min(SMALLEST)

    def expectation(self, key: str) -> Tensor:
        """Probability that a unit is kept, sigmoid(logit): the mask that is saved, not one random sample."""
        return torch.sigmoid(self.logits[key])

    def density(self) -> float:
        """Kept fraction over all masked units."""
        kept = self.shards.all_reduce(self._kept().to(torch.float64))
        return float(kept) / max(1, sum(math.prod(shape) for shape in self.shapes.values()))

    def _kept(self) -> Tensor:
        """Sum of the probabilities of all units held here."""
        every = list(self.logits.values())
        size = chunk_numel(every[0].device)
        if every[0].device.type != "cpu":
            sums = [sums_of_sigmoids(group).double().sum() for group in groups(every, size, Tensor.numel)]
        else:
            sums = [part.sigmoid().sum().double() for logits in every for part in logits.view(-1).split(size)]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=every[0].device)


def product(masks: Sequence[ConcreteMask], key: str, samples: Sequence[Tensor] | None = None) -> MaskProduct:
    """M = M1 o M2 of one tensor at one sample of each mask, or at their probabilities.

    Args:
        samples: of masks that all models share.
    """
    shared = [mask for mask in masks if not mask.owners]
    factors = tuple(samples) if samples is not None else tuple(mask.logits[key] for mask in shared)
    own = tuple(mask.logits[one] for mask in masks if mask.owners for one in mask.keys_of(key))
    means = None
    if masks[0].rescale:
        values = factors if samples is not None else tuple(mask.expectation(key) for mask in shared)
        means = tuple(mask.mean(key, value) for mask, value in zip(shared, values, strict=True))
    first = masks[0]
    entries = math.prod(first.shapes[first.keys_of(key)[0]])
    return MaskProduct(factors, samples is None, means, first.temperature, first.shards.all_reduce, entries, own)


def detects_per_model(config: DamConfig, *, suspects: bool) -> bool:
    """Whether each model has a Backdoor-Detection mask of its own, where something is suspect or nothing is."""
    wanted = config.detection == "model" or (config.detection == "auto" and suspects)
    return wanted and config.objective != "paper" and not config.constants.rescale and config.mask != "m1"


def masks_in_use(
    model: MergedModel,
    config: DamConfig,
    *,
    temperature: float,
    offsets: Mapping[str, float] | None = None,
    per_model: bool = False,
    by_token: bool = False,
) -> dict[str, ConcreteMask]:
    """The masks that `mask` asks for, by name.

    Args:
        temperature: of the relaxation.
        offsets: by name, added to the setting `initial_logit`.
        per_model: whether each model has a Backdoor-Detection mask of its own.
        by_token: whether tensors with a row per token get one entry per row, even where others have one per element.
    """
    shapes = {
        name: mask_shape(shape, "row" if by_token and name in model.vocabulary else config.granularity)
        for name, shape in model.mask_shapes.items()
    }
    found = {}
    for name in _IN_USE[config.mask]:
        owners = model.num_models if name == BACKDOOR_DETECTION and per_model else 0
        found[name] = ConcreteMask(
            {own_key(t, key): shape for t in range(owners) for key, shape in shapes.items()} if owners else shapes,
            name=name,
            temperature=temperature,
            rescale=config.constants.rescale,
            initial_logit=config.constants.initial_logit + (offsets or {}).get(name, 0.0),
            device=model.device,
            shards=model.shards,
            owners=owners,
        )
    return found


def combined(masks: Mapping[str, ConcreteMask], samples: Mapping[str, Weights] | None = None) -> dict[str, MaskProduct]:
    """M = M1 o M2 by tensor, from one sample of each mask in use or from their probabilities."""
    used = list(masks.values())
    first = used[0]
    return {
        key: product(used, key, None if samples is None else [samples[mask.name][key] for mask in used])
        for key in dict.fromkeys(map(owned_name, first.logits) if first.owners else first.logits)
    }


def logits_of(masks: Mapping[str, ConcreteMask], name: str) -> list[tuple[str, str]]:
    """Mask and key of the logits of a tensor, in the order of `MaskProduct.parts`."""
    return [(mask, key) for mask, one in masks.items() for key in one.keys_of(name)]


class LogitSteps:
    """One optimiser step of all masks, from gradients that come tensor by tensor.

    Args:
        masks: by name.
        optimisers: of the logits of the masks that learn, by the same names.
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

    def add(self, places: Sequence[tuple[str, str]], gradients: Sequence[Tensor]) -> None:
        """dL/dlogit of one tensor.

        Args:
            places: mask and key of each, see `logits_of`.
        """
        for (name, key), gradient in zip(places, gradients, strict=True):
            logits = self.masks[name].logits[key]
            logits.grad = gradient
            self._waiting[name].append(key)
            self._held += gradient.numel()
        if self._held >= self._most:
            self._step()

    def finish(self, step: int) -> None:
        """Step what is left.

        Raises:
            DamError: some gradient was not finite.
        """
        self._step()
        if self._seen:
            require_flags(self._seen, torch.cat(self._finite), step)

    def _step(self) -> None:
        """Logits without a gradient stay as they are."""
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


def final_probabilities(masks: Mapping[str, ConcreteMask]) -> Whole:
    """What is saved: whole probabilities as bytes by mask and tensor, in the first process; nothing in the others."""
    found: Whole = {}
    for name, mask in masks.items():
        found[name] = {}
        for key, shape in mask.shapes.items():
            whole = mask.shards.all_gather(to_bytes(mask.expectation(key)), shape)
            if mask.shards.rank == 0:
                found[name][key] = whole
    return found


def facts_of(masks: Mapping[str, ConcreteMask]) -> dict[str, Any]:
    """What is told of masks beside their values."""
    return {
        "densities": {name: mask.density() for name, mask in masks.items()},
        "own_masks": [name for name, mask in masks.items() if mask.owners],
    }


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
