"""Check types, ranges and checksum of a `dam_masks.safetensors` before anything in it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    StringConstraints,
    ValidationError,
)
from torch import Tensor

from mergekit_dam.io.digests import tensor_digest
from mergekit_dam.merging.mask_bytes import STEPS
from mergekit_dam.merging.mask_keys import own_key, owned_name

CHECKSUM = "content_sha256"  # entry of the metadata
# entries of older files, which have no checksum
_FORMER = {"schema", "settings", "base", "models", "tensors", "seed", "versions", "norms", "densities", "audit"}
_ONE_AS_FLOAT16_BITS = 0x3C00
TYPES = {1: torch.float16, 2: torch.uint8}  # of masks, by schema
_LONGEST_NAME, _MOST_MODELS = 1024, 1024  # bounds on what a report draws
Digest = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9a-zA-Z]{1,64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class _Settings(_Part):
    rescale: StrictBool


class _Base(_Part):
    model: StrictStr
    sha256: Digest


class _Model(_Base):
    name: Annotated[str, StringConstraints(strict=True, max_length=_LONGEST_NAME)]
    samples: list[StrictStr]


class _Vaccinated(_Part):
    agreement: dict[StrictStr, StrictFloat | None] = Field(default_factory=dict)
    held_out: dict[StrictStr, StrictFloat | None] = Field(default_factory=dict)


class _Metadata(_Part):
    """The metadata entries that this package reads; further entries are kept unchanged."""

    schema_: StrictInt
    settings: _Settings
    base: _Base
    models: Annotated[list[_Model], Field(max_length=_MOST_MODELS)]
    tensors: list[Annotated[str, StringConstraints(strict=True, max_length=_LONGEST_NAME)]]
    students: dict[StrictStr, StrictFloat] = Field(default_factory=dict)
    vaccinated: dict[StrictStr, _Vaccinated] = Field(default_factory=dict)
    own_masks: list[Literal["backdoor_detection"]] = Field(default_factory=list, max_length=1)


def read_metadata(text: str) -> dict[str, Any]:
    """Parse the JSON object in the file's header.

    Raises:
        ValueError: the text is no JSON object.
    """
    try:
        metadata = json.loads(text)
    except RecursionError as error:
        raise ValueError("metadata nested too deeply") from error
    if not isinstance(metadata, dict):
        raise ValueError("metadata that are no object")
    return metadata


def check_metadata(metadata: dict[str, Any]) -> None:
    """Check the types of all metadata entries that are read later.

    Raises:
        ValueError: with the wrong entry.
    """
    try:
        _Metadata.model_validate({**metadata, "schema_": metadata.get("schema")})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"metadata {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except RecursionError as error:
        raise ValueError("metadata nested too deeply") from error
    if len(set(metadata["tensors"])) != len(metadata["tensors"]):
        raise ValueError("a tensor that is listed twice")


def check_values(
    metadata: Mapping[str, Any], probabilities: Mapping[str, Mapping[str, Tensor]], coefficients: Tensor
) -> None:
    """Check shapes, types and ranges of masks and coefficients.

    Raises:
        ValueError: with the fault.
    """
    models, tensors = len(metadata["models"]), len(metadata["tensors"])
    shape = tuple(coefficients.shape)
    if shape not in {(models, 1), (models, tensors)} or coefficients.dtype != torch.float32:
        raise ValueError(f"coefficients of shape {shape} for {models} models and {tensors} tensors")
    # no bound on their size: nearly closed masks at the start make them large, and the merge checks its results
    if not bool(torch.isfinite(coefficients).all()):
        raise ValueError("coefficients that are not finite")
    wanted = TYPES[metadata["schema"]]
    shapes: dict[str, set[torch.Size]] = {}
    for mask, by_key in probabilities.items():
        own = mask in metadata.get("own_masks", ())
        if own and by_key and set(by_key) != {own_key(t, name) for t in range(models) for name in metadata["tensors"]}:
            raise ValueError(f"{mask} that some model lacks for some tensor")
        for key, values in by_key.items():
            name = owned_name(key) if own else key
            if values.dtype != wanted or not _within_unit_interval(values):
                raise ValueError(f"mask of {name} is not {str(wanted).removeprefix('torch.')} within [0, 1]")
            shapes.setdefault(name, set()).add(values.shape)
            if len(shapes[name]) > 1 or not values.numel():
                raise ValueError(f"masks of {name} that are empty or differ in shape")


def check_stand_ins(stand_ins: Iterable[Mapping[str, Tensor]]) -> None:
    """Check the tensors that are merged in place of models.

    Raises:
        ValueError: with the fault.
    """
    for by_name in stand_ins:
        for name, tensor in by_name.items():
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"the substitute for {name} is not float32, or not finite")


def _within_unit_interval(values: Tensor) -> bool:
    """Whether all values are in [0, 1]; bit patterns of float16, as integers, have the same order, with NaN above 1."""
    if values.numel() == 0:
        return True
    if values.dtype == torch.uint8:
        return int(values.max()) <= STEPS
    low, high = values.view(torch.int16).aminmax()
    return int(low) >= 0 and int(high) <= _ONE_AS_FLOAT16_BITS


def checksum(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the metadata, and over name, type, shape and bytes of every tensor, in the order of names.

    It finds damage, not forgery: the author of a file can write any checksum.
    """
    hashed = {key: value for key, value in metadata.items() if key != CHECKSUM}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode())
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases Python's global lock
        for name, part in zip(names, pool.map(lambda name: tensor_digest(tensors[name]), names), strict=True):
            digest.update(repr((name, str(tensors[name].dtype), tuple(tensors[name].shape), part)).encode())
    return digest.hexdigest()


def check_content(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare the content of a file with its checksum.

    A file without a checksum is accepted as an older file only if it has no newer entries: one damaged byte in the
    checksum's name must not turn the check off.

    Raises:
        ValueError: content and checksum differ, or a file that is not older has no checksum.
    """
    if CHECKSUM not in metadata:
        if unknown := sorted(set(metadata) - _FORMER):
            raise ValueError(f"no {CHECKSUM}, but {unknown[0][:80]!r}")
    elif metadata[CHECKSUM] != checksum(metadata, tensors):
        raise ValueError("content that does not match its checksum")
