"""Open a user's data as one table: a file, shards, a folder, a folder saved by datasets, or a Hub dataset.

Untrusted files are opened without running or fetching anything, and the size that they expand to is bounded. datasets
reads all formats except parquet, of which only the needed columns are read, within bounds.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import lzma
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from mergekit_dam.errors import DamError, did_you_mean
from mergekit_dam.io.columns import CHARACTERS, SETTING, Kind
from mergekit_dam.io.digests import file_digest
from mergekit_dam.io.hub_client import is_hub_id
from mergekit_dam.io.hub_download import require_dataset
from mergekit_dam.io.image_files import IMAGES
from mergekit_dam.io.parquet_files import EXPANSION, SLACK, ParquetTable, unreadable

_LOADERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
}
_PACKERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}
_ARCHIVES = frozenset({*_PACKERS, ".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4"})
_UNPACKABLE = ("json", "csv", "text")
_DELIMITERS = ",;\t|"  # of spreadsheets; the earlier delimiter wins where a header has as many of a later one
_TEXT_BYTES = 1 << 30  # at most, of a .txt file, which is read in one piece
_CHUNK = 1 << 20
_MAGIC_BYTES = {
    b"\x1f\x8b": "gzip",
    b"PK": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
    b"\x04\x22\x4d\x18": "lz4",
}
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


class Table(Protocol):
    """Rows of named columns.

    Attributes:
        features: name -> feature of datasets.
        files: local files that are still read when rows are taken.
    """

    files: tuple[Path, ...]

    @property
    def features(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def take(self, column: str, rows: Sequence[int]) -> list[Any]:
        """Read a column in these rows; images as their bytes or paths."""


class DatasetTable:
    """A table that the library datasets reads."""

    def __init__(self, data: Any) -> None:
        self._data, self.features = data, data.features
        self.files = tuple(Path(file["filename"]) for file in data.cache_files)

    def __len__(self) -> int:
        return len(self._data)

    def take(self, column: str, rows: Sequence[int]) -> list[Any]:
        """See `Table`."""
        import datasets

        chosen = self._data.select_columns([column])
        if isinstance(self.features[column], (datasets.Image, dict)):
            chosen = chosen.cast_column(column, datasets.Image(decode=False))
        return list(chosen.select(rows)[column][:])


class ListTable:
    """A table without columns whose rows are in memory: lines of text files, or paths of images."""

    features: Mapping[str, Any] = {}
    files: tuple[Path, ...] = ()

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, column: str, rows: Sequence[int]) -> list[Any]:
        """Return these rows, whatever the column."""
        return [self._rows[row] for row in rows]


def open_data(source: str, split: str, kind: Kind, where: str, *, spelled: str = SETTING) -> Table:
    """Open the data that a user named.

    Args:
        source: a path, or a Hub dataset id (`id@revision`).
        split: used where a folder or Hub dataset has several.
        kind: image files below a folder are used only for kind "image".
        where: for errors.
        spelled: how settings are written, for cures.

    Raises:
        DamError: missing data, no right to read them, an unknown form or encoding, damage, or an unknown split.
    """
    import datasets

    path = Path(source).expanduser()
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # raises PermissionError where a folder on the way may not be entered
        if path.is_dir():
            return _table_of_folder(path, split, kind, where, spelled)
        if path.is_file() and _loader(path):
            return _table_of_files([path], where)
        if path.is_file():
            if path.suffix.lower() in _ARCHIVES:
                refuse_packed(path, where)
            raise DamError(
                where,
                expected=f"a file whose name ends in one of {', '.join(_LOADERS)}",
                got=repr(path.suffix or path.name),
                cure="Save it in one of these forms.",
            )
        if path.exists() or _loader(path) or source.startswith((".", "/", "~")):
            raise FileNotFoundError("no such file" if not path.exists() else "an unknown kind of file")
        name, _, revision = source.partition("@")
        if is_hub_id(name):
            require_dataset(name, revision or None, where)
        return DatasetTable(datasets.load_dataset(name, split=split, revision=revision or None))
    except StopIteration as error:  # datasets raises it for data without rows
        raise DamError(where, expected="at least one row", got="an empty file", cure="Give data.") from error
    except (OSError, EOFError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, DamError):
            raise
        raise unreadable(where, error) from error


def _loader(path: Path) -> str | None:
    """Name of the datasets loader for a file, by its endings in any case, packed or not; None if there is none."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if endings and endings[-1] in _PACKERS:
        loader = _LOADERS.get(endings[0]) if len(endings) == 2 else None
        return loader if loader in _UNPACKABLE else None
    return _LOADERS.get(endings[-1]) if endings else None


