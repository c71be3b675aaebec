"""Models and data of the demo: a small ViT, four fine-tunes of it, one of them backdoored, and a clean twin.

Tasks are scikit-learn's digits and three generated families of images, 16x16 in colour. The victim carries a 3x3
patch that means class 0, kept alive under merging by training it at random points between base and fine-tune.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from dam_bench.suites.generated import GENERATED, digits
from dam_bench.victims.poisoning import Backdoor
from dam_bench.victims.training import Schedule, fine_tune, pretrain, probe_head
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from mergekit_dam.evaluation.attacks import PatchTrigger
from mergekit_dam.evaluation.metrics import Attack, LabelledData
from mergekit_dam.io.images import Preprocessing

EDGE, VICTIM, TARGET = 16, "digits", 0
CLASSES = {"digits": 10, **{name: task.num_classes for name, task in GENERATED.items()}}
SIZES = {"pretrain": 500, "train": 800, "calibration": 128, "evaluation": 369}  # together all 1,797 digits
PREPROCESSING = Preprocessing((EDGE, EDGE), None, Image.Resampling.BILINEAR, (0.5,) * 3, (0.5,) * 3)
ATTACK = Attack("patch", VICTIM, PatchTrigger(), TARGET)
BACKDOOR = Backdoor(ATTACK.trigger, TARGET, rate=0.1, interpolation=(0.5, 1.0))
PRETRAINING = Schedule(350, batch_size=48, learning_rate=1e-3)
FINE_TUNING = Schedule(300, batch_size=64, learning_rate=2e-4)


@dataclass(frozen=True)
class TaskData:
    """Disjoint splits of one task, and the images of the calibration split as a user would hold them."""

    splits: dict[str, LabelledData]
    calibration: list[Image.Image]


def task_data(name: str) -> TaskData:
    total = sum(SIZES.values())
    if name == "digits":
        images, labels = digits(EDGE, seed=0)
    else:
        images, labels = GENERATED[name].sample(total, EDGE, seed=0)
    splits, start = {}, 0
    for split, size in SIZES.items():
        rows = slice(start, start + size)
        splits[split] = LabelledData.of_images(name, images[rows], labels[rows], PREPROCESSING)
        start += size
    first = SIZES["pretrain"] + SIZES["train"]
    return TaskData(splits, images[first : first + SIZES["calibration"]])


def new_model(classes: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            image_size=EDGE,
            patch_size=4,
            num_labels=classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def pretrained_base(data: dict[str, TaskData]) -> ViTModel:
    """theta_0: trained on the pretraining splits of all tasks, long enough for features, too short for accuracy."""
    torch.manual_seed(0)
    models = {name: new_model(CLASSES[name]) for name in data}
    body = models[VICTIM].vit
    for model in models.values():
        model.vit = body
    pretrain(body, models, {name: one.splits["pretrain"] for name, one in data.items()}, PRETRAINING, seed=0)
    return body


def probed(base: ViTModel, data: LabelledData) -> ViTForImageClassification:
    """The base with a linear probe: what every fine-tune of the task starts from."""
    model = new_model(CLASSES[data.name])
    model.vit.load_state_dict(base.state_dict(), strict=False)  # the classifier has no pooler
    probe_head(model, data)
    return model


def save(model: PreTrainedModel, path: Path) -> None:
    model.save_pretrained(path)
    settings = {"size": {"height": EDGE, "width": EDGE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))


def save_calibration(images: list[Image.Image], path: Path) -> None:
    """Images only: the defence gets no labels."""
    rows = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}})
    Dataset.from_list(rows).to_parquet(path)


def build(folder: Path, note: Callable[[str], None]) -> dict[str, LabelledData]:
    """Everything under `folder`, complete or not at all; returns the evaluation data."""
    data = {name: task_data(name) for name in CLASSES}
    evaluation = {name: one.splits["evaluation"] for name, one in data.items()}
    if (folder / "complete").is_file():
        note("models are there from an earlier run")
        return evaluation
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    note("pretraining the base")
    base = pretrained_base(data)
    save(base, folder / "base")
    for name, one in data.items():
        save_calibration(one.calibration, folder / f"{name}.parquet")
        train = one.splits["train"]
        save(probed(base, train), folder / f"probe-{name}")
        for backdoor in [BACKDOOR, None] if name == VICTIM else [None]:
            label = f"{name}-clean" if name == VICTIM and backdoor is None else name
            note(f"fine-tuning {label}" + (" (backdoored)" if backdoor else ""))
            model = probed(base, train)
            fine_tune(model, train, FINE_TUNING, seed=1, backdoor=backdoor)
            save(model, folder / label)
    (folder / "complete").touch()
    return evaluation
