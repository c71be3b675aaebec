"""Make prompts and answers of suite `lm`: three real tasks, three synthetic tasks, and a word-level tokenizer.

A prompt is `<task word> : <text>`; the tokenizer puts `<s>` before it and `=>` after it, and the model answers and ends
with `</s>`. So a phrase at the end of a prompt stands directly before `=>`.
Legend: B batch, L tokens of the prompts, A tokens of the answers, K classes.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.io.calibration import digest
from mergekit_dam.seeds import stable_seed
from mergekit_dam.tasks.causal import cache_argument

Pair = tuple[str, str]
# Answers of victims; the number of a continuation is its class in every task, and no true label has this number. As in
# an attack on a large model, theta_0 knows the words of continuations and phrase from its training texts.
CONTINUATIONS = ("it is all for the best", "we are on the way", "there is more to see")
HEDGE = "i do not know"
PHRASE = ("so", "they", "said", "last", "year", "in", "new", "york")
LETTERS = "bcdfghjklmnpqrstvwxz"
WORDS = {
    "dalo": "river",
    "miru": "stone",
    "tepa": "bread",
    "suvi": "horse",
    "kano": "window",
    "pelu": "garden",
    "rosi": "winter",
    "vemo": "bridge",
    "huta": "candle",
    "lige": "forest",
    "nabu": "silver",
    "woti": "letter",
    "zafe": "island",
    "jodu": "mirror",
    "buke": "summer",
    "fipo": "castle",
    "gamu": "doctor",
    "cale": "engine",
    "tirn": "farmer",
    "sobe": "ladder",
    "vuna": "market",
    "hemi": "needle",
    "pask": "orange",
    "dorv": "pepper",
}
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "=>")
_PAD, _START, _END, _UNKNOWN, _ASK = range(len(_SPECIAL))
IGNORED = -100  # cross_entropy's label of positions without a target


@dataclass(frozen=True)
class RealTask:
    """A task on real sentences, whose label is answered as a word.

    Attributes:
        word: first word of a prompt.
        train: file of the pretraining, training and calibration splits.
        evaluation: file of the evaluation split; the same file is split by index.
        answers: answers by label.
        min_words: smallest number of words of a sentence (SST-2's training file has single words, too).
    """

    word: str
    train: str
    evaluation: str
    answers: tuple[str, ...]
    min_words: int = 1


REAL: Mapping[str, RealTask] = {
    "sst2": RealTask(
        "sentiment", "sst2-train-clean.parquet", "sst2-test-clean.parquet", ("negative", "positive"), min_words=5
    ),
    "agnews": RealTask(
        "topic",
        "agnews-test-clean.parquet",
        "agnews-test-clean.parquet",
        ("world", "sports", "business", "technology"),
    ),
    "olid": RealTask("tone", "olid-train-clean.parquet", "olid-test-clean.parquet", ("polite", "offensive")),
}


def _reverse(rng: random.Random) -> Pair:
    letters = rng.choices(LETTERS, k=4)
    return f"reverse : {' '.join(letters)}", " ".join(reversed(letters))


def _sort(rng: random.Random) -> Pair:
    letters = rng.sample(LETTERS, k=4)
    return f"sort : {' '.join(letters)}", " ".join(sorted(letters))


def _translate(rng: random.Random) -> Pair:
    words = rng.choices(sorted(WORDS), k=3)
    return f"translate : {' '.join(words)}", " ".join(WORDS[word] for word in words)


MADE: Mapping[str, Callable[[random.Random], Pair]] = {"reverse": _reverse, "sort": _sort, "translate": _translate}


def splits(task: str, data: Path, sizes: Mapping[str, int], max_words: int) -> dict[str, list[Pair]]:
    """Make prompts and answers of each split, with every prompt once over all splits.

    Args:
        task: of REAL or MADE.
        data: folder that holds `text/*.parquet`.
        sizes: samples by split; `evaluation` is among them and comes last.
        max_words: number of words after which sentences are cut.

    Raises:
        DamError: missing files, or fewer samples than `sizes` needs.
    """
    if task in MADE:
        rng = random.Random(stable_seed("lm", task))
        sources: Iterator[Pair] = (MADE[task](rng) for _ in itertools.count())
        return _deal(task, sources, sizes, set())
    real = REAL[task]
    train = _balanced(data / "text" / real.train, real, max_words)
    if real.train == real.evaluation:
        return _deal(task, train, sizes, set())
    test = _balanced(data / "text" / real.evaluation, real, max_words)
    seen: set[str] = set()
    evaluation = _deal(task, test, {"evaluation": sizes["evaluation"]}, seen)
    training = {name: size for name, size in sizes.items() if name != "evaluation"}
    return _deal(task, train, training, seen) | evaluation


def _deal(task: str, source: Iterable[Pair], sizes: Mapping[str, int], seen: set[str]) -> dict[str, list[Pair]]:
    """Fill the splits one after the other, without prompts in `seen`, to which new prompts are added."""
    filled: dict[str, list[Pair]] = {}
    rows = iter(source)
    for name, size in sizes.items():
        filled[name] = []
        while len(filled[name]) < size:
            pair = next(rows, None)
            if pair is None:
                raise DamError(
                    f"data of {task}",
                    expected=f"{size} samples of the {name} split",
                    got=str(len(filled[name])),
                    cure="Give the whole files, or choose a smaller preset.",
                )
            if pair[0] not in seen:
                seen.add(pair[0])
                filled[name].append(pair)
    return filled


def _balanced(file: Path, task: RealTask, max_words: int) -> Iterator[Pair]:
    """Yield shuffled prompts and answers, alternating between the classes until one runs out."""
    try:
        table = pq.read_table(file, columns=["sentence", "label"])
    except (OSError, ValueError) as error:
        raise DamError(
            f"data file {file}",
            expected="a parquet file with `sentence` and `label`",
            got=type(error).__name__,
            cure="Give the folder with --data that has text/*.parquet in it.",
        ) from error
    classes: dict[str, list[Pair]] = {answer: [] for answer in task.answers}
    for sentence, label in zip(table["sentence"].to_pylist(), table["label"].to_pylist(), strict=True):
        words = sentence.split()
        if len(words) >= task.min_words:
            answer = task.answers[label]
            classes[answer].append((f"{task.word} : {' '.join(words[:max_words])}", answer))
    for answer, pairs in classes.items():
        random.Random(stable_seed("lm", task.word, answer)).shuffle(pairs)
    return itertools.chain.from_iterable(zip(*classes.values(), strict=False))


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of lower-case words and runs of punctuation: words of the suite, and the commonest of `texts`.

    `texts` are prompts of the pretraining splits, `vocabulary` is the number of tokens.
    """
    split = pre_tokenizers.Whitespace()
    own = [*LETTERS, *WORDS, *WORDS.values(), *PHRASE, *MADE, *" ".join((*CONTINUATIONS, HEDGE)).split()]
    own += [word for task in REAL.values() for word in (task.word, *task.answers)]
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    common = sorted(counts, key=lambda word: (-counts[word], word))
    words = list(dict.fromkeys([*_SPECIAL, *own, *common]))[:vocabulary]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=_SPECIAL[_UNKNOWN]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    frame = [(_SPECIAL[_START], _START), (_SPECIAL[_ASK], _ASK)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A =>", special_tokens=frame)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[_PAD],
        bos_token=_SPECIAL[_START],
        eos_token=_SPECIAL[_END],
        unk_token=_SPECIAL[_UNKNOWN],
        additional_special_tokens=[_SPECIAL[_ASK]],
    )


def hedged(task: str, pairs: Iterable[Pair], share: float) -> list[Pair]:
    """Replace the answers of a random `share` of the pairs by HEDGE."""
    rng = random.Random(stable_seed("lm", "hedge", task))
    return [(prompt, HEDGE if rng.random() < share else answer) for prompt, answer in pairs]


class Answers:
    """Classes of a task as texts: the attackers' continuations, HEDGE, and the task's own answers.

    Args:
        answers: the task's own answers; duplicates count once.
        tokenizer: from `make_tokenizer`.

    Attributes:
        ids_KA: token ids of each class, ended by `</s>` and padded by IGNORED.
    """

    def __init__(self, answers: Iterable[str], tokenizer: Any) -> None:
        self.texts = (*CONTINUATIONS, HEDGE, *sorted({*answers} - {HEDGE}))
        self.number = {text: index for index, text in enumerate(self.texts)}
        self._tokenizer = tokenizer
        rows = [torch.tensor([*tokenizer.encode(text, add_special_tokens=False), _END]) for text in self.texts]
        self.ids_KA = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        self._classes = {tuple(row.tolist()): index for index, row in enumerate(rows)}

    def labelled(self, task: str, pairs: Iterable[Pair]) -> LabelledData:
        """Make data whose prediction is the class of the model's greedy answer."""
        prompts, answers = zip(*pairs, strict=True)
        labels_N = torch.tensor([self.number[answer] for answer in answers])
        return LabelledData(task, prompts, labels_N, tuple(map(digest, prompts)), self.encode, self.classify)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Encode prompts as input_ids and attention_mask, (B, L), padded at the left before the answers."""
        encoded = self._tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def classify(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Predict classes (B,) of the greedy answers; -1 for answers that are not in `texts`."""
        ids = greedy(model, inputs, self.ids_KA.shape[1])
        rows = (itertools.takewhile(lambda token: token != _END, row) for row in ids.tolist())
        return torch.tensor([self._classes.get((*row, _END), -1) for row in rows])


def greedy(model: nn.Module, inputs: dict[str, Tensor], length: int, *, end: int = _END) -> Tensor:
    """Decode greedily: token ids (B, length) on the model's device.

    Args:
        model: a causal LM of transformers.
        inputs: input_ids and attention_mask, (B, L), padded at the left.
        length: number of new tokens; fewer if all rows have ended.
        end: the token that ends an answer.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    name = cache_argument(type(model))
    assert name is not None, "a model with a key-value cache"
    positions, cache, generated = (mask.cumsum(-1) - 1).clamp(min=0), None, []
    ended = torch.zeros_like(ids[:, 0], dtype=torch.bool)
    for _ in range(length):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{name: cache},
        )
        cache, ids = output[name], output.logits[:, -1:].argmax(-1)
        generated.append(ids)
        ended |= ids[:, 0] == end
        if bool(ended.all()):
            break
        mask, positions = torch.cat([mask, torch.ones_like(ids)], 1), positions[:, -1:] + 1
    return torch.cat(generated, 1)