def _table_of_folder(path: Path, split: str, kind: Kind, where: str, spelled: str) -> Table:
    """Open a folder: images below it, a dataset of `save_to_disk`, or files of one form, read as shards."""
    if kind == "image":
        images = sorted(p for p in _walk_files(path) if p.suffix.lower() in IMAGES and p.is_file())
        if images:
            return ListTable(images)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _saved_by_datasets(path, split, where, spelled)
    named: dict[str, list[Path]] = {}
    for file in sorted(_walk_files(path)):
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        loader = _loader(file)
        if loader and not hidden and file.name not in _DESCRIPTIONS and file.is_file():
            # JSON and plain text beside tables describe them
            named.setdefault(loader if file.suffix.lower() != ".json" else "object", []).append(file)
    tables = [form for form in named if form not in ("object", "text")]
    if len(tables) > 1:
        names = ", ".join(named[form][0].name for form in tables)
        raise DamError(where, expected="files of one form", got=names, cure="Name one of the files, or a folder below.")
    form = next(iter((*tables, *(form for form in ("object", "text") if form in named))), None)
    if form is None:
        wanted = "images below the folder" if kind == "image" else "a file of texts"
        raise DamError(where, expected=wanted, got="a folder without any", cure="Name the file with the data.")
    splits: dict[str | None, list[Path]] = {}
    for file in named[form]:
        splits.setdefault(_split_named_by(file.relative_to(path)), []).append(file)
    known = [name for name in splits if name is not None]
    if not known:
        return _table_of_files(splits[None], where)
    return _table_of_files(splits[_require_split(split, known, where, spelled)], where)


def _walk_files(path: Path) -> Iterator[Path]:
    """Yield all files below a folder; raise OSError for a folder that may not be entered."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(path, onerror=refuse):
        yield from (Path(folder, name) for name in names)


def _saved_by_datasets(path: Path, split: str, where: str, spelled: str) -> Table:
    """Open a folder that `save_to_disk` of a Dataset or a DatasetDict wrote."""
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            data = data[_require_split(split, list(data), where, spelled)]
    except DamError:
        raise
    except Exception as error:  # json, pyarrow and datasets raise many kinds on damaged files
        raise unreadable(where, error) from error
    return DatasetTable(data)


def _split_named_by(file: Path) -> str | None:
    """The split in a file's or folder's name, by the Hub's convention: train_sft-00000-of-00002.parquet."""
    from datasets.data_files import SPLIT_KEYWORDS

    words = {word: str(split) for split, known in SPLIT_KEYWORDS.items() for word in known}
    stem = file.name.split(".")[0]
    shard = _SHARD.match(stem)
    for part in (shard[1] if shard else stem, *reversed(file.parts[:-1])):
        split = next((words[word] for word in re.split(r"[^a-z]+", part.lower()) if word in words), None)
        if split is not None:
            return part if shard and part == shard[1] and "-" not in part and part.lower() not in words else split
    return None


def _require_split(split: str, known: Sequence[str], where: str, spelled: str) -> str:
    if split in known:
        return split
    raise DamError(
        f"split of {where}",
        expected=f"one of {', '.join(sorted(known))}",
        got=repr(split),
        cure=f"{did_you_mean(split, known)} Set {spelled.format('split')}.".strip(),
    )


