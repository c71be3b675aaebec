"""Store the findings of a scan in the cache, one file per model, since `audit` and learning need the same scan.

scans/<key>-<place>.safetensors: the recovered triggers, `<finding>.<parameter>`, with the findings' facts and the
seconds that the scan took as JSON in the metadata. The key is a hash of all inputs of the scan by content: weights,
samples, heads, the settings that it reads, versions and code; of all models where the scan of one reads the others. A
file is written atomically when its model is scanned, so that an interrupted scan goes on with the next model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergekit_dam.artifact.schema import CHECKSUM, checksum
from mergekit_dam.constants import constants_of
from mergekit_dam.io.cache import cache_folder
from mergekit_dam.io.files import replacing, require_own
from mergekit_dam.models.plan import Plan
from mergekit_dam.scan.findings import Finding, blank_finding, facts_of
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.content import content_key

LOG = logging.getLogger(__name__)
FOLDER = "scans"
_ENTRY = "dam_scan"
# what only the fit after the scan reads; tests/artifact/test_scan_file.py scans without them
NOT_SCANNED = constants_of("twins", "suspects", "fit", "paper", "students", "vaccine") | {
    "alpha",
    "batch_size",
    "clean",
    "detection",
    "granularity",
    "mask",
    "mask_learning_rate",
    "objective",
    "refresh_every",
    "steps",
    "student_steps",
    "weight",
    "window",
}


class StoredScan:
    """The cached files of a scan.

    Args:
        plan: plan of the models to scan.
        tasks: tasks of the plan.
        digests: content hashes of the weights (`digests_of`).
        seconds: seconds by part of the work; `take` adds to its entry "scan" what the scan of the model took.
        quiet: do not log which models are not scanned again.
    """

    def __init__(
        self,
        plan: Plan,
        tasks: Sequence[Task],
        digests: Mapping[str, str],
        seconds: MutableMapping[str, float],
        *,
        quiet: bool = False,
    ) -> None:
        self.tasks, self.seconds, self.quiet = tasks, seconds, quiet
        folder = (plan.cache or cache_folder()) / FOLDER
        read = [index if task.scanned_alone else None for index, task in enumerate(tasks)]
        keys = {only: content_key(plan, tasks, digests, without=NOT_SCANNED, only=only) for only in dict.fromkeys(read)}
        # a seed of the scan follows from the place
        self.files = [folder / f"{keys[only]}-{index}.safetensors" for index, only in enumerate(read)]

    def take(self, index: int) -> list[Finding] | None:
        """Read the findings about a task; None without a complete scan of these inputs and settings."""
        file = self.files[index]
        if not file.is_file():
            return None
        require_own(
            file.parent,
            "Scans of other users are not trusted: remove the folder, or set MERGEKIT_DAM_CACHE to another folder.",
        )
        try:
            with safe_open(str(file), framework="pt") as stored:
                facts = json.loads((stored.metadata() or {})[_ENTRY])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no iterator there)
            if facts.pop(CHECKSUM) != checksum(facts, tensors):
                raise ValueError("content that does not match its checksum")
            findings = [blank_finding(self.tasks, entry) for entry in facts["findings"]]
            for i, finding in enumerate(findings):
                for n, parameter in enumerate(finding.trigger.parameters):
                    parameter.copy_(tensors[f"{i}.{n}"])
            self.seconds["scan"] = self.seconds.get("scan", 0.0) + float(facts["seconds"])
            if not self.quiet:
                LOG.warning("dam: the scan of %s is in the cache; it is not scanned again", self.tasks[index].name)
            return findings
        except (SafetensorError, OSError, LookupError, StopIteration, TypeError, ValueError, RuntimeError) as error:
            LOG.warning("dam: the scan in the cache (%s) cannot be used and is done again: %s", file, error)
            return None

    def keep(self, index: int, findings: Sequence[Finding], seconds: float) -> None:
        """Store the complete scan of a task's model; a cache that cannot be written costs time only."""
        file = self.files[index]
        tensors = {
            f"{i}.{n}": parameter.detach().contiguous().cpu()
            for i, finding in enumerate(findings)
            for n, parameter in enumerate(finding.trigger.parameters)
        }
        facts: dict[str, Any] = {"findings": [facts_of(finding) for finding in findings], "seconds": seconds}
        facts[CHECKSUM] = checksum(facts, tensors)
        try:
            file.parent.parent.mkdir(parents=True, exist_ok=True)
            file.parent.mkdir(mode=0o775, exist_ok=True)
            with replacing(file) as temporary:
                save_file(tensors, temporary, metadata={_ENTRY: json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            LOG.info("dam: the scan is not kept in %s: %s", file.parent, error)
