"""Store the findings of a scan in the cache, since `audit` and learning need the same scan.

scans/<key>.safetensors: the recovered triggers, `<finding>.<parameter>`, with the findings' facts and the seconds that
the scan took as JSON in the metadata. The key is a hash of all inputs of the scan by content: weights, samples, heads,
the settings that it reads, versions and code. The file is written atomically, so that an interrupted scan is never
used as a whole one.
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
NOT_SCANNED = constants_of("suspects", "fit", "paper", "students", "vaccine") | {
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
    """The cached file of a scan.

    Args:
        plan: plan of the models to scan.
        tasks: tasks of the plan.
        digests: content hashes of the weights (`digests_of`).
        seconds: seconds by part of the work; `take` sets its entry "scan", and `keep` stores that entry.
        quiet: do not log which file a scan was read from.
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
        key = content_key(plan, tasks, digests, without=NOT_SCANNED)
        self.file = (plan.cache or cache_folder()) / FOLDER / f"{key}.safetensors"

    def take(self) -> list[Finding] | None:
        """Read the findings; None without a complete scan of these inputs and settings."""
        if not self.file.is_file():
            return None
        require_own(
            self.file.parent,
            "Scans of other users are not trusted: remove the folder, or set MERGEKIT_DAM_CACHE to another folder.",
        )
        try:
            with safe_open(str(self.file), framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_ENTRY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator there)
            if facts.pop(CHECKSUM) != checksum(facts, tensors):
                raise ValueError("content that does not match its checksum")
            self.seconds["scan"] = float(facts["seconds"])
            findings = [blank_finding(self.tasks, entry) for entry in facts["findings"]]
            for i, finding in enumerate(findings):
                for n, parameter in enumerate(finding.trigger.parameters):
                    parameter.copy_(tensors[f"{i}.{n}"])
            if not self.quiet:
                LOG.warning("dam: the scan from the cache %s; no model is scanned again", self.file)
            return findings
        except (SafetensorError, OSError, LookupError, StopIteration, TypeError, ValueError, RuntimeError) as error:
            LOG.warning("dam: the scan in the cache (%s) cannot be used and is done again: %s", self.file, error)
            return None

    def keep(self, findings: Sequence[Finding]) -> None:
        """Store a complete scan; a cache that cannot be written costs time only."""
        tensors = {
            f"{i}.{n}": parameter.detach().contiguous().cpu()
            for i, finding in enumerate(findings)
            for n, parameter in enumerate(finding.trigger.parameters)
        }
        facts: dict[str, Any] = {
            "findings": [facts_of(finding) for finding in findings],
            "seconds": self.seconds["scan"],
        }
        facts[CHECKSUM] = checksum(facts, tensors)
        try:
            self.file.parent.parent.mkdir(parents=True, exist_ok=True)
            self.file.parent.mkdir(mode=0o775, exist_ok=True)
            with replacing(self.file) as temporary:
                save_file(tensors, temporary, metadata={_ENTRY: json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            LOG.info("dam: the scan is not kept in %s: %s", self.file.parent, error)
