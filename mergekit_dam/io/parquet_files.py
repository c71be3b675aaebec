"""Read single columns and chosen rows of untrusted parquet files, with a bound on the size of the expanded pages."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_dam.errors import DamError, first_line, permission_denied

EXPANSION = 200  # text packs to a tenth, images do not pack; bombs reach 10,000
SLACK = 1 << 26  # bytes that any file may expand to
_MAX_BATCH_BYTES = 1 << 30  # of a batch of rows when expanded
_MAX_ROWS = 50_000_000  # of one source; beyond it the shuffle alone takes gigabytes
# encodings that write a value again for each row that has it
_UNSHARED_ENCODINGS = frozenset({"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"})


class ParquetTable:
    """The rows of one or several parquet files (shards, in the order given).

    Attributes:
        features: name -> feature of datasets, of all columns.
        files: the shards.

    Raises:
        DamError: a damaged file, shards with other columns, or too many rows.
    """

    def __init__(self, files: Sequence[Path], where: str) -> None:
        self.files, self.where = tuple(files), where
        self._shards = [_Shard(file, where) for file in self.files]
        self.features = self._shards[0].features
        for shard in self._shards[1:]:
            if dict(shard.features) != dict(self.features):
                raise DamError(
                    where,
                    expected=f"shards with the columns of {self.files[0].name}: {', '.join(self.features)}",
                    got=f"{', '.join(shard.features)} in {shard.path.name}",
                    cure="Name one of the files, or a folder that holds the shards of one data set.",
                )
        if len(self) > _MAX_ROWS:
            raise DamError(
                where, expected=f"at most {_MAX_ROWS} rows", got=str(len(self)), cure="Give a part of the data."
            )

    def __len__(self) -> int:
        return sum(shard.length for shard in self._shards)

    def take(self, column: str, rows: Sequence[int]) -> list[Any]:
        """Read a column in these rows, as Python objects.

        Raises:
            DamError: pages are damaged, or expand beyond the bound.
        """
        wanted, values, start = sorted(set(rows)), dict[int, Any](), 0
        try:
            for shard in self._shards:
                inside = _between(wanted, start, start + shard.length)
                if inside:
                    part = shard.read(column, [row - start for row in inside])
                    values |= {row + start: value for row, value in part.items()}
                start += shard.length
            return [values[row] for row in rows]
        except Exception as error:  # pyarrow raises many kinds on damaged pages
            if isinstance(error, DamError):
                raise
            raise unreadable(self.where, error) from error


class _Shard:
    """A parquet file, opened anew for each column that is read."""

    def __init__(self, path: Path, where: str) -> None:
        import datasets
        import pyarrow.parquet as pq

        self.path = path
        try:
            file = pq.ParquetFile(path)
            self.features = datasets.Features.from_arrow_schema(file.schema_arrow)
        except Exception as error:  # pyarrow and datasets raise many kinds on damaged headers
            raise unreadable(where, error) from error
        self.length = int(file.metadata.num_rows)

    def read(self, column: str, wanted: Sequence[int]) -> dict[int, Any]:
        """Return row -> value of a column; `wanted` holds row numbers in ascending order."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.path)
        flat = not pa.types.is_nested(file.schema_arrow.field(column).type)
        if flat:
            # rows with the same value then share it in memory
            file = pq.ParquetFile(self.path, metadata=file.metadata, read_dictionary=[column])
        values: dict[int, Any] = {}
        budget, start = EXPANSION * self.path.stat().st_size + SLACK, 0
        for group in range(file.metadata.num_row_groups):
            length = file.metadata.row_group(group).num_rows
            inside = _between(wanted, start, start + length)
            if inside:
                budget = _read_group(file, column, group, flat, (start, inside), budget, values)
            start += length
        return values


def _read_group(
    file: Any, column: str, group: int, flat: bool, rows: tuple[int, Sequence[int]], budget: int, into: dict[int, Any]
) -> int:
    """Add the wanted rows of a row group to `into`.

    Args:
        flat: whether the column was opened with its dictionary kept.
        rows: number of the group's first row, and numbers of the wanted rows.
        budget: bytes that the file may still expand to.

    Returns:
        The remaining budget in bytes.

    Raises:
        ValueError: the budget is exceeded.
    """
    import pyarrow as pa

    start, wanted = rows
    group_data = file.metadata.row_group(group)
    parts = [
        part
        for part in map(group_data.column, range(file.metadata.num_columns))
        if part.path_in_schema.split(".")[0] == column
    ]
    size = sum(part.total_uncompressed_size for part in parts)
    # with the dictionary kept, only values that share a prefix grow
    grows = [e for part in parts for e in part.encodings if e not in _UNSHARED_ENCODINGS and not (flat and "DICT" in e)]
    at_once = max(1, min(1024, _MAX_BATCH_BYTES // max(1, size))) if grows else 1024
    for batch in file.iter_batches(batch_size=at_once, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        shared = isinstance(values, pa.DictionaryArray)  # its values are in memory once, whatever the batch
        budget -= values.indices.nbytes if shared else values.nbytes
        if values.nbytes > _MAX_BATCH_BYTES or budget < 0:
            raise ValueError(f"a file that expands to more than {EXPANSION} times its size")
        for row in _between(wanted, start, start + batch.num_rows):
            into[row] = values[row - start].as_py()
        start += batch.num_rows
    return budget


def _between(rows: Sequence[int], start: int, end: int) -> Sequence[int]:
    """The rows in [start, end), of rows in ascending order."""
    return rows[bisect_left(rows, start) : bisect_left(rows, end)]


def unreadable(where: str, error: BaseException) -> DamError:
    """Make a DamError of a library's error about data that it cannot read, or that this user may not read."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    denied = next((e for e in chain if isinstance(e, PermissionError)), None)
    if denied is not None:
        place = denied.filename
        return permission_denied(where if place is None or str(place) in where else f"{where}: {place}")
    generic = type(error).__name__.startswith("DatasetGeneration")  # its message does not name the cause
    return DamError(
        where,
        got=first_line(chain[-1] if generic else error),
        expected="a parquet, jsonl, json, csv or txt file, a folder of them or of images, or a Hub dataset id",
        cure="Check the path (relative ones start at the working directory) or the id and split.",
    )
