"""fusion_bench's own class of the public DAM step, adapted to other models than CLIP; see run.py for its defects.

Theirs, called and never copied: `ConcreteSafeTaskWiseAdaMergingForCLIP` with its set-up, mask model, merged model,
losses, optimisers, loops and final merge. Ours, below: where batches come from, how logits are read from a body
that is no CLIP, the shape of the perturbation, and the clock.
Legend: T tasks, N samples, B batch, C channels, H, W pixels, L tokens, D or W width, P projection,
K classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from fusion_bench.method.concrete_subspace.clip_safe_concrete_adamerging import ConcreteSafeTaskWiseAdaMergingForCLIP
from fusion_bench.utils.data import InfiniteDataLoader
from lightning.fabric.loggers import TensorBoardLogger
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class PublicStep(ConcreteSafeTaskWiseAdaMergingForCLIP):
    """Their algorithm on tensors that are already loaded.

    Args:
        config: their settings.
        data: task -> tensors with N rows each; the first one is what the perturbation is added to.
        batch_size: B; the last batch of a pass may be smaller, as in their loader.
        device: `cpu` or `cuda`.
        logs: folder that their logger needs.
    """

    def __init__(
        self, config: DictConfig, data: Mapping[str, tuple[Tensor, ...]], *, batch_size: int, device: str, logs: Path
    ) -> None:
        super().__init__(config)
        self.fabric = lightning.Fabric(accelerator=device, devices=1, loggers=TensorBoardLogger(root_dir=logs))
        self._data, self._batch_size = dict(data), batch_size
        self._iterators: dict[str, Iterator[Any]] = {}
        self.step_seconds: list[float] = []
        self.step_processor_seconds: list[float] = []
        self.coefficient_seconds = 0.0

    def setup_models(self) -> Any:
        """Theirs, then a perturbation of our inputs' shape: theirs is fixed to 3 x 224 x 224."""
        module, mask_model = super().setup_models()
        shape = next(iter(self._data.values()))[0].shape[1:]
        delta_T = torch.zeros((len(self._data), *shape))
        self.pertubed_model.perturbed_input = nn.Parameter(delta_T, requires_grad=True)
        return module, mask_model

    def get_shuffled_test_loader_iter(self, task: str, **_: Any) -> Iterator[Any]:  # type: ignore[override]
        """Batches of our calibration data; theirs come from the test set."""
        if task not in self._iterators:
            dataset = TensorDataset(*self._data[task])
            loader = DataLoader(dataset, batch_size=min(self._batch_size, len(dataset)), shuffle=True)
            self._iterators[task] = iter(InfiniteDataLoader(self.fabric.setup_dataloaders(loader)))
        return self._iterators[task]

    def train_mask(self, module: Any, mask_model: Any) -> None:
        self._last, self._last_processor = time.perf_counter(), time.process_time()
        super().train_mask(module, mask_model)

    def print_profile_summary(self, title: str | None = None) -> None:
        """They print a table at the end of every mask step: here the clock is read instead."""
        now = time.perf_counter()
        self.step_seconds.append(now - self._last)
        self._last = now
        processor = time.process_time()
        self.step_processor_seconds.append(processor - self._last_processor)
        self._last_processor = processor

    def run_adamerging(self, module: Any, mask: Any) -> Any:
        start, mask_steps = time.perf_counter(), len(self.step_seconds)
        merged = super().run_adamerging(module, mask)
        self.coefficient_seconds = time.perf_counter() - start
        del self.step_seconds[mask_steps:], self.step_processor_seconds[mask_steps:]
        return merged


class ClipEncoders(PublicStep):
    """CLIP's vision tower, with their own logits from given zero-shot heads: theirs are made of task names.

    Args:
        projection_PW: of the full CLIP.
        heads: task -> class features (K, P), times the logit scale.
    """

    def __init__(self, *args: Any, projection_PW: Tensor, heads: Mapping[str, Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        projection = nn.Linear(projection_PW.shape[1], projection_PW.shape[0], bias=False).requires_grad_(False)
        projection.weight.copy_(projection_PW)
        self.visual_projection = self.to_device(projection)
        self.zeroshot_weights = {task: self.to_device(weight_KP) for task, weight_KP in heads.items()}
        self.logit_scale_exp = self.to_device(torch.tensor(1.0))

    def setup_zero_shot_classification_head(self, *_: Any, **__: Any) -> None:
        """The heads are there already."""


class LinearHeads(PublicStep):
    """Encoders whose fine-tunes keep a frozen linear head each.

    Args:
        heads: task -> the head of its fine-tune.
    """

    def __init__(self, *args: Any, heads: Mapping[str, nn.Linear], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads = {task: self.to_device(head.requires_grad_(False)) for task, head in heads.items()}

    def setup_zero_shot_classification_head(self, *_: Any, **__: Any) -> None:
        """The heads are there already."""


class ImageEncoders(LinearHeads):
    """ViT: the first token's last state goes into the head, as in ViTForImageClassification."""

    def compute_logits(self, module: Any, images: Tensor, task: str, *_: Any) -> Tensor:
        logits_BK: Tensor = self._heads[task](module(images).last_hidden_state[:, 0])
        return logits_BK


class TextEncoders(LinearHeads):
    """BERT: the pooled state goes into the head. Their step knows no text, so this is an extension of ours.

    What they call images are word embeddings (B, L, D) of theta_0's own table; the attention mask is kept aside
    from one call to the next, since their loop hands on the first tensor of a batch only.
    """

    def get_shuffled_test_loader_iter(self, task: str, **_: Any) -> Iterator[Any]:  # type: ignore[override]
        return self._remember(task, super().get_shuffled_test_loader_iter(task))

    def _remember(self, task: str, batches: Iterator[Any]) -> Iterator[Any]:
        for embedded, mask in batches:
            self._mask_BL = mask
            yield [embedded]

    def compute_logits(self, module: Any, images: Tensor, task: str, *_: Any) -> Tensor:
        # their loop stacks the clean and the perturbed half of a batch
        mask = self._mask_BL.repeat(len(images) // len(self._mask_BL), 1)
        logits_BK: Tensor = self._heads[task](module(inputs_embeds=images, attention_mask=mask).pooler_output)
        return logits_BK
