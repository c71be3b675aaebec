"""`objective: inversion`, the default: recover triggers without labels, and fit both masks against them.

1. Scan: targeted inversion of every class of every input model, theta_0 as the control (scan/inversion.py); a wide
   trigger of each suspect class is then recovered from its model.
2. Fit: M1, M2 and the coefficients are learned together, so that the merge answers calibration samples as each
   task's own model does, a suspect class no more often than another class (teacher.py), and the same with a trigger:
   L = sum_t KL(f_t(x) || f(x)) + alpha sum_suspects KL(f_t(x) || f(x + trigger)).
3. Refresh: every few steps new triggers of the suspects are recovered from the current merge and added to the pool, so
   that the fit also meets what is left of a backdoor (min-max, as in adversarial training, arXiv 1706.06083).
The masks are those of DAM (Yang et al., arXiv 2410.13910): M1 keeps changes that tasks share; M2, one per model if a
class is suspect (`detection`), removes changes that react to triggers.
Legend: T tasks, P masked tensors, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.engine.shards import WorkItem
from mergekit_dam.engine.snapshots import State
from mergekit_dam.learn.fit import MaskFit
from mergekit_dam.learn.losses import calibration_batch, fit_loss
from mergekit_dam.learn.masks import ConcreteMask, ProbabilityBytes, final_probabilities, mask_facts
from mergekit_dam.learn.scanned_search import ScannedSearch
from mergekit_dam.learn.teacher import TeacherLogits, debias
from mergekit_dam.learn.trigger_pool import refresh_triggers


class InversionSearch(ScannedSearch):
    """The search described above; `start` holds coefficients times the masks' initial density."""

    def set_up(self) -> None:
        super().set_up()
        for item in self.schedule:
            if item is not None:
                own = self.model.frozen.own_weights(item.task)
                self.answers[item.task] = TeacherLogits(self.tasks[item.task], own)
        self.begin_fit()

    def begin_fit(self) -> None:
        self.fit = MaskFit(self.model, self.config, self.start, suspects=len(self.trigger_pool) > 0)

    def merged_weights(self) -> Weights:
        return self.fit.weights()

    @property
    def masks(self) -> dict[str, ConcreteMask]:
        """Masks by name."""
        return self.fit.masks

    @property
    def coefficients(self) -> Tensor:
        """lambda, (T, 1) or (T, P)."""
        return self.fit.coefficients

    def run(self) -> tuple[ProbabilityBytes, Tensor]:
        """Learn; return probabilities as bytes by mask and tensor, and the coefficients (T, 1) or (T, P)."""
        phase, done = self.restore("scan")
        if phase == "scan":
            self.scan_if_needed(done)
            done = 0
        debias(self.answers, self.trigger_pool)
        for step in self.progress(range(done, self.config.steps), "masks"):
            if step and step % self.config.refresh_every == 0:
                self.refresh(step)
            self.step(step)
            self.snapshot_if_due("masks", step + 1)
        return final_probabilities(self.masks), self.coefficients

    def state(self, phase: str, done: int) -> State:
        state = self.fit.state(self.facts_of_state(phase, done))
        state.tensors |= self.triggers_of_state()
        return state

    def allocate(self, facts: Mapping[str, Any]) -> None:
        self.allocate_triggers(facts)
        self.begin_fit()

    def facts_of_masks(self) -> dict[str, Any]:
        return mask_facts(self.masks)

    def refresh(self, step: int) -> None:
        """Step 3: recover new triggers from the current merge."""
        weights = self.fit.weights()
        refresh_triggers(
            self.tasks,
            self.trigger_pool,
            self.shards,
            self.config,
            self.model.frozen.base_weights(),
            lambda _: weights,
            self.config.constants.refresh_steps,
            step,
        )

    def step(self, step: int) -> None:
        """Step 2: take one step of both masks and the coefficients."""
        merged = self.fit.combined()
        weights = self.model.weights(merged, self.coefficients)
        parts: dict[str, Tensor] = {}
        for item in self.schedule:
            loss = torch.zeros((), device=self.model.device)
            if item is not None:
                rows_B = calibration_batch(self.tasks[item.task], self.config, step)
                loss = self._loss(item, weights, rows_B, step, parts)
            if loss.requires_grad:
                loss.backward()
        self.fit.update(merged, weights, step)
        losses = self.sum_losses(parts)
        record = {
            "phase": "masks",
            "step": step,
            "loss": sum(losses.values()),
            **losses,
            **{f"density/{name}": mask.density() for name, mask in self.masks.items()},
        }
        self.track_step(record)

    def _loss(self, item: WorkItem, weights: Weights, rows_B: Tensor, step: int, parts: dict[str, Tensor]) -> Tensor:
        task, answers = self.tasks[item.task], self.answers[item.task]
        return fit_loss(task, item, answers, weights, rows_B, self.trigger_pool, self.config, step, parts)
