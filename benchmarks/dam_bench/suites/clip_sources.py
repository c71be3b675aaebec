"""Locate the models and data of suite `clip-paper`: Hub ids in one table, or local folders in their place.

The ids are those of fusion_bench 0.2.33 (its configuration files CLIPVisionModelPool/clip-vit-base-patch32_TA8.yaml
and dataset/image_classification), through which the paper's experiments were published; a checkpoint is a
CLIPVisionModel. None could be loaded when this was written, without a connection: the suite is tested with local
substitutes of the same format. Revisions are pinned where the full commit could be looked up, else they are `main`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from mergekit_dam.errors import DamError, did_you_mean, first_line
from mergekit_dam.io.images import Preprocessing

BASE = "openai/clip-vit-base-patch32"
FILE = "clip-paper.json"
_EDGE = 224  # pixels, where the processor's file does not say


@dataclass(frozen=True)
class ClipTask:
    """An image task.

    Attributes:
        dataset: Hub id, or a local folder with parquet files of both splits.
        checkpoint: the published fine-tune of the vision tower, a Hub id or a local folder.
        phrase: format of a class name in the prompt "a photo of a {}.".
        config: configuration of the dataset, where it has several.
        splits: names of the split of training and calibration, and of the split of evaluation.
        columns: names of the image column and of the class column.
        revision: of the dataset.
        checkpoint_revision: of the checkpoint.
        classes: names for a dataset whose class column has none.
    """

    dataset: str
    checkpoint: str
    phrase: str = "{}"
    config: str | None = None
    splits: tuple[str, str] = ("train", "test")
    columns: tuple[str, str] = ("image", "label")
    revision: str = "main"
    checkpoint_revision: str = "main"
    classes: tuple[str, ...] = ()


TASKS: Mapping[str, ClipTask] = {
    "sun397": ClipTask(
        "tanganke/sun397", f"tanganke/{BASE[7:]}_sun397", revision="9c4afd6174afa3974f209a0ef099dbbe244dfd27"
    ),
    "stanford-cars": ClipTask("tanganke/stanford_cars", f"tanganke/{BASE[7:]}_stanford-cars"),
    "resisc45": ClipTask("tanganke/resisc45", f"tanganke/{BASE[7:]}_resisc45", "{} seen from the air"),
    "eurosat": ClipTask("tanganke/eurosat", f"tanganke/{BASE[7:]}_eurosat", "{} seen by a satellite"),
    "svhn": ClipTask("ufldl-stanford/svhn", f"tanganke/{BASE[7:]}_svhn", 'number "{}"', config="cropped_digits"),
    "gtsrb": ClipTask(
        "tanganke/gtsrb",
        f"tanganke/{BASE[7:]}_gtsrb",
        '"{}" traffic sign',
        revision="ea889fff70dda7b09e94a4b207dded438deca549",
    ),
    "mnist": ClipTask("ylecun/mnist", f"tanganke/{BASE[7:]}_mnist", 'number "{}"'),
    "dtd": ClipTask("tanganke/dtd", f"tanganke/{BASE[7:]}_dtd", "{} texture"),
}


@dataclass(frozen=True)
class Sources:
    """Sources of the base, the tasks and the clean models.

    Attributes:
        base: a full CLIP with processor and tokenizer, a Hub id or a local folder.
        tasks: name -> its sources.
        revision: of the base.
        fine_tune: whether the suite trains clean models; else they are the published checkpoints.
    """

    base: str
    tasks: Mapping[str, ClipTask]
    revision: str = "main"
    fine_tune: bool = False

    @classmethod
    def read(cls, folder: Path | None) -> Sources:
        """Read the Hub's sources, replaced by the entries of FOLDER/clip-paper.json if that file exists.

        The file: {"base": ..., "revision": ..., "fine_tune": true, "tasks": {"dtd": {"dataset": ..., ...}}}; all
        entries are optional, and keys of a task are the attributes of `ClipTask`. Paths that exist count from FOLDER.

        Raises:
            DamError: not JSON, an unknown key or an unknown task.
        """
        file = folder / FILE if folder is not None else None
        if file is None or not file.is_file():
            return cls(BASE, TASKS)
        try:
            given = dict(json.loads(file.read_text("utf-8")))
            tasks = {name: dict(entry) for name, entry in dict(given.pop("tasks", {})).items()}
        except (ValueError, TypeError) as error:
            raise DamError(
                f"mapping {file}", expected="a JSON object", got=first_line(error), cure="Repair the file."
            ) from error
        _known(given, ("base", "revision", "fine_tune"), f"mapping {file}")
        _known(tasks, TASKS, f"tasks of mapping {file}")
        found = dict(TASKS)
        for name, entry in tasks.items():
            _known(entry, [f.name for f in fields(ClipTask)], f"task {name} of mapping {file}")
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            for key in ("dataset", "checkpoint"):
                if key in values:
                    values[key] = _place(file.parent, values[key])
            found[name] = replace(found[name], **values)
        return cls(
            _place(file.parent, given.get("base", BASE)),
            found,
            given.get("revision", "main"),
            bool(given.get("fine_tune", False)),
        )

    def fingerprint(self) -> dict[str, Any]:
        """Hub ids with the wanted revisions, and hashes of the files of local folders, as JSON."""
        tasks = {
            name: asdict(task) | {"dataset": _content(task.dataset), "checkpoint": _content(task.checkpoint)}
            for name, task in self.tasks.items()
        }
        return {"base": _content(self.base), "revision": self.revision, "fine_tune": self.fine_tune, "tasks": tasks}

    def processor(self) -> dict[str, Any]:
        """Read the base's preprocessor_config.json, with a number as size written out as the shorter edge."""
        name = "preprocessor_config.json"
        try:
            local = Path(self.base) / name
            file = local if Path(self.base).is_dir() else Path(hf_hub_download(self.base, name, revision=self.revision))
            values: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise _unreachable(f"base {self.base}", error) from error
        if isinstance(values.get("size"), int):
            values["size"] = {"shortest_edge": values["size"]}
        return values

    def preprocessing(self) -> Preprocessing:
        """The preprocessing of `processor`, as the package applies it."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(self.processor()))
            return Preprocessing.read([Path(folder)], _EDGE)

    def dataset(self, name: str, split: int) -> Any:
        """Load the rows of a split (0 training, 1 evaluation) with two columns, `image` and `label`."""
        import datasets

        task = self.tasks[name]
        try:
            revision = None if Path(task.dataset).is_dir() else task.revision
            data = datasets.load_dataset(task.dataset, task.config, split=task.splits[split], revision=revision)
            data = data.select_columns(list(task.columns))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
            raise _unreachable(f"dataset of {name} ({task.dataset})", error) from error
        renamed = {old: new for old, new in zip(task.columns, ("image", "label"), strict=True) if old != new}
        data = data.rename_columns(renamed) if renamed else data
        if not isinstance(data.features["image"], datasets.Image):
            data = data.cast_column("image", datasets.Image())
        return data

    def classes(self, name: str) -> list[str]:
        """Class names for the prompt, in the order of the labels.

        Raises:
            DamError: neither the dataset nor the mapping has names.
        """
        task = self.tasks[name]
        known = task.classes or getattr(self.dataset(name, 1).features["label"], "names", None)
        if not known:
            raise DamError(
                f"classes of {name}",
                expected="names in the dataset's class column",
                got="none",
                cure=f"Give `classes` of this task in {FILE}.",
            )
        return [task.phrase.format(str(label).replace("_", " ").strip()) for label in known]


def load_clip(model_class: Any, source: str, revision: str = "main") -> Any:
    """Load a model of a transformers class in float32, from the Hub or a local folder.

    Raises:
        DamError: the class cannot load the source.
    """
    try:
        return model_class.from_pretrained(source, revision=revision).float().eval()
    except (OSError, ValueError) as error:
        raise _unreachable(f"{model_class.__name__} {source}", error) from error


def _unreachable(subject: str, error: Exception) -> DamError:
    return DamError(
        subject,
        expected="a model or dataset on the Hub or in a local folder",
        got=first_line(error),
        cure=f"Connect to the Hub (unset HF_HUB_OFFLINE), or name local folders in {FILE} under --data.",
    )


def _known(given: Mapping[str, Any], allowed: Any, where: str) -> None:
    for key in given:
        if key not in allowed:
            raise DamError(
                where,
                expected=f"keys among {', '.join(allowed)}",
                got=repr(key),
                cure=did_you_mean(key, allowed) or "Leave it out.",
            )


def _place(folder: Path, source: str) -> str:
    """Return an absolute path if the source exists under `folder` or by itself, else the Hub id."""
    path = folder / Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _content(source: str) -> str:
    """Return a Hub id unchanged; for a folder, the SHA-256 of its files."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as data:
            while block := data.read(1 << 20):
                total.update(block)
    return total.hexdigest()
