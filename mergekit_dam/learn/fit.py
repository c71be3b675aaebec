"""Fit masks and coefficients of a merged model or of a part of it. T models, P masked tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.engine.snapshots import State, adam_state
from mergekit_dam.learn.masks import LogitSteps, combined, detects_per_model, logit_keys, make_masks, mask_state
from mergekit_dam.merging.checks import finite_flags, require_flags
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED
from mergekit_dam.merging.mask_product import MaskProduct


class MaskFit:
    """Both masks and the coefficients, learned together by Adam.

    Args:
        model: the merged model.
        config: shared settings.
        start: initial coefficients times the masks' initial density, (T, 1) or (T, P).
        suspects: whether some class is suspect.
        by_token: whether embeddings have a mask entry per token.

    Attributes:
        masks: masks by name.
        coefficients: lambda, shaped like `start`.
        optimisers: optimisers of the logits, by mask name.
    """

    def __init__(
        self, model: MergedModel, config: DamConfig, start: Tensor, *, suspects: bool, by_token: bool = False
    ) -> None:
        self.model, self.config = model, config
        constants = config.constants
        self.masks = make_masks(
            model,
            config,
            temperature=1.0,
            offsets={
                TASK_SHARED: constants.task_shared_start,
                BACKDOOR_DETECTION: constants.backdoor_detection_start,
            },
            per_model=detects_per_model(config, suspects=suspects),
            by_token=by_token,
        )
        kept = math.prod(mask.density() for mask in self.masks.values()) if not constants.rescale else 1.0
        self.coefficients = start / kept
        self.optimisers = {
            name: torch.optim.Adam(mask.logits.values(), fused=True) for name, mask in self.masks.items()
        }
        self._coefficient_optimiser = torch.optim.Adam([self.coefficients])

    def combined(self) -> dict[str, MaskProduct]:
        """Return M = M1 o M2 by tensor, at the masks' probabilities."""
        return combined(self.masks)

    def weights(self) -> Weights:
        """Return whole merged weights at the current masks and coefficients, for use without gradients."""
        return self.model.weights(self.combined(), self.coefficients)

    def update(self, merged: dict[str, MaskProduct], weights: Weights, step: int) -> None:
        """Take one Adam step of masks and coefficients; the step size falls along a cosine.

        Args:
            merged: the masks M that `weights` were merged with.
            weights: merged weights, with the gradients of the tasks' losses.
            step: number of the step, from 0 to `steps` - 1.

        Raises:
            DamError: a gradient that is not finite.
        """
        config, constants = self.config, self.config.constants
        slope, last = math.cos(math.pi * step / max(1, config.steps)), constants.last_rate_share
        factor = last + (1 - last) * 0.5 * (1 + slope)
        rates = [(optimiser, config.mask_learning_rate) for optimiser in self.optimisers.values()]
        for optimiser, rate in [*rates, (self._coefficient_optimiser, constants.coefficient_learning_rate)]:
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        self.coefficients.grad = torch.zeros_like(self.coefficients)
        steps = LogitSteps(self.masks, self.optimisers)
        num_parts = sum(max(1, mask.owners) for mask in self.masks.values())
        for key, gradients in self.model.logit_gradients(
            weights,
            merged,
            self.coefficients,
            self.coefficients.grad,
            range(num_parts),
        ):
            steps.add(logit_keys(self.masks, key), gradients)
        steps.finish(step)
        require_flags(["the coefficients"], finite_flags([self.coefficients.grad]), step)
        self._coefficient_optimiser.step()
        self.coefficients.clamp_(0.0, constants.max_coefficient)

    def state(self, facts: dict[str, Any]) -> State:
        """Return the state that later steps depend on."""
        state = mask_state(self.masks, self.optimisers, facts)
        state.tensors |= {"coefficients": self.coefficients}
        state.tensors |= adam_state(self._coefficient_optimiser, "adam", ["coefficients"])
        return state
