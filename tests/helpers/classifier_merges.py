"""Task arithmetic on the bodies of a suite's classifiers, in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from dam_bench.suites.classifiers import ClassifierSuite
from torch import nn


def merged_at(suite: ClassifierSuite, base: Path, task: str, models: Iterable[Path], share: float) -> nn.Module:
    """theta_0 + share x the sum of the models' task vectors, with the head of a task, in evaluation mode."""
    model, start = suite.start(base, task), suite.start(base, task)
    theta, merged = dict(start.named_parameters()), dict(model.named_parameters())
    with torch.no_grad():
        for path in models:
            for name, p in suite.load_model(path).named_parameters():
                if not name.startswith("classifier"):
                    merged[name].add_(p - theta[name], alpha=share)
    return model.eval()
