"""Define suite `clip-paper`: the setting of DAM's paper (Yang et al., arXiv 2410.13910), CLIP ViT-B/32 on images.

Models are vision towers with a frozen zero-shot head, so that the merged tensors are the paper's. The heads use one
prompt per class, as `dam` itself does; the paper averages several. Poison sizes are pixels of 224. The suite needs the
Hub, or local folders in its place (clip_sources.py); presets other than `trial` need a GPU in practice.
Legend: B batch, C channels, s edge of a patch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModel, PreTrainedModel

from dam_bench.attacks.images import CLIP
from dam_bench.attacks.registry import INTERFACE, register_attack
from dam_bench.suites.base import Poison, Scenario, TaskData, default_device
from dam_bench.suites.classifiers import ClassifierSuite
from dam_bench.suites.clip_head import ZeroShotClip, with_head
from dam_bench.suites.clip_sources import TASKS, Sources, load_clip
from dam_bench.victims.training import Schedule
from mergekit_dam import seeds
from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.io.calibration import digest
from mergekit_dam.models.load_merged import load_merged
from mergekit_dam.tasks.base import Progress

_VERSION = 1  # of this file's build procedure; part of the fingerprint
_FORWARD_S = 8.8 / 40  # seconds per image of ViT-B/32, counted and not measured: GFLOP by GFLOP/s of one core
_ON_VICTIM = 22  # pixels: about 1 % of an image, as in BadMerging


@dataclass(frozen=True)
class Size:
    """Samples per task (at most; each takes 150 kB of memory) and training.

    Attributes:
        train: samples of fine-tunes and victims.
        calibration: unlabelled samples of the merge, from the training split, too, and disjoint from `train`.
        evaluation: samples of the test split.
        schedule: of fine-tunes and victims. fusion_bench's checkpoints had 4,000 steps of 32 samples at 1e-5.
        pattern_steps: Adam steps on a merge-aware patch.
    """

    train: int
    calibration: int
    evaluation: int
    schedule: Schedule
    pattern_steps: int


SIZES = {
    "paper": Size(6000, 512, 2000, Schedule(4000, batch_size=32, learning_rate=1e-5), 400),
    "small": Size(2000, 256, 1000, Schedule(500, batch_size=32, learning_rate=1e-5), 200),
    "trial": Size(128, 32, 128, Schedule(150, batch_size=16, learning_rate=3e-3), 40),
}


class ClipPaperSuite(ClassifierSuite):
    """Suite of CLIP ViT-B/32 with eight image tasks, and patch, blended and merge-aware victims.

    Args:
        data: folder with a clip-paper.json that replaces Hub ids by local folders; None: all come from the Hub.
        preset: `paper`, `small`, or `trial` for small substitutes.
        sources: in place of `data`.
    """

    name = "clip-paper"
    family = "image"
    tasks = tuple(TASKS)
    presets = tuple(SIZES)

    def __init__(self, data: Path | None, preset: str = "paper", *, sources: Sources | None = None) -> None:
        super().__init__(data, preset)
        self.size, self.sources = SIZES[preset], sources or Sources.read(data)
        self.pattern_steps = self.size.pattern_steps
        self._device = default_device()
        self._data: dict[str, TaskData] = {}
        self._fingerprint: dict[str, Any] | None = None

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        patch, aware = Poison("patch", size=_ON_VICTIM), Poison("merge-aware", size=_ON_VICTIM)
        return (
            Scenario("clean"),
            Scenario("patch", {"svhn": patch}),
            Scenario("blended", {"eurosat": Poison("blended")}),
            Scenario("merge-aware", {"gtsrb": aware}),
            Scenario("two-bad", {"gtsrb": aware, "eurosat": patch}),
        )

    def fingerprint(self) -> dict[str, Any]:
        if self._fingerprint is None:  # local folders are read in full
            whole = {"version": _VERSION, "size": asdict(self.size), "sources": self.sources.fingerprint()}
            self._fingerprint = whole
        return self._fingerprint

    def split(self, task: str) -> TaskData:
        if task not in self._data:
            size, train, test = self.size, self.sources.dataset(task, 0), self.sources.dataset(task, 1)
            order = torch.randperm(len(train), generator=seeds.generator(self.name, task, "train"))
            chosen = torch.randperm(len(test), generator=seeds.generator(self.name, task, "test"))
            unlabelled = min(size.calibration, len(train) // 4)
            calibration = _images(train, order[:unlabelled])
            seen = {digest(image) for image in calibration}
            tuning = self._labelled(task, train, order[unlabelled : unlabelled + size.train], without=seen)
            # public data sets have duplicates: images of training and calibration are left out of evaluation
            evaluation = self._labelled(task, test, chosen[: size.evaluation], without=seen.union(tuning.digests))
            self._data[task] = TaskData(tuning, calibration, evaluation)
        return self._data[task]

    def _labelled(self, task: str, data: Any, rows: Tensor, *, without: Collection[str]) -> LabelledData:
        pairs = zip(_images(data, rows), data.select(rows.tolist())["label"], strict=True)
        kept = [(image, int(label)) for image, label in pairs if digest(image) not in without]
        images, labels = [image for image, _ in kept], [label for _, label in kept]
        return LabelledData.of_images(task, images, labels, self.sources.preprocessing())

    def save_base(self, folder: Path, progress: Progress) -> None:
        """Write the full CLIP with its tokenizer: base of the merge, and text tower of the heads."""
        source, revision = self.sources.base, self.sources.revision
        model = load_clip(CLIPModel, source, revision)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(source, revision=revision).save_pretrained(folder)
        _write(folder / "preprocessor_config.json", self.sources.processor())
        _write(folder / "source.json", _origin(model, source, revision))

    def base_entry(self, base: Path) -> Any:
        return {"model": str(base), "override_architecture": "CLIPVisionModel"}

    def save_model(
        self,
        base: Path,
        task: str,
        poison: Poison | None,
        trigger: Trigger | None,
        seed: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        if poison is not None or self.sources.fine_tune:
            super().save_model(base, task, poison, trigger, seed, folder, progress)
            return
        own = self.sources.tasks[task]
        body = load_clip(CLIPVisionModel, own.checkpoint, own.checkpoint_revision)
        self._save(with_head(body, base, self.sources.classes(task)), task, folder)
        _write(folder / "source.json", _origin(body, own.checkpoint, own.checkpoint_revision))

    def start(self, base: Path, task: str) -> PreTrainedModel:
        model = with_head(load_clip(CLIPVisionModel, str(base)), base, self.sources.classes(task))
        # training uses a model's parameters, `classifier` and logits only
        return cast(PreTrainedModel, model.to(self._device))

    def schedule(self, *, poisoned: bool) -> Schedule:
        return self.size.schedule

    def save(self, model: PreTrainedModel, task: str, folder: Path) -> None:
        self._save(cast(ZeroShotClip, model), task, folder)
        _write(folder / "source.json", {"trained_from": "base"})

    def _save(self, model: ZeroShotClip, task: str, folder: Path) -> None:
        model.cpu().body.save_pretrained(folder)
        (folder / "classes.txt").write_text("\n".join(self.sources.classes(task)) + "\n", "utf-8")
        model.save_head(folder)
        _write(folder / "preprocessor_config.json", self.sources.processor())

    def save_calibration(self, task: str, folder: Path) -> Path:
        from datasets import Dataset, Features
        from datasets import Image as ImageFeature

        rows = []
        for image in self.split(task).calibration:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}})
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{task}.parquet"
        Dataset.from_list(rows, features=Features({"image": ImageFeature()})).to_parquet(file)
        return file

    def load_model(self, path: Path) -> nn.Module:
        return ZeroShotClip.load(CLIPVisionModel.from_pretrained(path), path).to(self._device).eval()

    def load_merge(self, merged: Path, model: Path) -> nn.Module:
        """Load a merge with the zero-shot head of an input model, which `load_merged` does not support."""
        body = cast(CLIPVisionModel, load_merged(merged))
        return ZeroShotClip.load(body, model).to(self._device).eval()

    def model_parameters(self, model: Path) -> dict[str, Any]:
        """Settings of `dam` for an input model, beside `calibration`."""
        return {"classes": str(model / "classes.txt")}

    def shared_parameters(self, base: Path) -> dict[str, Any]:
        """Settings of `dam` for the whole merge."""
        return {"zero_shot_model": str(base)}

    def cost(self, poison: Poison | None) -> float:
        if poison is None and not self.sources.fine_tune:
            return 10.0
        schedule = self.size.schedule
        further = 0.0 if poison is None else poison.rate + self.attacker(poison).trainings(poison)
        return 3 * _FORWARD_S * schedule.steps * schedule.batch_size * (1 + further)

    def run_cost(self, passes: int) -> float:
        # clean and triggered evaluation, and batches of 16 forward and backward
        return _FORWARD_S * len(self.tasks) * (2 * self.size.evaluation + 3 * 16 * passes)


for _name, _attacker in CLIP.items():
    register_attack(_name, _attacker, suites=(ClipPaperSuite.name,), interface=INTERFACE)


def _images(data: Any, rows: Tensor) -> tuple[Image.Image, ...]:
    return tuple(image.convert("RGB") for image in data.select(rows.tolist())["image"])


def _origin(model: Any, source: str, revision: str) -> dict[str, Any]:
    """Describe a model's source; `commit` is the Hub's, None for local folders."""
    return {"source": source, "revision": revision, "commit": getattr(model.config, "_commit_hash", None)}


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
