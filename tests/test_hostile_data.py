"""Calibration data from strangers: bombs, paths, programs, labels and damage, each one clear error in little memory."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pil

from mergekit_dam import calibration
from mergekit_dam.calibration import load_calibration
from mergekit_dam.calibration_files import Kind
from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.images import Preprocessing
from tests.bounds import bounded
from tests.test_hostile_files import _edited, fuzzed


def _load(path: Path, kind: Kind = "text", num: int = 4, **settings: Any) -> list[Any]:
    found = load_calibration(
        ModelSettings(calibration=str(path), **settings), kind, num_samples=num, seed=0, task="task"
    )
    return list(found.samples)


def _png(width: int, height: int) -> bytes:
    """One bit per pixel, all black: a few kB for gigapixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("edge", [9_000, 13_000, 40_000])  # below, above PIL's warning, and above its error
def test_an_image_bomb_is_refused_before_it_is_decoded(edge: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(edge, edge))
    (tmp_path / "b.png").write_bytes(_png(8, 8))
    before, began = _peak_mb(), time.process_time()
    with pytest.raises(DamError, match=r"sample \d of .*: expected an image, got .*pixels"):
        _load(tmp_path, "image")
    assert _peak_mb() - before < 100 and time.process_time() - began < 5


def test_programs_in_images_are_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL hands EPS to Ghostscript, whatever the file is called."""
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was called"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was called"))
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%id) run\n")
    Pil.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(DamError, match="cannot identify image file"):
        _load(tmp_path, "image")


@pytest.mark.parametrize("place", ["/etc/hostname", "http://127.0.0.1:9/x.png", "zip://x.png::http://127.0.0.1:9/x"])
def test_paths_inside_a_data_file_are_not_followed(place: str, tmp_path: Path) -> None:
    rows = pa.array([{"bytes": None, "path": place}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": rows}), tmp_path / "d.parquet")
    with pytest.raises(DamError, match="which a data file may not name"):
        _load(tmp_path / "d.parquet", "image")


def test_a_small_parquet_that_would_expand_to_gigabytes(tmp_path: Path) -> None:
    """One value of 16 MB, written once, used by 4,000 rows: 64 GB. Texts stay one value; images are refused."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * (1 << 24)]))
    pq.write_table(pa.table({"text": text}), tmp_path / "d.parquet", compression="zstd", store_schema=False,
                   dictionary_pagesize_limit=1 << 28)  # fmt: skip
    assert (tmp_path / "d.parquet").stat().st_size < 1 << 20
    before = _peak_mb()
    samples = _load(tmp_path / "d.parquet", num=8)
    assert {len(sample) for sample in samples} == {1 << 17} and _peak_mb() - before < 500
    rows = pa.array([{"bytes": b"x" * (1 << 22), "path": None}] * 60)
    pq.write_table(pa.table({"image": rows}), tmp_path / "i.parquet", compression="zstd",
                   dictionary_pagesize_limit=1 << 28)  # fmt: skip
    del rows
    before = _peak_mb()
    with pytest.raises(DamError, match="expands to more than 200 times its size"):
        _load(tmp_path / "i.parquet", "image", num=60)
    assert _peak_mb() - before < 500


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_packed_data_under_a_plain_name(suffix: str, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(1 << 24))
    (tmp_path / f"d{suffix}").write_bytes(packed.getvalue())
    with pytest.raises(DamError, match="got zip data"):
        _load(tmp_path / f"d{suffix}")


def _write(path: Path, suffix: str, rows: dict[str, list[Any]]) -> Path:
    data = Dataset.from_dict(rows)
    file = path / f"d{suffix}"
    {".parquet": data.to_parquet, ".jsonl": data.to_json, ".csv": data.to_csv}[suffix](str(file))
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_labels_do_not_reach_the_search(suffix: str, tmp_path: Path) -> None:
    """Alone, by number, by name, or as text: refused; beside the input: not read."""
    texts = ["one film", "two films", "three films"]
    both = _write(tmp_path, suffix, {"text": texts, "label": ["good", "bad", "bad"], "y": [0, 1, 1]})
    assert set(_load(both)) == set(texts)
    for column in ("label", "y"):
        with pytest.raises(DamError, match="Labels never reach the search"):
            _load(both, column=column)
    alone = _write(tmp_path, suffix, {"Label": ["good", "bad", "bad"], "y": [0, 1, 1]})
    with pytest.raises(DamError, match="exactly one with texts, got none"):
        _load(alone)


def test_class_labels_and_hidden_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    features = Features({"intent": ClassLabel(names=["a", "b"]), "note": Value("string")})
    Dataset.from_dict({"intent": [0, 1] * 20, "note": ["yes", "no"] * 20}, features).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DamError, match="Labels never reach"):
        _load(tmp_path / "d.parquet", column="intent")
    _load(tmp_path / "d.parquet", num=40, column="note")
    assert "only 2 different texts among 40; are these labels?" in caplog.text


