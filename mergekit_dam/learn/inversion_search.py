"""`objective: inversion`, the default: find backdoors blindly, then fit both masks against what was found.

1. Scan: targeted inversion of every class of every input model, theta_0 as the control (scan/inversion.py); a wide
   trigger of each suspect class is then recovered from its model.
2. Fit: M1, M2 and the coefficients are learned together, so that the merge answers calibration samples as each
   task's own model does, a suspect class no more often than others (teacher.py), with a recovered trigger as without:
   L = sum_t KL(f_t(x) || f(x)) + alpha sum_suspects KL(f_t(x) || f(x + trigger)).
3. Refresh: every few steps the suspects' triggers are recovered anew from the current merge and join those known, so
   that what is left of a backdoor is found, too (min-max, as in adversarial training, arXiv 1706.06083).
The masks are those of DAM (Yang et al., arXiv 2410.13910): M1 keeps what tasks share, M2, per model where something
is suspect (`detection`), takes out what reacts to triggers. Legend: T tasks, P masked tensors, B batch, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.engine.shards import Share, turns
from mergekit_dam.engine.snapshots import State
from mergekit_dam.engine.streamed_weights import Weights
from mergekit_dam.learn.fit import MaskFit
from mergekit_dam.learn.losses import Patience, calibration_batch, fit_loss, held_out, summed
from mergekit_dam.learn.masks import ConcreteMask, Whole, final_probabilities
from mergekit_dam.learn.search import MaskSearch
from mergekit_dam.learn.students import wanted
from mergekit_dam.learn.teacher import OwnAnswers, balance
from mergekit_dam.learn.trigger_pool import Pooled, Pools, recover
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION
from mergekit_dam.scan.cross_task import untouched, weights_of_other, weights_of_others
from mergekit_dam.scan.findings import Finding, Suspect, blank, blank_finding, facts_of, in_order, suspects, target_of
from mergekit_dam.scan.inversion import success_rates
from mergekit_dam.scan.scanner import scan, undefended

LOG = logging.getLogger(__name__)


class InversionSearch(MaskSearch):
    """The search described above; `start` are effective coefficients: with the masks at their start."""

    def set_up(self) -> None:
        self.begin_fit(suspects=False)
        self.turns = turns([len(calibration_batch(task, self.config, 0)) for task in self.tasks], self.shards)
        self.answers = {
            share.task: OwnAnswers(self.tasks[share.task], self.model.frozen.own_weights(share.task))
            for share in self.turns
            if share is not None
        }
        self.patience = Patience(self.config.patience)
        self.findings: list[Finding] = []
        self.pools: Pools = {}

    def begin_fit(self, *, suspects: bool) -> None:
        """Masks and coefficients at their start."""
        self.fit = MaskFit(self.model, self.config, self.start, suspects=suspects)

    @property
    def masks(self) -> dict[str, ConcreteMask]:
        """By name."""
        return self.fit.masks

    @property
    def coefficients(self) -> Tensor:
        """lambda, (T, 1) or (T, P)."""
        return self.fit.coefficients

    def run(self) -> tuple[Whole, Tensor]:
        """Learn. Returns probabilities as bytes by mask and tensor, and the coefficients (T, 1) or (T, P)."""
        phase, done = self.begin("scan")
        if phase == "scan":
            if BACKDOOR_DETECTION in self.masks and not wanted(self.tasks, self.config):
                self.scan(done)
            done = 0
        balance(self.answers, self.pools)
        for step in self.progress(range(done, self.config.steps), "masks"):
            if step and step % self.config.refresh_every == 0:
                self.refresh(step)
            self.step(step)
            if self.is_enough(step):
                LOG.info("dam: the loss on held-out samples falls no more: done after step %d", step)
                break
            self.keep("masks", step + 1)
        return final_probabilities(self.masks), self.coefficients

    def state(self, phase: str, done: int) -> State:
        facts = {
            "phase": phase, "done": done,
            "findings": [facts_of(finding) for finding in self.findings],
            "pools": [[*key, [one.weight for one in pool]] for key, pool in self.pools.items()],
            "patience": [self.patience.lowest, self.patience.misses],
        }  # fmt: skip
        state = self.fit.state(facts)
        held = {f"finding/{i}": f.trigger for i, f in enumerate(self.findings)}
        held |= {f"pool/{n}/{i}": p.trigger for n, pool in enumerate(self.pools.values()) for i, p in enumerate(pool)}
        state.tensors |= {f"{name}/{i}": p for name, t in held.items() for i, p in enumerate(t.parameters)}
        return state

    def lay_out(self, facts: Mapping[str, Any]) -> None:
        self.patience.lowest, self.patience.misses = facts.get("patience", (None, 0))
        self.findings = [blank_finding(self.tasks, f) for f in facts["findings"]]
        self.pools = {}
        for task, target, carrier, kind, weights in facts["pools"]:
            key = Suspect(task, target_of(target), carrier, kind)
            self.pools[key] = [Pooled(blank(self.tasks[task], kind), weight) for weight in weights]
        self.begin_fit(suspects=len(self.pools) > 0)

    def audit(self) -> list[dict[str, Any]]:
        """The scan's findings as JSON, with those that the masks were fitted against marked."""
        return [{**f.to_json(self.tasks), "suspect": f.key in self.pools} for f in self.findings]

    def remaining(self) -> list[dict[str, Any]]:
        """What the recovered trigger of each suspect does to the suspect's model, and what is left in the merge.

        Success is the share of calibration samples that are answered with the target: `before` of the model, `after`
        of the merge, and `plain` of the merge without a trigger (None for continuations). Every process measures all.
        """
        marked = [finding for finding in self.findings if finding.key in self.pools]
        if not marked:
            return []
        base = self.model.frozen.base_weights()
        merged = self.fit.weights()
        found = []
        for one in marked:
            task = self.tasks[one.task]
            own = task.own_weights() if one.carrier is None else weights_of_other(task, self.tasks[one.carrier], base)
            before, after = (success_rates(task, w, one.trigger, [one.target])[0] for w in (own, merged))
            plain = untouched(task, merged, [one.target])[0] if isinstance(one.target, int) else None
            names = {key: value for key, value in one.to_json(self.tasks).items() if key not in one.numbers}
            found.append(names | {"control": one.control, "before": before, "after": after, "plain": plain})
        return found

    def scan(self, done: int = 0) -> None:
        """Step 1: each process scans a task at a time."""
        base = self.model.frozen.base_weights()
        if self.shards.rank == 0:
            for note in undefended(self.tasks):
                LOG.warning("dam: %s", note)
        if done or not self._take_known():
            for first in self.progress(range(done, len(self.tasks), self.shards.size), "scan"):
                indices = range(len(self.tasks))[first : first + self.shards.size]
                own = indices[self.shards.rank : self.shards.rank + 1]
                self.findings += self._shared(scan(self.tasks, base, self.config, own))
                self.keep("scan", indices.stop)
            if self.known is not None and self.shards.rank == 0:
                self.known.keep(self.findings)
        for finding in suspects(self.findings, self.config.suspicion):
            self.pools[finding.key] = []
            self.track({"phase": "scan", **finding.to_json(self.tasks)})
        if self.pools:
            self.begin_fit(suspects=True)

        def scanned(suspect: Suspect) -> Mapping[str, Tensor]:
            if suspect.carrier is None:
                return self.tasks[suspect.task].own_weights()
            return weights_of_others(self.tasks, suspect.task, base)

        recover(self.tasks, self.pools, self.shards, self.config, base, scanned, self.config.scan_steps, "model")

    def _take_known(self) -> bool:
        """Whether another run has scanned these models so: its findings are then everyone's."""
        found = self.known.take() if self.known is not None and self.shards.rank == 0 else None
        there = bool(self.shards.union({"there": found is not None} if self.shards.rank == 0 else {})["there"])
        if there:
            self.findings = self._shared(found or [])
        return there

    def _shared(self, ours: list[Finding]) -> list[Finding]:
        """Everyone's findings of a turn in everyone's hands, by task and class."""
        everyones = self.shards.union({self.shards.rank: [facts_of(finding) for finding in ours]})
        found = []
        for owner, facts in everyones.items():
            for number, one in enumerate(facts):
                finding = ours[number] if owner == self.shards.rank else blank_finding(self.tasks, one)
                self.shards.broadcast(finding.trigger.parameters, owner)
                found.append(finding)
        return in_order(found)

    def refresh(self, step: int) -> None:
        """Step 3: new triggers from the current merge."""
        weights = self.fit.weights()
        recover(
            self.tasks, self.pools, self.shards, self.config, self.model.frozen.base_weights(), lambda _: weights,
            self.config.refresh_steps, step,
        )  # fmt: skip

    def step(self, step: int) -> None:
        """Step 2: one step of both masks and the coefficients."""
        merged = self.fit.combined()
        weights = self.model.weights(merged, self.coefficients)
        parts: dict[str, Tensor] = {}
        for turn, share in enumerate(self.turns):
            loss = torch.zeros((), device=self.model.device)
            if share is not None:
                rows_B = calibration_batch(self.tasks[share.task], self.config, step)
                loss = self._loss(share, weights, rows_B, step, parts)
            for _ in range(self._idle_passes(turn, share)):
                loss = loss + 0.0 * self.tasks[0].logits(weights, self.tasks[0].inputs(torch.arange(1))).sum()
            if loss.requires_grad:
                loss.backward()
        self.fit.update(merged, weights, step)
        losses = self._summed(parts)
        record = {
            "phase": "masks", "step": step, "loss": sum(losses.values()), **losses,
            **{f"density/{name}": mask.density() for name, mask in self.masks.items()},
        }  # fmt: skip
        self.track_step(record)

    def _idle_passes(self, turn: int, share: Share | None) -> int:
        """Passes that we make for nothing in a turn, because blocks wait for all processes."""
        if self.shards.size == 1 or not self.model.blockwise:
            return 0
        passes = [1 + sum(suspect.task == index for suspect in self.pools) for index in range(len(self.tasks))]
        most = max(passes[turn * self.shards.size : (turn + 1) * self.shards.size])
        return most - (passes[share.task] if share is not None else 0)

    def _loss(self, share: Share, weights: Weights, rows_B: Tensor, step: int, parts: dict[str, Tensor]) -> Tensor:
        task, answers = self.tasks[share.task], self.answers[share.task]
        return fit_loss(task, share, answers, weights, rows_B, self.pools, self.config, step, parts)

    def _summed(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """Everyone's terms; here is where the accelerator is waited for."""
        ours = torch.stack(list(parts.values())).tolist() if parts else []
        return summed(self.shards.union({self.shards.rank: dict(zip(parts, ours, strict=True))}).values())

    @torch.no_grad()
    def is_enough(self, step: int) -> bool:
        """Whether the loss on the held-out samples says so (setting `patience`)."""
        if not self.patience.is_due(step):
            return False
        weights = self.fit.weights()
        parts: dict[str, Tensor] = {}
        for share in self.turns:
            rows_B = held_out(self.tasks[share.task], self.config) if share is not None else torch.empty(0)
            if share is not None and len(share.of(rows_B)):
                self._loss(share, weights, rows_B, 0, parts)
        loss = sum(self._summed(parts).values())
        self.track({"phase": "held out", "step": step, "loss/held out": loss})
        return self.patience.is_over(loss)
