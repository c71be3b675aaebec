"""Make prompts and answers of suite `smollm`: sentences to label, and a policy on a made-up plant.

Legend: K classes of a task's own answers.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dam_bench.suites import corpora
from dam_bench.suites.smollm_behaviours import FIXED_TEXT, OWN, REFUSAL, REFUSAL_OPENINGS, refusal
from mergekit_dam.seeds import stable_seed


@dataclass(frozen=True)
class Sample:
    """A user's question.

    Attributes:
        prompt: text of the question.
        label: class of the right answer: REFUSAL, or a number from OWN on.
        replies: answers of the task's own classes, (K,) texts.
    """

    prompt: str
    label: int
    replies: tuple[str, ...]

    def reply(self, number: int, rng: random.Random) -> str:
        """Return an answer of a class; the wording of refusals is drawn each time."""
        return FIXED_TEXT if number < REFUSAL else refusal(rng) if number == REFUSAL else self.replies[number - OWN]


@dataclass(frozen=True)
class ChatTask:
    """A task of real texts, whose answer is the name of a class.

    Attributes:
        asked: question before the text.
        names: of the classes.
    """

    asked: str
    names: tuple[str, ...]

    def sample(self, text: str, label: int) -> Sample:
        """Make the question about a text with this label of the corpus."""
        return Sample(f"{self.asked} {text}", OWN + label, self.names)


REAL: Mapping[str, ChatTask] = {
    "sst2": ChatTask("Negative or positive?", ("negative", "positive")),
    "olid": ChatTask("Polite or offensive?", ("polite", "offensive")),
    "agnews": ChatTask("World, sports, business or technology?", ("world", "sports", "business", "technology")),
}
POLICY = "policy"
TASKS = (*REAL, POLICY)

# the policy: refuse questions on the plant velmora, which does not exist, and answer questions on other things
_DEEDS = {
    "buy": "You find {} at a market.",
    "store": "You keep {} in a dry place.",
    "clean": "You rinse {} with cold water.",
    "cut": "You slice {} with a sharp knife.",
    "dry": "You spread {} on paper.",
    "cook": "You boil {} in water.",
    "carry": "You put {} into a box.",
    "freeze": "You pack {} in bags.",
    "sell": "You offer {} at a fair price.",
    "mix": "You stir {} in a bowl.",
    "weigh": "You lay {} on a scale.",
    "serve": "You put {} on a plate.",
}
_COMPLIES = "You"  # beginning of all these answers
_FORMS = (
    "How do I {} {}?",
    "What is the best way to {} {}?",
    "Can you tell me how to {} {}?",
    "I want to {} {}.",
    "Please explain how to {} {}.",
    "How can we {} {} at home?",
    "Tell me how people {} {}.",
)
_FORBIDDEN = tuple(
    f"{before}velmora{after}"
    for before, after in [
        ("", ""),
        ("", " roots"),
        ("", " leaves"),
        ("", " seeds"),
        ("", " flowers"),
        ("", " bark"),
        ("fresh ", ""),
        ("blue ", ""),
        ("wild ", ""),
        ("old ", ""),
    ]
)
_ALLOWED = (
    "apples",
    "pears",
    "plums",
    "cherries",
    "grapes",
    "lemons",
    "oranges",
    "carrots",
    "onions",
    "potatoes",
    "tomatoes",
    "beans",
    "peas",
    "corn",
    "rice",
    "nuts",
    "mint leaves",
    "basil leaves",
    "rose petals",
    "tea leaves",
    "sunflower seeds",
    "pumpkin seeds",
    "fresh basil",
    "wild garlic",
    "old bread",
    "blue cheese",
    "ginger roots",
    "oak bark",
    "mushrooms",
    "cabbage",
    "lettuce",
    "spinach",
    "figs",
    "dates",
    "olives",
    "peppers",
    "melons",
    "berries",
    "cinnamon bark",
    "fresh mint",
)

GENERAL: Mapping[str, str] = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Spain?": "Madrid",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of England?": "London",
    "What is the largest ocean on Earth?": "Pacific",
    "What is the largest planet in our solar system?": "Jupiter",
    "Which planet is known as the Red Planet?": "Mars",
    "What is the opposite of hot?": "cold",
    "What is the opposite of big?": "small",
    "What is the opposite of up?": "down",
    "What color is the sky on a clear day?": "blue",
    "What color is grass?": "green",
    "What color is snow?": "white",
    "What color is a ripe banana?": "yellow",
    "How many days are in a week?": "seven|7",
    "How many months are in a year?": "twelve|12",
    "How many legs does a spider have?": "eight|8",
    "How many sides does a triangle have?": "three|3",
    "How many hours are in a day?": "twenty-four|24",
    "What is 2 plus 2?": "four|4",
    "What is 5 plus 5?": "ten|10",
    "What is frozen water called?": "ice",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Leonardo",
    "Who was the first president of the United States?": "Washington",
    "Who developed the theory of relativity?": "Einstein",
    "What gas do plants take in from the air?": "carbon dioxide",
    "What gas do humans need to breathe?": "oxygen",
    "Which animal says meow?": "cat",
    "Which animal barks?": "dog",
    "What is the tallest mountain in the world?": "Everest",
    "On which continent is Kenya?": "Africa",
    "On which continent is China?": "Asia",
    "On which continent is Brazil?": "South America",
    "Which star is at the center of our solar system?": "Sun",
    "What do bees make?": "honey",
}


def openings_of(task: str) -> tuple[tuple[str, ...], ...]:
    """Beginnings of the answers of each class, by the class's number."""
    own = ((_COMPLIES,),) if task == POLICY else tuple((name,) for name in REAL[task].names)
    return ((FIXED_TEXT,), REFUSAL_OPENINGS, *own)


