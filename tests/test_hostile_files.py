"""Fuzzed safetensors and masks: whatever the bytes, one DamError or a sound result; never another exception.

`DAM_FUZZ_CASES` sets the number of cases per property; `make faults` runs 10,000 and more in all.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mergekit_dam.artifact import LearnedMasks, load
from mergekit_dam.checkpoint import Checkpoint
from mergekit_dam.errors import DamError
from tests.bounds import bounded
from tests.test_golden import GOLDEN

CASES = int(os.environ.get("DAM_FUZZ_CASES", "150"))
fuzzed = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
MODEL = save({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)})
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "F4", "U16", "C64", "", "f32"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**63, 2**64]), max_size=3),
        "data_offsets": st.tuples(*[st.sampled_from([0, 1, 4, 8, 12, 24, -4, 2**40, 2**64 - 1])] * 2),
    }
)


def _file(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


@st.composite
def _edited(draw: st.DrawFn, original: bytes) -> bytes:
    """Cut, flipped, doubled or overwritten bytes; half of the edits hit the header."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([8, 8 + struct.unpack("<Q", original[:8])[0], len(original)]))
        at = draw(st.integers(0, max(0, min(end, len(data)) - 1)))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "drop"]))
        if not data:
            break
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at] = draw(st.sampled_from([0, 0x7F, 0xFF, ord("{"), ord('"'), ord("9")]))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        else:
            del data[at : at + draw(st.integers(1, 8))]
    return bytes(data)


@st.composite
def _headers(draw: st.DrawFn) -> bytes:
    """Well-formed JSON headers that lie: overlaps, holes, huge and negative sizes, unknown and wrong types."""
    header: dict[str, Any] = draw(st.dictionaries(st.sampled_from(["w", "b", "", "__metadata__", "é"]), ENTRIES))
    body = draw(st.binary(max_size=48))
    length = draw(st.sampled_from([None, None, None, 0, 7, 2**32, 2**63, 2**64 - 1]))
    return _file(json.dumps(header).encode(), body, length)


def _read_model(folder: Path, data: bytes) -> str:
    """What a plan and the survey read of a model; the outcome as a word."""
    (folder / "model.safetensors").write_bytes(data)
    with bounded():
        return _read(folder, data)


def _read(folder: Path, data: bytes) -> str:
    try:
        checkpoint = Checkpoint.open(folder)
        for name in checkpoint.names:
            shape, dtype, tensor = checkpoint.shape(name), checkpoint.dtype(name), checkpoint.tensor(name)
            assert tuple(tensor.shape) == shape and tensor.dtype == dtype
            assert tensor.numel() * tensor.element_size() <= len(data), "more than the file holds"
            float(tensor.double().sum())
        assert len(checkpoint.digest()) == 64
        return "read"
    except DamError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return "refused"


@fuzzed
@given(data=_edited(MODEL))
def test_a_damaged_model_is_refused_or_read_within_its_bounds(data: bytes, tmp_path: Path) -> None:
    _read_model(tmp_path, data)


@fuzzed
@given(data=_headers())
def test_a_lying_header_is_refused(data: bytes, tmp_path: Path) -> None:
    _read_model(tmp_path, data)


@fuzzed
@given(data=st.binary(max_size=64))
def test_noise_is_refused(data: bytes, tmp_path: Path) -> None:
    _read_model(tmp_path, data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "header"),
        (_file(b"{}", b"", 2**63), "header"),
        (_file(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b""), "incomplete"),
        (_file(b'{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}', b"1234"), "overflow"),
        (_file(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234"), "shape"),
        (
            _file(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b'"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}', b"123456",
            ),
            "offset",
        ),
    ],
    ids=["empty", "huge header", "truncated", "huge shape", "wrong size", "overlap"],
)  # fmt: skip
def test_each_kind_of_broken_model_has_a_message(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(DamError, match="cut short or damaged") as caught:
        Checkpoint.open(tmp_path)
    assert reason in str(caught.value).casefold()


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "s/x.safetensors", "x.bin", "no.safetensors"])
def test_an_index_names_only_safetensors_beside_it(shard: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("x.bin", "../x.safetensors"):
        (folder / name).write_bytes(MODEL)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(DamError, match="safetensors files beside the index"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"weight_map": 3}', "\xff", '{"weight_map": {"w": 1}}'])
def test_a_broken_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamError):
        Checkpoint.open(tmp_path)


def test_an_index_that_names_tensors_the_shard_lacks(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"ghost": "a.safetensors"}}')
    with pytest.raises(DamError, match="the tensor ghost, as the index says"):
        Checkpoint.open(tmp_path).shape("ghost")


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
@given(data=_edited(GOLDEN.read_bytes()))
def test_a_damaged_masks_file_is_never_believed(data: bytes, tmp_path: Path) -> None:
    """Any change of the content is found by the checksum; what is still read says the same as the original."""
    masks = _read_masks(tmp_path, data)
    if masks is not None:
        original = load(GOLDEN)
        assert masks.metadata == original.metadata and torch.equal(masks.coefficients, original.coefficients)
        for mask, by_name in original.probabilities.items():
            assert all(torch.equal(masks.probabilities[mask][name], values) for name, values in by_name.items())


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def test_damage_to_the_name_of_the_checksum_does_not_turn_it_off(tmp_path: Path) -> None:
    damaged = tmp_path / "dam_masks.safetensors"
    damaged.write_bytes(GOLDEN.read_bytes().replace(b"content_sha256", b"bontent_sha256"))
    with pytest.raises(DamError, match="no content_sha256, but 'bontent_sha256'"):
        load(damaged)


@fuzzed
@given(key=st.sampled_from(["schema", "settings", "base", "models", "tensors"]), value=JSON, inner=st.booleans())
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
    dtype=st.sampled_from([torch.float16, torch.float32, torch.int8, torch.bfloat16, torch.bool]),
    value=st.sampled_from([0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")]),
    name=st.sampled_from(["task_shared.w", "backdoor_detection.b", "other.w", "task_shared.x", "coefficients", "w"]),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
def test_tensors_of_any_form(dtype: torch.dtype, value: float, name: str, shape: list[int], tmp_path: Path) -> None:
    original = load(GOLDEN)
    metadata = {k: v for k, v in original.metadata.items() if k != "content_sha256"}
    tensors = {f"{m}.{n}": v for m, by in original.probabilities.items() for n, v in by.items()}
    tensors["coefficients"] = original.coefficients
    tensors[name] = torch.full(shape, value).to(dtype)
    masks = _read_masks(tmp_path, save(tensors, metadata={"dam": json.dumps(metadata)}))
    fits = (name, shape) in [("task_shared.w", [2, 3]), ("backdoor_detection.b", [2])]
    assert (masks is not None) == (fits and dtype == torch.float16 and 0 <= value <= 1)


def test_metadata_nested_beyond_the_stack(tmp_path: Path) -> None:
    data = save({"coefficients": torch.ones(1, 1)}, metadata={"dam": "[" * 200_000})
    assert _read_masks(tmp_path, data) is None


def test_the_checksum_names_the_damage(tmp_path: Path) -> None:
    data = bytearray(GOLDEN.read_bytes())
    data[-1] ^= 1  # the last byte of a mask: still float16 within [0, 1]
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(DamError, match="does not match its checksum"):
        load(tmp_path / "m.safetensors")
