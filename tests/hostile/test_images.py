"""Images and their preprocessing from strangers: bombs, programs and damage, each one clear error in little memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pil

from mergekit_dam.errors import DamError
from mergekit_dam.io.images import Preprocessing
from tests.helpers.bounds import bounded
from tests.helpers.hostile import edited, fuzzed, load, png


@pytest.mark.parametrize("edge", [9_000, 13_000, 40_000])  # below, above PIL's warning, and above its error
def test_an_image_bomb_is_refused_before_it_is_decoded(edge: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(edge, edge))
    (tmp_path / "b.png").write_bytes(png(8, 8))
    with (
        bounded(megabytes=100),
        pytest.raises(DamError, match=r"sample \d of .*: expected an image, got .*pixels"),
    ):
        load(tmp_path, "image")


def test_programs_in_images_are_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL hands EPS to Ghostscript, whatever the file is called."""
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was called"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was called"))
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%id) run\n")
    Pil.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(DamError, match="cannot identify image file"):
        load(tmp_path, "image")


def test_images_are_read_as_datasets_reads_them(tmp_path: Path) -> None:
    """Bytes in a struct, bare bytes and files: the same pixels, turned as EXIF says."""
    picture = Pil.effect_noise((12, 7), 40).convert("RGB")
    exif = Pil.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    (expected,) = Dataset.from_dict({"i": [{"bytes": data, "path": None}]}, Features({"i": Image()}))["i"]
    assert expected.size == (7, 12)
    Dataset.from_dict({"i": [{"bytes": data, "path": None}] * 2}, Features({"i": Image()})).to_parquet(
        tmp_path / "struct.parquet"
    )
    pq.write_table(pa.table({"i": pa.array([data] * 2)}), tmp_path / "bytes.parquet")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    for source in (tmp_path, tmp_path / "struct.parquet", tmp_path / "bytes.parquet"):
        assert [image.tobytes() for image in load(source, "image")] == [expected.convert("RGB").tobytes()] * 2


@fuzzed
@given(data=edited(png(9, 9)), suffix=st.sampled_from([".png", ".jpg", ".gif"]))
def test_damaged_images_are_read_or_refused(data: bytes, suffix: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}{suffix}").write_bytes(data)
    try:
        with bounded():
            assert all(image.mode == "RGB" for image in load(tmp_path, "image"))
    except DamError as error:
        assert str(error).isprintable()
    finally:
        for name in ("a", "b"):
            (tmp_path / f"{name}{suffix}").unlink()


SETTINGS = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 10**9, "width": 16}},
        {"size": {"shortest_edge": 10**9}},
        {"size": -1},
        {"size": "16"},
        {"image_std": [0.0] * 3},
        {"image_mean": [float("nan")] * 3},
        {"image_mean": [0.5]},
        {"resample": 99},
        {"do_center_crop": True, "crop_size": {"height": 1}},
        {"do_center_crop": True, "crop_size": 10**6},
        {"image_mean": 3},
        {"size": [16]},
    ],
)
def test_preprocessing_that_would_fill_the_memory_or_make_nan(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, **change}))
    with pytest.raises(DamError, match="sizes in pixels, and mean and std of three channels"):
        Preprocessing.read([tmp_path], 16)


def test_a_needle_of_an_image_is_not_stretched_without_bound(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, "size": {"shortest_edge": 224}}))
    resized = Preprocessing.read([tmp_path], 16).pixels([Pil.new("RGB", (60_000, 1))])
    assert resized.shape == (1, 3, 224, 4096)
