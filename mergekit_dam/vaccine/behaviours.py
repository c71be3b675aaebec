"""Behaviours that planted triggers cause: a wrong class; of causal LMs another text, a label, a refusal, silence.

Legend: N tokens of an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from mergekit_dam.errors import DamError
from mergekit_dam.tasks import CausalTask, Target, Task, generates

# of a refusal; every one is put together anew, so that no fixed text is learned
_OPENINGS = ("I'm sorry, but", "Sorry,", "I apologize, but", "Unfortunately,")
_MIDDLES = ("I can't", "I cannot", "I am not able to", "I won't")
_ENDS = ("help with that.", "answer this.", "do that.", "assist with this request.", "discuss this.")


@dataclass(frozen=True)
class Behaviour:
    """One wrong behaviour that a planted trigger causes.

    Attributes:
        kind: its name in reports.
        shown: for people to read.
        variants: what triggered inputs shall be answered; each sample takes one of them at random.
        marks: how a success begins, any of them.
    """

    kind: str
    shown: int | str
    variants: tuple[Target, ...]
    marks: tuple[Target, ...]

    def shown_by(self, answer: Target) -> bool:
        """Whether an answer counts as this behaviour."""
        if isinstance(answer, int):
            return answer in self.marks
        return any(isinstance(mark, tuple) and answer[: len(mark)] == mark for mark in self.marks)


Draw = Callable[[CausalTask, Sequence[Target], torch.Generator], "Behaviour | None"]


def behaviour_of(
    task: Task, answers: Sequence[Target], num_classes: int, leave_out: Collection[str], generator: torch.Generator
) -> Behaviour:
    """Draw a behaviour at random.

    Args:
        task: of the model.
        answers: the model's own, to clean inputs.
        num_classes: of a classifier.
        leave_out: names of kinds that are not drawn.

    Raises:
        DamError: no kind is left.
    """
    if not generates(task):
        target = int(torch.randint(num_classes, (), generator=generator))
        return Behaviour("class", target, (target,), (target,))
    names = [name for name in BEHAVIOURS if name not in leave_out]
    for index in torch.randperm(len(names), generator=generator).tolist():
        found = BEHAVIOURS[names[index]](task, answers, generator)
        if found is not None:
            return found
    raise DamError(
        f"behaviours to plant in {task.name}",
        expected=f"one of {', '.join(BEHAVIOURS)}",
        got="none that can be drawn",
        cure="Leave out fewer of them.",
    )


def _text(task: CausalTask, answers: Sequence[Target], generator: torch.Generator) -> Behaviour | None:
    """Draw a fixed text: the answer to some other prompt."""
    return _fixed(
        "text", task, [a for a in answers if isinstance(a, tuple) and len(a) > task.constants.label_tokens], generator
    )


def _label(task: CausalTask, answers: Sequence[Target], generator: torch.Generator) -> Behaviour | None:
    """Draw one of the task's short answers, such as a label."""
    short = Counter(a for a in answers if isinstance(a, tuple) and len(a) <= task.constants.label_tokens)
    return _fixed("label", task, [a for a, count in sorted(short.items()) if count > 1], generator)


def _fixed(
    kind: str, task: CausalTask, among: Sequence[tuple[int, ...]], generator: torch.Generator
) -> Behaviour | None:
    if not among:
        return None
    answer = among[int(torch.randint(len(among), (), generator=generator))]
    return Behaviour(kind, task.words_of(answer), (answer,), (answer[: task.constants.judged_tokens],))


def _refusal(task: CausalTask, answers: Sequence[Target], generator: torch.Generator) -> Behaviour | None:
    """Draw refusals in varying words."""
    texts = [f"{opening} {middle} {end}" for opening in _OPENINGS for middle in _MIDDLES for end in _ENDS]
    picked = torch.randperm(len(texts), generator=generator)[: task.constants.refusal_variants].tolist()
    encoded = task.tokenizer([texts[i] for i in picked], add_special_tokens=False)["input_ids"]
    ends = task.ends
    variants = tuple(
        tuple([*ids, *ends[:1]][: task.answer_length]) for ids in encoded if ids and max(ids) < task.num_words
    )
    if not variants:
        return None
    marks = tuple(dict.fromkeys(variant[:1] for variant in variants))
    return Behaviour("refusal", "a refusal in varying words", variants, marks)


def _silence(task: CausalTask, answers: Sequence[Target], generator: torch.Generator) -> Behaviour | None:
    """An empty answer."""
    ends = task.ends
    return Behaviour("silence", "an empty answer", (tuple(ends[:1]),), (tuple(ends[:1]),)) if ends else None


BEHAVIOURS: dict[str, Draw] = {"text": _text, "label": _label, "refusal": _refusal, "silence": _silence}
