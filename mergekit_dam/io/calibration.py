"""Draw a seeded sample of unlabelled calibration inputs from a file, a folder or a Hub dataset.

Labels never reach the search: only the input columns are read, and a column of numbers or classes is refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_dam import seeds
from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.io.columns import LABELS, SETTING, Conversation, Kind, choose_inputs, text_of
from mergekit_dam.io.data_files import ListTable, Table, open_data
from mergekit_dam.io.image_files import download_folders, image_of

LOG = logging.getLogger(__name__)
Sample = Any  # a text, a conversation, or a PIL image


@dataclass(frozen=True)
class Calibration:
    """Unlabelled samples of one task.

    Attributes:
        samples: PIL images (RGB), texts or conversations.
        digests: one `digest` per sample, in the same order.
    """

    samples: tuple[Any, ...]
    digests: tuple[str, ...]


def load_calibration(
    settings: ModelSettings, kind: Kind, *, num_samples: int, seed: int, task: str, position: int = 0
) -> Calibration:
    """Read `num_samples` samples, chosen by the seed and the model's position in the recipe, never by its name.

    Raises:
        DamError: missing, empty or unreadable data; a missing, ambiguous or label column.
    """
    source = settings.calibration
    if source is None:
        raise DamError(
            f"calibration of {task}",
            expected=f"unlabelled {kind} data",
            got="none",
            cure="Set `calibration:` to a file, a folder or a Hub dataset id under the model's parameters.",
        )
    where = f"calibration of {task} ({source})"
    path = Path(source).expanduser()
    before = file_states([path])
    table = open_data(source, settings.split, kind, where)
    if len(table) == 0:
        raise DamError(where, expected="at least one sample", got="none", cure="Give a file or folder with data in it.")
    order = torch.randperm(len(table), generator=seeds.generator(seed, "samples", position))[:num_samples].tolist()
    before |= file_states(table.files)
    values = values_of(table, settings.column, kind, where, order)
    files = [row for row in values if isinstance(row, Path)]
    before |= file_states(files)
    if kind == "image":
        samples = images_of(values, order, source)
    else:
        samples = [sample for sample in values if isinstance(sample, Conversation) or sample.strip()]
        _warn_about_labels(samples, where)
    if file_states([path, *table.files, *files]) != before:
        raise DamError(
            where,
            expected="data that stay as they are",
            got="a change while they were read",
            cure="Run again when nothing writes to them.",
        )
    if len(samples) < 2:
        raise DamError(
            where, expected="at least 2 samples that are not blank", got=str(len(samples)), cure="Give more data."
        )
    return Calibration(tuple(samples), tuple(digest(sample) for sample in samples))


def values_of(
    table: Table,
    column: str | None,
    kind: Kind,
    where: str,
    rows: Sequence[int],
    *,
    labels: Collection[str] = LABELS,
    spelled: str = SETTING,
) -> list[Any]:
    """Read the inputs in these rows: texts, conversations, or values that `image_of` decodes.

    Args: as for `choose_inputs`.

    Raises:
        DamError: as for `choose_inputs`, or rows that cannot be read.
    """
    if isinstance(table, ListTable):
        values = table.take("", rows)
        if kind == "text":
            return [text_of(value) for value in values]
        if any(isinstance(value, str) for value in values):
            raise DamError(where, expected="images", got="lines of text", cure="Name a folder of images, or parquet.")
        return values
    inputs = choose_inputs(table.features, column, kind, where, labels=labels, spelled=spelled)
    columns = [table.take(name, rows) for name in inputs.columns]
    return [inputs.sample(*row) for row in zip(*columns, strict=True)]


def images_of(values: Sequence[Any], rows: Sequence[int], source: str) -> list[Any]:
    """Decode images; only a Hub dataset may name image files, and only in the cache that it was downloaded to."""
    trusted = () if Path(source).expanduser().exists() else download_folders()
    return [
        image_of(value, f"sample {row} of {source}", trusted=trusted) for row, value in zip(rows, values, strict=True)
    ]


def digest(sample: Sample) -> str:
    """First 16 hex digits of SHA-256 over an image's pixels, or the UTF-8 of a text or of a conversation's content."""
    if isinstance(sample, Conversation):
        sample = sample.content()
    data = sample.encode() if isinstance(sample, str) else repr(sample.size).encode() + sample.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def file_states(paths: Sequence[Path]) -> dict[Path, tuple[int, ...]]:
    """Device, inode, size (bytes) and time of change (ns) of each existing file among `paths`."""
    states: dict[Path, tuple[int, ...]] = {}
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            continue  # a Hub dataset, or a file whose absence the reader reports
        states[path] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    return states


def _warn_about_labels(texts: Sequence[Sample], where: str) -> None:
    distinct = len(set(texts))
    if len(texts) >= 20 * distinct > 0:
        LOG.warning("%s: only %d different texts among %d; are these labels?", where, distinct, len(texts))