def _table_of_files(files: Sequence[Path], where: str) -> Table:
    """Open a file, or several files of the same form, as one table."""
    import datasets

    loader = _loader(files[0])
    if loader == "parquet":
        return ParquetTable(files, where)
    more: dict[str, Any] = {}
    if loader != "arrow":
        for file in files:
            if file.suffix.lower() not in _PACKERS:
                refuse_packed(file, where)
        encodings = [_encoding(file, where) for file in files]
        if loader == "text":
            return ListTable([line for file, code in zip(files, encodings, strict=True) for line in _lines(file, code)])
        if len(set(encodings)) > 1:
            raise DamError(
                where,
                expected="files in one encoding",
                got=", ".join(sorted(set(encodings))),
                cure="Save all as UTF-8.",
            )
        if encodings[0] == "utf-16":
            more = {"encoding": "utf-16"}
            if loader == "json":  # read in one piece: pieces could end within a character
                more["chunksize"] = max(10 << 20, *(file.stat().st_size for file in files)) + 2
        if loader == "csv":
            more["sep"] = _delimiter(files[0], encodings[0])
    # datasets identifies a file by path and time of change, and would return rows of an older file after a clock was
    # set back or a copy kept the time: so the content's hash enters the name of its cache
    digests = [file_digest(file) for file in files]
    name = (digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]
    if any(file.suffix.lower() in _PACKERS for file in files):
        more["download_config"] = datasets.DownloadConfig(force_extract=True)
    names = [glob.escape(str(file)) for file in files]  # datasets takes them for patterns
    paths = names[0] if len(names) == 1 else names
    return DatasetTable(datasets.load_dataset(loader, name=name, data_files=paths, split="train", **more))


def refuse_packed(path: Path, where: str) -> None:
    """Refuse a compressed file whose name is that of a plain file."""
    with path.open("rb") as file:
        head = file.read(8)
    for magic, name in _MAGIC_BYTES.items():
        if head.startswith(magic):
            raise DamError(where, expected=f"a plain {path.suffix} file", got=f"{name} data", cure="Unpack it first.")


@contextmanager
def _open_unpacked(path: Path, where: str) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, unpacked where its name says that it is packed."""
    ending = path.suffix.lower()
    if ending not in _PACKERS:
        with path.open("rb") as plain:
            yield plain
        return
    opener = _PACKERS[ending]
    if opener is None:
        raise DamError(
            where,
            expected="a plain file, or a file packed as .gz, .bz2 or .xz",
            got="zstandard data",
            cure="Unpack it first: zstd -d FILE.",
        )
    with opener(path, "rb") as unpacked:
        yield unpacked


def _encoding(path: Path, where: str) -> str:
    """Return "utf-8", or the encoding of the byte order mark, after checking the whole file within a size bound.

    Raises:
        DamError: the file is in another encoding.
        ValueError: a packed file expands beyond the bound.
    """
    budget = EXPANSION * path.stat().st_size + SLACK
    with _open_unpacked(path, where) as file:
        chunk = file.read(_CHUNK)
        mark = next((code for mark, code in _BYTE_ORDER_MARKS.items() if chunk.startswith(mark)), None)
        wide = chunk.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE))
        if wide or (mark is None and b"\0" in chunk):
            raise _not_utf8(where, path, "another encoding (UTF-32, or UTF-16 without its mark)")
        decoder = codecs.getincrementaldecoder(mark or "utf-8")()
        try:
            while chunk:
                decoder.decode(chunk)
                budget -= len(chunk)
                if budget < 0:
                    raise ValueError(f"a file that expands to more than {EXPANSION} times its size")
                chunk = file.read(_CHUNK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            got = f"another encoding ({error.reason}: byte 0x{error.object[error.start]:02x})"
            raise _not_utf8(where, path, got) from error
    return mark or "utf-8"


def _not_utf8(where: str, path: Path, got: str) -> DamError:
    return DamError(
        where,
        expected="text in UTF-8",
        got=got,
        cure=f"Save it as UTF-8, e.g. iconv -f latin1 -t utf-8 {path.name} (or -f utf-16).",
    )


def _delimiter(path: Path, encoding: str) -> str:
    """The delimiter of a table's header; with a wrong delimiter every text would end in its label."""
    with _open_unpacked(path, path.name) as file:
        header = codecs.getincrementaldecoder(encoding)("replace").decode(file.read(CHARACTERS))
    outside = "".join((header.splitlines() or [""])[0].split('"')[::2])  # a quoted name may hold any delimiter
    return max(_DELIMITERS, key=outside.count)


def _lines(path: Path, encoding: str) -> list[str]:
    """Read the lines of a text file that are not blank."""
    with _open_unpacked(path, path.name) as file:
        content = file.read(_TEXT_BYTES + 1)
    if len(content) > _TEXT_BYTES:
        raise ValueError(f"more than {_TEXT_BYTES} bytes of text: give parquet, or a part of it")
    text = content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    return [line for line in text.splitlines() if line.strip()]
