"""The Task of image encoders. Legend: B batch, C channels, H, W pixels, K classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mergekit_dam.errors import DamError
from mergekit_dam.io.calibration import load_calibration
from mergekit_dam.io.images import Preprocessing
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks.base import Task
from mergekit_dam.tasks.bounds import Bounds, Perturb
from mergekit_dam.tasks.readout import (
    Readout,
    class_names,
    image_text_head,
    linear_head,
    own_head,
    prompts,
    zero_shot_head,
)


class ImageTask(Task):
    """ViT, CLIP's vision tower, and the full CLIP, whose text tower makes the head and is merged, too."""

    modality = "image"
    trigger_kinds = ("pixels", "style")

    def __init__(self, plan: Plan, index: int, device: torch.device) -> None:
        super().__init__(plan, index, device)
        self._prompts: dict[str, Tensor] = {}
        self._read = self._readout(plan)
        config = getattr(self.input.config, "vision_config", self.input.config)
        self.preprocessing = Preprocessing.read((self.input.path, plan.base.path), config.image_size)
        data = load_calibration(
            self.input.settings,
            "image",
            num_samples=plan.config.num_samples,
            seed=plan.config.seed,
            task=self.name,
            position=self.index,
        )
        self.num_samples, self.sample_digests = len(data.samples), data.digests
        self._pixels = self.preprocessing.pixels(data.samples)
        self.perturbation_shape = tuple(self._pixels.shape[1:])
        self.bounds = Bounds.of(0.0, 1.0).to(device)

    def _readout(self, plan: Plan) -> Readout:
        """Choose the head: the class's own, a linear one from a file, or a zero-shot one."""
        settings, kind = self.input.settings, type(self.module).__name__
        if kind.endswith("ForImageClassification"):
            return own_head()
        if settings.head is not None:
            return linear_head(settings.head, _width(self.input.config, kind), self.name, self.device)
        if settings.classes is not None and kind == "CLIPModel":
            names = class_names(settings.classes, self.name)
            tokens = prompts(names, (self.input.path, plan.base.path), self.name)
            self._prompts = {key: tensor.to(self.device) for key, tensor in tokens.items()}
            return image_text_head()
        if settings.classes is not None and plan.config.zero_shot_model is not None:
            names = class_names(settings.classes, self.name)
            return zero_shot_head(names, plan.config.zero_shot_model, self.name, self.device)
        raise DamError(
            f"model {self.name}",
            expected="a classification head, `head:`, or for CLIP `classes:`",
            got=kind,
            cure="CLIP vision models need `zero_shot_model:` beside `classes:`.",
        )

    def read_tensors(self) -> Sequence[Tensor]:
        scale = torch.tensor([self.preprocessing.mean, self.preprocessing.std])
        return [self._pixels, scale, *self._prompts.values(), *self._read.tensors]

    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        return {"pixels": self._pixels[indices].to(self.device).float() / 255}

    def samples(self, indices: Tensor) -> list[Tensor]:
        return list(self._pixels[indices].float() / 255)

    def batch(self, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"pixels": torch.stack(list(samples)).to(self.device)}

    def logits(
        self, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], perturb: Perturb | None = None
    ) -> Tensor:
        pixels = inputs["pixels"]
        if perturb is not None:
            pixels, _ = perturb(pixels, None)
        normalised = self.preprocessing.normalise(pixels).to(self.dtype)
        return self._read(self.call(self.parameters(weights), pixel_values=normalised, **self._prompts))


def _width(config: PretrainedConfig, kind: str) -> int:
    return int(config.projection_dim if kind.endswith("WithProjection") else config.hidden_size)
