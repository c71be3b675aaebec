"""Verify that masks belong to a merge, and load masks of earlier runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path

from mergekit_dam.artifact.masks_file import LearnedMasks, load, load_metadata
from mergekit_dam.config import NOT_LEARNED
from mergekit_dam.errors import DamError
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks.content import BY_CONTENT

LOG = logging.getLogger(__name__)


def load_cached(path: Path, plan: Plan, digests: Mapping[str, str]) -> LearnedMasks | None:
    """Load the masks of an earlier run; None without usable masks. An unusable file is renamed to `.damaged`.

    The caller holds the folder's lock, so incomplete files of a killed run are removed.
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
    """Refuse masks that were learned on other models, tensors or settings.

    Raises:
        DamError: with the difference.
    """

    def refuse(what: str, expected: object, got: object) -> DamError:
        return DamError(
            f"masks {path}: {what}",
            expected=str(expected),
            got=str(got),
            cure="Leave `masks` out to learn new masks, or merge the models that these were learned on.",
        )

    recorded = masks.metadata
    if recorded["base"]["sha256"] != digests["base"]:
        raise refuse("base model", f"{recorded['base']['model']} with the recorded content", plan.base.ref)
    if len(recorded["models"]) != len(plan.models):
        raise refuse("models", len(recorded["models"]), len(plan.models))
    for entry, model in zip(recorded["models"], plan.models, strict=True):
        if entry["sha256"] != digests[model.name]:
            raise refuse("model", f"{entry['model']} with the recorded content", model.ref)
    shapes = {spec.mask_name: spec.shape for spec in plan.tensors}
    for name in recorded["tensors"]:
        if name not in shapes:
            raise refuse("tensor", name, "a merge without it")
        for part in itertools.chain.from_iterable(masks.parts_of(name).values()):
            if not _broadcasts(tuple(part.shape), shapes[name]):
                raise refuse(f"shape of {name}", tuple(part.shape), shapes[name])
    written = {spec.name: spec.shape for spec in plan.tensors}
    for stand_in in masks.stand_ins:
        for name, tensor in stand_in.items():
            if written.get(name) != tuple(tensor.shape):
                raise refuse(f"substitute for {name}", written.get(name, "no such tensor"), tuple(tensor.shape))
    # `window: auto` accepts masks of any window
    ignored = {"window"} if plan.config.window == "auto" else set()
    asked = plan.config.named()
    for key in sorted(plan.config.given - NOT_LEARNED - BY_CONTENT - ignored):
        if recorded["settings"].get(key) != asked[key]:
            raise refuse(f"setting {key}", recorded["settings"].get(key), asked[key])


def _broadcasts(mask: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(mask) == len(shape) and all(m in (1, s) for m, s in zip(mask, shape, strict=True))


def require_inputs_of(path: Path, plan: Plan, digests: Mapping[str, str]) -> None:
    """Refuse inputs that changed since a merge was made: theta_0 and the heads would be others.

    Args:
        path: masks file of the merge; without it, as in a merge that was published, nothing is compared.
        plan: of the merge's recipe.
        digests: as `digests_of` gives them.

    Raises:
        DamError: with the model that changed.
    """
    recorded = load_metadata(path)
    entries = [recorded["base"], *recorded["models"]] if recorded else []
    for entry, model in zip(entries, (plan.base, *plan.models), strict=False):
        if entry["sha256"] != digests[model.name]:
            raise DamError(
                f"model {model.ref}",
                expected="the content that was merged",
                got="other weights",
                cure="Restore the model as it was, or merge again.",
            )
