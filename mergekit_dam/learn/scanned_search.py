"""What searches share that first scan the models for backdoors and then fit masks against what was found. T tasks."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.engine.shards import schedule
from mergekit_dam.learn.losses import calibration_batch, summed
from mergekit_dam.learn.search import MaskSearch
from mergekit_dam.learn.students import wanted
from mergekit_dam.learn.teacher import TeacherLogits
from mergekit_dam.learn.trigger_pool import TriggerPool, WeightedTrigger, refresh_triggers
from mergekit_dam.scan.cross_task import merge_without, success_without_trigger, weights_from
from mergekit_dam.scan.findings import Finding, Suspect, blank, blank_finding, facts_of, in_order, suspects, target_of
from mergekit_dam.scan.inversion import success_rates
from mergekit_dam.scan.scanner import scan, undefended

LOG = logging.getLogger(__name__)


class ScannedSearch(MaskSearch):
    """A search with findings, and triggers of the suspects.

    Attributes:
        findings: of the scan.
        trigger_pool: triggers to fit masks against, by suspect.
        schedule: the tasks whose losses are ours, one after another.
        answers: f_t(x), by index of those tasks.
    """

    scans = True

    def set_up(self) -> None:
        self.schedule = schedule([len(calibration_batch(task, self.config, 0)) for task in self.tasks], self.shards)
        self.findings: list[Finding] = []
        self.trigger_pool: TriggerPool = {}
        self.answers: dict[int, TeacherLogits] = {}

    @abstractmethod
    def begin_fit(self) -> None:
        """Masks and coefficients at their start, now that it is known whether there are suspects."""

    @abstractmethod
    def merged_weights(self) -> Weights:
        """The whole merge by the masks as they are."""

    def facts_of_state(self, phase: str, done: int) -> dict[str, Any]:
        """All of the state that is no tensor."""
        return {
            "phase": phase,
            "done": done,
            "findings": [facts_of(finding) for finding in self.findings],
            "pools": [[*key, [one.weight for one in pool]] for key, pool in self.trigger_pool.items()],
        }

    def triggers_of_state(self) -> dict[str, Tensor]:
        """Triggers of the findings and of the pool."""
        held = {f"finding/{i}": f.trigger for i, f in enumerate(self.findings)}
        for n, triggers in enumerate(self.trigger_pool.values()):
            held |= {f"pool/{n}/{i}": one.trigger for i, one in enumerate(triggers)}
        return {f"{name}/{i}": p for name, t in held.items() for i, p in enumerate(t.parameters)}

    def allocate_triggers(self, facts: Mapping[str, Any]) -> None:
        """Findings and pool, whose triggers are still to be filled."""
        self.findings = [blank_finding(self.tasks, f) for f in facts["findings"]]
        self.trigger_pool = {}
        for task, target, source_model, kind, weights in facts["pools"]:
            key = Suspect(task, target_of(target), source_model, kind)
            self.trigger_pool[key] = [WeightedTrigger(blank(self.tasks[task], kind), weight) for weight in weights]

    def audit(self) -> list[dict[str, Any]]:
        """The scan's findings as JSON, with those that the masks were fitted against marked."""
        return [{**f.to_json(self.tasks), "suspect": f.key in self.trigger_pool} for f in self.findings]

    def remaining(self) -> list[dict[str, Any]]:
        """What the recovered trigger of each suspect does to the suspect's model, and what is left in the merge.

        Success is the share of calibration samples that are answered with the target: `before` of the model, `after`
        of the merge, and `plain` of the merge without a trigger (None for continuations). Every process measures all.
        """
        marked = [finding for finding in self.findings if finding.key in self.trigger_pool]
        if not marked:
            return []
        base = self.model.frozen.base_weights()
        merged = self.merged_weights()
        found = []
        for one in marked:
            task = self.tasks[one.task]
            source = one.source_model
            own = task.own_weights() if source is None else weights_from(task, self.tasks[source], base)
            before, after = (success_rates(task, w, one.trigger, [one.target])[0] for w in (own, merged))
            plain = success_without_trigger(task, merged, [one.target])[0] if isinstance(one.target, int) else None
            names = {key: value for key, value in one.to_json(self.tasks).items() if key not in one.numbers}
            found.append(names | {"control": one.base_success, "before": before, "after": after, "plain": plain})
        return found

    def scan_if_wanted(self, done: int) -> None:
        """Step 1, unless there is no mask to fit against triggers, or students are merged."""
        if self.config.mask != "m1" and not wanted(self.tasks, self.config):
            self.scan(done)

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
                self.snapshot_if_due("scan", indices.stop)
            if self.known is not None and self.shards.rank == 0:
                self.known.keep(self.findings)
        for finding in suspects(self.findings, self.config.suspicion, self.config.constants):
            self.trigger_pool[finding.key] = []
            self.track({"phase": "scan", **finding.to_json(self.tasks)})
        if self.trigger_pool:
            self.begin_fit()

        refresh_triggers(
            self.tasks,
            self.trigger_pool,
            self.shards,
            self.config,
            base,
            lambda suspect: self.scanned(suspect, base),
            self.config.scan_steps,
            "model",
        )

    def scanned(self, suspect: Suspect, base: Weights) -> Mapping[str, Tensor]:
        """The weights in which a suspect was found: its model's own, or those of all other models.

        Args:
            base: theta_0 by output name.
        """
        if suspect.source_model is None:
            return self.tasks[suspect.task].own_weights()
        return merge_without(self.tasks, suspect.task, base)

    def _take_known(self) -> bool:
        """Whether another run has scanned these models so: its findings are then everyone's."""
        found = self.known.take() if self.known is not None and self.shards.rank == 0 else None
        ours = {"there": found is not None} if self.shards.rank == 0 else {}
        there = bool(self.shards.all_gather_dict(ours)["there"])
        if there:
            self.findings = self._shared(found or [])
        return there

    def _shared(self, ours: list[Finding]) -> list[Finding]:
        """Everyone's findings of a turn in everyone's hands, by task and class."""
        everyones = self.shards.all_gather_dict({self.shards.rank: [facts_of(finding) for finding in ours]})
        found = []
        for owner, facts in everyones.items():
            for number, one in enumerate(facts):
                finding = ours[number] if owner == self.shards.rank else blank_finding(self.tasks, one)
                self.shards.broadcast(finding.trigger.parameters, owner)
                found.append(finding)
        return in_order(found)

    def summed(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """Everyone's terms; here is where the accelerator is waited for."""
        ours = torch.stack(list(parts.values())).tolist() if parts else []
        return summed(self.shards.all_gather_dict({self.shards.rank: dict(zip(parts, ours, strict=True))}).values())
