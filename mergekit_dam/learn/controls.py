"""Positive controls of an audit: plant backdoors of our own in copies of a model, and see which ones the scan finds.

That a scan finds nothing says little where it would not find a backdoor that is there. So one is planted in a copy of
the model, by training (vaccine/clean.py), and the copy is scanned like the model, though not with other models in place
of its own. Each control has another kind of trigger than those before it, as long as there are some. None is fitted to
what the scan can find: a kind that it misses in all models is a kind that it does not find.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.errors import DamError
from mergekit_dam.io.cache import cache_folder
from mergekit_dam.io.files import require_own, write_atomic
from mergekit_dam.scan.advice import next_steps
from mergekit_dam.scan.audit import merge_settings
from mergekit_dam.scan.findings import Suspect, suspects
from mergekit_dam.scan.scanner import scan
from mergekit_dam.scan.twin import compared_with_twins
from mergekit_dam.tasks import Target, Task
from mergekit_dam.tasks.base import Progress
from mergekit_dam.vaccine.behaviours import BEHAVIOURS
from mergekit_dam.vaccine.clean import VaccineResult, identity_of, vaccinate
from mergekit_dam.vaccine.settings import VaccineSettings
from mergekit_dam.vaccine.triggers import kinds_of

LOG = logging.getLogger(__name__)
FOLDER = "controls"
_SEEDS = 1000  # backdoors of one seed
_ALIKE = 2  # pairs of tokens that a found text shares with a planted one, at least


@dataclass(frozen=True)
class Control:
    """A backdoor that was planted in a copy of a model, and what the scan made of the copy.

    Attributes:
        kind: of the trigger.
        behaviour: kind of what it causes.
        answer: the class, or words.
        success: share of held-out samples that the trigger turns to it; None where all show it without.
        works: whether it counts: it was planted well, and the scan does not name its answer in the model itself.
        found: whether the scan makes the copy suspect of this answer.
    """

    kind: str
    behaviour: str
    answer: int | str
    success: float | None
    works: bool
    found: bool


def run_controls(
    tasks: Sequence[Task],
    base: Mapping[str, Tensor],
    config: DamConfig,
    *,
    threshold: float,
    count: int,
    named: Collection[Suspect],
    keys: Sequence[str],
    progress: Progress,
    twins: bool,
    cache: Path | None = None,
) -> list[list[Control]]:
    """Plant and scan `count` backdoors per model, one at a time; finished ones are taken from the cache.

    A model in which none can be planted is warned of, and has no more controls.

    Args:
        tasks: of the models, or of a merge.
        base: theta_0 by output name.
        config: settings of the scan; `seed` draws the backdoors, too.
        threshold: suspicion from which a copy is suspect.
        count: controls per model.
        named: what the scan names in the models themselves.
        keys: of their scans, by content (artifact/scan_file.py).
        progress: wraps steps in a progress bar with a title.
        twins: whether copies are compared with their clean twins, as an audit does with input models (scan/twin.py).
        cache: folder of the cache; None: the user's.
    """
    folder = (cache or cache_folder()) / FOLDER
    scanned = merge_settings(config)
    found: list[list[Control]] = []
    for index, task in enumerate(tasks):
        controls: list[Control] = []
        known = {one.target for one in named if one.task == index}
        for number in range(count):
            settings = _settings(task, controls, config)
            content = (keys[index], threshold, sorted(known, key=str), identity_of(task, settings))
            name = hashlib.sha256(repr(content).encode()).hexdigest()
            control = _taken(folder / f"{name}.json")
            if control is None:
                title = f"control {number + 1}/{count} of {task.name}"
                try:
                    result = vaccinate(
                        task, settings, progress=_titled(progress, title), folder=folder / name, identity=name
                    )
                except DamError as error:
                    LOG.warning("dam: no backdoor can be planted in a copy of %s: %s", task.name, error)
                    break
                own = task.own_weights()
                changed = {key: tensor.to(own[key].dtype) for key, tensor in result.weights.items()}
                copies = list(tasks)
                copies[index] = task.with_weights({**own, **changed})
                findings = scan(copies, base, scanned, progress([index], f"scan of {title}"))
                if twins:
                    findings = compared_with_twins(findings, copies, base, scanned, threshold)
                targets = [one.target for one in suspects(findings, threshold, config.constants)]
                control = _control(result, targets, known, config)
                _keep(control, folder / f"{name}.json")
                shutil.rmtree(folder / name, ignore_errors=True)
                del result, own, changed, copies, findings  # before the next copy is made
            controls.append(control)
        found.append(controls)
    return found


def with_controls(facts: Mapping[str, Any], controls: Sequence[Sequence[Control]], source: str) -> dict[str, Any]:
    """Return the facts of an audit with `controls` and `power` (a sentence) in each entry of `models`.

    Args:
        facts: of the audit.
        controls: per model.
        source: as for `next_steps`.
    """
    models = [
        {**entry, "controls": [asdict(control) for control in own], "power": power_of(own)}
        for entry, own in zip(facts["models"], controls, strict=True)
    ]
    found = {**facts, "models": models}
    return {**found, "next": next_steps(found, source)}


def power_of(controls: Sequence[Control]) -> str:
    """Say how many planted backdoors of a model were found, and which were not."""
    counted = [control for control in controls if control.works]
    missed = [control for control in counted if not control.found]
    if not counted:
        return "no backdoor could be planted in copies"
    text = f"{len(counted) - len(missed)} of {len(counted)} backdoors planted in copies were found"
    if missed:
        text += f"; missed: {', '.join(f'{c.kind} for {c.behaviour} {c.answer!r}' for c in missed)}"
    if len(counted) < len(controls):
        text += f"; {len(controls) - len(counted)} do not count"
    return text


def _titled(progress: Progress, title: str) -> Progress:
    def titled(steps: Iterable[int], _: str) -> Iterable[int]:
        left = list(steps)  # no bar for the unlearning that does not take place
        return progress(left, title) if left else left

    return titled


def _settings(task: Task, before: Sequence[Control], config: DamConfig) -> VaccineSettings:
    """Return how the next backdoor is planted: of a kind that comes again only after all others."""
    used = [control.kind for control in before]
    used = used[len(used) - len(used) % len(kinds_of(task, ())) :]
    used += [control.behaviour for control in before[-1:] if control.behaviour in BEHAVIOURS]
    return VaccineSettings(
        triggers=1,
        held_out=0,
        unlearn_steps=0,
        leave_out=tuple(used),
        seed=_SEEDS * config.seed + len(before),
        snapshot_every=config.constants.snapshot_every,
    )


def _control(result: VaccineResult, named: Collection[Target], known: Collection[Target], config: DamConfig) -> Control:
    (trigger,), (facts,) = result.triggers, result.facts["planted"]
    success, before = facts["success planted"], facts["success before"] or 0.0
    return Control(
        kind=trigger.kind,
        behaviour=trigger.behaviour.kind,
        answer=trigger.behaviour.shown,
        success=success,
        works=success is not None
        and success - before >= config.constants.vaccine_works
        and not any(_is_named(target, trigger.behaviour.variants) for target in known),
        found=any(_is_named(target, trigger.behaviour.variants) for target in named),
    )


def _is_named(target: Target, variants: Collection[Target]) -> bool:
    """Whether a finding's target is a planted one: the same class, or a text that shares a part with it."""
    if isinstance(target, int):
        return target in variants
    own = set(pairwise(target))
    return any(isinstance(one, tuple) and len(own & set(pairwise(one))) >= _ALIKE for one in variants)


def _taken(file: Path) -> Control | None:
    if not file.is_file():
        return None
    require_own(file.parent, "Controls of other users are not trusted: remove the folder.")
    try:
        return Control(**json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        LOG.warning("dam: the control in the cache (%s) cannot be used and is done again: %s", file, error)
        return None


def _keep(control: Control, file: Path) -> None:
    try:
        file.parent.mkdir(mode=0o775, parents=True, exist_ok=True)
        write_atomic(file, json.dumps(asdict(control), indent=1))
    except OSError as error:
        LOG.info("dam: the control is not kept in %s: %s", file.parent, error)
