"""Fuzzed safetensors and indices of models: whatever the bytes, one DamError or a sound result."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mergekit_dam.errors import DamError
from mergekit_dam.models.checkpoint import Checkpoint
from tests.helpers.bounds import bounded
from tests.helpers.hostile import edited, fuzzed

MODEL = save({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)})
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "F4", "U16", "C64", "", "f32"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**63, 2**64]), max_size=3),
        "data_offsets": st.tuples(*[st.sampled_from([0, 1, 4, 8, 12, 24, -4, 2**40, 2**64 - 1])] * 2),
    }
)


def file(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


@st.composite
def _headers(draw: st.DrawFn) -> bytes:
    """Well-formed JSON headers that lie: overlaps, holes, huge and negative sizes, unknown and wrong types."""
    header: dict[str, Any] = draw(st.dictionaries(st.sampled_from(["w", "b", "", "__metadata__", "é"]), ENTRIES))
    body = draw(st.binary(max_size=48))
    length = draw(st.sampled_from([None, None, None, 0, 7, 2**32, 2**63, 2**64 - 1]))
    return file(json.dumps(header).encode(), body, length)


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
@given(data=edited(MODEL))
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
        (file(b"{}", b"", 2**63), "header"),
        (file(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b""), "incomplete"),
        (file(b'{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}', b"1234"), "overflow"),
        (file(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234"), "shape"),
        (
            file(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b'"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
                b"123456",
            ),
            "offset",
        ),
    ],
    ids=["empty", "huge header", "truncated", "huge shape", "wrong size", "overlap"],
)
def test_each_kind_of_broken_model_has_a_message(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(DamError, match="truncated or damaged") as caught:
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