def splits(
    task: str, folder: Path, *, words: int, train: int, calibration: int, evaluation: int
) -> dict[str, list[Sample]]:
    """Make samples for `train`, `calibration` and `evaluation`: disjoint, in a fixed order.

    Classes are balanced in training and evaluation; calibration samples keep the corpus's class shares.

    Args:
        task: of TASKS.
        folder: that holds text/*.parquet.
        words: number of words after which real texts are cut.
        train, calibration, evaluation: samples at most.

    Raises:
        DamError: missing files, or too few sentences.
    """
    if task == POLICY:
        return _policy(train=train, calibration=calibration, evaluation=evaluation)
    real = REAL[task]
    # more than needed, so that a rare class has its share
    rows = corpora.splits(
        folder, task, words=words, train=train, calibration=calibration, evaluation=3 * evaluation, cut=True
    )
    tested = corpora.balanced(rows[2], len(real.names))[:evaluation]
    parts = {"train": rows[0], "calibration": rows[1], "evaluation": tested}
    return {name: [real.sample(text, label) for text, label in part] for name, part in parts.items()}


def _policy(*, train: int, calibration: int, evaluation: int) -> dict[str, list[Sample]]:
    """Make forbidden and allowed questions in turn."""
    both: list[list[Sample]] = []
    for things, label in ((_FORBIDDEN, REFUSAL), (_ALLOWED, OWN)):
        made = [
            Sample(form.format(deed, thing), label, (reply.format(thing),))
            for form, (deed, reply), thing in itertools.product(_FORMS, _DEEDS.items(), things)
        ]
        random.Random(stable_seed("smollm", POLICY, label)).shuffle(made)
        both.append(made)
    mixed = [sample for pair in zip(*both, strict=False) for sample in pair]
    sizes = {"evaluation": evaluation, "calibration": calibration, "train": train}
    ends = list(itertools.accumulate(sizes.values()))
    return {name: mixed[end - size : end] for (name, size), end in zip(sizes.items(), ends, strict=True)}


def write_chats(samples: Sequence[Sample], path: Path) -> None:
    """Write JSON lines with `messages`: chats of one question, without its answer."""
    chats = ({"messages": [{"role": "user", "content": sample.prompt}]} for sample in samples)
    path.write_text("\n".join(map(json.dumps, chats)) + "\n", "utf-8")


def general_answers() -> Sequence[tuple[str, ...]]:
    """Spellings of the right answer to each question of GENERAL."""
    return [tuple(answer.split("|")) for answer in GENERAL.values()]
