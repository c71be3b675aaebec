"""Sizes of suite `vision`: small for two cores, gpu for one accelerator, tiny for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dam_bench.victims.training import Schedule


@dataclass(frozen=True)
class Preset:
    """Sizes of models and data.

    Attributes:
        hidden_size, num_layers, patch_size: of the ViT; heads are 32 wide, the MLP is four times as wide.
        pretraining: of theta_0; the batch size is per task, and CIFAR-10 has `cifar_share` times as much.
        fine_tuning: of a clean model.
        poisoning: of a victim; an attacker may take more and larger steps.
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


_SIZES = {
    "pretrain": (12000, 400, 4000), "train": (8000, 700, 4000), "calibration": (1000, 256, 1000),
    "evaluation": (1000, 441, 600),
}  # fmt: skip
PRESETS = {
    "small": Preset(
        128, 4, 8, Schedule(2500, batch_size=16, learning_rate=1e-3, weight_decay=0.05),
        Schedule(300, batch_size=64, learning_rate=3e-5), Schedule(400, batch_size=64, learning_rate=6e-5),
        {"cifar10": 500, "other": 8}, _SIZES,
    ),
    "gpu": Preset(
        384, 8, 4, Schedule(20000, batch_size=64, learning_rate=1e-3, weight_decay=0.05),
        Schedule(1500, batch_size=128, learning_rate=2e-5), Schedule(1500, batch_size=128, learning_rate=4e-5),
        {"cifar10": 500, "other": 8},
        {"pretrain": (14000, 400, 20000), "train": (9000, 700, 10000), "calibration": (1000, 256, 1000),
         "evaluation": (4000, 441, 2000)},
    ),
    # a smoke test: everything runs in a minute, and no gate holds
    "tiny": Preset(
        32, 1, 8, Schedule(12, batch_size=8), Schedule(60, batch_size=32), Schedule(60, batch_size=32),
        {"cifar10": 8, "other": 4},
        {"pretrain": (60, 100, 60), "train": (160, 160, 160), "calibration": (20, 20, 20), "evaluation": (60, 60, 60)},
    ),
}  # fmt: skip
