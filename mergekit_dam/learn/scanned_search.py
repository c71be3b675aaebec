"""Define the base class of searches that scan models for backdoors and fit masks against suspects. T tasks."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.engine.shards import schedule
from mergekit_dam.learn.losses import calibration_batch, sum_terms
from mergekit_dam.learn.search import MaskSearch
from mergekit_dam.learn.students import uses_students
from mergekit_dam.learn.teacher import TeacherLogits
from mergekit_dam.learn.trigger_pool import TriggerPool, WeightedTrigger, refresh_triggers
from mergekit_dam.scan.cross_task import merge_without, success_without_trigger, weights_from
from mergekit_dam.scan.findings import Finding, Suspect, blank, blank_finding, facts_of, in_order, suspects, target_of
from mergekit_dam.scan.inversion import success_rates
from mergekit_dam.scan.scanner import scan, undefended
from mergekit_dam.scan.triggers import TriggerBatch

LOG = logging.getLogger(__name__)


class ScannedSearch(MaskSearch):
    """A search with findings, and with triggers of the suspects.

    Attributes:
        findings: findings of the scan.
        trigger_pool: triggers to fit masks against, by suspect.
        schedule: work of this process in each step.
        answers: f_t(x), by index of the tasks in `schedule`.
    """

    scans = True

    def set_up(self) -> None:
        self.schedule = schedule([len(calibration_batch(task, self.config, 0)) for task in self.tasks], self.shards)
        self.findings: list[Finding] = []
        self.trigger_pool: TriggerPool = {}
        self.answers: dict[int, TeacherLogits] = {}

    @abstractmethod
    def begin_fit(self) -> None:
        """Make initial masks and coefficients; the number of M2 masks depends on whether there are suspects."""

    @abstractmethod
    def merged_weights(self) -> Weights:
        """Return the weights of the whole merge at the current masks."""

    def facts_of_state(self, phase: str, done: int) -> dict[str, Any]:
        """Return the JSON part of the state."""
        return {
            "phase": phase,
            "done": done,
            "findings": [facts_of(finding) for finding in self.findings],
            "pools": [[*key, [one.weight for one in pool]] for key, pool in self.trigger_pool.items()],
        }

    def triggers_of_state(self) -> dict[str, Tensor]:
        """Return the tensors of triggers of the findings and of the pool, by name."""
        held = {f"finding/{i}": f.trigger for i, f in enumerate(self.findings)}
        for n, triggers in enumerate(self.trigger_pool.values()):
            held |= {f"pool/{n}/{i}": one.trigger for i, one in enumerate(triggers)}
        return {f"{name}/{i}": p for name, t in held.items() for i, p in enumerate(t.parameters)}

    def allocate_triggers(self, facts: Mapping[str, Any]) -> None:
        """Make findings and pool with blank triggers, so that a snapshot can fill them."""
        self.findings = [blank_finding(self.tasks, f) for f in facts["findings"]]
        self.trigger_pool = {}
        for task, target, source_model, kind, weights in facts["pools"]:
            key = Suspect(task, target_of(target), source_model, kind)
            self.trigger_pool[key] = [WeightedTrigger(blank(self.tasks[task], kind), weight) for weight in weights]
        if facts["phase"] != "scan":
            self.teach_suspects()

    def suspects(self) -> list[Finding]:
        """Return the findings that make models suspect."""
        return suspects(self.findings, self.config.suspicion, self.config.constants)

    def audit(self) -> list[dict[str, Any]]:
        """Return the findings of the scan as JSON; `suspect` marks those that make their model suspect."""
        marked = {finding.key for finding in self.suspects()}
        return [{**f.to_json(self.tasks), "suspect": f.key in marked} for f in self.findings]

    def remaining(self) -> list[dict[str, Any]]:
        """Return the success of each suspect's recovered trigger on the suspect's model and on the merge.

        Success is the share of calibration samples that are answered with the target: `before` by the model, `after`
        by the merge, and `plain` by the merge without a trigger (None for continuations). Every process measures all.
        """
        found_suspects = in_order(self.suspects())
        if not found_suspects:
            return []
        base = self.model.frozen.base_weights()
        merged = self.merged_weights()
        rows = []
        for finding in found_suspects:
            task = self.tasks[finding.task]
            source, target = finding.source_model, finding.target
            own = task.own_weights() if source is None else weights_from(task, self.tasks[source], base)
            before, after = (success_rates(task, w, finding.trigger, [target])[0] for w in (own, merged))
            plain = success_without_trigger(task, merged, [target])[0] if isinstance(target, int) else None
            names = {key: value for key, value in finding.to_json(self.tasks).items() if key not in finding.numbers}
            rows.append(names | {"control": finding.base_success, "before": before, "after": after, "plain": plain})
        return rows

    def scan_if_needed(self, done: int) -> None:
        """Run step 1, unless no mask is fitted against triggers, or students replace the models."""
        if self.config.mask != "m1" and not uses_students(self.tasks, self.config):
            self.scan(done)

    def scan(self, done: int = 0) -> None:
        """Step 1: scan all models, each process one task at a time, and recover a trigger of each suspect."""
        base = self.model.frozen.base_weights()
        if self.shards.rank == 0:
            for note in undefended(self.tasks):
                LOG.warning("dam: %s", note)
        for first in self.progress(range(done, len(self.tasks), self.shards.size), "scan"):
            indices = range(len(self.tasks))[first : first + self.shards.size]
            own = indices[self.shards.rank : self.shards.rank + 1]
            self.findings += self._gather_findings(scan(self.tasks, base, self.config, own, self.known))
            self.snapshot_if_due("scan", indices.stop)
        known: dict[Suspect, TriggerBatch] = {}
        found = self.suspects()
        for finding in found:
            self.track({"phase": "scan", **finding.to_json(self.tasks)})
        if self.teach_suspects():
            self.begin_fit()
            return
        for finding in found:
            self.trigger_pool[finding.key] = []
            if not self.tasks[finding.task].classifies:  # the scan's search ends when the trigger is widest
                known[finding.key] = finding.trigger
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
            known=known,
        )

    def teach_suspects(self) -> bool:
        """Put students in the places of suspect models, and return whether there are any.

        Students have no backdoor to fit masks against.
        """
        found = sorted({finding.model for finding in self.suspects()})
        if self.teach is None or not found:
            return False
        self.model = self.teach(found)
        return True

    def scanned(self, suspect: Suspect, base: Weights) -> Mapping[str, Tensor]:
        """Return the weights that a suspect's trigger is recovered from: its model's, or a merge of all other models.

        Args:
            base: theta_0 by output name.
        """
        if suspect.source_model is None:
            return self.tasks[suspect.task].own_weights()
        return merge_without(self.tasks, suspect.task, base)

    def _gather_findings(self, ours: list[Finding]) -> list[Finding]:
        """Return the findings of all processes, with their triggers, by task and class."""
        by_rank = self.shards.all_gather_dict({self.shards.rank: [facts_of(finding) for finding in ours]})
        findings = []
        for owner, all_facts in by_rank.items():
            for number, facts in enumerate(all_facts):
                finding = ours[number] if owner == self.shards.rank else blank_finding(self.tasks, facts)
                self.shards.broadcast(finding.trigger.parameters, owner)
                findings.append(finding)
        return in_order(findings)

    def sum_losses(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """Sum loss terms over processes, by name; this waits for the accelerator."""
        ours = torch.stack(list(parts.values())).tolist() if parts else []
        return sum_terms(self.shards.all_gather_dict({self.shards.rank: dict(zip(parts, ours, strict=True))}).values())
