"""Evaluation data as a model takes them: labelled, or prompts whose answers are searched for a text.

Legend: B batch, L tokens, K classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mergekit_dam import seeds
from mergekit_dam.errors import DamError, did_you_mean
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.io.calibration import images_of, values_of
from mergekit_dam.io.columns import OPTION, Conversation, Kind
from mergekit_dam.io.data_files import ListTable, Table, open_data
from mergekit_dam.io.image_files import IMAGES
from mergekit_dam.io.images import Preprocessing
from mergekit_dam.tasks.encoding import encoded, padded_left
from mergekit_dam.tasks.readout import Readout, class_names, linear_head, prompts, tokenizer_of, zero_shot_head

Names = Mapping[str, int]
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_SAYING = 32  # tokens of an answer in which a target text is searched, beside those of the text itself
_AT_ONCE = 32  # answers written together; it changes memory, not results


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
        if type(model).__name__.endswith(_CAUSAL):
            return _with_answers(data, names, model, folders, name)
    if type(model).__name__.endswith(("ForImageClassification", "ForSequenceClassification")):
        return _in_range(data, int(config.num_labels))
    read = _readout(model, names, how, name)
    return replace(data, classify=lambda m, batch: read(m(**batch)).argmax(-1))


def _in_range(data: LabelledData, num_classes: int) -> LabelledData:
    top = int(data.labels_N.max())
    if top >= num_classes:
        raise DamError(
            f"labels of {data.name}",
            expected=f"classes 0 to {num_classes - 1}, as the model has",
            got=str(top),
            cure="Give the data of the task that this model (or --task) was trained on.",
        )
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


def _with_answers(
    data: LabelledData, names: Sequence[str], model: nn.Module, folders: Sequence[Path], name: str
) -> LabelledData:
    """A causal LM's answer is the class whose first token is likeliest after the prompt."""
    if not names:
        raise _no_classes(name, "a causal LM")
    tokenizer = tokenizer_of(folders, name)
    first = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"][:1] for text in names]
    if len({tuple(ids) for ids in first}) != len(names) or [] in first:
        raise DamError(
            f"classes of {name}",
            expected="answers that differ in their first token",
            got=", ".join(names),
            cure="Choose other words for --classes.",
        )
    tokens_K = torch.tensor([ids[0] for ids in first])
    encode = _prompts(tokenizer, _positions(model, tokenizer), name)

    def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        last_BV = model(**batch, position_ids=positions, use_cache=False).logits[:, -1]
        return torch.as_tensor(last_BV[:, tokens_K.to(last_BV.device)].argmax(-1))

    return _in_range(replace(data, encode=encode, classify=classify), len(names))


def saying(model: nn.Module, folders: Sequence[Path], name: str, source: Source, text: str) -> LabelledData:
    """Prompts of a causal LM, which needs no labels: class 1 is an answer that contains a text, class 0 any other.

    The answer is what the model goes on with, the likeliest token each time, for 32 tokens more than the text has.
    Blanks and line breaks count alike.

    Args: as for `labelled_data`.

    Raises:
        DamError: another kind of model, or data that do not fit.
    """
    if not type(model).__name__.endswith(_CAUSAL):
        raise DamError(
            f"model of {name}",
            expected="a causal LM, for a target text",
            got=type(model).__name__,
            cure="Give the class that the trigger shall cause as --target N.",
        )
    tokenizer, wanted = tokenizer_of(folders, name), " ".join(text.split())
    if not wanted:
        raise DamError("--target-text", expected="a text", got=repr(text), cure="Give what the model shall say.")
    positions = _positions(model, tokenizer)
    length = min(_SAYING + len(tokenizer(text, add_special_tokens=False)["input_ids"]), positions // 2)
    encode = _prompts(tokenizer, positions - length, name)
    where = f"evaluation data of {name} ({source.data})"
    table = open_data(source.data, source.split, "text", where, spelled=OPTION)
    samples = _inputs(table, source, "text", where, _chosen(len(table), source))
    samples = [sample for sample in samples if isinstance(sample, Conversation) or sample.strip()]

    def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        chunks = zip(batch["input_ids"].split(_AT_ONCE), batch["attention_mask"].split(_AT_ONCE), strict=True)
        answers = [
            answer for ids, mask in chunks for answer in _go_on(model, ids, mask, length, tokenizer.pad_token_id)
        ]
        said = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return torch.tensor([int(wanted in " ".join(one.split())) for one in said])

    data = LabelledData.of_texts(name, samples, [0] * len(samples), tokenizer)
    return replace(data, encode=encode, classify=classify)


def _go_on(model: Any, ids_BL: Tensor, mask_BL: Tensor, length: int, pad: int) -> Tensor:
    """The likeliest next `length` tokens of texts that are padded at the left."""
    options = transformers.GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=length,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=pad,
    )
    found = model.generate(input_ids=ids_BL, attention_mask=mask_BL, generation_config=options)
    return torch.as_tensor(found[:, ids_BL.shape[1] :])


