"""Files of calibration data as spreadsheets, cameras and libraries write them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.io.calibration import load_calibration
from mergekit_dam.io.image_files import image_of
from mergekit_dam.io.images import Preprocessing
from mergekit_dam.io.untrusted import load_json


def _texts(source: Path, **settings: str) -> tuple[str, ...]:
    found = load_calibration(
        ModelSettings(calibration=str(source), **settings), "text", num_samples=8, seed=0, task="a"
    )
    return found.samples


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet", "txt"])
@pytest.mark.parametrize("name", ["cars [1]", "cars?", "*", "{a,b}", "[!x]"])
def test_a_name_is_no_pattern(tmp_path: Path, name: str, ending: str) -> None:
    """What the name would match as a pattern lies beside the file, and in its folder's place."""
    folders = tmp_path / "data [2024]", tmp_path / "data 2"
    for folder in folders:
        folder.mkdir()
    for place, text in ((folders[0] / name, "right"), (folders[0] / "cars 1", "wrong"), (folders[1] / name, "wrong")):
        rows = [f"{text} {i}" for i in range(6)]
        file = place.with_name(f"{place.name}.{ending}")
        if ending == "parquet":
            pq.write_table(pa.table({"text": rows}), file)
        elif ending == "json":
            file.write_text(json.dumps([{"text": row} for row in rows]))
        elif ending == "jsonl":
            file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        else:
            file.write_text("\n".join(["text", *rows] if ending == "csv" else rows))
    assert {text.split()[0] for text in _texts(folders[0] / f"{name}.{ending}")} == {"right"}


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_no_delimiter_lets_labels_into_the_texts(tmp_path: Path, delimiter: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f'"text"{delimiter}label\n' + "".join(f"red dog {i}{delimiter}{i % 3}\n" for i in range(6)))
    assert sorted(_texts(file)) == [f"red dog {i}" for i in range(6)]


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_grey_of_16_bit_is_scaled(tmp_path: Path, name: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 20)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    seen = np.asarray(image_of(tmp_path / name, "picture")).astype(float)
    assert np.abs(seen - values[..., None] / 257).max() <= 1


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_grey_without_a_known_white_is_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.ones((4, 4), dtype=kind)).save(tmp_path / "grey.tif")
    with pytest.raises(DamError, match="save it with 8 or 16 bit"):
        image_of(tmp_path / "grey.tif", "picture")


