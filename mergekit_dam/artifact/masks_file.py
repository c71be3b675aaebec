"""`dam_masks.safetensors`: the only hand-off between learning and merging.

Format (schema 2), a plain safetensors file:
    task_shared.<tensor>          uint8, 254 times the probability that a unit is kept by M1 (merging/mask_bytes.py)
    backdoor_detection.<t>.<tensor>  uint8, the same for M2 of model t; without <t> where all models share one mask
    coefficients                  float32, (T, 1) or (T, P): lambda per model, or per model and masked tensor
    student.<t>.<tensor>          float32: merged in place of model t's tensor; see learn/stand_ins.py
    metadata "dam"                JSON: schema, settings, base, models, tensors (the P names in order), own_masks (names
                                  of masks of which each model has its own), versions, content_sha256 (over everything
                                  else; older files lack it)
A tensor that no model changed is not in the file, and keeps the base's values. Masks have the shape
of the tensor or (rows, 1, ...), by granularity; files of earlier versions may have (1, ...). They are divided by their
mean when they are applied (constant `rescale`), so the file holds plain probabilities. Files of schema 1, whose masks
are float16, are read, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_dam.artifact.schema import (
    CHECKSUM,
    TYPES,
    check_content,
    check_metadata,
    check_stand_ins,
    check_values,
    checksum,
    read_metadata,
)
from mergekit_dam.config import NOT_LEARNED
from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.cache import cached_fact
from mergekit_dam.io.files import replacing
from mergekit_dam.merging.checks import mask_faults
from mergekit_dam.merging.mask_bytes import to_bytes
from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED, own_key, owned_name
from mergekit_dam.merging.mask_product import MaskProduct, means_of
from mergekit_dam.models.plan import Plan

SCHEMA = 2
MASKS_FILE = "dam_masks.safetensors"
_STAND_IN = "student"  # since the first substitutes were students


@dataclass(frozen=True)
class LearnedMasks:
    """Learned masks and coefficients of a merge.

    Attributes:
        probabilities: mask name -> tensor name, or `own_key` of it -> probabilities, as bytes (merging/mask_bytes.py)
            or in a floating type.
        coefficients: lambda, (T, 1) or (T, P), float32.
        metadata: the JSON described above; `metadata["tensors"]` orders the P columns.
        faults: descriptions of what makes masks that were read meaningless (`checks.mask_faults`).
        stand_ins: per model, output name -> tensor that is merged in its place (learn/stand_ins.py); () where the
            models themselves are merged.
    """

    probabilities: Mapping[str, Mapping[str, Tensor]]
    coefficients: Tensor
    metadata: Mapping[str, Any]
    faults: tuple[str, ...] = ()
    stand_ins: Sequence[Mapping[str, Tensor]] = ()

    def product(self, name: str, device: torch.device | str = "cpu") -> MaskProduct | None:
        """M = M1 o M2 of a tensor, rescaled where the settings say so; None if no mask is in use."""
        by_mask = {mask: [part.to(device) for part in parts] for mask, parts in self.parts_of(name).items()}
        factors = tuple(parts[0] for mask, parts in by_mask.items() if mask not in self._own_mask_names)
        own = tuple(part for mask, parts in by_mask.items() if mask in self._own_mask_names for part in parts)
        if not by_mask:
            return None
        means = means_of(factors) if self.metadata["settings"]["rescale"] else None
        return MaskProduct(factors, means=means, own=own)

    def parts_of(self, name: str) -> dict[str, list[Tensor]]:
        """Probabilities of a tensor by mask: T of them where each model has its own mask, else one."""
        count = len(self.metadata["models"])
        parts = {}
        for mask, by_key in self.probabilities.items():
            keys = [own_key(t, name) for t in range(count)] if mask in self._own_mask_names else [name]
            if keys[0] in by_key:
                parts[mask] = [by_key[key] for key in keys]
        return parts

    @property
    def _own_mask_names(self) -> Sequence[str]:
        """Names of masks of which each model has its own."""
        return tuple(self.metadata.get("own_masks", ()))

    def mask(self, name: str, device: torch.device | str = "cpu") -> Tensor | None:
        """`product` as one float32 tensor; M_t of all models, stacked, where they have own masks."""
        product = self.product(name, device)
        return None if product is None else product.full()

    def has(self, name: str) -> bool:
        """Whether a model changed the tensor; if not, the merge has the base's values."""
        return name in self._columns

    def coefficients_of(self, name: str) -> Tensor:
        """lambda of the T models for a tensor, shape (T,)."""
        columns = self.coefficients.shape[1]
        return self.coefficients[:, 0 if columns == 1 else self._columns[name]]

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.metadata["tensors"])}


