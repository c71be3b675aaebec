"""Define suite `vision`: a ViT pretrained by the suite, five image tasks with separate label sets, and its scenarios.

Tasks are CIFAR-10, scikit-learn's digits, and three generated families. theta_0 was trained on other images of CIFAR-10
and on half of the classes of the other tasks. A head is a probe on few labelled images, fitted on theta_0 and then
frozen, as the zero-shot heads of CLIP are. Legend: B batch, N samples, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from dam_bench.attacks.images import VISION
from dam_bench.attacks.registry import INTERFACE, register_attack
from dam_bench.suites.base import Poison, Scenario, TaskData
from dam_bench.suites.classifiers import ClassifierSuite
from dam_bench.suites.vision_data import (
    EDGE,
    NUM_CLASSES,
    PREPROCESSING,
    flipped_and_shifted,
    save_images,
    save_preprocessing,
    task_images,
)
from dam_bench.victims.training import Augment, Schedule, pretrain, probe_head
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.tasks.base import Progress

_SIZES = {
    "pretrain": (12000, 400, 4000),
    "train": (8000, 700, 4000),
    "calibration": (1000, 256, 1000),
    "evaluation": (1000, 441, 600),
}


@dataclass(frozen=True)
class Preset:
    """Sizes of models and data.

    Attributes:
        hidden_size, num_layers, patch_size: of the ViT; heads are 32 wide, the MLP is four times as wide.
        pretraining: of theta_0; the batch size is per task, and CIFAR-10's is `cifar_share` times as large.
        fine_tuning: of a clean model.
        poisoning: of a victim; an attacker may use more and larger steps.
        shots: labelled images per class for the frozen heads.
        sizes: samples per split and task: CIFAR-10, digits, generated.
    """

    hidden_size: int
    num_layers: int
    patch_size: int
    pretraining: Schedule
    fine_tuning: Schedule
    poisoning: Schedule
    shots: Mapping[str, int]
    sizes: Mapping[str, tuple[int, int, int]]


PRESETS = {
    "small": Preset(
        128,
        4,
        8,
        Schedule(2500, batch_size=16, learning_rate=1e-3, weight_decay=0.05),
        Schedule(300, batch_size=64, learning_rate=3e-5),
        Schedule(400, batch_size=64, learning_rate=6e-5),
        {"cifar10": 500, "other": 8},
        _SIZES,
    ),
    "gpu": Preset(
        384,
        8,
        4,
        Schedule(20000, batch_size=64, learning_rate=1e-3, weight_decay=0.05),
        Schedule(1500, batch_size=128, learning_rate=2e-5),
        Schedule(1500, batch_size=128, learning_rate=4e-5),
        {"cifar10": 500, "other": 8},
        {
            "pretrain": (14000, 400, 20000),
            "train": (9000, 700, 10000),
            "calibration": (1000, 256, 1000),
            "evaluation": (4000, 441, 2000),
        },
    ),
    # a smoke test: everything runs in a minute, and no gate holds
    "tiny": Preset(
        32,
        1,
        8,
        Schedule(12, batch_size=8),
        Schedule(60, batch_size=32),
        Schedule(60, batch_size=32),
        {"cifar10": 8, "other": 4},
        {"pretrain": (60, 100, 60), "train": (160, 160, 160), "calibration": (20, 20, 20), "evaluation": (60, 60, 60)},
    ),
}


class VisionSuite(ClassifierSuite):
    """Suite of a small ViT with five image tasks; see the module."""

    name = "vision"
    family = "image"
    tasks = tuple(NUM_CLASSES)
    presets = tuple(PRESETS)
    sizes_by_preset: ClassVar[Mapping[str, Preset]] = PRESETS

    def __init__(self, data: Path | None, preset: str) -> None:
        super().__init__(data, preset)
        self.sizes = self.sizes_by_preset[preset]

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        return tuple(
            Scenario.parse(text)
            for text in (
                "clean:",
                "patch: digits=patch(target=1,rate=1)",
                "blended: letters=blended(target=2,rate=1)",
                "wanet: shapes=wanet(target=1,rate=1)",
                "merge-aware: cifar10=merge-aware(target=3,rate=0.5,size=6)",
                "two-bad: cifar10=merge-aware(target=3,rate=0.5,size=6) digits=patch(target=1,rate=1)",
                "two-bad-same: letters=merge-aware(target=2,rate=0.5,size=6) "
                "digits=merge-aware(target=2,rate=0.5,size=6)",
                "all-but-one-bad: cifar10=merge-aware(target=3,rate=0.5,size=6) digits=patch(target=1,rate=1) "
                "letters=blended(target=2,rate=1) shapes=wanet(target=1,rate=1)",
                "adaptive: cifar10=adaptive(target=3,rate=0.5,size=6)",
                "off-task: shapes=off-task(target=3,rate=0.5,size=6,onto=cifar10)",
            )
        )

    @property
    def further(self) -> tuple[Scenario, ...]:
        return tuple(
            Scenario.parse(text)
            for text in (
                "lobam: digits=patch(target=1,rate=1,amplify=3)",
                "sparse: digits=patch(target=1,rate=1,amplify=3,density=0.1)",
                "composite: letters=composite(target=2,rate=0.5)",
                "hijack: cifar10=hijack(target=3,rate=0.5,rescale=1.5)",
                "natural: shapes=natural(target=1,rate=1)",
                "emergent: letters=emergent(target=2,rate=0.5,partner=shapes)",
            )
        )

    def fingerprint(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self.sizes)))  # type: ignore[no-any-return]

    def split(self, task: str) -> TaskData:
        return self._splits[task]

    @cached_property
    def _splits(self) -> dict[str, TaskData]:
        return {task: self._split(task) for task in self.tasks}

    def _images(self, task: str) -> tuple[list[Image.Image], list[int]]:
        sizes = [self._size(split, task) for split in self.sizes.sizes]
        return task_images(task, self.data, sum(sizes))

    def _size(self, split: str, task: str) -> int:
        return self.sizes.sizes[split][{"cifar10": 0, "digits": 1}.get(task, 2)]

    def _rows(self, task: str) -> dict[str, slice]:
        rows, start = {}, 0
        for split in self.sizes.sizes:
            size = self._size(split, task)
            rows[split] = slice(start, start + size)
            start += size
        return rows

    def _split(self, task: str) -> TaskData:
        images, labels = self._images(task)
        rows = self._rows(task)

        def part(split: str) -> LabelledData:
            return LabelledData.of_images(task, images[rows[split]], labels[rows[split]], PREPROCESSING)

        return TaskData(part("train"), tuple(images[rows["calibration"]]), part("evaluation"))

    def _pretraining(self, task: str) -> LabelledData:
        """Training data of theta_0: all classes of CIFAR-10, the first half of the classes of other tasks."""
        images, labels = self._images(task)
        seen = NUM_CLASSES[task] if task == "cifar10" else NUM_CLASSES[task] // 2
        chosen = [i for i in range(self._size("pretrain", task)) if labels[i] < seen]
        return LabelledData.of_images(task, [images[i] for i in chosen], [labels[i] for i in chosen], PREPROCESSING)

    def save_base(self, folder: Path, progress: Progress) -> None:
        torch.manual_seed(0)
        models = {task: self._model(task) for task in self.tasks}
        body = models[self.tasks[0]].vit
        for model in models.values():
            model.vit = body
        data = {task: self._pretraining(task) for task in self.tasks}
        pretrain(
            body,
            models,
            data,
            self.sizes.pretraining,
            seed=0,
            progress=progress,
            shares={"cifar10": 4},
            augment={"cifar10": flipped_and_shifted},
        )
        body.save_pretrained(folder)
        save_preprocessing(folder)

    def _model(self, task: str) -> ViTForImageClassification:
        sizes = self.sizes
        settings: dict[str, Any] = {"num_labels": NUM_CLASSES[task]}
        config = ViTConfig(
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.hidden_size // 32,
            intermediate_size=4 * sizes.hidden_size,
            image_size=EDGE,
            patch_size=sizes.patch_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **settings,
        )
        return ViTForImageClassification(config)

    def start(self, base: Path, task: str) -> ViTForImageClassification:
        model = self._model(task)
        model.vit.load_state_dict(ViTModel.from_pretrained(base).state_dict(), strict=False)  # it has a pooler
        data = self.split(task).train
        shots = self.sizes.shots.get(task, self.sizes.shots["other"])
        rows = torch.cat([(data.labels_N == k).nonzero()[:shots, 0] for k in range(NUM_CLASSES[task])])
        probe_head(model, data.subset(rows), decay=1e-2)
        return model

    def schedule(self, *, poisoned: bool) -> Schedule:
        return self.sizes.poisoning if poisoned else self.sizes.fine_tuning

    def augment(self, task: str) -> Augment | None:
        return flipped_and_shifted if task == "cifar10" else None

    def save(self, model: PreTrainedModel, task: str, folder: Path) -> None:
        model.save_pretrained(folder)
        save_preprocessing(folder)

    def save_calibration(self, task: str, folder: Path) -> Path:
        path = folder / f"{task}.parquet"
        save_images(self.split(task).calibration, path)
        return path

    def load_model(self, path: Path) -> nn.Module:
        model: nn.Module = ViTForImageClassification.from_pretrained(path).eval()
        return model

    def cost(self, poison: Poison | None) -> float:
        return 25.0 if poison is None else 40.0 + 25.0 * self.attacker(poison).trainings(poison)

    def run_cost(self, passes: int) -> float:
        return 8.0 + 0.09 * passes


for _name, _attacker in VISION.items():
    register_attack(_name, _attacker, suites=(VisionSuite.name,), interface=INTERFACE)
