"""Unlabelled calibration data: a file, a folder or a Hub dataset, one column of it, a seeded sample.

Labels never reach the search: only the chosen column is read, and a column of numbers or classes is refused.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from mergekit_dam import seeds
from mergekit_dam.config import ModelSettings, did_you_mean
from mergekit_dam.errors import DamError, first_line
from mergekit_dam.hub_errors import is_hub_id
from mergekit_dam.hub_inputs import require_dataset

Kind = Literal["image", "text"]
_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Calibration:
    """Samples of one task.

    Attributes:
        samples: PIL images (RGB) or texts.
        digests: first 16 hex digits of SHA-256 of each sample (pixels or UTF-8), in the same order.
    """

    samples: tuple[Any, ...]
    digests: tuple[str, ...]


def load_calibration(settings: ModelSettings, kind: Kind, *, num_samples: int, seed: int, task: str) -> Calibration:
    """Read `num_samples` samples, chosen by seed and task.

    Raises:
        DamError: missing, empty or unreadable data; a missing, ambiguous or label column.
    """
    source = settings.calibration
    if source is None:
        raise DamError(
            f"calibration of {task}", expected=f"unlabelled {kind} data", got="none",
            cure="Set `calibration:` to a file, a folder or a Hub dataset id under the model's parameters.",
        )  # fmt: skip
    path = Path(source).expanduser()
    if path.is_dir() and kind == "image":
        rows: Any = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES)
    elif path.suffix == ".txt" and path.is_file():
        rows = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    else:
        rows = _column(_dataset(path, settings, task), settings.column, kind, f"calibration of {task} ({source})")
    if len(rows) == 0:
        raise DamError(
            f"calibration of {task} ({source})", expected="at least one sample", got="none",
            cure="Give a file or folder with data in it.",
        )  # fmt: skip
    order = torch.randperm(len(rows), generator=seeds.generator(seed, "samples", task))[:num_samples]
    read = _image if kind == "image" else _text
    samples = [read(rows[int(i)], f"sample {int(i)} of {source}") for i in order]
    if kind == "text":
        samples = [text for text in samples if str(text).strip()]
    if len(samples) < 2:
        raise DamError(
            f"calibration of {task} ({source})", expected="at least 2 samples that are not blank",
            got=str(len(samples)), cure="Give more data.",
        )  # fmt: skip
    return Calibration(tuple(samples), tuple(digest(sample) for sample in samples))


def digest(sample: Any) -> str:
    """First 16 hex digits of SHA-256 over the pixels of an image or the UTF-8 of a text."""
    data = sample.encode() if isinstance(sample, str) else repr(sample.size).encode() + sample.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _dataset(path: Path, settings: ModelSettings, task: str) -> Any:
    import datasets

    source = str(settings.calibration)
    try:
        if path.is_file() and path.suffix in _LOADERS:
            loader = _LOADERS[path.suffix]
            return datasets.load_dataset(loader, data_files=str(path), split="train")
        if path.exists() or path.suffix in {*_LOADERS, ".txt"} or source.startswith((".", "/", "~")):
            raise FileNotFoundError("no such file" if not path.exists() else "an unknown kind of file")
        name, _, revision = source.partition("@")
        if is_hub_id(name):
            require_dataset(name, revision or None, f"calibration of {task} ({source})")
        return datasets.load_dataset(name, split=settings.split, revision=revision or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, DamError):
            raise
        raise DamError(
            f"calibration of {task} ({source})", got=first_line(error),
            expected="a parquet, jsonl, json, csv or txt file, an image folder, or a Hub dataset id",
            cure="Check the path (relative ones start at the working directory) or the id and split.",
        ) from error  # fmt: skip


def _column(data: Any, column: str | None, kind: Kind, where: str) -> Any:
    """The rows of one column; nothing else of the data is touched."""
    import datasets

    candidates = [name for name, feature in data.features.items() if _holds(feature, kind)]
    if column is not None and column not in data.features:
        raise DamError(
            f"column of {where}", expected=f"one of {', '.join(data.features)}", got=repr(column),
            cure=did_you_mean(column, data.features) or "Set `column:` to one of them.",
        )  # fmt: skip
    if column is not None and column not in candidates:
        raise DamError(
            f"column {column!r} of {where}", expected=f"{kind}s", got=f"{data.features[column]}",
            cure="Labels never reach the search: name the column with the inputs.",
        )  # fmt: skip
    if column is None:
        if len(candidates) != 1:
            raise DamError(
                f"columns of {where}", expected=f"exactly one with {kind}s",
                got=", ".join(candidates) or f"none among {', '.join(data.features)}",
                cure="Set `column:`.",
            )  # fmt: skip
        column = candidates[0]
    selected = data.select_columns([column])
    if kind == "image" and not isinstance(selected.features[column], datasets.Image):
        selected = selected.cast_column(column, datasets.Image())
    return selected[column]


def _holds(feature: Any, kind: Kind) -> bool:
    import datasets

    if kind == "text":
        return isinstance(feature, datasets.Value) and feature.dtype in {"string", "large_string"}
    return (
        isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or (isinstance(feature, datasets.Value) and feature.dtype in {"binary", "large_binary"})
    )


def _image(row: Any, where: str) -> Image.Image:
    try:
        image = row if isinstance(row, Image.Image) else Image.open(row if isinstance(row, Path) else io.BytesIO(row))
        return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise DamError(where, expected="an image", got=str(error), cure="Remove or repair this sample.") from error


def _text(row: Any, where: str) -> str:
    return str(row or "")
