"""Image encoders with a classification head of their own. Legend: B batch, C channels, H, W pixels, K classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_dam.calibration import load_calibration
from mergekit_dam.errors import DamError
from mergekit_dam.images import Preprocessing
from mergekit_dam.perturbation import Bounds, Perturb
from mergekit_dam.plan import Plan
from mergekit_dam.tasks.base import Task


class ImageTask(Task):
    """ViTForImageClassification and CLIPForImageClassification."""

    def __init__(self, plan: Plan, index: int, device: torch.device) -> None:
        super().__init__(plan, index, device)
        if not type(self.module).__name__.endswith("ForImageClassification"):
            raise DamError(
                f"model {self.name}", expected="a classification head (...ForImageClassification)",
                got=type(self.module).__name__,
                cure="Give the fine-tuned model with its head; only the base may be without one.",
            )  # fmt: skip
        config = getattr(self.input.config, "vision_config", self.input.config)
        self.preprocessing = Preprocessing.read((self.input.path, plan.base.path), config.image_size)
        data = load_calibration(
            self.input.settings, "image", num_samples=plan.config.num_samples, seed=plan.config.seed, task=self.name
        )
        self.num_samples, self.sample_digests = len(data.samples), data.digests
        self._pixels = self.preprocessing.pixels(data.samples)
        self.perturbation_shape = tuple(self._pixels.shape[1:])
        self.bounds = Bounds.of(0.0, 1.0).to(device)

    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        return {"pixels": self._pixels[indices].to(self.device).float() / 255}

    def logits(
        self, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], perturb: Perturb | None = None
    ) -> Tensor:
        pixels = inputs["pixels"]
        if perturb is not None:
            pixels, _ = perturb(pixels, None)
        output = self.call(self.parameters(weights), pixel_values=self.preprocessing.normalise(pixels))
        logits: Tensor = output.logits
        return logits