def test_a_processor_file_of_transformers_5_holds_the_preprocessing(tmp_path: Path) -> None:
    images = {"size": {"shortest_edge": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    found = Preprocessing.read([tmp_path], 32)
    assert (found.resize, found.mean, found.std) == (16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


_ROWS = [f"red dog {i}" for i in range(6)]


def _table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": _ROWS, "label": [i % 3 for i in range(6)]})


def _csv(separator: str = ",") -> str:
    return f"text{separator}label\n" + "".join(f"{row}{separator}1\n" for row in _ROWS)


def _jsonl(rows: Sequence[str] = _ROWS) -> str:
    return "".join(json.dumps({"text": row, "label": 1}) + "\n" for row in rows)


def _packed(opener: Any, name: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with opener(folder / name, "wb") as file:
            file.write(content.encode())
        return folder / name

    return write


def _written(content: dict[str, str | bytes], source: str = "") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for name, text in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder / source

    return write


def _saved(folder: Path) -> Path:
    _table().save_to_disk(folder / "saved")
    return folder / "saved"


def _saved_splits(folder: Path) -> Path:
    datasets.DatasetDict({"train": _table(), "test": _table().select([0])}).save_to_disk(folder / "saved")
    return folder / "saved"


def _shards(folder: Path) -> Path:
    """What a download of the Hub leaves: shards of two splits, and files about them."""
    for i in range(2):
        _table().shard(2, i).to_parquet(folder / f"data/train-0000{i}-of-00002.parquet")
    _table().select([0]).to_parquet(folder / "data/test-00000-of-00001.parquet")
    _written({"README.md": "x", "dataset_infos.json": "{}", ".cache/x.parquet": "x", "license.txt": "x"})(folder)
    return folder


_FORMS: dict[str, Callable[[Path], Path]] = {
    "gzip": _packed(gzip.open, "a.jsonl.gz", _jsonl()),
    "bzip2": _packed(bz2.open, "a.csv.bz2", _csv()),
    "xz": _packed(lzma.open, "a.txt.xz", "\n".join(_ROWS)),
    "packed spreadsheet": _packed(gzip.open, "a.csv.gz", _csv(";")),
    "upper-case jsonl": _written({"A.JSONL": _jsonl()}, "A.JSONL"),
    "upper-case csv": _written({"A.CSV": _csv()}, "A.CSV"),
    "marked csv": _written({"a.csv": _csv("\t").encode("utf-16")}, "a.csv"),
    "marked jsonl": _written({"a.jsonl": _jsonl().encode("utf-16")}, "a.jsonl"),
    "marked text": _written({"a.txt": "\n".join(_ROWS).encode("utf-8-sig")}, "a.txt"),
    "save_to_disk": _saved,
    "save_to_disk of splits": _saved_splits,
    "shards of parquet": _shards,
    "shards of jsonl": _written({"b/x-1.jsonl": _jsonl(_ROWS[:3]), "b/x-2.jsonl": _jsonl(_ROWS[3:])}),
    "splits of jsonl": _written({"train.jsonl": _jsonl(), "test.jsonl": _jsonl(["no"]), "meta.json": "{}"}),
    "folders of splits": _written({"train/0.txt": "\n".join(_ROWS), "test/0.txt": "no"}),
}


@pytest.mark.parametrize("form", _FORMS)
def test_a_form_of_files_gives_its_rows(form: str, tmp_path: Path) -> None:
    assert sorted(_texts(_FORMS[form](tmp_path))) == _ROWS


_REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "latin-1": (_written({"a.csv": "text,label\nré,1\n".encode("latin-1")}, "a.csv"), "another encoding.*iconv"),
    "utf-16 unmarked": (_written({"a.jsonl": _jsonl().encode("utf-16-le")}, "a.jsonl"), "UTF-16.*Save it as UTF-8"),
    "two forms": (_written({"a.csv": _csv(), "b.jsonl": _jsonl()}), "files of one form.*Name one of the files"),
    "other columns": (_written({"a.parquet": b"", "b.parquet": b""}), "Check the path"),
    "no such split": (
        _written({"dev.jsonl": _jsonl()}),
        "one of validation, got 'train'.*`split:`",
    ),
    "damaged folder": (_written({"dataset_info.json": ""}), "Check the path"),
    "no data": (_written({"notes.md": ""}), "Name the file"),
    "packed bomb": (_packed(gzip.open, "a.jsonl.gz", " " * (1 << 27)), "expands to more than 200 times"),
    "no gzip": (_written({"a.jsonl.gz": _jsonl()}, "a.jsonl.gz"), "Check the path"),
    "a workbook": (_written({"a.xlsx": b"PK\x03\x04"}, "a.xlsx"), "ends in one of .*Save it in one of these"),
    "empty": (_written({"a.jsonl": b""}, "a.jsonl"), "an empty file"),
    "an archive": (_written({"a.zip": b"PK\x03\x04"}, "a.zip"), "zip data. Unpack it first"),
}


@pytest.mark.parametrize("form", _REFUSED)
def test_a_form_that_is_not_read_names_its_cure(form: str, tmp_path: Path) -> None:
    write, cure = _REFUSED[form]
    with pytest.raises(DamError, match=cure):
        _texts(write(tmp_path))


@pytest.mark.parametrize("kind", ["a.gz", "shards"])
def test_rewritten_files_are_read_again(kind: str, tmp_path: Path) -> None:
    for word in ("one", "two"):
        rows = _jsonl([f"{word} {i}" for i in range(4)])
        if kind == "shards":
            source = _written({"x/1.jsonl": rows, "x/2.jsonl": rows}, "x")(tmp_path)
        else:
            source = _packed(gzip.open, "a.jsonl.gz", rows)(tmp_path)
        for file in tmp_path.rglob("*.*"):
            os.utime(file, (10**9, 10**9))
        assert {text.split()[0] for text in _texts(source)} == {word}


@contextmanager
def _nobody() -> Iterator[None]:
    """Without root's right to read what modes forbid."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(os.name != "posix", reason="modes")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.csv", "a.png", "a.json", "folder"])
def test_a_missing_right_is_called_one(name: str) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.mkdir() if name == "folder" else file.write_text("x")
        os.chmod(folder, 0o755)
        file.chmod(0)
        with _nobody(), pytest.raises(DamError, match=r"the right to read it.*chmod"):
            if name == "a.json":
                load_json(file)
            elif name == "a.png":
                image_of(file, "picture")
            else:
                _texts(file)


@pytest.mark.skipif(os.name != "posix", reason="modes")
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_folder_below_that_is_closed_is_not_an_empty_one(kind: Any) -> None:
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in ("open", "closed"):
            Path(folder, name).mkdir()
            Image.new("RGB", (4, 4)).save(Path(folder, name, "x.png"))
            Path(folder, name, "x.txt").write_text("red\ndog\n")
        Path(folder, "closed").chmod(0)
        with _nobody(), pytest.raises(DamError, match="/closed: expected the right to read it"):
            load_calibration(ModelSettings(calibration=folder), kind, num_samples=8, seed=0, task="a")
        Path(folder, "closed").chmod(0o755)
