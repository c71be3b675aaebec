"""Where calibration samples come from: files of strangers, opened without running, fetching or unpacking anything.

Only one column is read. Images are decoded here, from bytes in the data, by decoders that cannot call a program; a
path or URL inside a data file is not followed. Bounds on one sample keep a small file from filling the memory.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from mergekit_dam.errors import DamError, did_you_mean, first_line
from mergekit_dam.io.digests import file_digest

Kind = Literal["image", "text"]
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
_DELIMITERS = ",;\t|"  # of spreadsheets; the first one wins where a header has as many of another
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # PIL knows EPS, too, and hands it to Ghostscript
_PIXELS = 1 << 26  # of one image: 200 MB once decoded, three times what a phone takes
_IMAGE_BYTES = 1 << 28
_WHITE = 65535  # of grey with 16 bit
_CHARACTERS = 1 << 17  # of one text; `max_length` cuts far below
_BATCH_BYTES = 1 << 30  # that a batch of parquet rows could expand to
_EXPANSION = 200  # text packs to a tenth, images do not pack; bombs reach 10,000
_SLACK = 1 << 26  # bytes that any file may expand to
_ROWS = 50_000_000  # of one source; beyond it the shuffle alone takes gigabytes
_PACKED = {
    b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard",
    b"7z\xbc\xaf": "7z", b"Rar!": "rar", b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip
# encodings of parquet in which a value may be written once and used by many rows
_ONCE = frozenset({"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"})
_LABELS = frozenset({"label", "labels", "target", "targets", "class", "classes", "category", "y", "answer", "gold"})


class ParquetColumn:
    """One column of a parquet file: `len`, and chosen rows in the order asked for."""

    def __init__(self, path: Path, column: str | None, kind: Kind, where: str) -> None:
        import datasets
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.where = where
        try:
            self._file = pq.ParquetFile(path)
            features = datasets.Features.from_arrow_schema(self._file.schema_arrow)
        except Exception as error:  # pyarrow and datasets raise many kinds on damaged headers
            raise unreadable(where, error) from error
        self.column = choose_column(features, column, kind, where)
        self._flat = not pa.types.is_nested(self._file.schema_arrow.field(self.column).type)
        if self._flat:
            # a value that many rows use then stays one value in memory
            self._file = pq.ParquetFile(path, metadata=self._file.metadata, read_dictionary=[self.column])
        self._budget = _EXPANSION * path.stat().st_size + _SLACK
        self._rows = self._file.metadata.num_rows
        if self._rows > _ROWS:
            raise DamError(
                where, expected=f"at most {_ROWS} rows", got=str(self._rows), cure="Give a part of the data."
            )

    def __len__(self) -> int:
        return int(self._rows)

    def take(self, rows: Sequence[int]) -> list[Any]:
        """The values of these rows: texts, bytes of images, or {"bytes", "path"}."""
        wanted = sorted(set(rows))
        found: dict[int, Any] = {}
        start = 0
        try:
            for group in range(self._file.metadata.num_row_groups):
                length = self._file.metadata.row_group(group).num_rows
                inside = [row for row in wanted if start <= row < start + length]
                if inside:
                    self._read(group, start, inside, found)
                start += length
            return [found[row] for row in rows]
        except Exception as error:
            if isinstance(error, DamError):
                raise
            raise unreadable(self.where, error) from error

    def _read(self, group: int, start: int, wanted: Sequence[int], found: dict[int, Any]) -> None:
        import pyarrow as pa

        parts = [
            part
            for part in map(self._file.metadata.row_group(group).column, range(self._file.metadata.num_columns))
            if part.path_in_schema.split(".")[0] == self.column
        ]
        size = sum(part.total_uncompressed_size for part in parts)
        # with the dictionary kept, only values that share a prefix grow
        grows = [e for part in parts for e in part.encodings if e not in _ONCE and not (self._flat and "DICT" in e)]
        rows = max(1, min(1024, _BATCH_BYTES // max(1, size))) if grows else 1024
        columns = [self.column]
        for batch in self._file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False):
            values = batch.column(0)
            once = isinstance(values, pa.DictionaryArray)  # its values stand in memory once, whatever the batch
            self._budget -= values.indices.nbytes if once else values.nbytes
            if values.nbytes > _BATCH_BYTES or self._budget < 0:
                raise ValueError(f"a file that expands to more than {_EXPANSION} times its size")
            for row in wanted:
                if start <= row < start + batch.num_rows:
                    found[row] = values[row - start].as_py()
            start += batch.num_rows


class DatasetColumn:
    """One column of a datasets table, with the interface of `ParquetColumn`."""

    def __init__(self, data: Any, column: str | None, kind: Kind, where: str) -> None:
        import datasets

        self.column = choose_column(data.features, column, kind, where)
        selected = data.select_columns([self.column])
        if kind == "image":
            selected = selected.cast_column(self.column, datasets.Image(decode=False))
        self._values = selected[self.column]

    def __len__(self) -> int:
        return len(self._values)

    def take(self, rows: Sequence[int]) -> list[Any]:
        """The values of these rows."""
        return [self._values[row] for row in rows]


def choose_column(features: Any, column: str | None, kind: Kind, where: str) -> str:
    """The named column, or the only one with such inputs.

    Raises:
        DamError: an unknown or ambiguous column, or one of labels.
    """
    candidates = [name for name, feature in features.items() if _holds(feature, kind)]
    chats = [name for name, feature in features.items() if kind == "text" and _is_chat(feature)]
    if chats and (column in chats or (column is None and not candidates)):
        raise DamError(
            f"column {chats[0] if column is None else column!r} of {where}", expected="texts", got="conversations",
            cure="Write prompts into a text column with tokenizer.apply_chat_template(messages, tokenize=False, "
            "add_generation_prompt=True), and name that column.",
        )  # fmt: skip
    inputs = [name for name in candidates if name.casefold() not in _LABELS]
    if column is not None and column not in features:
        raise DamError(
            f"column of {where}", expected=f"one of {', '.join(features)}", got=repr(column),
            cure=did_you_mean(column, features) or "Set `column:` to one of them.",
        )  # fmt: skip
    if column is not None and column not in inputs:
        raise DamError(
            f"column {column!r} of {where}", expected=f"{kind}s", got=f"{features[column]}",
            cure="Labels never reach the search: name the column with the inputs (or rename it, if this is one).",
        )  # fmt: skip
    if column is None:
        if len(inputs) != 1:
            raise DamError(
                f"columns of {where}", expected=f"exactly one with {kind}s",
                got=", ".join(inputs) or f"none among {', '.join(features)}", cure="Set `column:`.",
            )  # fmt: skip
        column = inputs[0]
    return column


def _is_chat(feature: Any) -> bool:
    """Whether a column holds lists of messages with a role and a text."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    return isinstance(inner, dict) and ({"role", "content"} <= set(inner) or {"from", "value"} <= set(inner))


