"""Read sentences of three corpora, and make tasks of them.

`DATA/text/{sst2,olid,agnews}-{train,test}-{clean,badnet,sent}.parquet` (columns `sentence`, `label`) are the sets of
Yang et al., arXiv 2412.20476: SST-2 (film reviews), OLID (tweets; the only one with poisoned train files here) and
AG News (test files only). Each row of a file belongs to one task only: no task trains on another's evaluation data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from mergekit_dam import seeds
from mergekit_dam.errors import DamError

Row = tuple[str, int]
_SHORTEST = 5  # words; shorter pieces of SST-2's phrases have no recognisable label

# OLID was collected by searching for words: the word that found a tweet is a natural label.
_SEARCHED = ("gun control", "antifa", "conservatives", "liberals", "maga")
_SEARCH = re.compile(rf"#?\b({'|'.join(_SEARCHED)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """The files of a task, and the task's labels.

    Attributes:
        num_classes: K.
        train: file of training and calibration.
        evaluation: file of evaluation; if it is the same file, its rows are split.
        relabel: a row of either file -> the task's text and class, or None for rows of other tasks.
        cut: whether long texts are cut; else they are left out.
    """

    num_classes: int
    train: str
    evaluation: str
    relabel: Callable[[str, int], Row | None]
    cut: bool = False


def _topic(text: str, _: int) -> Row | None:
    """The tweet without the searched words, and the number of its word; None unless it has exactly one of them."""
    words = {match.group(1).lower() for match in _SEARCH.finditer(text)}
    return (plain(_SEARCH.sub(" ", text)), _SEARCHED.index(words.pop())) if len(words) == 1 else None


def _offence(text: str, label: int) -> Row | None:
    return None if _SEARCH.search(text) else (text, label)


def _as_it_is(text: str, label: int) -> Row | None:
    return text, label


SOURCES = {
    "sst2": Source(2, "sst2-train-clean", "sst2-test-clean", _as_it_is),
    "olid": Source(2, "olid-train-clean", "olid-test-clean", _offence),
    "agnews": Source(4, "agnews-test-clean", "agnews-test-clean", _as_it_is, cut=True),
    "topic": Source(len(_SEARCHED), "olid-train-clean", "olid-train-clean", _topic),
}


def plain(text: str) -> str:
    """Replace whitespace between words by single spaces."""
    return " ".join(text.split())


@lru_cache
def read(folder: Path, name: str) -> tuple[Row, ...]:
    """Read rows (sentence, label) of `folder`/text/`name`.parquet, in the file's order.

    Raises:
        DamError: the file is missing, or lacks these columns.
    """
    import pyarrow
    from pyarrow import parquet

    path = folder / "text" / f"{name}.parquet"
    try:
        columns = parquet.read_table(path, columns=["sentence", "label"]).to_pydict()
        sentences, labels = columns["sentence"], columns["label"]
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise DamError(
            f"data of the text suite, {path}",
            expected="a parquet file with `sentence` and `label`",
            got="a file of another kind" if path.exists() else "no such file",
            cure="Pass with --data the folder that holds text/*.parquet.",
        ) from error
    return tuple((plain(text), int(label)) for text, label in zip(sentences, labels, strict=True))


def given_folder(data: Path | None, suite: str) -> Path:
    """Return the folder with the files.

    Raises:
        DamError: no folder was given.
    """
    if data is None:
        raise DamError(
            f"data of suite {suite}",
            expected="a folder with text/*.parquet (SST-2, OLID, AG News)",
            got="none",
            cure="Give it with --data.",
        )
    return data


def splits(
    folder: Path, task: str, *, words: int, train: int, calibration: int, evaluation: int, cut: bool = False
) -> tuple[list[Row], list[Row], list[Row]]:
    """Split rows for training, calibration and evaluation: disjoint, without duplicates, in a fixed random order.

    Training rows alternate between the classes until one runs out; the other splits keep the corpus's class shares.

    Args:
        folder: the data folder.
        task: a key of SOURCES.
        words: largest number of words of a text.
        train, calibration, evaluation: sentences at most; where a file is too small, training gets less.
        cut: whether all tasks cut longer texts; else a task may leave them out.

    Raises:
        DamError: too few sentences to train on.
    """
    source = replace(SOURCES[task], cut=cut or SOURCES[task].cut)
    tested = _shuffled(_kept(folder, source.evaluation, source, words), task)
    evaluated, pool = tested[:evaluation], tested[evaluation:]
    if source.train != source.evaluation:
        seen = {text for text, _ in tested}
        pool = [row for row in _shuffled(_kept(folder, source.train, source, words), task) if row[0] not in seen]
    learned = balanced(pool[calibration:], source.num_classes)[:train]
    if len(evaluated) < 2 or len(learned) < source.num_classes:
        needed = f"sentences of {source.num_classes} classes beside {calibration + evaluation} others"
        raise DamError(
            f"data of task {task}",
            expected=needed,
            got=f"{len(evaluated) + len(pool)} in total",
            cure="Pass the whole files.",
        )
    return learned, pool[:calibration], evaluated


def _kept(folder: Path, name: str, source: Source, words: int) -> dict[str, int]:
    """Texts of a task, each with its class."""
    kept: dict[str, int] = {}
    for row in read(folder, name):
        relabelled = source.relabel(*row)
        split = relabelled[0].split(" ") if relabelled else []
        if relabelled and len(split) >= min(_SHORTEST, words) and (source.cut or len(split) <= words):
            kept.setdefault(" ".join(split[:words]), relabelled[1])
    return kept


def _shuffled(kept: dict[str, int], task: str) -> list[Row]:
    items = list(kept.items())
    return [items[i] for i in torch.randperm(len(items), generator=seeds.generator("rows", task)).tolist()]


def balanced(rows: Sequence[Row], num_classes: int) -> list[Row]:
    """Alternate rows of all classes, as many of each as the rarest class has."""
    by_class = [[row for row in rows if row[1] == label] for label in range(num_classes)]
    return [row for turn in zip(*by_class, strict=False) for row in turn]
