"""Targeted inversion: search by Adam for universal triggers that make a model answer given targets.

Triggers are parametrised and priced as in Neural Cleanse (Wang et al., IEEE S&P 2019, section IV).
Legend: B batch, R triggers, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.constants import Constants
from mergekit_dam.engine.module_weights import without_gradients
from mergekit_dam.scan.triggers import TriggerBatch, kinds_of, started
from mergekit_dam.tasks import Target, Task

_AT_ONCE = 8  # texts of a causal LM, whose logits are large


@dataclass(frozen=True)
class Pace:
    """Speed of an inversion: Adam's step, the first price of a unit of size, and its factors per step.

    Fast prices give the smallest triggers: among them the implanted ones stand out. Slow ones leave triggers wide: they
    hold more of what a backdoor reacts to, and that is what masks must be fitted against (benchmarks/STUDY.md).
    """

    learning_rate: float
    price: float
    rise: float
    fall: float

    @classmethod
    def lean(cls, constants: Constants) -> Pace:
        """Fast prices, for the scan."""
        return cls(constants.lean_learning_rate, constants.lean_price, constants.lean_rise, constants.lean_fall)

    @classmethod
    def wide(cls, constants: Constants) -> Pace:
        """Slow prices, for what masks are fitted against."""
        return cls(constants.wide_learning_rate, constants.wide_price, constants.wide_rise, constants.wide_fall)


class Inversion:
    """Search one model for triggers of several targets at once, one row each.

    The price of size rises while a trigger works on enough of the last batches (`trigger_works`) and falls otherwise;
    Wang et al. (section IV.B) wait for several batches instead.

    Args:
        task: forward pass and calibration samples.
        weights: of the model that is inverted, by output name.
        targets: what each row shall cause, R of them.
        batch_size: samples per row and step.
        generator: of batches, and of the start.
        start: triggers to go on from; None: random ones of the plainest kind.
        pace: how fast prices and triggers move; None: as in a scan.
    """

    def __init__(
        self,
        task: Task,
        weights: Mapping[str, Tensor],
        targets: Sequence[Target],
        *,
        batch_size: int,
        generator: torch.Generator,
        start: TriggerBatch | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.task, self.generator, self.targets = task, generator, list(targets)
        self.weights = without_gradients(weights)
        self.batch_size = min(batch_size, task.num_samples)
        count, pace = len(targets), pace or Pace.lean(task.constants)
        if start is None:
            start = started(task, kinds_of(task)[0], count, generator)
        self.triggers = start.like([p.detach().clone().requires_grad_(True) for p in start.parameters])
        self.optimiser = torch.optim.Adam(self.triggers.parameters, lr=pace.learning_rate, betas=(0.5, 0.9))
        self.best = self.triggers.rows(range(count))
        self.pace, self.price_R = pace, torch.full((count,), pace.price, device=task.device)
        self.smallest_R = torch.full_like(self.price_R, torch.inf)
        self.success_R = torch.full_like(self.price_R, 0.5)
        self.loss_R = torch.full_like(self.price_R, torch.inf)

    @property
    def worked(self) -> bool:
        """Whether every row's trigger has worked once."""
        return bool(self.smallest_R.isfinite().all())

    def run(self, steps: int, *, until_works: bool = False) -> Inversion:
        """Take some more steps; returns itself.

        Args:
            until_works: whether to stop once every row's trigger has worked.
        """
        for _ in range(steps):
            if until_works and self.worked:
                break
            self._step()
        return self

    def _step(self) -> None:
        task, triggers, count = self.task, self.triggers, len(self.targets)
        rows_B = torch.randint(task.num_samples, (self.batch_size,), generator=self.generator)
        gradients: list[Tensor] = []
        means, shares = [], []
        # a causal LM's activations are large, so one row at a time
        for part in torch.arange(count).split(count if task.classifies else 1):
            losses, hits = _reach(task, self.weights, triggers, self.targets, rows_B, part.tolist())
            losses_R, size_R = losses.view(len(part), -1).mean(1), triggers.size()
            added = torch.autograd.grad((losses_R + self.price_R[part] * size_R[part]).sum(), triggers.parameters)
            gradients = [total + one for total, one in zip(gradients, added, strict=True)] if gradients else list(added)
            means.append(losses_R.detach())
            shares.append(hits.float().view(len(part), -1).mean(1))
        self.loss_R, hits_R = torch.cat(means), torch.cat(shares)
        self.success_R = 0.7 * self.success_R + 0.3 * hits_R
        works_R = self.success_R >= task.constants.trigger_works
        with torch.no_grad():
            size_R = triggers.size()
            better_R = works_R & (size_R < self.smallest_R)
            self.smallest_R = torch.where(better_R, size_R, self.smallest_R)
            kept_R = better_R | self.smallest_R.isinf()
            for kept, now, gradient in zip(self.best.parameters, triggers.parameters, gradients, strict=True):
                kept[kept_R] = now[kept_R]
                now.grad = gradient
        self.price_R = torch.where(works_R, self.price_R * self.pace.rise, self.price_R / self.pace.fall).clamp(
            1e-5, 10.0
        )
        self.optimiser.step()

    def finalists(self, count: int, gap_R: Tensor) -> Inversion:
        """Keep the most promising rows in a new search: half the smallest that worked, half of the widest gap.

        Args:
            count: rows at most.
            gap_R: success that theta_0 does not share. A warp has no small trigger, only a gap; a patch that also
                fools theta_0 has no gap at first, only a small trigger.
        """
        size_R = torch.where(self.smallest_R.isinf(), 1e6 * (2.0 - self.success_R), self.smallest_R)
        small = size_R.argsort()[: (count + 1) // 2]
        gap_R = gap_R.clone()
        gap_R[small] = torch.inf
        return self._only(gap_R.argsort(descending=True)[:count].sort().values)

    def nearest(self, count: int) -> Inversion:
        """Keep the rows whose targets are nearest, by the loss of the last step, in a new search."""
        return self._only(self.loss_R.argsort()[:count].sort().values)

    def _only(self, rows: Tensor) -> Inversion:
        """Go on with some rows."""
        chosen = Inversion(
            self.task,
            self.weights,
            [self.targets[row] for row in rows.tolist()],
            batch_size=self.batch_size,
            generator=self.generator,
            start=self.triggers.rows(rows.tolist()),
            pace=self.pace,
        )
        chosen.best = self.best.rows(rows.tolist())
        chosen.price_R, chosen.smallest_R, chosen.success_R, chosen.loss_R = (
            values[rows] for values in (self.price_R, self.smallest_R, self.success_R, self.loss_R)
        )
        return chosen


@torch.no_grad()
def success_rates(
    task: Task, weights: Mapping[str, Tensor], triggers: TriggerBatch, targets: Sequence[Target]
) -> list[float]:
    """Measure on which share of calibration samples each trigger makes a model answer its target."""
    rows_B = torch.arange(min(task.constants.measured_samples, task.num_samples))
    at_once = len(rows_B) if task.classifies else _AT_ONCE
    rates = []
    for row in range(len(targets)):
        hits = [_reach(task, weights, triggers, targets, part, [row])[1] for part in rows_B.split(at_once)]
        rates.append(float(torch.cat(hits).float().mean()))
    return rates


def _reach(
    task: Task,
    weights: Mapping[str, Tensor],
    triggers: TriggerBatch,
    targets: Sequence[Target],
    rows_B: Tensor,
    chosen: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """losses and hits (R B) of the chosen rows: every trigger on every sample, sample by sample within a trigger."""
    inputs = task.prompts(rows_B.repeat(len(chosen)))
    which = torch.tensor(chosen).repeat_interleave(len(rows_B)).to(task.device)
    wanted = [targets[row] for row in chosen for _ in range(len(rows_B))]
    return task.reach(weights, inputs, wanted, triggers.perturb(which))