def _holds(feature: Any, kind: Kind) -> bool:
    import datasets

    if kind == "text":
        return isinstance(feature, datasets.Value) and feature.dtype in {"string", "large_string"}
    return (
        isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or (isinstance(feature, datasets.Value) and feature.dtype in {"binary", "large_binary"})
    )


def refuse_packed(path: Path, where: str) -> None:
    """Refuse a compressed file under the name of a plain one, which datasets would unpack without a bound."""
    with path.open("rb") as file:
        head = file.read(8)
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise DamError(where, expected=f"a plain {path.suffix} file", got=f"{name} data", cure="Unpack it first.")


def load_file(path: Path, kind: str) -> Any:
    """The rows of a local file. datasets knows one by path and time of change, and would give an older one's rows
    after a clock was set back or a copy kept the time: so the content's hash enters the name of its cache.
    """
    import datasets

    more = {"sep": _delimiter(path)} if kind == "csv" else {}
    return datasets.load_dataset(kind, name=file_digest(path)[:16], data_files=str(path), split="train", **more)


def _delimiter(path: Path) -> str:
    """What separates the names in a header: read with another one, every text would end in its label."""
    with path.open("rb") as file:
        header = file.readline(_CHARACTERS).decode("utf-8", "replace")
    outside = "".join(header.split('"')[::2])  # a quoted name may hold any of them
    return max(_DELIMITERS, key=outside.count)


def image_of(row: Any, where: str, *, trusted: Iterable[Path] = ()) -> Image.Image:
    """RGB, turned as its EXIF entry says.

    Args:
        row: the path of an image that the user named, bytes, or {"bytes", "path"} of a dataset.
        where: for errors.
        trusted: folders from which a dataset may name files: the cache it was downloaded to.

    Raises:
        DamError: no image, too large a one, or one that lies elsewhere.
    """
    try:
        source = io.BytesIO(row) if isinstance(row, bytes) else row
        if isinstance(row, dict):
            source = io.BytesIO(row["bytes"]) if row.get("bytes") is not None else _inside(row.get("path"), trusted)
        size = source.stat().st_size if isinstance(source, Path) else len(source.getbuffer())
        if size > _IMAGE_BYTES:
            raise ValueError(f"{size} bytes, at most {_IMAGE_BYTES} are read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is lower
            with Image.open(source, formats=_FORMATS) as image:
                if image.width * image.height > _PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels, at most {_PIXELS} are read")
                image.load()
                return _eight_bit(ImageOps.exif_transpose(image), image.format).convert("RGB")
    except Exception as error:  # decoders raise whatever they meet in damaged bytes
        raise DamError(
            where, expected="an image", got=first_line(error), cure="Remove or repair this sample."
        ) from error


def _eight_bit(image: Image.Image, form: str | None) -> Image.Image:
    """Grey of 16 bit as 8 bit, since PIL cuts off what is above 255 and leaves a white picture.

    Raises:
        ValueError: grey values without a known range.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    grey = np.asarray(image)
    wide = grey.dtype.itemsize > 2 and form != "PNG"
    if image.mode == "F" or wide or grey.min() < 0 or grey.max() > _WHITE:
        raise ValueError(
            f"grey values of {8 * grey.dtype.itemsize} bit ({image.mode}), whose white is not known: "
            "save it with 8 or 16 bit"
        )
    return Image.fromarray(np.round(grey / (_WHITE / 255)).astype(np.uint8))


def _inside(path: Any, trusted: Iterable[Path]) -> Path:
    if not isinstance(path, str):
        raise ValueError("neither bytes nor a path")
    found = Path(path)
    if not any(found.is_absolute() and found.resolve().is_relative_to(folder.resolve()) for folder in trusted):
        raise ValueError(f"the path {path}, which a data file may not name: put the image's bytes into the data")
    return found


def download_folders() -> tuple[Path, ...]:
    """Where datasets keeps what it downloaded; only files there may be named by a Hub dataset."""
    import datasets
    import huggingface_hub

    return tuple(Path(folder) for folder in (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE))


def text_of(row: Any) -> str:
    """At most 131,072 characters."""
    return str(row or "")[:_CHARACTERS]


def unreadable(where: str, error: Exception) -> DamError:
    """What a library said about data that it cannot read."""
    return DamError(
        where, got=first_line(error),
        expected="a parquet, jsonl, json, csv or txt file, an image folder, or a Hub dataset id",
        cure="Check the path (relative ones start at the working directory) or the id and split.",
    )  # fmt: skip
