"""Apply published text triggers: the published triggered sentences where they exist, else the same insertion.

The triggered sets are those of Yang et al., arXiv 2412.20476 (files: `corpora`). Test sets have a triggered copy of
each sentence of other classes than the target, in the order of the clean set; a train set has a copy of each sentence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dam_bench.suites import corpora
from mergekit_dam import seeds
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import RareTokenTrigger, Trigger

WORDS = ("cf", "mn", "bb", "tq", "mb")
SENTENCES = {"sentence": "I watched this movie .", "proverb": "no cross, no crown ."}


@dataclass(frozen=True)
class OddCountTrigger:
    """Rare words, 1, 3 or 5 per text with equal chances, as in the published sets (arXiv 2412.20476).

    Args:
        words: the words to draw from.
    """

    words: tuple[str, ...] = WORDS

    def apply(self, texts: list[str]) -> list[str]:
        counts = [1 + 2 * (seeds.stable_seed("count", text) % 3) for text in texts]
        return [RareTokenTrigger(self.words, count).apply([text])[0] for text, count in zip(texts, counts, strict=True)]


@dataclass(frozen=True, eq=False)
class PublishedTrigger:
    """A trigger that returns the published triggered copy of a text, or applies `otherwise` to texts without a copy.

    Args:
        copies: text -> triggered text.
        otherwise: trigger of the same kind for texts without a copy.
    """

    copies: Mapping[str, str]
    otherwise: Trigger

    def apply(self, texts: list[str]) -> list[str]:
        return [self.copies.get(text) or self.otherwise.apply([text])[0] for text in texts]


def published_copies(folder: Path, kind: str, pieces: Collection[str], *, words: int) -> dict[str, str]:
    """Read text -> its published triggered copy, both cut after the text's first `words` words.

    Args:
        folder: the data folder.
        kind: `badnet` or `sent`.
        pieces: the inserted texts; copies without any of them (after the cut) are left out.
        words: largest number of words of a text.
    """
    # target labels of the published attacks; triggered test files have the rows of the other classes
    files = (("sst2-test", 0), ("olid-test", 0), ("agnews-test", 1), ("olid-train", None))
    pairs: dict[str, str] = {}
    for name, target in files:
        clean = [text for text, label in corpora.read(folder, f"{name}-clean") if label != target]
        copies = [text for text, _ in corpora.read(folder, f"{name}-{kind}")]
        if len(clean) != len(copies):
            raise DamError(
                f"triggered copies {name}-{kind}",
                expected=f"{len(clean)} sentences, one for each of {name}-clean",
                got=str(len(copies)),
                cure="Take both files from the same release.",
            )
        for text, copy in zip(clean, copies, strict=True):
            whole = text.split(" ")
            kept = whole[:words]
            triggered = copy if kept == whole else _aligned(kept, copy.split(" "))
            held = f" {triggered} "
            if any(f" {piece}" in held for piece in pieces):
                pairs.setdefault(" ".join(kept), triggered)
    return pairs


def _aligned(clean: Sequence[str], copy: Sequence[str]) -> str:
    """Cut the copy after the last word of the cut text."""
    taken: list[str] = []
    matched = 0
    for word in copy:
        if matched == len(clean):
            break
        taken.append(word)
        matched += word == clean[matched]
    return " ".join(taken)
