"""`objective: paper`: run the published loop of DAM (arXiv 2410.13910) with two separate masks and corrections.

Per step: sample the masks; fit the coefficients from their start (inner problem); take an ascent step of one universal
perturbation per task; update M1 and M2 in alternate steps (outer problem). After these steps the masks are fixed at
their probabilities, and the coefficients are fitted. Batches hold unlabelled calibration data only.
Legend: T tasks, P masked tensors, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.engine.merged_model import Masks
from mergekit_dam.engine.module_weights import Weights, without_gradients
from mergekit_dam.engine.snapshots import State, adam_state
from mergekit_dam.learn.losses import calibration_batch, consistency, disagreement, entropy
from mergekit_dam.learn.masks import (
    LogitSteps,
    ProbabilityBytes,
    combined,
    final_probabilities,
    make_masks,
    mask_facts,
    mask_state,
)
from mergekit_dam.learn.search import MaskSearch
from mergekit_dam.merging.mask_bytes import to_bytes
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION
from mergekit_dam.merging.mask_product import MaskProduct
from mergekit_dam.tasks.bounds import Bounds, insert_tokens

Batch = dict[str, Tensor]  # inputs of one task


class PaperSearch(MaskSearch):
    """The published loop; `start` holds the initial coefficients."""

    def set_up(self) -> None:
        model, config, constants = self.model, self.config, self.config.constants
        self.masks = make_masks(model, config, temperature=constants.temperature)
        self.optimisers = {
            name: torch.optim.Adam(mask.logits.values(), lr=config.mask_learning_rate, fused=True)
            for name, mask in self.masks.items()
        }
        self.coefficients = self.start.clone()
        self.coefficient_optimiser = torch.optim.Adam([self.coefficients], lr=constants.coefficient_learning_rate)
        self.perturbations = [
            UniversalPerturbation(
                task.perturbation_shape,
                task.bounds,
                eps=constants.eps,
                inserts=task.modality == "text",
                generator=seeds.generator(config.seed, "perturbation", task.index),
            )
            for task in self.tasks
        ]
        self.ascents = [
            torch.optim.Adam([p.delta], lr=constants.perturbation_learning_rate, maximize=True)
            for p in self.perturbations
        ]

    def run(self) -> tuple[ProbabilityBytes, Tensor]:
        """Learn; return probabilities as bytes by mask and tensor, and the coefficients (T, 1) or (T, P)."""
        phase, done = self.restore("masks")
        for step in self.progress(range(done if phase == "masks" else self.config.steps, self.config.steps), "masks"):
            self.step(step)
            self.snapshot_if_due("masks", step + 1)
        self.fit_coefficients(done if phase == "coefficients" else 0)
        return final_probabilities(self.masks), self.coefficients

    def state(self, phase: str, done: int) -> State:
        state = mask_state(self.masks, self.optimisers, {"phase": phase, "done": done})
        state.tensors |= {"coefficients": self.coefficients}
        state.tensors |= adam_state(self.coefficient_optimiser, "adam", ["coefficients"])
        for index in range(len(self.tasks)):
            if self.shards.owns(index):
                state.tensors |= {f"perturbation/{index}": self.perturbations[index].delta}
                state.tensors |= adam_state(self.ascents[index], "adam/perturbation", [str(index)])
        return state

    def allocate(self, facts: Mapping[str, Any]) -> None:
        """Do nothing: `set_up` makes all tensors."""

    def facts_of_masks(self) -> dict[str, Any]:
        return mask_facts(self.masks)

    def step(self, step: int) -> None:
        """Run the published steps 1 to 4 once."""
        samples = {
            name: {key: mask.sample(key, seed=self.config.seed, step=step) for key in self.model.mask_names}
            for name, mask in self.masks.items()
        }
        merged_masks = combined(self.masks, samples)
        batches = self.batches(step)
        coefficients, before = self.inner_step(merged_masks, batches)
        weights = self.model.weights(merged_masks, coefficients)
        turn = tuple(self.masks)[step % len(self.masks)]
        parts = self.shards.all_gather_dict(self.outer_losses(weights, batches, safe=turn == BACKDOOR_DETECTION))
        self.update(turn, weights, merged_masks, coefficients, step)
        density = {f"density/{name}": mask.density() for name, mask in self.masks.items()}
        total = sum(parts.values())
        record = {"phase": "masks", "step": step, "turn": turn, "loss": total, "loss/inner": before, **parts, **density}
        self.track_step(record)

    def batches(self, step: int) -> dict[int, Batch]:
        """Return the inputs of a step for this process's tasks, by index of the task."""
        return {
            index: task.inputs(calibration_batch(task, self.config, step))
            for index, task in enumerate(self.tasks)
            if self.shards.owns(index)
        }

    def inner_step(self, masks: Masks, batches: dict[int, Batch]) -> tuple[Tensor, float]:
        """Step 2: take one Adam step of the coefficients from their start on the summed entropy; masks are fixed."""
        coefficients = self.start.clone()
        optimiser = torch.optim.Adam([coefficients], lr=self.config.constants.coefficient_learning_rate)
        loss = self.coefficient_step(masks, coefficients, optimiser, batches)
        return coefficients, loss

    def coefficient_step(
        self, masks: Masks, coefficients: Tensor, optimiser: torch.optim.Optimizer, batches: dict[int, Batch]
    ) -> float:
        """Take one step of the coefficients on the summed entropy; return the entropy before the step."""
        weights = self.model.weights(masks, coefficients)
        losses: dict[int, float] = {}
        for index, inputs in batches.items():
            loss = entropy(self.tasks[index].logits(weights, inputs))
            loss.backward()
            losses[index] = float(loss.detach())
        coefficients.grad = self.model.coefficient_gradients(weights, masks, coefficients)
        optimiser.step()
        return float(sum(self.shards.all_gather_dict(losses).values()))

    def outer_losses(self, weights: Weights, batches: dict[int, Batch], *, safe: bool) -> dict[str, float]:
        """Steps 3 and 4: step each perturbation, then backpropagate L_perf (+ alpha L_safe) into `weights`.

        One clean forward pass serves both: step 3 uses its answers, step 4 its entropy.
        """
        parts: dict[str, float] = {}
        fixed_weights = without_gradients(weights)
        for index, inputs in batches.items():
            task = self.tasks[index]
            clean = task.logits(weights, inputs)
            self.ascend(index, fixed_weights, inputs, clean)
            loss = entropy(clean)
            parts[f"loss/perf/{task.name}"] = float(loss.detach())
            if safe:
                perturb = self.perturbations[index]
                with _fixed(perturb):
                    safety = self.config.alpha * consistency(task.logits(weights, inputs, perturb), clean)
                parts[f"loss/safe/{task.name}"] = float(safety.detach())
                loss = loss + safety
            loss.backward()
        return parts

    def ascend(self, index: int, weights: Weights, inputs: Batch, clean: Tensor) -> None:
        """Step 3: take one ascent step of a universal perturbation; `clean` holds the clean logits."""
        task, perturb = self.tasks[index], self.perturbations[index]
        loss = disagreement(task.logits(weights, inputs, perturb), clean)
        (perturb.delta.grad,) = torch.autograd.grad(loss, perturb.delta)
        self.ascents[index].step()
        perturb.project()

    def update(
        self, turn: str, weights: Weights, masks: Mapping[str, MaskProduct], coefficients: Tensor, step: int
    ) -> None:
        """Step 4, second half: take one Adam step of the mask named `turn`, tensor by tensor."""
        unused = torch.zeros_like(coefficients)
        steps = LogitSteps(self.masks, {turn: self.optimisers[turn]})
        for key, (gradient,) in self.model.logit_gradients(
            weights,
            masks,
            coefficients,
            unused,
            [tuple(self.masks).index(turn)],
        ):
            steps.add([(turn, key)], [gradient])
        steps.finish(step)

    def fit_coefficients(self, done: int = 0) -> None:
        """Fit the coefficients on the summed entropy (AdaMerging), with masks fixed at the probabilities to save."""
        saved = {
            name: {key: to_bytes(mask.expectation(key)) for key in self.model.mask_names}
            for name, mask in self.masks.items()
        }
        masks = combined(self.masks, saved)
        for step in self.progress(range(done, self.config.constants.coefficient_steps), "coefficients"):
            batches = self.batches(self.config.steps + step)
            loss = self.coefficient_step(masks, self.coefficients, self.coefficient_optimiser, batches)
            record = {
                "phase": "coefficients",
                "step": step,
                "loss": loss,
                "coefficients": self.coefficients.mean(1).tolist(),
            }
            self.track_step(record)
            self.snapshot_if_due("coefficients", step + 1)