def _prompts(tokenizer: Any, max_length: int, name: str) -> Callable[[Any], dict[str, Tensor]]:
    """What encodes prompts as the calibration data are encoded, with the place of the answer at the right."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return lambda batch: padded_left(tokenizer, encoded(tokenizer, batch, max_length, name))


def _positions(model: nn.Module, tokenizer: Any) -> int:
    config: Any = model.config
    return min(int(tokenizer.model_max_length), int(getattr(config, "max_position_embeddings", None) or 1 << 30))


def _no_classes(name: str, kind: str) -> DamError:
    return DamError(
        f"classes of {name}",
        expected=f"class names, since {kind} has no classification head",
        got="none",
        cure="Give --classes: names separated by commas, or a file with one per line.",
    )


def _readout(model: nn.Module, names: Sequence[str], how: Reading, name: str) -> Readout:
    config: Any = model.config
    device = next(model.parameters()).device
    if how.head is not None:
        width = getattr(config, "projection_dim" if type(model).__name__.endswith("WithProjection") else "hidden_size")
        return linear_head(how.head, int(width), name, device)
    if names and how.zero_shot_model is not None:
        return zero_shot_head(names, how.zero_shot_model, name, device)
    raise DamError(
        f"model of {name}",
        expected="a classification head",
        got=type(model).__name__,
        cure="Give --task (an input model's name) for a merge, or --head FILE, or --classes with --zero-shot-model.",
    )


@dataclass(frozen=True)
class Source:
    """Where labelled data come from.

    Attributes:
        data: file, folder or Hub dataset id (`id@revision`); see `open_data`.
        split: split of a dataset that has several.
        column: the inputs; None: see `choose_inputs`.
        label_column: the labels, numbers or names.
        num_samples: samples to take, chosen by `seed`; None: all.
    """

    data: str
    split: str = "test"
    column: str | None = None
    label_column: str = "label"
    num_samples: int | None = None
    seed: int = 0


def read_labelled(source: Source, kind: Kind, name: str, known: Names) -> tuple[list[Any], list[int]]:
    """Samples (PIL images, texts or conversations) and their classes.

    Raises:
        DamError: data that cannot be read, or columns or labels that are not there.
    """
    where = f"evaluation data of {name} ({source.data})"
    path = Path(source.data).expanduser()
    table: Table
    if kind == "image" and (files := _images_of_classes(path, source.split)):
        table, rows = ListTable(files), _chosen(len(files), source)
        raw: list[Any] = [files[row].parent.name for row in rows]
    else:
        table = open_data(source.data, source.split, kind, where, spelled=OPTION)
        _require_label(table, source, where)
        rows = _chosen(len(table), source)
        raw = table.take(source.label_column, rows)
        spelled = getattr(table.features[source.label_column], "names", None)
        if spelled and set(spelled) <= set(known):
            raw = [spelled[number] for number in raw]
    samples = _inputs(table, source, kind, where, rows)
    if kind == "image":
        samples = images_of(samples, rows, source.data)
    return samples, _classes(raw, known, where)


def _chosen(length: int, source: Source) -> list[int]:
    """The rows to take, in their order."""
    if source.num_samples is None or source.num_samples >= length:
        return list(range(length))
    order = torch.randperm(length, generator=seeds.generator(source.seed, "evaluation"))
    return sorted(order[: source.num_samples].tolist())


def _inputs(table: Table, source: Source, kind: Kind, where: str, rows: Sequence[int]) -> list[Any]:
    labels = {source.label_column.casefold()}
    return values_of(table, source.column, kind, where, rows, labels=labels, spelled=OPTION)


def _images_of_classes(path: Path, split: str) -> list[Path]:
    """Images in a folder per class: of the split's own folder where there is one, else below `path`."""
    root = path / split if (path / split).is_dir() else path
    return sorted(p for p in root.glob("*/*") if p.suffix.lower() in IMAGES)


def _require_label(table: Table, source: Source, where: str) -> None:
    if isinstance(table, ListTable):
        raise DamError(
            where,
            expected="labels",
            got="lines or images without any",
            cure="Give a table with a column of labels, or images in a folder per class.",
        )
    if source.label_column not in table.features:
        raise DamError(
            f"--label-column of {where}",
            expected=f"one of the columns {', '.join(table.features)}",
            got=repr(source.label_column),
            cure=did_you_mean(source.label_column, table.features) or "Set --label-column.",
        )


def _classes(raw: Sequence[Any], known: Names, where: str) -> list[int]:
    """Class numbers; names are looked up, never numbered by guesswork."""
    found = []
    for value in raw:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            number = None
        elif isinstance(value, int):
            number = value
        else:
            number = known.get(value, int(value) if value.isdecimal() else None)
        if number is None or number < 0:
            raise DamError(
                f"label {value!r} in {where}",
                expected=f"a class number or one of {', '.join(list(known)[:8])}",
                got="neither",
                cure=did_you_mean(str(value), known) or "Name the classes in order: --classes A,B,C.",
            )
        found.append(number)
    return found