@pytest.mark.parametrize("kind", ["txt", "parquet", "folder"])
def test_data_that_change_while_they_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "folder":
        for i in range(3):
            Pil.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        source, changed = tmp_path, tmp_path / "1.png"
    else:
        rows = ["a film", "a plot", "a story"]
        source = tmp_path / f"d.{kind}"
        source.write_text("\n".join(rows)) if kind == "txt" else Dataset.from_dict({"text": rows}).to_parquet(source)
        changed = source
    name = "image_of" if kind == "folder" else "text_of"
    read = getattr(calibration, name)

    def and_write(*args: Any, **options: Any) -> Any:
        changed.write_bytes(changed.read_bytes() + b" ")
        return read(*args, **options)

    monkeypatch.setattr(calibration, name, and_write)
    with pytest.raises(DamError, match="a change while they were read"):
        _load(source, "image" if kind == "folder" else "text")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rewritten_data_with_their_old_time_of_change(suffix: str, tmp_path: Path) -> None:
    """A clock that was set back, or a copy that keeps times: datasets would give the rows of the older file."""
    for word in ("one", "two"):
        file = _write(tmp_path, suffix, {"text": [f"{word} {i}" for i in range(4)]})
        os.utime(file, (10**9, 10**9))
        assert {text.split()[0] for text in _load(file)} == {word}


def test_evaluation_data_are_read_with_the_same_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image bombs, programs in images, paths inside a data file, packed files: as for calibration."""
    import subprocess

    from mergekit_dam.labelled_files import Source, read_labelled
    from mergekit_dam.trigger_text import parse_trigger

    def read(data: Path, kind: Kind = "image") -> Any:
        with bounded(megabytes=100):
            return read_labelled(Source(str(data)), kind, "m", {"cat": 0, "dog": 1})

    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was called"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was called"))
    folder = tmp_path / "images"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        Pil.new("RGB", (8, 8)).save(folder / name / "a.png")
    images, labels = read(folder)
    assert labels == [0, 1] and [image.size for image in images] == [(8, 8)] * 2
    postscript = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%id) run\n"
    for content, reason in ((_png(40_000, 40_000), "pixels"), (postscript.encode(), "cannot identify")):
        (folder / "cat" / "b.png").write_bytes(content)
        with pytest.raises(DamError, match=reason):
            read(folder)
        with pytest.raises(DamError, match=reason):
            parse_trigger(f"blended(image={folder / 'cat' / 'b.png'},opacity=0.2)")
    rows = pa.array(
        [{"bytes": None, "path": "/etc/hostname"}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}), tmp_path / "d.parquet")
    with pytest.raises(DamError, match="which a data file may not name"):
        read(tmp_path / "d.parquet")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(1 << 24))
    (tmp_path / "d.jsonl").write_bytes(packed.getvalue())
    with pytest.raises(DamError, match="got zip data"):
        read(tmp_path / "d.jsonl", "text")


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
        assert [image.tobytes() for image in _load(source, "image")] == [expected.convert("RGB").tobytes()] * 2


def test_rows_of_several_groups_are_those_of_datasets(tmp_path: Path) -> None:
    rows = [f"text {i}" for i in range(100)]
    pq.write_table(pa.table({"text": rows, "label": list(range(100))}), tmp_path / "d.parquet", row_group_size=7)
    Dataset.from_dict({"text": rows}).to_json(str(tmp_path / "d.jsonl"))
    assert _load(tmp_path / "d.parquet", num=30) == _load(tmp_path / "d.jsonl", num=30)


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a film", "a plot", "a story"] * 3}), file)
    return file.getvalue()


@fuzzed
@given(data=_edited(_parquet()))
def test_damaged_parquet_is_read_or_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(data)
    try:
        with bounded(megabytes=2200):  # a footer that lies about a page's size: see SECURITY.md
            assert all(isinstance(text, str) for text in _load(tmp_path / "d.parquet"))
    except DamError as error:
        assert str(error).isprintable()


@fuzzed
@given(data=_edited(_png(9, 9)), suffix=st.sampled_from([".png", ".jpg", ".gif"]))
def test_damaged_images_are_read_or_refused(data: bytes, suffix: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}{suffix}").write_bytes(data)
    try:
        with bounded():
            assert all(image.mode == "RGB" for image in _load(tmp_path, "image"))
    except DamError as error:
        assert str(error).isprintable()
    finally:
        for name in ("a", "b"):
            (tmp_path / f"{name}{suffix}").unlink()


SETTINGS = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 10**9, "width": 16}}, {"size": {"shortest_edge": 10**9}}, {"size": -1}, {"size": "16"},
        {"image_std": [0.0] * 3}, {"image_mean": [float("nan")] * 3}, {"image_mean": [0.5]}, {"resample": 99},
        {"do_center_crop": True, "crop_size": {"height": 1}}, {"do_center_crop": True, "crop_size": 10**6},
        {"image_mean": 3}, {"size": [16]},
    ],
)  # fmt: skip
def test_preprocessing_that_would_fill_the_memory_or_make_nan(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, **change}))
    with pytest.raises(DamError, match="sizes in pixels, and mean and std of three channels"):
        Preprocessing.read([tmp_path], 16)


def test_a_needle_of_an_image_is_not_stretched_without_bound(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, "size": {"shortest_edge": 224}}))
    resized = Preprocessing.read([tmp_path], 16).pixels([Pil.new("RGB", (60_000, 1))])
    assert resized.shape == (1, 3, 224, 4096)