def describe(plan: Plan, digests: Mapping[str, str], samples: Mapping[str, list[str]]) -> dict[str, Any]:
    """Describe the inputs of the masks as JSON: settings, base, models.

    Args:
        digests: model name (`base` for theta_0) -> content hash of its weight files.
        samples: model name -> digests of its calibration samples, which evaluation must not contain.
    """
    return {
        "schema": SCHEMA,
        "settings": plan.config.named(without=NOT_LEARNED),
        "base": {"model": str(plan.base.ref), "sha256": digests["base"]},
        "models": [
            {
                "name": model.name,
                "model": str(model.ref),
                "sha256": digests[model.name],
                "settings": model.settings.model_dump(),
                "samples": samples.get(model.name, []),
            }
            for model in plan.models
        ],
    }


def save(path: Path, masks: LearnedMasks) -> None:
    """Write a masks file atomically.

    Raises:
        DamError: the folder cannot be written.
    """
    tensors = {
        f"{mask}.{name}": to_bytes(values).contiguous().cpu()
        for mask, by_name in masks.probabilities.items()
        for name, values in by_name.items()
    }
    for index, by_name in enumerate(masks.stand_ins):
        tensors |= {f"{_STAND_IN}.{index}.{name}": tensor.contiguous().cpu() for name, tensor in by_name.items()}
    tensors["coefficients"] = masks.coefficients.to(torch.float32).contiguous().cpu()
    metadata = {**masks.metadata, "schema": SCHEMA}
    metadata[CHECKSUM] = checksum(metadata, tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            # a single metadata entry, since safetensors writes several in random order: equal masks give equal bytes
            save_file(tensors, temporary, metadata={"dam": json.dumps(metadata)})
    except (OSError, SafetensorError) as error:
        raise DamError(
            f"masks {path}",
            expected="a folder with space that can be written",
            got=first_line(error),
            cure="Free space there, or set MERGEKIT_DAM_CACHE to another folder, and run again.",
        ) from error


def load_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a masks file from its header alone; empty if the file is missing.

    Raises:
        DamError: a damaged file.
    """
    if not path.is_file():
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = read_metadata((file.metadata() or {})["dam"])
        check_metadata(metadata)
        return metadata
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamError(
            f"masks {path}",
            expected="a complete dam_masks.safetensors",
            got=f"a damaged file ({error})",
            cure="Merge again.",
        ) from error


def load(path: Path) -> LearnedMasks:
    """Read an artefact lazily and check its form; the content of one that passed before is trusted (io/cache.py).

    Raises:
        DamError: missing, damaged, of another schema, or with values outside [0, 1].
    """
    if not path.is_file():
        raise DamError(
            f"masks {path}",
            expected=f"a {MASKS_FILE} file",
            got="no such file",
            cure="Leave `masks` out to learn them, or correct the path.",
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = read_metadata((file.metadata() or {})["dam"])
            if metadata.get("schema") not in tuple(TYPES):  # it may be of any type
                raise DamError(
                    f"masks {path}",
                    expected=f"schema {SCHEMA} or an earlier one",
                    got=str(metadata.get("schema"))[:80],
                    cure="Learn the masks again with this version of mergekit-dam.",
                )
            check_metadata(metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator there)
        coefficients = tensors["coefficients"]
        listed = set(metadata["tensors"])
        probabilities: dict[str, dict[str, Tensor]] = {TASK_SHARED: {}, BACKDOOR_DETECTION: {}}
        count = len(metadata["models"]) if metadata.get("students") or metadata.get("vaccinated") else 0
        stand_ins: dict[str, dict[str, Tensor]] = {str(index): {} for index in range(count)}
        for key, values in tensors.items():
            if key == "coefficients":
                continue
            mask, _, name = key.partition(".")
            if mask == _STAND_IN:
                index, _, name = name.partition(".")
                stand_ins[index][name] = values
                continue
            tensor_name = owned_name(name) if mask in metadata.get("own_masks", ()) else name
            if tensor_name not in listed:
                raise KeyError(f"{key} in the list of tensors")
            probabilities[mask][name] = values

        def check() -> str:
            check_content(metadata, tensors)
            check_values(metadata, probabilities, coefficients)
            check_stand_ins(stand_ins.values())
            return json.dumps(mask_faults(probabilities, coefficients))

        faults = cached_fact(path, f"faults of masks of schema {SCHEMA}, checked by {version('mergekit-dam')}", check)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, DamError):
            raise
        raise DamError(
            f"masks {path}",
            expected="a complete dam_masks.safetensors",
            got=f"a damaged file ({first_line(error)})",
            cure="Learn the masks again.",
        ) from error
    return LearnedMasks(probabilities, coefficients, metadata, tuple(json.loads(faults)), tuple(stand_ins.values()))
