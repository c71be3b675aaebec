"""Data files from strangers: bombs, paths, labels, changes and damage, each one clear error in little memory."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from PIL import Image as Pil

from mergekit_dam.errors import DamError
from mergekit_dam.io import calibration
from mergekit_dam.io.columns import Kind
from tests.helpers.bounds import bounded
from tests.helpers.hostile import edited, fuzzed, load, png


@pytest.mark.parametrize("place", ["/etc/hostname", "http://127.0.0.1:9/x.png", "zip://x.png::http://127.0.0.1:9/x"])
def test_paths_inside_a_data_file_are_not_followed(place: str, tmp_path: Path) -> None:
    rows = pa.array([{"bytes": None, "path": place}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": rows}), tmp_path / "d.parquet")
    with pytest.raises(DamError, match="which a data file may not name"):
        load(tmp_path / "d.parquet", "image")


def test_a_small_parquet_that_would_expand_to_gigabytes(tmp_path: Path) -> None:
    """One value of 16 MB, written once, used by 4,000 rows: 64 GB. Texts stay one value; images are refused."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * (1 << 24)]))
    pq.write_table(
        pa.table({"text": text}),
        tmp_path / "d.parquet",
        compression="zstd",
        store_schema=False,
        dictionary_pagesize_limit=1 << 28,
    )
    assert (tmp_path / "d.parquet").stat().st_size < 1 << 20
    with bounded(megabytes=500):
        samples = load(tmp_path / "d.parquet", num=8)
    assert {len(sample) for sample in samples} == {1 << 17}
    rows = pa.array([{"bytes": b"x" * (1 << 22), "path": None}] * 60)
    pq.write_table(
        pa.table({"image": rows}), tmp_path / "i.parquet", compression="zstd", dictionary_pagesize_limit=1 << 28
    )
    del rows
    with bounded(megabytes=500), pytest.raises(DamError, match="expands to more than 200 times its size"):
        load(tmp_path / "i.parquet", "image", num=60)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_packed_data_under_a_plain_name(suffix: str, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(1 << 24))
    (tmp_path / f"d{suffix}").write_bytes(packed.getvalue())
    with pytest.raises(DamError, match="got zip data"):
        load(tmp_path / f"d{suffix}")


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
    assert set(load(both)) == set(texts)
    for column in ("label", "y"):
        with pytest.raises(DamError, match="Labels never reach the search"):
            load(both, column=column)
    alone = _write(tmp_path, suffix, {"Label": ["good", "bad", "bad"], "y": [0, 1, 1]})
    with pytest.raises(DamError, match="exactly one with texts, got none"):
        load(alone)


def test_class_labels_and_hidden_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    features = Features({"intent": ClassLabel(names=["a", "b"]), "note": Value("string")})
    Dataset.from_dict({"intent": [0, 1] * 20, "note": ["yes", "no"] * 20}, features).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DamError, match="Labels never reach"):
        load(tmp_path / "d.parquet", column="intent")
    load(tmp_path / "d.parquet", num=40, column="note")
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
    name = "image_of" if kind == "folder" else "values_of"
    read = getattr(calibration, name)

    def and_write(*args: Any, **options: Any) -> Any:
        found = read(*args, **options)
        changed.write_bytes(changed.read_bytes() + b" ")
        return found

    monkeypatch.setattr(calibration, name, and_write)
    with pytest.raises(DamError, match="a change while they were read"):
        load(source, "image" if kind == "folder" else "text")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rewritten_data_with_their_old_time_of_change(suffix: str, tmp_path: Path) -> None:
    """A clock that was set back, or a copy that keeps times: datasets would give the rows of the older file."""
    for word in ("one", "two"):
        file = _write(tmp_path, suffix, {"text": [f"{word} {i}" for i in range(4)]})
        os.utime(file, (10**9, 10**9))
        assert {text.split()[0] for text in load(file)} == {word}


def test_evaluation_data_are_read_with_the_same_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image bombs, programs in images, paths inside a data file, packed files: as for calibration."""
    import subprocess

    from mergekit_dam.evaluation.attack_text import parse_trigger
    from mergekit_dam.evaluation.labelled_data import Source, read_labelled

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
    for content, reason in ((png(40_000, 40_000), "pixels"), (postscript.encode(), "cannot identify")):
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


def test_rows_of_several_groups_are_those_of_datasets(tmp_path: Path) -> None:
    rows = [f"text {i}" for i in range(100)]
    pq.write_table(pa.table({"text": rows, "label": list(range(100))}), tmp_path / "d.parquet", row_group_size=7)
    Dataset.from_dict({"text": rows}).to_json(str(tmp_path / "d.jsonl"))
    assert load(tmp_path / "d.parquet", num=30) == load(tmp_path / "d.jsonl", num=30)


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a film", "a plot", "a story"] * 3}), file)
    return file.getvalue()


@fuzzed
@given(data=edited(_parquet()))
def test_damaged_parquet_is_read_or_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(data)
    try:
        with bounded(megabytes=2200):  # a footer that lies about a page's size: see SECURITY.md
            assert all(isinstance(text, str) for text in load(tmp_path / "d.parquet"))
    except DamError as error:
        assert str(error).isprintable()
