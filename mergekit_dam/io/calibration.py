"""Unlabelled calibration data: a file, a folder or a Hub dataset, one column of it, a seeded sample.

Labels never reach the search: only the chosen column is read, and a column of numbers or classes is refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_dam import seeds
from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.io.data_files import (
    IMAGES,
    LOADERS,
    DatasetColumn,
    Kind,
    ParquetColumn,
    download_folders,
    image_of,
    load_file,
    refuse_packed,
    text_of,
    unreadable,
)
from mergekit_dam.io.hub_client import is_hub_id
from mergekit_dam.io.hub_download import require_dataset

LOG = logging.getLogger(__name__)
_TEXT_BYTES = 1 << 30  # of a .txt file, which is read at once


@dataclass(frozen=True)
class Calibration:
    """Samples of one task.

    Attributes:
        samples: PIL images (RGB) or texts.
        digests: first 16 hex digits of SHA-256 of each sample (pixels or UTF-8), in the same order.
    """

    samples: tuple[Any, ...]
    digests: tuple[str, ...]


def load_calibration(
    settings: ModelSettings, kind: Kind, *, num_samples: int, seed: int, task: str, position: int = 0
) -> Calibration:
    """Read `num_samples` samples, chosen by the seed and the model's position in the recipe, never by a name.

    Raises:
        DamError: missing, empty or unreadable data; a missing, ambiguous or label column.
    """
    source = settings.calibration
    if source is None:
        raise DamError(
            f"calibration of {task}", expected=f"unlabelled {kind} data", got="none",
            cure="Set `calibration:` to a file, a folder or a Hub dataset id under the model's parameters.",
        )  # fmt: skip
    where = f"calibration of {task} ({source})"
    path = Path(source).expanduser()
    before = file_states([path])
    rows = _source(path, settings, kind, where)
    if len(rows) == 0:
        raise DamError(where, expected="at least one sample", got="none", cure="Give a file or folder with data in it.")
    order = torch.randperm(len(rows), generator=seeds.generator(seed, "samples", position))[:num_samples].tolist()
    taken = rows.take(order)
    files = [row for row in taken if isinstance(row, Path)]
    before |= file_states(files)
    if kind == "image":
        trusted = () if path.exists() else download_folders()
        samples: list[Any] = [
            image_of(row, f"sample {i} of {source}", trusted=trusted) for i, row in zip(order, taken, strict=True)
        ]
    else:
        samples = [text for text in map(text_of, taken) if text.strip()]
        _warn_about_labels(samples, where)
    if file_states([path, *files]) != before:
        raise DamError(
            where, expected="data that stay as they are", got="a change while they were read",
            cure="Run again when nothing writes to them.",
        )  # fmt: skip
    if len(samples) < 2:
        raise DamError(
            where, expected="at least 2 samples that are not blank", got=str(len(samples)), cure="Give more data."
        )
    return Calibration(tuple(samples), tuple(digest(sample) for sample in samples))


def digest(sample: Any) -> str:
    """First 16 hex digits of SHA-256 over the pixels of an image or the UTF-8 of a text."""
    data = sample.encode() if isinstance(sample, str) else repr(sample.size).encode() + sample.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


class _Listed:
    """Rows that are at hand: lines of a text file, or paths of images."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Sequence[int]) -> list[Any]:
        """The values of these rows."""
        return [self._rows[row] for row in rows]


def _source(path: Path, settings: ModelSettings, kind: Kind, where: str) -> _Listed | ParquetColumn | DatasetColumn:
    import datasets

    source = str(settings.calibration)
    try:
        if path.is_dir():
            return _folder(path, settings, kind, where)
        if path.suffix == ".txt" and path.is_file():
            return _Listed(_lines(path))
        if path.suffix == ".parquet" and path.is_file():
            return ParquetColumn(path, settings.column, kind, where)
        if path.suffix in LOADERS and path.is_file():
            refuse_packed(path, where)
            data = load_file(path, LOADERS[path.suffix])
        elif path.exists() or path.suffix in {*LOADERS, ".parquet", ".txt"} or source.startswith((".", "/", "~")):
            raise FileNotFoundError("no such file" if not path.exists() else "an unknown kind of file")
        else:
            name, _, revision = source.partition("@")
            if is_hub_id(name):
                require_dataset(name, revision or None, where)
            data = datasets.load_dataset(name, split=settings.split, revision=revision or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, DamError):
            raise
        raise unreadable(where, error) from error
    return DatasetColumn(data, settings.column, kind, where)


def _folder(path: Path, settings: ModelSettings, kind: Kind, where: str) -> _Listed | ParquetColumn | DatasetColumn:
    """Images below a folder, or its one file of data.

    Raises:
        DamError: a folder of another kind, with the step that makes a file of it.
    """
    if kind == "image":
        images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
        if images:
            return _Listed(images)
    files = sorted(p for p in path.rglob("*") if p.suffix in {*LOADERS, ".parquet", ".txt"} and p.is_file())
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        got = "a folder of save_to_disk"
        cure = 'Name the file that datasets.load_from_disk(FOLDER).to_parquet("data.parquet") writes (of one split).'
    elif files:
        got = f"a folder with {', '.join(p.name for p in files[:2])}{' ...' if len(files) > 2 else ''}"
        cure = "Name one of its files, or make one of them all: datasets' concatenate_datasets and to_parquet."
    else:
        got, cure = "a folder without any", "Name the file with the data."
    raise DamError(
        where, expected="images below the folder" if kind == "image" else "a file of texts", got=got, cure=cure
    )


def _lines(path: Path) -> list[str]:
    """Lines that are not blank."""
    size = path.stat().st_size
    if size > _TEXT_BYTES:
        raise ValueError(f"{size} bytes of text, at most {_TEXT_BYTES} are read: give parquet, or a part of it")
    return [line for line in path.read_text("utf-8").splitlines() if line.strip()]


def file_states(paths: Sequence[Path]) -> dict[Path, tuple[int, ...]]:
    """Place, length and time of change (ns) of the files among `paths`."""
    found: dict[Path, tuple[int, ...]] = {}
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            continue  # a Hub dataset, or a file whose absence the reader reports
        found[path] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    return found


def _warn_about_labels(texts: Sequence[str], where: str) -> None:
    distinct = len(set(texts))
    if len(texts) >= 20 * distinct > 0:
        LOG.warning("%s: only %d different texts among %d; are these labels?", where, distinct, len(texts))
