"""M1 and M2 together, as both searches hold them: made, combined, saved, and put into snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.shards import ALONE
from mergekit_dam.engine.snapshots import State, adam_state
from mergekit_dam.engine.streamed_weights import Weights
from mergekit_dam.learn.masks import ConcreteMask, product
from mergekit_dam.merging.checks import finite_flags, require_flags
from mergekit_dam.merging.mask_bytes import to_bytes
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED, mask_shape, own_key, owned_name
from mergekit_dam.merging.mask_product import MaskProduct, together_numel

Whole = dict[str, dict[str, Tensor]]

_IN_USE = {"dual": (TASK_SHARED, BACKDOOR_DETECTION), "m1": (TASK_SHARED,), "m2": (BACKDOOR_DETECTION,)}


def detects_per_model(config: DamConfig, *, suspects: bool) -> bool:
    """Whether each model has a Backdoor-Detection mask of its own, where something is suspect or nothing is."""
    wanted = config.detection == "model" or (config.detection == "auto" and suspects)
    return wanted and config.objective == "inversion" and not config.rescale and config.mask != "m1"


def masks_in_use(
    model: MergedModel, config: DamConfig, *, temperature: float, offsets: Mapping[str, float] | None = None,
    per_model: bool = False,
) -> dict[str, ConcreteMask]:  # fmt: skip
    """The masks that `mask` asks for, by name.

    Args:
        temperature: of the relaxation.
        offsets: by name, added to the setting `initial_logit`.
        per_model: whether each model has a Backdoor-Detection mask of its own.
    """
    shapes = {name: mask_shape(shape, config.granularity) for name, shape in model.mask_shapes.items()}
    found = {}
    for name in _IN_USE[config.mask]:
        owners = model.num_models if name == BACKDOOR_DETECTION and per_model else 0
        found[name] = ConcreteMask(
            {own_key(t, key): shape for t in range(owners) for key, shape in shapes.items()} if owners else shapes,
            name=name, temperature=temperature, rescale=config.rescale,
            initial_logit=config.initial_logit + (offsets or {}).get(name, 0.0), device=model.device,
            shards=ALONE if config.granularity == "tensor" else model.shards, owners=owners,
        )  # fmt: skip
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
        together: whether as many tensors are stepped together as `together_numel` says, or each by itself, which
            spares their gradients' memory.
    """

    def __init__(
        self, masks: Mapping[str, ConcreteMask], optimisers: Mapping[str, torch.optim.Optimizer], *, together: bool
    ) -> None:  # fmt: skip
        self.masks, self.optimisers = masks, optimisers
        self._waiting: dict[str, list[str]] = {name: [] for name in optimisers}
        self._seen: list[str] = []
        self._finite: list[Tensor] = []
        self._held = 0
        every = list(next(iter(masks.values())).logits.values())
        total = sum(logits.numel() for logits in every)
        self._most = together_numel(every[0].device, total) * len(optimisers) if together else 1

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
            whole = mask.shards.gather(to_bytes(mask.expectation(key)), shape)
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
