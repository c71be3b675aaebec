"""Defend by fine-pruning: cut units that are dormant on clean samples, then fine-tune.

Units that only a trigger uses are silent on clean inputs. The method prunes the units of the last layers with the
smallest mean activation on clean samples, and fine-tunes what is left. Here the units are those of the feed-forward
parts of the last blocks, and the own answers of the input models are the labels. (Merge Hijacking, arXiv 2505.23561,
reports what is left of its attack after fine-pruning.)

Legend: B batch, L tokens, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dam_bench.defences.base import DefenceInputs
from dam_bench.defences.blocks import blocks_in_order, parts_of
from dam_bench.defences.training import Trained, Tuned
from mergekit_dam.config import setting
from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.tasks import Task

_AT_ONCE = 64  # samples of a pass


def activations(task: Task, weights: Weights, names: Sequence[str], rows: Tensor) -> dict[str, Tensor]:
    """Mean absolute activation (U,) of the units that feed each of these matrices, over samples and tokens.

    Args:
        names: output names of matrices.
        rows: indices of calibration samples.
    """
    sums: dict[str, Tensor] = {}
    kept: dict[str, Tensor | None] = {}
    total = 0

    def watch(name: str) -> Any:
        def before(_: object, arguments: tuple[Tensor, ...]) -> None:
            units_BLU, mask_BL = arguments[0].abs().float(), kept["mask"]
            weighted = units_BLU if mask_BL is None else units_BLU * mask_BL[..., None]
            sums[name] = sums.get(name, torch.zeros(())).to(weighted.device) + weighted.flatten(0, -2).sum(0)

        return task.module.get_submodule(task.targets[name].rpartition(".")[0]).register_forward_pre_hook(before)

    handles = [watch(name) for name in names]
    try:
        with torch.no_grad():
            for part in rows.split(_AT_ONCE):
                inputs = task.inputs(part)
                kept["mask"] = inputs.get("attention_mask")
                task.logits(weights, inputs)
                total += len(part) if kept["mask"] is None else int(kept["mask"].sum())
    finally:
        for handle in handles:
            handle.remove()
    return {name: tensor / total for name, tensor in sums.items()}


class FinePruning(Tuned):
    """Prunes dormant units of the last blocks' feed-forward parts, and fine-tunes the rest."""

    share: float = setting(..., "Share of the units that is pruned, the most dormant ones.", ge=0, lt=1)
    last_blocks: int = setting(..., "Number of blocks that are pruned, from the last on.", ge=1)

    def kept(self, given: DefenceInputs, start: Weights) -> dict[str, Tensor]:
        """1 for units that stay, 0 for dormant ones, by output name of the matrix that reads them, in its shape."""
        task = given.tasks[0]
        first = len(blocks_in_order(task)) - self.last_blocks
        layers = [
            name
            for (block, part), names in parts_of(task).items()
            if part == "down" and block >= first
            for name in names
            if start[name].ndim == 2
        ]
        found = [activations(one, start, layers, torch.arange(one.num_samples)) for one in given.tasks]
        masks = {}
        for name in layers:
            mean_U = torch.stack([one[name] / one[name].mean() for one in found]).mean(0)
            kept_U = torch.ones_like(mean_U)
            kept_U[mean_U.argsort()[: int(self.share * len(mean_U))]] = 0.0
            owner = task.module.get_submodule(task.targets[name].rpartition(".")[0])
            masks[name] = (kept_U[:, None] if isinstance(owner, Conv1D) else kept_U).expand_as(start[name])
        return masks

    def trainable(self, given: DefenceInputs) -> Trained:
        trained = super().trainable(given)
        return _Pruned(trained, self.kept(given, trained.start))


class _Pruned(Trained):
    """Trained weights of which some entries stay zero."""

    def __init__(self, whole: Trained, kept: Mapping[str, Tensor]) -> None:
        self.start, self.parameters, self._whole, self._kept = whole.start, whole.parameters, whole, kept

    def weights(self, scale: float = 1.0) -> dict[str, Tensor]:
        weights = self._whole.weights(scale)
        return {**weights, **{name: weights[name] * mask for name, mask in self._kept.items()}}
