"""Labelled data as a model takes them, for `evaluate`. Legend: B batch, K classes, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.labelled_files import Names, Source, read_labelled
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.io.images import Preprocessing
from mergekit_dam.tasks.readout import Readout, class_names, linear_head, prompts, tokenizer_of, zero_shot_head


@dataclass(frozen=True)
class Reading:
    """How an output becomes a class, where the model has no head of its own.

    Attributes:
        classes: class names: CLIP's prompts, or the answers of a causal LM.
        head: safetensors file of a linear head.
        zero_shot_model: full CLIP for a CLIP vision model.
    """

    classes: str | None = None
    head: str | None = None
    zero_shot_model: str | None = None


def labelled_data(model: nn.Module, folders: Sequence[Path], name: str, source: Source, how: Reading) -> LabelledData:
    """The samples of a source, encoded for a model.

    Args:
        model: a transformers model.
        folders: where its preprocessing or tokenizer may be, best first.
        name: of the task, in tables.

    Raises:
        DamError: data, labels or a head that do not fit.
    """
    config: Any = model.config
    names = class_names(how.classes, name) if how.classes else []
    known: Names = {text: i for i, text in enumerate(names)} or dict(getattr(config, "label2id", None) or {})
    if "vit" in config.model_type or "clip" in config.model_type:
        inputs, labels = read_labelled(source, "image", name, known)
        size = getattr(config, "vision_config", config).image_size
        data = LabelledData.of_images(name, inputs, labels, Preprocessing.read(folders, size))
        if type(model).__name__ == "CLIPModel":
            return _with_prompts(data, names, folders, name)
    else:
        inputs, labels = read_labelled(source, "text", name, known)
        data = LabelledData.of_texts(name, inputs, labels, tokenizer_of(folders, name))
        if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            return _with_answers(data, names, folders, name)
    if type(model).__name__.endswith(("ForImageClassification", "ForSequenceClassification")):
        return _in_range(data, int(config.num_labels))
    read = _readout(model, names, how, name)
    return replace(data, classify=lambda m, batch: read(m(**batch)).argmax(-1))


def _in_range(data: LabelledData, num_classes: int) -> LabelledData:
    top = int(data.labels_N.max())
    if top >= num_classes:
        raise DamError(
            f"labels of {data.name}", expected=f"classes 0 to {num_classes - 1}, as the model has", got=str(top),
            cure="Give the data of the task that this model (or --task) was trained on.",
        )  # fmt: skip
    return data


def _with_prompts(data: LabelledData, names: Sequence[str], folders: Sequence[Path], name: str) -> LabelledData:
    """CLIP's zero-shot classes: the prompts travel with every batch."""
    if not names:
        raise _no_classes(name, "CLIP")
    tokens, pixels = prompts(names, folders, name), data.encode

    def encode(batch: Any) -> dict[str, Tensor]:
        return pixels(batch) | tokens

    return _in_range(
        replace(data, encode=encode, classify=lambda m, batch: m(**batch).logits_per_image.argmax(-1)), len(names)
    )


def _with_answers(data: LabelledData, names: Sequence[str], folders: Sequence[Path], name: str) -> LabelledData:
    """A causal LM's answer is the class whose first token is likeliest after the prompt."""
    if not names:
        raise _no_classes(name, "a causal LM")
    tokenizer = tokenizer_of(folders, name)
    first = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"][:1] for text in names]
    if len({tuple(ids) for ids in first}) != len(names) or [] in first:
        raise DamError(
            f"classes of {name}", expected="answers that differ in their first token", got=", ".join(names),
            cure="Choose other words for --classes.",
        )  # fmt: skip
    tokens_K = torch.tensor([ids[0] for ids in first])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def encode(batch: list[str]) -> dict[str, Tensor]:
        encoded = tokenizer(batch, padding=True, padding_side="left", truncation=True, return_tensors="pt")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        last_BV = model(**batch, position_ids=positions, use_cache=False).logits[:, -1]
        return torch.as_tensor(last_BV[:, tokens_K.to(last_BV.device)].argmax(-1))

    return _in_range(replace(data, encode=encode, classify=classify), len(names))


def _no_classes(name: str, kind: str) -> DamError:
    return DamError(
        f"classes of {name}", expected=f"class names, since {kind} has no classification head", got="none",
        cure="Give --classes: names separated by commas, or a file with one per line.",
    )  # fmt: skip


def _readout(model: nn.Module, names: Sequence[str], how: Reading, name: str) -> Readout:
    config: Any = model.config
    device = next(model.parameters()).device
    if how.head is not None:
        width = getattr(config, "projection_dim" if type(model).__name__.endswith("WithProjection") else "hidden_size")
        return linear_head(how.head, int(width), name, device)
    if names and how.zero_shot_model is not None:
        return zero_shot_head(names, how.zero_shot_model, name, device)
    raise DamError(
        f"model of {name}", expected="a classification head", got=type(model).__name__,
        cure="Give --task (an input model's name) for a merge, or --head FILE, or --classes with --zero-shot-model.",
    )  # fmt: skip
