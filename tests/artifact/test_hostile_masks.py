"""Fuzzed masks files: whatever the bytes, one DamError or what was saved; never another exception."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mergekit_dam.artifact.masks_file import LearnedMasks, load
from mergekit_dam.errors import DamError
from tests.artifact.test_masks_file import FORMER, GOLDEN
from tests.helpers.bounds import bounded
from tests.helpers.hostile import JSON, edited, fuzzed


def _read_masks(folder: Path, data: bytes) -> LearnedMasks | None:
    path = folder / "dam_masks.safetensors"
    path.write_bytes(data)
    with bounded():
        return _believed(path)


def _believed(path: Path) -> LearnedMasks | None:
    try:
        masks = load(path)
    except DamError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return None
    for name in masks.metadata["tensors"]:
        product = masks.mask(name)
        assert product is None or bool(torch.isfinite(product).all())
        assert masks.coefficients_of(name).shape == (len(masks.metadata["models"]),)
    return masks


@fuzzed
@given(data=edited(GOLDEN.read_bytes()))
def test_a_damaged_masks_file_is_never_believed(data: bytes, tmp_path: Path) -> None:
    """Any change of the content is found by the checksum; what is still read says the same as the original."""
    masks = _read_masks(tmp_path, data)
    if masks is not None:
        original = load(GOLDEN)
        assert masks.metadata == original.metadata and torch.equal(masks.coefficients, original.coefficients)
        for mask, by_name in original.probabilities.items():
            assert all(torch.equal(masks.probabilities[mask][name], values) for name, values in by_name.items())


def test_damage_to_the_name_of_the_checksum_does_not_turn_it_off(tmp_path: Path) -> None:
    damaged = tmp_path / "dam_masks.safetensors"
    damaged.write_bytes(GOLDEN.read_bytes().replace(b"content_sha256", b"bontent_sha256"))
    with pytest.raises(DamError, match="no content_sha256, but 'bontent_sha256'"):
        load(damaged)


@fuzzed
@given(
    key=st.sampled_from(["schema", "settings", "base", "models", "tensors", "own_masks"]),
    value=JSON,
    inner=st.booleans(),
)
def test_metadata_of_any_form(key: str, value: Any, inner: bool, tmp_path: Path) -> None:
    """Well-formed files whose metadata have other types: no checksum, as a stranger could write them."""
    original = load(GOLDEN)
    metadata = {k: v for k, v in original.metadata.items() if k != "content_sha256"}
    if inner and key == "models":
        metadata["models"] = [{**metadata["models"][0], "samples": value}, metadata["models"][1]]
    elif inner and key == "settings":
        metadata["settings"] = {"rescale": value}
    else:
        metadata[key] = value
    tensors = {f"{m}.{n}": v for m, by in original.probabilities.items() for n, v in by.items()}
    data = save(tensors | {"coefficients": original.coefficients}, metadata={"dam": json.dumps(metadata)})
    _read_masks(tmp_path, data)


@fuzzed
@given(
    file=st.sampled_from([GOLDEN, FORMER]),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.int8, torch.bfloat16, torch.bool]),
    value=st.sampled_from([0.0, 1.0, -0.5, 1.5, 254.0, 255.0, float("nan"), float("inf")]),
    name=st.sampled_from(["task_shared.w", "backdoor_detection.b", "other.w", "task_shared.x", "coefficients", "w"]),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
def test_tensors_of_any_form(
    file: Path, dtype: torch.dtype, value: float, name: str, shape: list[int], tmp_path: Path
) -> None:
    original = load(file)
    metadata = {k: v for k, v in original.metadata.items() if k != "content_sha256"}
    tensors = {f"{m}.{n}": v for m, by in original.probabilities.items() for n, v in by.items()}
    tensors["coefficients"] = original.coefficients
    tensors[name] = torch.full(shape, value).to(dtype)
    kept, most = (torch.uint8, 254) if file == GOLDEN else (torch.float16, 1)
    within = 0 <= float(torch.tensor(value).to(dtype)) <= most
    masks = _read_masks(tmp_path, save(tensors, metadata={"dam": json.dumps(metadata)}))
    mask = (name, shape) in [("task_shared.w", [2, 3]), ("backdoor_detection.b", [2])]
    coefficients = name == "coefficients" and shape in ([2, 1], [2, 2])  # of two models, and for two tensors
    fits = (mask and dtype == kept and within) or (coefficients and dtype == torch.float32 and math.isfinite(value))
    assert (masks is not None) == fits


def test_metadata_nested_beyond_the_stack(tmp_path: Path) -> None:
    data = save({"coefficients": torch.ones(1, 1)}, metadata={"dam": "[" * 200_000})
    assert _read_masks(tmp_path, data) is None


def test_the_checksum_names_the_damage(tmp_path: Path) -> None:
    data = bytearray(GOLDEN.read_bytes())
    data[-1] ^= 1  # the last byte of a mask: still within [0, 254]
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(DamError, match="does not match its checksum"):
        load(tmp_path / "m.safetensors")