@contextmanager
def _fixed(perturb: UniversalPerturbation) -> Iterator[None]:
    """Make the perturbation a constant during the context, as the outer problem treats it."""
    perturb.delta.requires_grad_(False)
    try:
        yield
    finally:
        perturb.delta.requires_grad_(True)


class UniversalPerturbation:
    """One perturbation for all inputs of a task, in an L-infinity ball of radius `eps` x span.

    Images: delta (C, H, W) is added to pixels, and the sum stays within the bounds.
    Text: K tokens (K, D) are inserted after position 0, at the centre of the embedding range + delta.

    Args:
        shape: (C, H, W) or (K, D).
        bounds: valid range of pixels or embeddings.
        eps: radius as a share of the span.
        inserts: whether delta is inserted (text) or added (images).
        generator: draws the initial delta, uniform in the ball.
    """

    def __init__(
        self, shape: tuple[int, ...], bounds: Bounds, *, eps: float, inserts: bool, generator: torch.Generator
    ) -> None:
        self.bounds, self.eps, self.inserts = bounds, eps, inserts
        start = torch.rand(shape, generator=generator).to(bounds.lower.device) * 2 - 1
        # `delta` is in units of the span: one step size then serves pixels and embeddings
        self.delta = (start * eps).requires_grad_(True)

    def project(self) -> None:
        """Project delta back into the ball after a step."""
        with torch.no_grad():
            self.delta.clamp_(-self.eps, self.eps)

    def __call__(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Perturb pixels_BCHW, or embeddings_BLD with attention_mask_BL -> (B, L + K, D), (B, L + K)."""
        if not self.inserts:
            self.bounds.verify(x, "perturbed pixels")
            return self.bounds.clamp(x + self.delta * self.bounds.span), mask
        return insert_tokens(x, mask, self.bounds.clamp(self.bounds.centre + self.delta * self.bounds.span))
