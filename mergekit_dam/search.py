"""`objective: paper`: the published loop of DAM (arXiv 2410.13910) with two real masks and its defects mended.

Per step: sample the masks; fit the coefficients from their start (inner problem); drive one universal
perturbation per task up; update M1 or M2, which take turns (outer problem). Then the masks are fixed at their
probabilities and the coefficients are fitted to the end. Batches hold unlabelled calibration data only.
Legend: T tasks, P masked tensors, B batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.errors import DamError
from mergekit_dam.losses import consistency, disagreement, entropy
from mergekit_dam.masks import BACKDOOR_DETECTION, TASK_SHARED, ConcreteMask, combine, mask_shape
from mergekit_dam.merged_model import MergedModel, Weights, clear_gradients
from mergekit_dam.numerics import require_finite_gradients
from mergekit_dam.perturbation import UniversalPerturbation
from mergekit_dam.tasks import Task

Track = Callable[[dict[str, Any]], None]
Progress = Callable[[Iterable[int], str], Iterable[int]]
_IN_USE = {"dual": (TASK_SHARED, BACKDOOR_DETECTION), "m1": (TASK_SHARED,), "m2": (BACKDOOR_DETECTION,)}


class PaperSearch:
    """State of one optimisation.

    Args:
        model: merged weights of T models.
        tasks: one per model, in the same order.
        config: shared settings.
        start: initial coefficients, (T,).
        track: called with one flat record per step.
        progress: wraps an iterable of steps in a progress bar with a title.
    """

    def __init__(
        self, model: MergedModel, tasks: Sequence[Task], config: DamConfig, start: Tensor, *,
        track: Track, progress: Progress,
    ) -> None:  # fmt: skip
        self.model, self.tasks, self.config = model, tasks, config
        self.track, self.progress = track, progress
        self.masks = masks_in_use(model, config, temperature=config.temperature)
        self.optimisers = {
            name: torch.optim.Adam(mask.logits.values(), lr=config.mask_learning_rate, fused=True)
            for name, mask in self.masks.items()
        }
        columns = 1 if config.coefficients == "task" else len(model.mask_names)
        self.start = start.to(model.device)[:, None].repeat(1, columns)
        self.perturbations = [
            UniversalPerturbation(
                task.perturbation_shape, task.bounds, eps=config.eps, inserts=len(task.perturbation_shape) == 2,
                generator=seeds.generator(config.seed, "perturbation", task.name),
            )
            for task in tasks
        ]  # fmt: skip
        self.ascents = [
            torch.optim.Adam([p.delta], lr=config.perturbation_learning_rate, maximize=True) for p in self.perturbations
        ]

    def run(self) -> tuple[dict[str, Weights], Tensor]:
        """Learn. Returns float16 probabilities by mask and tensor, and the coefficients (T, 1) or (T, P)."""
        for step in self.progress(range(self.config.steps), "masks"):
            self.step(step)
        probabilities = {
            name: {key: mask.expectation(key).to(torch.float16) for key in self.model.mask_names}
            for name, mask in self.masks.items()
        }
        return probabilities, self.fit_coefficients(probabilities)

    def audit(self) -> list[dict[str, Any]]:
        """Nothing: the published loop does not look at single models."""
        return []

    def step(self, step: int) -> None:
        """One pass through the published steps 1 to 4."""
        samples = {
            name: {key: mask.sample(key, seed=self.config.seed, step=step) for key in self.model.mask_names}
            for name, mask in self.masks.items()
        }
        merged_masks = combined(self.masks, samples)
        batches = [task.inputs(calibration_batch(task, self.config, step)) for task in self.tasks]
        coefficients, before = self.inner_step(merged_masks, batches)
        weights = self.model.weights(merged_masks, coefficients)
        self.ascend(weights, batches)
        turn = tuple(self.masks)[step % len(self.masks)]
        parts = self.outer_losses(weights, batches, safe=turn == BACKDOOR_DETECTION)
        self.update(turn, samples, weights, coefficients, step)
        density = {f"density/{name}": mask.density() for name, mask in self.masks.items()}
        total = sum(parts.values())
        record = {"phase": "masks", "step": step, "turn": turn, "loss": total, "loss/inner": before, **parts, **density}
        require_finite(record, step)
        self.track(record)

    def inner_step(self, masks: Weights, batches: list[Weights]) -> tuple[Tensor, float]:
        """Step 2: from their start, one Adam step of the coefficients on the summed entropy, masks fixed."""
        coefficients = self.start.clone()
        optimiser = torch.optim.Adam([coefficients], lr=self.config.coefficient_learning_rate)
        loss = self.coefficient_step(masks, coefficients, optimiser, batches)
        return coefficients, loss

    def coefficient_step(
        self, masks: Weights, coefficients: Tensor, optimiser: torch.optim.Optimizer, batches: list[Weights]
    ) -> float:
        weights = self.model.weights(masks, coefficients)
        total = 0.0
        for task, inputs in zip(self.tasks, batches, strict=True):
            loss = entropy(task.logits(weights, inputs))
            loss.backward()
            total += float(loss)
        coefficients.grad = self.model.coefficient_gradients(weights, masks, coefficients)
        optimiser.step()
        return total

    def ascend(self, weights: Weights, batches: list[Weights]) -> None:
        """Step 3: one ascent step of each universal perturbation, merged weights fixed."""
        fixed = {name: weight.detach() for name, weight in weights.items()}
        for task, inputs, perturb, ascent in zip(self.tasks, batches, self.perturbations, self.ascents, strict=True):
            with torch.no_grad():
                clean = task.logits(fixed, inputs)
            (perturb.delta.grad,) = torch.autograd.grad(
                disagreement(task.logits(fixed, inputs, perturb), clean), perturb.delta
            )
            ascent.step()
            perturb.project()

    def outer_losses(self, weights: Weights, batches: list[Weights], *, safe: bool) -> dict[str, float]:
        """Step 4: backward passes of L_perf (+ alpha L_safe) into the gradients of `weights`."""
        clear_gradients(weights)
        parts: dict[str, float] = {}
        for task, inputs, perturb in zip(self.tasks, batches, self.perturbations, strict=True):
            clean = task.logits(weights, inputs)
            loss = entropy(clean)
            parts[f"loss/perf/{task.name}"] = float(loss)
            if safe:
                with _fixed(perturb):
                    safety = self.config.alpha * consistency(task.logits(weights, inputs, perturb), clean)
                parts[f"loss/safe/{task.name}"] = float(safety)
                loss = loss + safety
            loss.backward()
        return parts

    def update(self, turn: str, samples: dict[str, Weights], weights: Weights, coefficients: Tensor, step: int) -> None:
        """Step 4, second half: one Adam step of the mask whose turn it is."""
        mask = self.masks[turn]
        shapes = {key: mask.logits[key].shape for key in self.model.mask_names}
        gradients = self.model.mask_gradients(weights, coefficients, shapes)
        for key, gradient in gradients.items():
            others = [self.masks[o].factor(samples[o][key]) for o in self.masks if o != turn]
            other = combine(others)
            through = gradient if other is None else gradient * other
            mask.logits[key].grad = mask.logit_gradient(samples[turn][key], through)
        require_finite_gradients({key: mask.logits[key].grad for key in gradients}, f"mask {turn}", step)
        self.optimisers[turn].step()

    def fit_coefficients(self, probabilities: dict[str, Weights]) -> Tensor:
        """With the masks fixed at what will be saved, fit the coefficients on the summed entropy (AdaMerging)."""
        masks = combined(
            self.masks, {name: {k: v.float() for k, v in by.items()} for name, by in probabilities.items()}
        )
        coefficients = self.start.clone()
        optimiser = torch.optim.Adam([coefficients], lr=self.config.coefficient_learning_rate)
        for step in self.progress(range(self.config.coefficient_steps), "coefficients"):
            batches = [
                task.inputs(calibration_batch(task, self.config, self.config.steps + step)) for task in self.tasks
            ]
            loss = self.coefficient_step(masks, coefficients, optimiser, batches)
            record = {
                "phase": "coefficients",
                "step": step,
                "loss": loss,
                "coefficients": coefficients.mean(1).tolist(),
            }
            require_finite(record, step)
            self.track(record)
        return coefficients


@contextmanager
def _fixed(perturb: UniversalPerturbation) -> Iterator[None]:
    """The outer problem treats the perturbation as a constant."""
    perturb.delta.requires_grad_(False)
    try:
        yield
    finally:
        perturb.delta.requires_grad_(True)


def masks_in_use(
    model: MergedModel, config: DamConfig, *, temperature: float, offsets: Mapping[str, float] | None = None
) -> dict[str, ConcreteMask]:
    """The masks that `mask` asks for, by name; `offsets` are added to the setting `initial_logit`."""
    shapes = {name: mask_shape(shape, config.granularity) for name, shape in model.mask_shapes.items()}
    return {
        name: ConcreteMask(
            shapes, name=name, temperature=temperature, rescale=config.rescale,
            initial_logit=config.initial_logit + (offsets or {}).get(name, 0.0), device=model.device,
        )
        for name in _IN_USE[config.mask]
    }  # fmt: skip


def combined(masks: Mapping[str, ConcreteMask], samples: Mapping[str, Weights]) -> Weights:
    """M = M1 o M2 by tensor from one sample (or the probabilities) of each mask in use."""
    merged: Weights = {}
    for key in next(iter(samples.values())):
        mask = combine([mask.factor(samples[name][key]) for name, mask in masks.items()])
        assert mask is not None, "at least one mask is in use"
        merged[key] = mask
    return merged


def calibration_batch(task: Task, config: DamConfig, step: int) -> Tensor:
    """Indices of the calibration samples of a step, shape (B,): the same for the same seed and step."""
    generator = seeds.generator(config.seed, "batch", task.name, step)
    size = min(config.batch_size, task.num_samples)
    return torch.randperm(task.num_samples, generator=generator)[:size]


def require_finite(record: dict[str, Any], step: int) -> None:
    """Raise DamError for the first value of a step's record that is NaN or infinite."""
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DamError(
                f"{name} at step {step}", expected="a finite number", got=str(value),
                cure="Lower mask_learning_rate or the models' weight.",
            )  # fmt: skip
