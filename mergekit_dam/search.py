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
from mergekit_dam.masks import BACKDOOR_DETECTION, TASK_SHARED, ConcreteMask, MaskProduct, mask_shape, product
from mergekit_dam.merged_model import Masks, MergedModel, Weights, fixed
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
        turn = tuple(self.masks)[step % len(self.masks)]
        parts = self.outer_losses(weights, batches, safe=turn == BACKDOOR_DETECTION)
        self.update(turn, weights, merged_masks, coefficients)
        density = {f"density/{name}": mask.density() for name, mask in self.masks.items()}
        total = sum(parts.values())
        record = {"phase": "masks", "step": step, "turn": turn, "loss": total, "loss/inner": before, **parts, **density}
        require_finite(record, step)
        self.track(record)

    def inner_step(self, masks: Masks, batches: list[Weights]) -> tuple[Tensor, float]:
        """Step 2: from their start, one Adam step of the coefficients on the summed entropy, masks fixed."""
        coefficients = self.start.clone()
        optimiser = torch.optim.Adam([coefficients], lr=self.config.coefficient_learning_rate)
        loss = self.coefficient_step(masks, coefficients, optimiser, batches)
        return coefficients, loss

    def coefficient_step(
        self, masks: Masks, coefficients: Tensor, optimiser: torch.optim.Optimizer, batches: list[Weights]
    ) -> float:
        weights = self.model.weights(masks, coefficients)
        total = 0.0
        for task, inputs in zip(self.tasks, batches, strict=True):
            loss = entropy(task.logits(weights, inputs))
            loss.backward()
            total += float(loss.detach())
        coefficients.grad = self.model.coefficient_gradients(weights, masks, coefficients)
        optimiser.step()
        return total

    def outer_losses(self, weights: Weights, batches: list[Weights], *, safe: bool) -> dict[str, float]:
        """Steps 3 and 4: move each perturbation, then the backward passes of L_perf (+ alpha L_safe) into `weights`.

        One clean forward pass serves both: step 3 needs its answers, step 4 its entropy.
        """
        parts: dict[str, float] = {}
        still = fixed(weights)
        for index, (task, inputs) in enumerate(zip(self.tasks, batches, strict=True)):
            clean = task.logits(weights, inputs)
            self.ascend(index, still, inputs, clean)
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

    def ascend(self, index: int, still: Weights, inputs: Weights, clean: Tensor) -> None:
        """Step 3: one ascent step of a universal perturbation, with weights that stay; `clean` are the clean logits."""
        task, perturb = self.tasks[index], self.perturbations[index]
        loss = disagreement(task.logits(still, inputs, perturb), clean)
        (perturb.delta.grad,) = torch.autograd.grad(loss, perturb.delta)
        self.ascents[index].step()
        perturb.project()

    def update(self, turn: str, weights: Weights, masks: Mapping[str, MaskProduct], coefficients: Tensor) -> None:
        """Step 4, second half: one Adam step of the mask whose turn it is, tensor by tensor."""
        unused = torch.zeros_like(coefficients)
        for key, gradient in self.model.chain(weights, masks, coefficients, unused):
            (found,) = masks[key].logit_gradients(gradient, [tuple(self.masks).index(turn)])
            step_of(self.optimisers[turn], self.masks[turn].logits[key], found)

    def fit_coefficients(self, probabilities: dict[str, Weights]) -> Tensor:
        """With the masks fixed at what will be saved, fit the coefficients on the summed entropy (AdaMerging)."""
        masks = combined(self.masks, probabilities)
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
