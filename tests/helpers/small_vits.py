"""Small ViTs that are trained for real: a base for two generated tasks of eight classes, and its fine-tunes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from dam_bench.suites.generated import GENERATED
from dam_bench.victims.poisoning import Backdoor
from dam_bench.victims.training import Schedule, fine_tune, pretrain, probe_head
from torch import nn
from transformers import ViTForImageClassification

from examples.demo import build as demo
from mergekit_dam.evaluation.metrics import LabelledData

TASKS = ("shapes", "stripes")


@dataclass(frozen=True)
class Trained:
    """What a fine-tune starts from.

    Attributes:
        data: labelled training data by task.
        body: theta_0.
        folder: where `base` and, per task, calibration data `NAME.parquet` lie.
    """

    data: dict[str, LabelledData]
    body: nn.Module
    folder: Path

    def probed(self, name: str) -> ViTForImageClassification:
        """theta_0 with a linear head for a task."""
        model = demo.new_model(8)
        model.vit.load_state_dict(self.body.state_dict(), strict=False)
        probe_head(model, self.data[name], decay=1e-2)
        return model

    def fine_tuned(
        self, model: ViTForImageClassification, name: str, backdoor: Backdoor | None, *, folder: str = ""
    ) -> None:
        """Train a probed model on its task, with or without a backdoor, and save it as `folder` (the task's name)."""
        schedule = Schedule(80, batch_size=32, learning_rate=2e-4)
        fine_tune(model, self.data[name], schedule, seed=0, backdoor=backdoor)
        demo.save(model, self.folder / (folder or name))


def trained_base(folder: Path) -> Trained:
    """Train theta_0 on both tasks, and write it with calibration data of other samples."""
    data: dict[str, LabelledData] = {}
    for name in TASKS:
        images, labels = GENERATED[name].sample(600, demo.EDGE, seed=0)
        data[name] = LabelledData.of_images(name, images[:500], labels[:500], demo.PREPROCESSING)
        demo.save_calibration(images[500:], folder / f"{name}.parquet")
    torch.manual_seed(0)
    models = {name: demo.new_model(8) for name in data}
    body = models["shapes"].vit
    models["stripes"].vit = body
    pretrain(body, models, data, Schedule(100, batch_size=32), seed=0)
    demo.save(body, folder / "base")
    return Trained(data, body, folder)
