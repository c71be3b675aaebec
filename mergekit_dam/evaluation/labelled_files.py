"""Labelled data as a user names them: samples and class numbers.

A parquet, jsonl, json or csv file or a Hub dataset id, with one column of inputs and one of labels, or a folder of
images with one sub-folder per class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from mergekit_dam import seeds
from mergekit_dam.errors import DamError, did_you_mean, first_line
from mergekit_dam.io.data_files import IMAGES, LOADERS, Kind, download_folders, image_of, load_file, refuse_packed
from mergekit_dam.io.hub_client import is_hub_id
from mergekit_dam.io.hub_download import require_dataset

Names = Mapping[str, int]
_LOADERS = {".parquet": "parquet", **LOADERS}


@dataclass(frozen=True)
class Source:
    """Where labelled data come from.

    Attributes:
        data: file, folder or Hub dataset id (`id@revision`).
        split: split of a dataset that has several.
        column: the inputs; None: the only column that can be.
        label_column: the labels, numbers or names.
        num_samples: samples to take, chosen by `seed`; None: all.
    """

    data: str
    split: str = "test"
    column: str | None = None
    label_column: str = "label"
    num_samples: int | None = None
    seed: int = 0


def read_labelled(source: Source, kind: Kind, name: str, known: Names) -> tuple[list[Any], list[int]]:
    """Samples (PIL images or texts) and their classes.

    Raises:
        DamError: data that cannot be read, or columns or labels that are not there.
    """
    where = f"evaluation data of {name} ({source.data})"
    try:
        table = _table(Path(source.data).expanduser(), source, kind)
        labels, inputs = _columns(table, source, kind, where)
        if source.num_samples is not None and source.num_samples < len(table):
            order = torch.randperm(len(table), generator=seeds.generator(source.seed, "evaluation", name))
            table = table.select(sorted(order[: source.num_samples].tolist()))
        if kind == "image":
            table = table.cast_column(inputs, datasets.Image(decode=False))
        spelled = getattr(table.features[labels], "names", None)
        raw = list(table[labels])
        if spelled and set(spelled) <= set(known):
            raw = [spelled[number] for number in raw]
        rows = table[inputs]
        samples = [str(row) for row in rows] if kind == "text" else _images(rows, source)
        return samples, _classes(raw, known, where)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, DamError):
            raise
        raise DamError(
            where, expected="a parquet, jsonl, json or csv file, a folder of image folders, or a Hub dataset id",
            got=first_line(error), cure="Check the path or the id and --split.",
        ) from error  # fmt: skip


def _images(rows: Iterable[Any], source: Source) -> list[Any]:
    """Decoded here, with bounds and by decoders that call no program, as calibration images are."""
    path = Path(source.data).expanduser()
    if path.is_dir():
        return [image_of(Path(row["path"]), str(row["path"])) for row in rows]
    trusted = () if path.exists() else download_folders()
    return [image_of(row, f"sample {i} of {source.data}", trusted=trusted) for i, row in enumerate(rows)]


def _table(path: Path, source: Source, kind: Kind) -> datasets.Dataset:
    if path.is_dir() and kind == "image":
        files = sorted(p for p in path.glob("*/*") if p.suffix.lower() in IMAGES)
        columns = {"image": [str(p) for p in files], source.label_column: [p.parent.name for p in files]}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    if path.is_file():
        if path.suffix not in _LOADERS:
            raise ValueError(f"a file of kind {path.suffix or 'unknown'}")
        if path.suffix in LOADERS:
            refuse_packed(path, f"evaluation data ({source.data})")
        return load_file(path, _LOADERS[path.suffix])
    if path.exists() or path.suffix in _LOADERS or source.data.startswith((".", "/", "~")):
        raise FileNotFoundError("no such file")
    dataset, _, revision = source.data.partition("@")
    if is_hub_id(dataset):
        require_dataset(dataset, revision or None, f"evaluation data ({source.data})")
    return datasets.load_dataset(dataset, split=source.split, revision=revision or None)


def _columns(table: datasets.Dataset, source: Source, kind: Kind, where: str) -> tuple[str, str]:
    """Names of the columns with labels and inputs."""
    for option, column in (("--label-column", source.label_column), ("--column", source.column)):
        if column is not None and column not in table.features:
            raise DamError(
                f"{option} of {where}", expected=f"one of the columns {', '.join(table.features)}", got=repr(column),
                cure=did_you_mean(column, table.features) or f"Set {option}.",
            )  # fmt: skip
    if source.column is not None:
        return source.label_column, source.column
    fitting = [c for c, feature in table.features.items() if c != source.label_column and _holds(feature, kind)]
    if len(fitting) != 1:
        raise DamError(
            f"columns of {where}", expected=f"exactly one with {kind}s",
            got=", ".join(fitting) or f"none among {', '.join(table.features)}", cure="Set --column.",
        )  # fmt: skip
    return source.label_column, fitting[0]


def _holds(feature: Any, kind: Kind) -> bool:
    dtype = getattr(feature, "dtype", None)
    if kind == "text":
        return isinstance(feature, datasets.Value) and dtype in {"string", "large_string"}
    bytes_or_path = isinstance(feature, dict) and "bytes" in feature
    return isinstance(feature, datasets.Image) or bytes_or_path or dtype in {"binary", "large_binary"}


def _classes(raw: Sequence[Any], known: Names, where: str) -> list[int]:
    """Class numbers; names are looked up, never numbered by guesswork."""
    found = []
    for value in raw:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            number = None
        elif isinstance(value, int):
            number = value
        else:
            number = known.get(value, int(value) if value.isdecimal() else None)
        if number is None or number < 0:
            raise DamError(
                f"label {value!r} in {where}", expected=f"a class number or one of {', '.join(list(known)[:8])}",
                got="neither", cure=did_you_mean(str(value), known) or "Name the classes in order: --classes A,B,C.",
            )  # fmt: skip
        found.append(number)
    return found
