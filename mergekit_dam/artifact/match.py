"""Whether masks belong to what is merged, and masks of earlier runs that do."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path

from mergekit_dam.artifact.masks_file import LearnedMasks, load
from mergekit_dam.config import NOT_LEARNED
from mergekit_dam.errors import DamError
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks.content import BY_CONTENT

LOG = logging.getLogger(__name__)


def load_cached(path: Path, plan: Plan, digests: Mapping[str, str]) -> LearnedMasks | None:
    """Masks of an earlier run; None if there are none. A damaged file is set aside, so that a new one can be made.

    The caller holds the folder's lock: what a killed run left half written is removed.
    """
    for stale in (*path.parent.glob(".*.*.tmp"), *path.parent.glob("heads/.*.tmp")):
        stale.unlink()
    if not path.is_file():
        return None
    try:
        masks = load(path)
        verify(masks, plan, digests, path=path)
        return masks
    except DamError as error:
        LOG.warning("dam: the cached masks cannot be used and are learned again: %s", error)
        path.replace(path.with_suffix(".damaged"))
        return None


def verify(masks: LearnedMasks, plan: Plan, digests: Mapping[str, str], *, path: Path) -> None:
    """Refuse masks that were learned on other models, tensors or settings, and name the difference."""

    def refuse(what: str, expected: object, got: object) -> DamError:
        return DamError(
            f"masks {path}: {what}",
            expected=str(expected),
            got=str(got),
            cure="Leave `masks` out to learn new ones, or merge what they were learned on.",
        )

    recorded = masks.metadata
    if recorded["base"]["sha256"] != digests["base"]:
        raise refuse("base model", f"{recorded['base']['model']} with the recorded content", plan.base.ref)
    if len(recorded["models"]) != len(plan.models):
        raise refuse("models", len(recorded["models"]), len(plan.models))
    for then, now in zip(recorded["models"], plan.models, strict=True):
        if then["sha256"] != digests[now.name]:
            raise refuse("model", f"{then['model']} with the recorded content", now.ref)
    shapes = {spec.mask_name: spec.shape for spec in plan.tensors}
    for name in recorded["tensors"]:
        if name not in shapes:
            raise refuse("tensor", name, "a merge without it")
        for part in itertools.chain.from_iterable(masks.parts_of(name).values()):
            if not _broadcasts(tuple(part.shape), shapes[name]):
                raise refuse(f"shape of {name}", tuple(part.shape), shapes[name])
    written = {spec.name: spec.shape for spec in plan.tensors}
    for made in masks.stand_ins:
        for name, tensor in made.items():
            if written.get(name) != tuple(tensor.shape):
                raise refuse(f"what stands in for {name}", written.get(name, "no such tensor"), tuple(tensor.shape))
    # `window: auto` is what the machine decides: it asks for none
    free = {"window"} if plan.config.window == "auto" else set()
    asked = plan.config.named()
    for key in sorted(plan.config.given - NOT_LEARNED - BY_CONTENT - free):
        if recorded["settings"].get(key) != asked[key]:
            raise refuse(f"setting {key}", recorded["settings"].get(key), asked[key])


def _broadcasts(mask: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(mask) == len(shape) and all(m in (1, s) for m, s in zip(mask, shape, strict=True))
