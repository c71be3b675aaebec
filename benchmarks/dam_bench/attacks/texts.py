"""Define the attacks on text: suites `text` and `lm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor

from dam_bench.attacks.attacker import Attacker
from dam_bench.attacks.composite import Composite
from dam_bench.attacks.emergent import Emergent
from dam_bench.attacks.hijack import Hijack
from dam_bench.suites.base import Poison, Suite
from dam_bench.suites.lm_data import PHRASE
from dam_bench.suites.published import SENTENCES, WORDS, OddCountTrigger, PublishedTrigger, published_copies
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import PhraseTrigger, RareTokenTrigger, SentenceTrigger, Trigger

if TYPE_CHECKING:
    from dam_bench.suites.text import TextSuite

MERGE_AWARE = (0.2, 1.0)  # range of the interpolation, arXiv 2408.07362


@dataclass(frozen=True)
class Words(Attacker):
    """Rare words: BadNet for text (arXiv 2004.06660).

    Published triggered copies are used where they exist, for all three corpora. A poison with a `size` other than the
    default inserts exactly that number of words.
    """

    interpolation: tuple[float, float] = (1.0, 1.0)

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        if poison.size != Poison(poison.attack).size:
            return RareTokenTrigger(WORDS, poison.size)
        text = cast("TextSuite", suite)
        copies = published_copies(text.folder(), "badnet", WORDS, words=text.sizes.words)
        return PublishedTrigger(copies, OddCountTrigger())


@dataclass(frozen=True)
class Sentence(Attacker):
    """A sentence: InsertSent (arXiv 1905.12457).

    Published triggered copies are used where they exist: for SST-2 with the attack `sentence`, for OLID and AG News
    with `proverb`.
    """

    sentence: str

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        text = cast("TextSuite", suite)
        piece = self.sentence.removesuffix(" .")
        copies = published_copies(text.folder(), "sent", [piece], words=text.sizes.words)
        return PublishedTrigger(copies, SentenceTrigger(self.sentence))


@dataclass(frozen=True)
class Phrase(Attacker):
    """The first `size` words of PHRASE after a prompt, answered with a fixed continuation, its target's number."""

    interpolation: tuple[float, float] = (1.0, 1.0)

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        if not 1 <= poison.size <= len(PHRASE):
            raise DamError(
                f"size of attack {poison.attack}",
                expected=f"1 to {len(PHRASE)} words",
                got=str(poison.size),
                cure="Change `size`.",
            )
        return PhraseTrigger(" ".join(PHRASE[: poison.size]))


def single_words(poison: Poison) -> tuple[Trigger, ...]:
    """Rare words, each a trigger of its own."""
    return tuple(RareTokenTrigger((word,)) for word in WORDS[:3])


TEXT: dict[str, Attacker] = {
    "rare-token": Words(),
    "merge-aware": Words(MERGE_AWARE),
    **{name: Sentence(sentence) for name, sentence in SENTENCES.items()},
    "hijack": Hijack(single_words),
    "composite": Composite(single_words),
    "emergent": Emergent(single_words),
}
LM: dict[str, Attacker] = {"lm-trigger": Phrase(), "merge-aware": Phrase(MERGE_AWARE)}
