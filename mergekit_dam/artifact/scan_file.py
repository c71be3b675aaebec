"""What a scan found, kept in the cache: `audit` and learning need the same scan, so the second of them takes it.

scans/<key>.safetensors: the recovered triggers, `<finding>.<parameter>`, with the findings' facts and the seconds that
the scan took as JSON in the metadata. The key is a hash of all that a scan depends on, by content: weights, samples,
heads, the settings that it reads, versions and code. The file is complete under its name or not there, so that a scan
that was cut short is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergekit_dam.artifact.schema import CHECKSUM, checksum
from mergekit_dam.io.cache import cache_folder, code_digest, library_versions
from mergekit_dam.io.files import replacing, require_own
from mergekit_dam.scan.findings import Finding, blank_finding, facts_of
from mergekit_dam.tasks import Task

LOG = logging.getLogger(__name__)
FOLDER = "scans"
_ENTRY = "dam_scan"
# settings that only the fit after the scan reads; tests/artifact/test_scan_file.py scans without them
NOT_SCANNED = frozenset(
    {
        "alpha", "batch_size", "coefficient_learning_rate", "coefficient_steps", "coefficients", "detection", "eps",
        "granularity", "initial_logit", "mask", "mask_learning_rate", "max_coefficient", "objective", "patience",
        "perturbation_learning_rate", "refresh_every", "refresh_steps", "rescale", "steps", "student_batch_size",
        "student_learning_rate", "student_steps", "student_words", "temperature",
    }
)  # fmt: skip
# of a model: names do not matter, and what the data is read from is in the samples' digests
_NAMES = frozenset({"name", "model"})
_DATA = frozenset({"calibration", "split", "column", "weight"})


class StoredScan:
    """The place of one scan.

    Args:
        description: what the masks depend on (`masks_file.describe`).
        tasks: of the plan.
        seconds: by part of the work; those of the scan are put there when it is taken, and kept from there.
        quiet: do not say where a scan was taken from.
    """

    def __init__(
        self, description: Mapping[str, Any], tasks: Sequence[Task], seconds: MutableMapping[str, float], *,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self.tasks, self.seconds, self.quiet = tasks, seconds, quiet
        facts = dict(description)
        facts["settings"] = {k: v for k, v in description["settings"].items() if k not in NOT_SCANNED}
        facts["base"] = {k: v for k, v in description["base"].items() if k not in _NAMES}
        facts["models"] = [
            {k: v for k, v in model.items() if k not in _NAMES}
            | {"settings": {k: v for k, v in model["settings"].items() if k not in _DATA}}
            for model in description["models"]
        ]
        heads = [_digest_of(task) for task in tasks]
        key = json.dumps([facts, heads, library_versions(), code_digest()], sort_keys=True)
        self.file = cache_folder() / FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def take(self) -> list[Finding] | None:
        """The findings; None where there is no whole scan of these inputs and settings."""
        if not self.file.is_file():
            return None
        require_own(
            self.file.parent, "Scans of others are not used unasked: remove it, or set MERGEKIT_DAM_CACHE to another."
        )
        try:
            with safe_open(str(self.file), framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_ENTRY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator there)
            if facts.pop(CHECKSUM) != checksum(facts, tensors):
                raise ValueError("content that does not match its checksum")
            self.seconds["scan"] = float(facts["seconds"])
            findings = [blank_finding(self.tasks, one) for one in facts["findings"]]
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
        """Keep a whole scan; a cache that cannot be written costs time only."""
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


def _digest_of(task: Task) -> str:
    """SHA-256 of a task's own head: a recipe names it by its file."""
    found = hashlib.sha256()
    for name, tensor in sorted(task.head.items()):
        content = tensor.detach().contiguous().cpu()
        found.update(repr((name, str(content.dtype), tuple(content.shape))).encode())
        found.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
