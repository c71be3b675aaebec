"""`objective: inversion`, the default: find backdoors blindly, then fit both masks against what was found.

1. Scan: targeted inversion of every class of every input model, theta_0 as the control (inversion.py); a wide trigger
   of each suspect class is then recovered from its model.
2. Fit: M1, M2 and the coefficients are learned together, so that the merge answers calibration samples as each
   task's own model does, and answers them alike when they carry a recovered trigger:
   L = sum_t KL(f_t(x) || f(x)) + alpha sum_suspects KL(f_t(x) || f(x + trigger)).
3. Refresh: every few steps the suspects' triggers are recovered anew from the current merge and join those known, so
   that what is left of a backdoor is found, too (min-max, as in adversarial training, arXiv 1706.06083).
The masks are those of DAM (Yang et al., arXiv 2410.13910): M1 keeps what the tasks share, M2 takes out what reacts to
the recovered triggers. Legend: T tasks, P masked tensors, B batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.inversion import WIDE, Finding, Inversion, scan, suspects
from mergekit_dam.losses import distillation
from mergekit_dam.masks import BACKDOOR_DETECTION, TASK_SHARED, combine
from mergekit_dam.merged_model import MergedModel, Weights
from mergekit_dam.search import Progress, Track, calibration_batch, combined, masks_in_use, require_finite
from mergekit_dam.tasks import Task
from mergekit_dam.triggers import RecoveredTriggers

_START = {TASK_SHARED: 3.0, BACKDOOR_DETECTION: 0.0}  # logits: M1 keeps 95 %, M2 can move up as well as down
_BATCH = 12  # samples per step of the search for a trigger to fit against
_POOL = 8  # triggers kept per suspect: the first one, and the latest


class InversionSearch:
    """State of one optimisation.

    Args:
        model: merged weights of T models.
        tasks: one per model, in the same order.
        config: shared settings.
        start: initial effective coefficients (what multiplies a task vector at the start), (T,).
        track: called with one flat record per step.
        progress: wraps an iterable of steps in a progress bar with a title.
    """

    def __init__(
        self, model: MergedModel, tasks: Sequence[Task], config: DamConfig, start: Tensor, *,
        track: Track, progress: Progress,
    ) -> None:  # fmt: skip
        self.model, self.tasks, self.config = model, tasks, config
        self.track, self.progress = track, progress
        self.masks = masks_in_use(model, config, temperature=1.0, offsets=_START)
        kept = math.prod(mask.density() for mask in self.masks.values()) if not config.rescale else 1.0
        columns = 1 if config.coefficients == "task" else len(model.mask_names)
        self.coefficients = (start.to(model.device) / kept)[:, None].repeat(1, columns)
        self.optimisers = [
            (torch.optim.Adam(mask.logits.values(), fused=True), config.mask_learning_rate)
            for mask in self.masks.values()
        ]
        self.optimisers.append((torch.optim.Adam([self.coefficients]), config.coefficient_learning_rate))
        self.own = [task.own_weights() for task in tasks]
        self.findings: list[Finding] = []
        self.pools: dict[tuple[int, int], list[RecoveredTriggers]] = {}

    def run(self) -> tuple[dict[str, Weights], Tensor]:
        """Learn. Returns float16 probabilities by mask and tensor, and the coefficients (T, 1) or (T, P)."""
        if BACKDOOR_DETECTION in self.masks:
            self.scan()
        for step in self.progress(range(self.config.steps), "masks"):
            if step and step % self.config.refresh_every == 0:
                self.refresh(step)
            self.step(step)
        probabilities = {
            name: {key: mask.expectation(key).to(torch.float16) for key in self.model.mask_names}
            for name, mask in self.masks.items()
        }
        return probabilities, self.coefficients

    def audit(self) -> list[dict[str, Any]]:
        """The scan's findings as JSON, with those that the masks were fitted against marked."""
        return [
            {**f.to_json(self.tasks[f.task].name), "suspect": (f.task, f.target) in self.pools} for f in self.findings
        ]

    def scan(self) -> None:
        """Step 1."""
        self.findings = scan(
            self.tasks, self.model.base_weights(), self.config, self.progress(range(len(self.tasks)), "scan")
        )
        for finding in suspects(self.findings, self.config.suspicion):
            key = (finding.task, finding.target)
            self.pools[key] = [self._wide(*key, self.own[finding.task], self.config.scan_steps, "model")]
            self.track({"phase": "scan", **finding.to_json(self.tasks[finding.task].name)})

    def _wide(self, index: int, target: int, weights: Weights, steps: int, *seed: object) -> RecoveredTriggers:
        """A trigger of one class of some weights that holds all that they react to."""
        task = self.tasks[index]
        generator = seeds.generator(self.config.seed, "wide", task.name, target, *seed)
        search = Inversion(task, weights, torch.tensor([target]), batch_size=_BATCH, generator=generator, pace=WIDE)
        return search.run(steps).best

    def refresh(self, step: int) -> None:
        """Step 3: new triggers from the current merge."""
        weights = self.model.weights(self.combined(), self.coefficients)
        for (index, target), pool in self.pools.items():
            pool.append(self._wide(index, target, weights, self.config.refresh_steps, step))
            del pool[1 : len(pool) - (_POOL - 1)]

    def combined(self) -> Weights:
        """M = M1 o M2 by tensor at the masks' probabilities."""
        return combined(self.masks, self._probabilities())

    def _probabilities(self) -> dict[str, Weights]:
        return {
            name: {key: mask.expectation(key) for key in self.model.mask_names} for name, mask in self.masks.items()
        }

    def step(self, step: int) -> None:
        """Step 2: one step of both masks and the coefficients."""
        probabilities = self._probabilities()
        merged = combined(self.masks, probabilities)
        weights = self.model.weights(merged, self.coefficients)
        parts: dict[str, float] = {}
        for index, task in enumerate(self.tasks):
            self.losses(index, task, weights, step, parts).backward()
        self.update(probabilities, merged, weights, step)
        record = {
            "phase": "masks", "step": step, "loss": sum(parts.values()), **parts,
            **{f"density/{name}": mask.density() for name, mask in self.masks.items()},
        }  # fmt: skip
        require_finite(record, step)
        self.track(record)

    def losses(self, index: int, task: Task, weights: Weights, step: int, parts: dict[str, float]) -> Tensor:
        """L of one task; its parts go into `parts`."""
        rows_B = calibration_batch(task, self.config, step)
        inputs = task.inputs(rows_B)
        with torch.no_grad():
            answer = task.logits(self.own[index], inputs)
        loss = distillation(task.logits(weights, inputs), answer)
        parts[f"loss/perf/{task.name}"] = float(loss.detach())
        for (owner, target), pool in self.pools.items():
            if owner != index:
                continue
            triggers = RecoveredTriggers.stack(pool)
            generator = seeds.generator(self.config.seed, "pool", task.name, target, step)
            which = torch.randint(len(triggers), (len(rows_B),), generator=generator).to(task.device)
            safety = self.config.alpha * distillation(task.logits(weights, inputs, triggers.perturb(which)), answer)
            key = f"loss/safe/{task.name}"
            parts[key] = parts.get(key, 0.0) + float(safety.detach())
            loss = loss + safety
        return loss

    def update(self, probabilities: dict[str, Weights], merged: Weights, weights: Weights, step: int) -> None:
        """Gradients by the chain rule, one Adam step each; the step size falls to a tenth along a cosine."""
        shapes = {key: next(iter(self.masks.values())).logits[key].shape for key in self.model.mask_names}
        gradients = self.model.mask_gradients(weights, self.coefficients, shapes)
        for name, mask in self.masks.items():
            for key, gradient in gradients.items():
                other = combine([self.masks[o].factor(probabilities[o][key]) for o in self.masks if o != name])
                through = gradient if other is None else gradient * other
                mask.logits[key].grad = mask.logit_gradient(probabilities[name][key], through)
        self.coefficients.grad = self.model.coefficient_gradients(weights, merged, self.coefficients)
        share = 0.1 + 0.45 * (1 + math.cos(math.pi * step / max(1, self.config.steps)))
        for optimiser, rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * share
            optimiser.step()
        self.coefficients.clamp_(0.0, self.config.max_coefficient)
