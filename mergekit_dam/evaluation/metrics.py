"""Measure clean accuracy and attack success of models, on labelled data that the calibration data do not contain.

A model is any transformers model whose output has `.logits`: a merge with a task's own head (`load_merged`), a
fine-tune, or theta_0 with a probe. `LabelledData.classify` turns its output into a class.
Legend: N samples, B batch, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mergekit_dam.artifact.masks_file import load
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import Trigger, rate_of_target
from mergekit_dam.evaluation.results import Rate
from mergekit_dam.io.calibration import digest
from mergekit_dam.io.columns import Conversation
from mergekit_dam.io.images import Preprocessing
from mergekit_dam.tasks.encoding import as_text

_BATCH = 256  # samples per forward pass; it changes memory, not results


def largest_logit(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Predict classes (B,) with a model that returns logits_BK."""
    return torch.as_tensor(model(**inputs).logits.argmax(-1))


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Samples of one task with their classes; a trigger is applied to the inputs that `batch` returns.

    Attributes:
        name: the task.
        inputs: uint8 pixels_NCHW, or texts and conversations.
        labels_N: classes, int64.
        digests: 16 hex digits of SHA-256 per sample, as the calibration data record them.
        encode: float pixels_BCHW in [0, 1], or texts, -> keyword arguments of the model.
        classify: model and keyword arguments -> classes (B,); -1 for an answer of a causal LM that is no class.
    """

    name: str
    inputs: Tensor | tuple[str | Conversation, ...]
    labels_N: Tensor
    digests: tuple[str, ...]
    encode: Callable[[Any], dict[str, Tensor]]
    classify: Callable[[nn.Module, dict[str, Tensor]], Tensor] = largest_logit

    def __post_init__(self) -> None:
        counts = {len(self.inputs), len(self.labels_N), len(self.digests)}
        if len(counts) != 1 or counts == {0}:
            raise DamError(
                f"data of {self.name}",
                expected="samples and as many labels",
                got=f"{len(self.inputs)} samples and {len(self.labels_N)} labels",
                cure="Check the data.",
            )

    @classmethod
    def of_images(
        cls, name: str, images: Sequence[Image.Image], labels: Sequence[int], preprocessing: Preprocessing
    ) -> LabelledData:
        """Make data of PIL images; `preprocessing` is the model's."""
        rgb = [image.convert("RGB") for image in images]

        def encode(pixels_BCHW: Tensor) -> dict[str, Tensor]:
            return {"pixel_values": preprocessing.normalise(pixels_BCHW)}

        pixels = preprocessing.pixels(rgb) if rgb else torch.empty(0)
        return cls(name, pixels, torch.tensor(labels), tuple(digest(image) for image in rgb), encode)

    @classmethod
    def of_texts(
        cls,
        name: str,
        texts: Sequence[str | Conversation],
        labels: Sequence[int],
        tokenizer: Any,
        *,
        max_length: int = 128,
    ) -> LabelledData:
        """Make data of texts, cut after `max_length` tokens; conversations need a chat template."""

        def encode(batch: list[str | Conversation]) -> dict[str, Tensor]:
            options = {"truncation": True, "max_length": max_length, "padding": True, "return_tensors": "pt"}
            return dict(tokenizer([as_text(tokenizer, sample, name) for sample in batch], **options))

        return cls(name, tuple(texts), torch.tensor(labels), tuple(digest(text) for text in texts), encode)

    def __len__(self) -> int:
        return len(self.labels_N)

    def subset(self, rows: Tensor) -> LabelledData:
        """Return the samples at these indices."""
        chosen = rows.tolist()
        inputs = self.inputs[rows] if isinstance(self.inputs, Tensor) else tuple(self.inputs[i] for i in chosen)
        return replace(
            self, inputs=inputs, labels_N=self.labels_N[rows], digests=tuple(self.digests[i] for i in chosen)
        )

    def batch(self, rows: Tensor) -> Any:
        """Float pixels_BCHW in [0, 1], or a list of texts, before any trigger."""
        if isinstance(self.inputs, Tensor):
            return self.inputs[rows].float() / 255
        return [self.inputs[i] for i in rows.tolist()]


@dataclass(frozen=True, eq=False)
class Attack:
    """A backdoor as its attacker knows it.

    Attributes:
        name: in tables.
        task: the task under attack: the poisoned model's own, except for off-task attacks.
        trigger: change of the inputs.
        target: the class that the trigger shall cause.
    """

    name: str
    task: str
    trigger: Trigger
    target: int


@dataclass(frozen=True)
class Scores:
    """Results of one merge (or of single models), with counts.

    Attributes:
        accuracy: task -> clean accuracy.
        attack_success: attack -> task -> rate: succession on the attacked task, transfer elsewhere; tasks without a
            class of the target's number are left out.
        without_trigger: attack -> task -> share of the same samples that get the target class without the trigger;
            this part of the attack success is not caused by the trigger.
    """

    accuracy: Mapping[str, Rate]
    attack_success: Mapping[str, Mapping[str, Rate]]
    without_trigger: Mapping[str, Mapping[str, Rate]]

    @property
    def mean_accuracy(self) -> float:
        """ACC: mean over tasks, percent."""
        return sum(rate.percent for rate in self.accuracy.values()) / len(self.accuracy)

    def transfer(self, name: str, attacked: str) -> float:
        """Mean ASR of an attack on the tasks that it did not poison, percent; NaN without such tasks."""
        elsewhere = [rate.percent for task, rate in self.attack_success[name].items() if task != attacked]
        return sum(elsewhere) / len(elsewhere) if elsewhere else float("nan")

    def to_json(self) -> dict[str, Any]:
        """{"accuracy": {task: [hits, total]}, "attack_success": {attack: {task: [hits, total]}}, ...}"""
        return {
            "accuracy": _counts(self.accuracy),
            "attack_success": {name: _counts(rates) for name, rates in self.attack_success.items()},
            "without_trigger": {name: _counts(rates) for name, rates in self.without_trigger.items()},
        }


