"""Files of calibration data as spreadsheets, cameras and libraries write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.io.calibration import load_calibration
from mergekit_dam.io.data_files import image_of
from mergekit_dam.io.images import Preprocessing


def _texts(source: Path, **settings: str) -> tuple[str, ...]:
    found = load_calibration(
        ModelSettings(calibration=str(source), **settings), "text", num_samples=8, seed=0, task="a"
    )
    return found.samples


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


@pytest.mark.parametrize("column", [{}, {"column": "messages"}])
def test_conversations_name_the_chat_template_as_cure(tmp_path: Path, column: dict[str, str]) -> None:
    file = tmp_path / "a.jsonl"
    row = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "dog"}]}
    file.write_text(f"{json.dumps(row)}\n" * 3)
    with pytest.raises(DamError, match=r"got conversations.*apply_chat_template"):
        _texts(file, **column)


@pytest.mark.parametrize(
    ("name", "cure"),
    [("dataset_info.json", "load_from_disk"), ("train-0.parquet", "to_parquet"), ("x", "Name the file")],
)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_folder_that_is_not_read_names_the_file_to_make(tmp_path: Path, name: str, cure: str, kind: Any) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DamError, match=cure):
        load_calibration(ModelSettings(calibration=str(tmp_path)), kind, num_samples=8, seed=0, task="a")
