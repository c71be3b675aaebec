"""Average masks and coefficients over the tensors of each layer. T models, P masked tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mergekit_dam.artifact.masks_file import LearnedMasks
from mergekit_dam.merging.mask_bytes import to_probabilities
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION

BOTH = "both"
_BODIES = frozenset({"model", "transformer", "vit", "bert", "roberta", "distilbert", "vision_model", "text_model"})


@dataclass
class Layer:
    """Mean values over the mask entries of a layer.

    Attributes:
        label: number of the layer, with its tower's name where there are several, or a module outside of the layers.
        entries: number of entries of its tensors in one mask.
        density: mask name -> share that the mask keeps; `both` is the product of all masks in use.
        coefficients: lambda per model, (T,).
    """

    label: str
    entries: int = 0
    density: dict[str, float] = field(default_factory=dict)
    coefficients: list[float] = field(default_factory=list)


def layer_of(name: str) -> tuple[str, int | None]:
    """Return a tensor's list of layers and its number there; or its module and None.

    `encoder.layer.3.output.dense.weight` -> ("encoder.layer", 3); `embeddings.norm.bias` -> ("embeddings", None)
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and i > 0:
            return ".".join(parts[:i]), int(part)
    inner = parts[1:] if parts[0] in _BODIES and len(parts) > 2 else parts
    tower = f"{parts[0].removesuffix('_model')} " if parts[0].endswith("_model") else ""
    return tower + inner[0], None


def layers_of(masks: LearnedMasks) -> list[Layer]:
    """Average masks and coefficients by layer, in the order of the tensors, embeddings first."""
    names: Sequence[str] = masks.metadata["tensors"]
    places = [layer_of(name) for name in names]
    stacks = {stack for stack, number in places if number is not None}
    in_use = [mask for mask, by_name in masks.probabilities.items() if by_name]
    layers: dict[tuple[str, int | None], Layer] = {}
    for name, place in zip(names, places, strict=True):
        layer = layers.setdefault(place, Layer(_label(place, stacks)))
        # the mean over the models, of a mask of which each model has its own
        parts = masks.parts_of(name)
        values = {mask: torch.stack([to_probabilities(part) for part in parts[mask]]).mean(0) for mask in in_use}
        entries = max((value.numel() for value in values.values()), default=1)
        shares = {mask: float(value.mean()) for mask, value in values.items()}
        if values:
            shares[BOTH] = float(math.prod(values.values(), start=torch.ones(())).mean())
        own = masks.coefficients_of(name).tolist()
        total = layer.entries + entries
        for mask, share in shares.items():
            layer.density[mask] = (layer.density.get(mask, 0.0) * layer.entries + share * entries) / total
        before = layer.coefficients or [0.0] * len(own)
        layer.coefficients = [(b * layer.entries + c * entries) / total for b, c in zip(before, own, strict=True)]
        layer.entries = total
    return _in_order(layers)


def own_densities(masks: LearnedMasks) -> list[float] | None:
    """Share that each model's own Backdoor-Detection mask keeps of its task vector, mean over all entries, (T,).

    None where models share the mask, or it is not in use.
    """
    if BACKDOOR_DETECTION not in masks.metadata.get("own_masks", ()):
        return None
    kept, entries = [0.0] * len(masks.metadata["models"]), 0
    for name in masks.metadata["tensors"]:
        parts = masks.parts_of(name)[BACKDOOR_DETECTION]
        entries += parts[0].numel()
        kept = [sum_ + float(to_probabilities(part).sum()) for sum_, part in zip(kept, parts, strict=True)]
    return [total / max(1, entries) for total in kept]


def _label(place: tuple[str, int | None], stacks: set[str]) -> str:
    stack, number = place
    if number is None:
        return stack
    return str(number) if len(stacks) == 1 else f"{stack.split('.')[0].removesuffix('_model')} {number}"


def _in_order(layers: dict[tuple[str, int | None], Layer]) -> list[Layer]:
    """Sort layers: embeddings, then each stack by number, then further modules; else in the order of the tensors."""

    def key(item: tuple[tuple[str, int | None], Layer]) -> tuple[int, str, int]:
        (stack, number), _ = item
        if number is None:
            return (0 if "emb" in stack or "wte" in stack or "wpe" in stack else 2, "", 0)
        return (1, stack, number)

    return [layer for _, layer in sorted(layers.items(), key=key)]
