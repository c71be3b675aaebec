"""Read evaluation data for a model: labelled samples, or prompts whose answers are searched for a target text.

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
from mergekit_dam.models.families import CAUSAL_CLASSES
from mergekit_dam.tasks.encoding import encoded, padded_left
from mergekit_dam.tasks.readout import Readout, class_names, linear_head, prompts, tokenizer_of, zero_shot_head

Names = Mapping[str, int]
_ANSWER_TOKENS = 32  # searched for a target text, in addition to the tokens of that text
_ANSWER_BATCH = 32  # answers generated together; it changes memory, not results


@dataclass(frozen=True)
class ReadoutOptions:
    """Options that turn outputs into classes, for a model without a classification head.

    Attributes:
        classes: class names: for CLIP's prompts, or the answers of a causal LM.
        head: safetensors file of a linear head.
        zero_shot_model: full CLIP for a CLIP vision model.
    """

    classes: str | None = None
    head: str | None = None
    zero_shot_model: str | None = None


def labelled_data(
    model: nn.Module, folders: Sequence[Path], name: str, source: Source, readout: ReadoutOptions
) -> LabelledData:
    """Read labelled samples and prepare their encoding and classification for a model.

    Args:
        model: a transformers model.
        folders: searched in this order for preprocessing settings or a tokenizer.
        name: of the task, in tables.
        source: the data.
        readout: options for models without a classification head.

    Raises:
        DamError: data, labels or a head that do not fit the model.
    """
    config: Any = model.config
    names = class_names(readout.classes, name) if readout.classes else []
    known: Names = {text: i for i, text in enumerate(names)} or dict(getattr(config, "label2id", None) or {})
    if "vit" in config.model_type or "clip" in config.model_type:
        inputs, labels = read_labelled(source, "image", name, known)
        size = getattr(config, "vision_config", config).image_size
        data = LabelledData.of_images(name, inputs, labels, Preprocessing.read(folders, size))
        if type(model).__name__ == "CLIPModel":
            return _with_zero_shot_classes(data, names, folders, name)
    else:
        inputs, labels = read_labelled(source, "text", name, known)
        data = LabelledData.of_texts(name, inputs, labels, tokenizer_of(folders, name))
        if type(model).__name__.endswith(CAUSAL_CLASSES):
            return _with_answer_classes(data, names, model, folders, name)
    if type(model).__name__.endswith(("ForImageClassification", "ForSequenceClassification")):
        return _require_known_classes(data, int(config.num_labels))
    head = _head_of(model, names, readout, name)
    return replace(data, classify=lambda m, batch: head(m(**batch)).argmax(-1))


def _require_known_classes(data: LabelledData, num_classes: int) -> LabelledData:
    largest = int(data.labels_N.max())
    if largest >= num_classes:
        raise DamError(
            f"labels of {data.name}",
            expected=f"classes 0 to {num_classes - 1}, as the model has",
            got=str(largest),
            cure="Give the data of the task that this model (or --task) was trained on.",
        )
    return data


def _with_zero_shot_classes(
    data: LabelledData, names: Sequence[str], folders: Sequence[Path], name: str
) -> LabelledData:
    """Classify with CLIP's zero-shot classes: every batch gets the prompts of all classes."""
    if not names:
        raise _no_classes(name, "CLIP")
    tokens, pixels = prompts(names, folders, name), data.encode

    def encode(batch: Any) -> dict[str, Tensor]:
        return pixels(batch) | tokens

    return _require_known_classes(
        replace(data, encode=encode, classify=lambda m, batch: m(**batch).logits_per_image.argmax(-1)), len(names)
    )


def _with_answer_classes(
    data: LabelledData, names: Sequence[str], model: nn.Module, folders: Sequence[Path], name: str
) -> LabelledData:
    """Classify with a causal LM: the class whose first token is the most likely after the prompt."""
    if not names:
        raise _no_classes(name, "a causal LM")
    tokenizer = tokenizer_of(folders, name)
    first_tokens = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"][:1] for text in names]
    if len({tuple(ids) for ids in first_tokens}) != len(names) or [] in first_tokens:
        raise DamError(
            f"classes of {name}",
            expected="answers that differ in their first token",
            got=", ".join(names),
            cure="Choose other words for --classes.",
        )
    tokens_K = torch.tensor([ids[0] for ids in first_tokens])
    encode = _prompt_encoder(tokenizer, _max_positions(model, tokenizer), name)

    def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        last_BV = model(**batch, position_ids=positions, use_cache=False).logits[:, -1]
        return torch.as_tensor(last_BV[:, tokens_K.to(last_BV.device)].argmax(-1))

    return _require_known_classes(replace(data, encode=encode, classify=classify), len(names))


