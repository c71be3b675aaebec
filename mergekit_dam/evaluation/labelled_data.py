"""Labelled data as a model takes them, for `evaluate`. Legend: B batch, K classes, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from mergekit_dam import seeds
from mergekit_dam.errors import DamError, did_you_mean, first_line
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.io.data_files import IMAGES, LOADERS, Kind, download_folders, image_of, load_file, refuse_packed
from mergekit_dam.io.hub_client import is_hub_id
from mergekit_dam.io.hub_download import require_dataset
from mergekit_dam.io.images import Preprocessing
from mergekit_dam.tasks.readout import Readout, class_names, linear_head, prompts, tokenizer_of, zero_shot_head

Names = Mapping[str, int]
_LOADERS = {".parquet": "parquet", **LOADERS}


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


@dataclass(frozen=True)
class Source:
    """Where labelled data come from.

    Attributes:
        data: file, folder or Hub dataset id (`id@revision`).
        split: split of a dataset that has several.
        column: the inputs; None: the only column that can be.
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
    """Samples (PIL images or texts) and their classes.

    Raises:
        DamError: data that cannot be read, or columns or labels that are not there.
    """
    where = f"evaluation data of {name} ({source.data})"
    try:
        table = _table(Path(source.data).expanduser(), source, kind)
        labels, inputs = _columns(table, source, kind, where)
        if source.num_samples is not None and source.num_samples < len(table):
            order = torch.randperm(len(table), generator=seeds.generator(source.seed, "evaluation"))
            table = table.select(sorted(order[: source.num_samples].tolist()))
        if kind == "image":
            table = table.cast_column(inputs, datasets.Image(decode=False))
        spelled = getattr(table.features[labels], "names", None)
        raw = list(table[labels])
        if spelled and set(spelled) <= set(known):
            raw = [spelled[number] for number in raw]
        rows = table[inputs]
        samples = [str(row) for row in rows] if kind == "text" else _images(rows, source)
        return samples, _classes(raw, known, where)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, DamError):
            raise
        raise DamError(
            where, expected="a parquet, jsonl, json or csv file, a folder of image folders, or a Hub dataset id",
            got=first_line(error), cure="Check the path or the id and --split.",
        ) from error  # fmt: skip


def _images(rows: Iterable[Any], source: Source) -> list[Any]:
    """Decoded here, with bounds and by decoders that call no program, as calibration images are."""
    path = Path(source.data).expanduser()
    if path.is_dir():
        return [image_of(Path(row["path"]), str(row["path"])) for row in rows]
    trusted = () if path.exists() else download_folders()
    return [image_of(row, f"sample {i} of {source.data}", trusted=trusted) for i, row in enumerate(rows)]


def _table(path: Path, source: Source, kind: Kind) -> datasets.Dataset:
    if path.is_dir() and kind == "image":
        files = sorted(p for p in path.glob("*/*") if p.suffix.lower() in IMAGES)
        columns = {"image": [str(p) for p in files], source.label_column: [p.parent.name for p in files]}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    if path.is_file():
        if path.suffix not in _LOADERS:
            raise ValueError(f"a file of kind {path.suffix or 'unknown'}")
        if path.suffix in LOADERS:
            refuse_packed(path, f"evaluation data ({source.data})")
        return load_file(path, _LOADERS[path.suffix])
    if path.exists() or path.suffix in _LOADERS or source.data.startswith((".", "/", "~")):
        raise FileNotFoundError("no such file")
    dataset, _, revision = source.data.partition("@")
    if is_hub_id(dataset):
        require_dataset(dataset, revision or None, f"evaluation data ({source.data})")
    return datasets.load_dataset(dataset, split=source.split, revision=revision or None)


def _columns(table: datasets.Dataset, source: Source, kind: Kind, where: str) -> tuple[str, str]:
    """Names of the columns with labels and inputs."""
    for option, column in (("--label-column", source.label_column), ("--column", source.column)):
        if column is not None and column not in table.features:
            raise DamError(
                f"{option} of {where}", expected=f"one of the columns {', '.join(table.features)}", got=repr(column),
                cure=did_you_mean(column, table.features) or f"Set {option}.",
            )  # fmt: skip
    if source.column is not None:
        return source.label_column, source.column
    fitting = [c for c, feature in table.features.items() if c != source.label_column and _holds(feature, kind)]
    if len(fitting) != 1:
        raise DamError(
            f"columns of {where}", expected=f"exactly one with {kind}s",
            got=", ".join(fitting) or f"none among {', '.join(table.features)}", cure="Set --column.",
        )  # fmt: skip
    return source.label_column, fitting[0]


def _holds(feature: Any, kind: Kind) -> bool:
    dtype = getattr(feature, "dtype", None)
    if kind == "text":
        return isinstance(feature, datasets.Value) and dtype in {"string", "large_string"}
    bytes_or_path = isinstance(feature, dict) and "bytes" in feature
    return isinstance(feature, datasets.Image) or bytes_or_path or dtype in {"binary", "large_binary"}


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
                f"label {value!r} in {where}", expected=f"a class number or one of {', '.join(list(known)[:8])}",
                got="neither", cure=did_you_mean(str(value), known) or "Name the classes in order: --classes A,B,C.",
            )  # fmt: skip
        found.append(number)
    return found
