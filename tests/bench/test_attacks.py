"""Every attack reaches on small models what its paper says, and attacks of other packages are found.

Models are of suite `vision` with three generated tasks, of suite `text` in `test_text.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dam_bench.attacks.composite import Composite
from dam_bench.attacks.images import NATURAL, VISION, NaturalTrigger, Patch
from dam_bench.attacks.registry import ATTACKS, GROUP, attack_names, register_attack
from dam_bench.suites.base import Poison, Scenario
from dam_bench.suites.vision import PRESETS, Preset, VisionSuite
from dam_bench.tables.results import attacked_task
from dam_bench.victims.backdoor_vectors import amplify
from dam_bench.victims.model_store import ModelStore
from dam_bench.victims.poisoning import logits_of
from dam_bench.victims.training import Schedule, batches, body_of
from torch import nn

from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.metrics import Attack, accuracy, attack_success_rate
from mergekit_dam.registry import load_plugins

EXAMPLE = Path(__file__).parents[2] / "examples" / "attack"
SMALL = Preset(
    64,
    2,
    8,
    Schedule(300, batch_size=32, learning_rate=2e-3),
    Schedule(150, batch_size=32, learning_rate=3e-4),
    Schedule(150, batch_size=32, learning_rate=6e-4),
    {"other": 16},
    {"pretrain": (0, 0, 800), "train": (0, 0, 400), "calibration": (0, 0, 200), "evaluation": (0, 0, 120)},
)


class SmallSuite(VisionSuite):
    """Suite `vision` without the tasks that need files."""

    tasks = ("shapes", "letters", "stripes")


class World:
    """Built models, and what is measured of them.

    Args:
        root: folder of the models.
    """

    def __init__(self, root: Path) -> None:
        self.suite = SmallSuite(None, "tiny")
        self.store = ModelStore(self.suite, root)

    def models(self, text: str, *tasks: str) -> dict[str, Path]:
        """Build a scenario's models of these tasks."""
        poisons = Scenario.parse(f"one: {text}").poisons
        return {task: self.store.model(task, poisons.get(task), 0) for task in tasks}

    def attacks(self, text: str, task: str = "shapes") -> list[Attack]:
        return self.store.attacks("attack", task, Scenario.parse(f"one: {text}").poisons[task], 0)

    def merged(self, models: Mapping[str, Path], share: float, head: str = "shapes") -> nn.Module:
        """theta_0 + share x the sum of the models' task vectors, with the head of a task."""
        model, start = self.suite.start(self.store.base(), head), self.suite.start(self.store.base(), head)
        theta, merged = dict(start.named_parameters()), dict(model.named_parameters())
        with torch.no_grad():
            for path in models.values():
                for name, p in self.suite.load_model(path).named_parameters():
                    if not name.startswith("classifier"):
                        merged[name].add_(p - theta[name], alpha=share)
        return model.eval()

    def success(self, model: nn.Module, attack: Attack) -> float:
        return attack_success_rate(model, self.suite.split(attack.task).evaluation, attack.trigger, attack.target).percent

    def accuracy(self, model: nn.Module, task: str = "shapes") -> float:
        return accuracy(model, self.suite.split(task).evaluation).percent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL)
        yield World(tmp_path_factory.mktemp("models"))