def text_target_data(model: nn.Module, folders: Sequence[Path], name: str, source: Source, text: str) -> LabelledData:
    """Read unlabelled prompts for a causal LM; class 1 is an answer that contains `text`, class 0 any other answer.

    The answer is the model's greedy continuation, 32 tokens longer than the text. Blanks and line breaks count alike.

    Args: as for `labelled_data`.

    Raises:
        DamError: the model is no causal LM, or the data do not fit.
    """
    if not type(model).__name__.endswith(CAUSAL_CLASSES):
        raise DamError(
            f"model of {name}",
            expected="a causal LM, for a target text",
            got=type(model).__name__,
            cure="Give the class that the trigger shall cause as --target N.",
        )
    tokenizer, wanted = tokenizer_of(folders, name), " ".join(text.split())
    if not wanted:
        raise DamError(
            "--target-text", expected="a text", got=repr(text), cure="Give the words that the model shall say."
        )
    positions = _max_positions(model, tokenizer)
    length = min(_ANSWER_TOKENS + len(tokenizer(text, add_special_tokens=False)["input_ids"]), positions // 2)
    encode = _prompt_encoder(tokenizer, positions - length, name)
    where = f"evaluation data of {name} ({source.data})"
    table = open_data(source.data, source.split, "text", where, spelled=OPTION)
    samples = _read_inputs(table, source, "text", where, _sampled_rows(len(table), source))
    samples = [sample for sample in samples if isinstance(sample, Conversation) or sample.strip()]

    def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        chunks = zip(batch["input_ids"].split(_ANSWER_BATCH), batch["attention_mask"].split(_ANSWER_BATCH), strict=True)
        answers = [
            answer
            for ids, mask in chunks
            for answer in _continue_prompts(model, ids, mask, length, tokenizer.pad_token_id)
        ]
        decoded = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return torch.tensor([int(wanted in " ".join(answer.split())) for answer in decoded])

    data = LabelledData.of_texts(name, samples, [0] * len(samples), tokenizer)
    return replace(data, encode=encode, classify=classify)


def _continue_prompts(model: Any, ids_BL: Tensor, mask_BL: Tensor, length: int, pad: int) -> Tensor:
    """Greedy continuations of `length` tokens (B, <= length), of texts that are padded at the left."""
    options = transformers.GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=length,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=pad,
    )
    generated_BL = model.generate(input_ids=ids_BL, attention_mask=mask_BL, generation_config=options)
    return torch.as_tensor(generated_BL[:, ids_BL.shape[1] :])


def _prompt_encoder(tokenizer: Any, max_length: int, name: str) -> Callable[[Any], dict[str, Tensor]]:
    """Make an encoder of prompts, padded at the left, that encodes as for calibration data."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return lambda batch: padded_left(tokenizer, encoded(tokenizer, batch, max_length, name))


def _max_positions(model: nn.Module, tokenizer: Any) -> int:
    config: Any = model.config
    return min(int(tokenizer.model_max_length), int(getattr(config, "max_position_embeddings", None) or 1 << 30))


def _no_classes(name: str, kind: str) -> DamError:
    return DamError(
        f"classes of {name}",
        expected=f"class names, since {kind} has no classification head",
        got="none",
        cure="Give --classes: names separated by commas, or a file with one per line.",
    )


def _head_of(model: nn.Module, names: Sequence[str], readout: ReadoutOptions, name: str) -> Readout:
    config: Any = model.config
    device = next(model.parameters()).device
    if readout.head is not None:
        width = getattr(config, "projection_dim" if type(model).__name__.endswith("WithProjection") else "hidden_size")
        return linear_head(readout.head, int(width), name, device)
    if names and readout.zero_shot_model is not None:
        return zero_shot_head(names, readout.zero_shot_model, name, device)
    raise DamError(
        f"model of {name}",
        expected="a classification head",
        got=type(model).__name__,
        cure="Give --task (an input model's name) for a merge, or --head FILE, or --classes with --zero-shot-model.",
    )


@dataclass(frozen=True)
class Source:
    """The place of labelled data, and the samples to use.

    Attributes:
        data: file, folder or Hub dataset id (`id@revision`); see `open_data`.
        split: split of a dataset that has several.
        column: name of the input column; None: see `choose_inputs`.
        label_column: name of the column of labels, which are numbers or names.
        num_samples: number of samples, drawn by `seed`; None: all.
        seed: of the draw.
    """

    data: str
    split: str = "test"
    column: str | None = None
    label_column: str = "label"
    num_samples: int | None = None
    seed: int = 0


def read_labelled(source: Source, kind: Kind, name: str, known: Names) -> tuple[list[Any], list[int]]:
    """Read samples (PIL images, texts or conversations) and their class numbers.

    Args:
        source: the data.
        kind: of the inputs.
        name: of the task, for errors.
        known: class name -> class number.

    Raises:
        DamError: data that cannot be read, or missing columns or labels.
    """
    where = f"evaluation data of {name} ({source.data})"
    path = Path(source.data).expanduser()
    table: Table
    if kind == "image" and (files := _class_folder_images(path, source.split)):
        table, rows = ListTable(files), _sampled_rows(len(files), source)
        raw: list[Any] = [files[row].parent.name for row in rows]
    else:
        table = open_data(source.data, source.split, kind, where, spelled=OPTION)
        _require_label(table, source, where)
        rows = _sampled_rows(len(table), source)
        raw = table.take(source.label_column, rows)
        class_names_of_data = getattr(table.features[source.label_column], "names", None)
        if class_names_of_data and set(class_names_of_data) <= set(known):
            raw = [class_names_of_data[number] for number in raw]
    samples = _read_inputs(table, source, kind, where, rows)
    if kind == "image":
        samples = images_of(samples, rows, source.data)
    return samples, _classes(raw, known, where)


def _sampled_rows(length: int, source: Source) -> list[int]:
    """Rows to read, in ascending order: all, or a sample drawn by the seed."""
    if source.num_samples is None or source.num_samples >= length:
        return list(range(length))
    order = torch.randperm(length, generator=seeds.generator(source.seed, "evaluation"))
    return sorted(order[: source.num_samples].tolist())


def _read_inputs(table: Table, source: Source, kind: Kind, where: str, rows: Sequence[int]) -> list[Any]:
    labels = {source.label_column.casefold()}
    return values_of(table, source.column, kind, where, rows, labels=labels, spelled=OPTION)


def _class_folder_images(path: Path, split: str) -> list[Path]:
    """Image files in one folder per class, below the folder of the split if it exists, else below `path`."""
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
    """Turn labels into class numbers; names are looked up in `known` and never numbered here."""
    numbers = []
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
        numbers.append(number)
    return numbers