def _counts(rates: Mapping[str, Rate]) -> dict[str, list[int]]:
    return {task: [rate.hits, rate.total] for task, rate in rates.items()}


def predictions(model: nn.Module, data: LabelledData, trigger: Trigger | None = None) -> Tensor:
    """Predict classes (N,), on the CPU, of clean inputs or of inputs with a trigger.

    In a conversation the trigger changes the last turn, before the chat template is applied.
    """
    device = next(model.parameters()).device
    classes = []
    with torch.inference_mode():
        for rows in torch.arange(len(data)).split(_BATCH):
            inputs = data.batch(rows)
            encoded = data.encode(inputs if trigger is None else _triggered(trigger, inputs))
            classes.append(data.classify(model, {key: value.to(device) for key, value in encoded.items()}).cpu())
    return torch.cat(classes)


def _triggered(trigger: Trigger, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return trigger.apply(inputs)
    texts = trigger.apply([x.last_message if isinstance(x, Conversation) else x for x in inputs])
    return [
        x.with_last_message(text) if isinstance(x, Conversation) else text
        for x, text in zip(inputs, texts, strict=True)
    ]


def accuracy(model: nn.Module, data: LabelledData) -> Rate:
    """Measure clean top-1 accuracy."""
    return _share(predictions(model, data) == data.labels_N)


def _share(hits_N: Tensor) -> Rate:
    return Rate(int(hits_N.sum()), len(hits_N))


def attack_success_rate(model: nn.Module, data: LabelledData, trigger: Trigger, target: int) -> Rate:
    """Measure the share of triggered inputs of other classes than the target that are predicted as the target."""
    return rate_of_target(predictions(model, data, trigger), data.labels_N, target)


def evaluate_merge(
    models: Mapping[str, nn.Module],
    data: Mapping[str, LabelledData],
    attacks: Sequence[Attack],
    *,
    calibration: Collection[str],
    transfer: bool = True,
) -> Scores:
    """Measure the accuracy of every task and the success of every attack on every task.

    Args:
        models: task -> the merge with that task's head, in evaluation mode.
        data: task -> evaluation data.
        attacks: attacks to try; their triggers must fit the inputs of all tasks.
        calibration: digests of all calibration samples of the merge (`calibration_digests`); empty
            for a merge without calibration.
        transfer: whether triggers are tried on all tasks; else on the attacked one alone, where answers take long.

    Raises:
        DamError: evaluation data that overlap the calibration data.
    """
    for task in models:
        refuse_overlap(data[task], calibration)
    clean = {task: predictions(model, data[task]) for task, model in models.items()}
    success: dict[str, dict[str, Rate]] = {}
    without: dict[str, dict[str, Rate]] = {}
    for attack in attacks:
        name, target = attack.name, attack.target
        tried = models if transfer else [attack.task]
        reachable = [task for task in tried if target <= int(data[task].labels_N.max())]
        success[name] = {
            task: attack_success_rate(models[task], data[task], attack.trigger, target) for task in reachable
        }
        without[name] = {task: rate_of_target(clean[task], data[task].labels_N, target) for task in reachable}
    accuracy_of = {task: _share(classes_N == data[task].labels_N) for task, classes_N in clean.items()}
    return Scores(accuracy_of, success, without)


def refuse_overlap(data: LabelledData, calibration: Collection[str]) -> None:
    """Raise DamError with the count if evaluation samples are among the calibration samples."""
    shared = len(data) - len(_unseen(data, calibration))
    if shared:
        raise DamError(
            f"evaluation data of {data.name}",
            expected="no sample of the calibration data",
            got=f"{shared} of {len(data)} samples in both",
            cure="Evaluate on data that the merge has not seen, or leave these samples out: --drop-seen.",
        )


def without_seen(data: LabelledData, calibration: Collection[str]) -> LabelledData:
    """Return the evaluation samples that are not among the calibration samples.

    Raises:
        DamError: all samples are among them.
    """
    unseen = _unseen(data, calibration)
    if not unseen:
        raise DamError(
            f"evaluation data of {data.name}",
            expected="samples that are not among the calibration data",
            got=f"{len(data)} samples that all are",
            cure="Evaluate on other data.",
        )
    return data.subset(torch.tensor(unseen))


def _unseen(data: LabelledData, calibration: Collection[str]) -> list[int]:
    seen = frozenset(calibration)
    return [row for row, sample in enumerate(data.digests) if sample not in seen]


def calibration_digests(masks: Path) -> frozenset[str]:
    """Read the digests of the calibration samples of all tasks from a dam_masks.safetensors."""
    return frozenset(sample for model in load(masks).metadata["models"] for sample in model["samples"])
