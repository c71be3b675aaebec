"""What a `dam_masks.safetensors` must look like before anything in it is believed: types, ranges and a checksum."""

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
# entries of files that were written before there was a checksum
_FORMER = {"schema", "settings", "base", "models", "tensors", "seed", "versions", "norms", "densities", "audit"}
_ONE_AS_FLOAT16_BITS = 0x3C00
TYPES = {1: torch.float16, 2: torch.uint8}  # of masks, by schema
_LONGEST_NAME, _MOST_MODELS = 1024, 1024  # a report draws them
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
    """The entries that this package reads; others are kept as they are."""

    schema_: StrictInt
    settings: _Settings
    base: _Base
    models: Annotated[list[_Model], Field(max_length=_MOST_MODELS)]
    tensors: list[Annotated[str, StringConstraints(strict=True, max_length=_LONGEST_NAME)]]
    students: dict[StrictStr, StrictFloat] = Field(default_factory=dict)
    vaccinated: dict[StrictStr, _Vaccinated] = Field(default_factory=dict)
    own_masks: list[Literal["backdoor_detection"]] = Field(default_factory=list, max_length=1)


def read_metadata(text: str) -> dict[str, Any]:
    """The JSON object in the file's header.

    Raises:
        ValueError: it is none.
    """
    try:
        metadata = json.loads(text)
    except RecursionError as error:
        raise ValueError("metadata nested too deeply") from error
    if not isinstance(metadata, dict):
        raise ValueError("metadata that are no object")
    return metadata


def check_metadata(metadata: dict[str, Any]) -> None:
    """Every entry that is read later has its proper type.

    Raises:
        ValueError: saying which entry is wrong.
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
    """Shapes, types and ranges of what is multiplied into weights.

    Raises:
        ValueError: saying what is wrong.
    """
    models, tensors = len(metadata["models"]), len(metadata["tensors"])
    shape = tuple(coefficients.shape)
    if shape not in {(models, 1), (models, tensors)} or coefficients.dtype != torch.float32:
        raise ValueError(f"coefficients of shape {shape} for {models} models and {tensors} tensors")
    # no bound on their size: a start at nearly closed masks makes large ones, and the merge checks its results
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
    """What is merged in place of models.

    Raises:
        ValueError: saying what is wrong.
    """
    for made in stand_ins:
        for name, tensor in made.items():
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"what stands in for {name} is not float32, or not finite")


def _within_unit_interval(values: Tensor) -> bool:
    """Whether all are in [0, 1]. float16: as integers their bit patterns are ordered alike, NaN above 1."""
    if values.numel() == 0:
        return True
    if values.dtype == torch.uint8:
        return int(values.max()) <= STEPS
    low, high = values.view(torch.int16).aminmax()
    return int(low) >= 0 and int(high) <= _ONE_AS_FLOAT16_BITS


def checksum(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the metadata, and name, type, shape and bytes of every tensor, in the order of names.

    It finds damage, not forgery: whoever writes a file can write its checksum.
    """
    rest = {key: value for key, value in metadata.items() if key != CHECKSUM}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets go of Python's lock
        for name, part in zip(names, pool.map(lambda name: tensor_digest(tensors[name]), names), strict=True):
            digest.update(repr((name, str(tensors[name].dtype), tuple(tensors[name].shape), part)).encode())
    return digest.hexdigest()


def check_content(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare a file with its checksum.

    A file without one is taken for an old one only if it has no entries that old ones did not have: one byte of
    damage to the checksum's name must not turn off its check.

    Raises:
        ValueError: they differ, or there is none and the file is no old one.
    """
    if CHECKSUM not in metadata:
        if unknown := sorted(set(metadata) - _FORMER):
            raise ValueError(f"no {CHECKSUM}, but {unknown[0][:80]!r}")
    elif metadata[CHECKSUM] != checksum(metadata, tensors):
        raise ValueError("content that does not match its checksum")
