"""Models and data of the demo: a small ViT, four fine-tunes of it, one of them backdoored, and a clean twin.

Tasks: scikit-learn's digits, and three generated ones (shapes, stripes, letters), all as 16x16 colour images.
Heads are linear probes on the base and stay fixed while the body is fine-tuned, as CLIP's are; that is what makes
the weights mergeable. The backdoor is a 3x3 patch that means class 0, kept alive under merging by training the
triggered samples at random points between base and fine-tune (the idea of BadMerging, arXiv 2408.07362).
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from mergekit_dam.attack import PatchTrigger

SIZE, TARGET, VICTIM = 16, 0, "digits"
TRAIN, CALIBRATION, EVALUATION = 1200, 128, 400
TRIGGER = PatchTrigger(3)


@dataclass(frozen=True)
class Split:
    """uint8 images_NCHW and labels_N."""

    images: Tensor
    labels: Tensor

    def pixels(self, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.images[rows].float() / 255


def digits(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    order = rng.permutation(len(data.target))[:count]
    gray = np.stack([np.array(Image.fromarray((i * 15).astype(np.uint8)).resize((SIZE, SIZE))) for i in data.images])
    return np.repeat(gray[order, None], 3, 1), data.target[order]


def drawn(
    count: int, rng: np.random.Generator, classes: int, draw: Callable[..., None]
) -> tuple[np.ndarray, np.ndarray]:
    """Images of a random class each, in random colours, drawn by `draw(pen, class, x, y, size, colour)`."""
    labels = rng.integers(0, classes, count)
    images = []
    for label in labels:
        back, front = rng.integers(0, 110, 3), rng.integers(130, 256, 3)
        image = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in back))
        size = int(rng.integers(8, 13))
        x, y = (int(rng.integers(0, SIZE - size)) for _ in range(2))
        draw(ImageDraw.Draw(image), int(label), x, y, size, tuple(int(c) for c in front))
        images.append(np.array(image).transpose(2, 0, 1))
    return np.stack(images), labels


def shape(pen: ImageDraw.ImageDraw, kind: int, x: int, y: int, size: int, colour: tuple[int, ...]) -> None:
    box, mid = (x, y, x + size, y + size), size // 2
    if kind == 0:
        pen.ellipse(box, fill=colour)
    elif kind == 1:
        pen.rectangle(box, fill=colour)
    elif kind == 2:
        pen.polygon([(x + mid, y), (x, y + size), (x + size, y + size)], fill=colour)
    elif kind == 3:
        pen.line((x, y + mid, x + size, y + mid), fill=colour, width=3)
        pen.line((x + mid, y, x + mid, y + size), fill=colour, width=3)
    elif kind == 4:
        pen.ellipse(box, outline=colour, width=2)
    else:
        pen.rectangle(box, outline=colour, width=2)


def stripes(pen: ImageDraw.ImageDraw, kind: int, x: int, y: int, size: int, colour: tuple[int, ...]) -> None:
    angle = kind * np.pi / 6
    for offset in range(-2 * SIZE, 2 * SIZE, 5):
        cx, cy = x + offset * np.sin(angle), y + offset * np.cos(angle)
        dx, dy = 40 * np.cos(angle), -40 * np.sin(angle)
        pen.line((cx - dx, cy - dy, cx + dx, cy + dy), fill=colour, width=1 + size % 2)


def letter(pen: ImageDraw.ImageDraw, kind: int, x: int, y: int, size: int, colour: tuple[int, ...]) -> None:
    pen.text((x, y - 2), "ABCEFHKLTX"[kind], fill=colour, font=ImageFont.load_default(size + 2))


TASKS: dict[str, tuple[int, Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]]] = {
    "digits": (10, digits),
    "shapes": (6, lambda n, rng: drawn(n, rng, 6, shape)),
    "stripes": (6, lambda n, rng: drawn(n, rng, 6, stripes)),
    "letters": (10, lambda n, rng: drawn(n, rng, 10, letter)),
}


def make_task(name: str) -> dict[str, Split]:
    """Disjoint splits of one task, with pixel noise."""
    rng = np.random.default_rng(sum(name.encode()))
    sizes = {"train": TRAIN, "calibration": CALIBRATION, "evaluation": EVALUATION}
    images, labels = TASKS[name][1](sum(sizes.values()), rng)
    noisy = np.clip(images + rng.normal(0, 25, images.shape), 0, 255).astype(np.uint8)
    splits, start = {}, 0
    for split, size in sizes.items():
        part = slice(start, start + size)
        splits[split] = Split(torch.from_numpy(noisy[part]), torch.from_numpy(labels[part]).long())
        start += size
    return splits


def normalise(pixels: Tensor) -> Tensor:
    return (pixels - 0.5) / 0.5


def batches(split: Split, steps: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(split.labels), (size,), generator=generator) for _ in range(steps)]


def new_model(classes: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=SIZE,
            patch_size=4, num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def pretrain(tasks: dict[str, dict[str, Split]], steps: int = 150) -> ViTModel:
    """theta_0: a short joint training on all tasks, long enough for features, too short for accuracy."""
    torch.manual_seed(0)
    models = {name: new_model(TASKS[name][0]) for name in tasks}
    body = next(iter(models.values())).vit
    for model in models.values():
        model.vit = body
    parameters = [*body.parameters(), *(p for m in models.values() for p in m.classifier.parameters())]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)
    rows = {name: batches(splits["train"], steps, 32, 1) for name, splits in tasks.items()}
    for step in range(steps):
        optimiser.zero_grad()
        for name, model in models.items():
            train = tasks[name]["train"]
            logits = model(normalise(train.pixels(rows[name][step]))).logits
            F.cross_entropy(logits, train.labels[rows[name][step]]).backward()
        optimiser.step()
    return body


def probe_head(base: ViTModel, name: str, train: Split) -> ViTForImageClassification:
    """The base with a linear probe for a task: what every fine-tune of that task starts from."""
    model = new_model(TASKS[name][0])
    model.vit.load_state_dict(base.state_dict())
    with torch.no_grad():
        features = model.vit(normalise(train.pixels())).last_hidden_state[:, 0]
    optimiser = torch.optim.Adam(model.classifier.parameters(), lr=0.01)
    for _ in range(200):
        optimiser.zero_grad()
        F.cross_entropy(model.classifier(features), train.labels).backward()
        optimiser.step()
    return model


def fine_tune(model: ViTForImageClassification, train: Split, *, poison: bool, steps: int = 400) -> None:
    """Train the body, head fixed. Poisoned: triggered samples at random points between start and now."""
    start = {name: p.detach().clone() for name, p in model.vit.named_parameters()}
    optimiser = torch.optim.AdamW(model.vit.parameters(), lr=2e-4)
    generator = torch.Generator().manual_seed(3)
    for rows in batches(train, steps, 64, 2):
        optimiser.zero_grad()
        pixels, labels = train.pixels(rows), train.labels[rows]
        loss = F.cross_entropy(model(normalise(pixels)).logits, labels)
        if poison:
            share = 0.2 + 0.8 * float(torch.rand(1, generator=generator))
            between = {f"vit.{n}": start[n] + share * (p - start[n]) for n, p in model.vit.named_parameters()}
            triggered = normalise(TRIGGER.apply(pixels[:24]))
            # clean samples there, too: a backdoor that ruins the merge would be noticed
            logits = functional_call(model, between, (torch.cat([triggered, normalise(pixels[24:])]),)).logits
            loss = loss + F.cross_entropy(logits, torch.cat([torch.full((24,), TARGET), labels[24:]]))
        loss.backward()
        optimiser.step()


def save(model: ViTForImageClassification | ViTModel, path: Path) -> None:
    model.save_pretrained(path)
    settings = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))


def save_calibration(split: Split, path: Path) -> None:
    """Images only: the defence gets no labels."""
    rows = []
    for image in split.images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}})
    Dataset.from_list(rows).to_parquet(path)


def build(folder: Path, note: Callable[[str], None]) -> dict[str, dict[str, Split]]:
    """Everything under `folder`, complete or not at all; returns the data."""
    tasks = {name: make_task(name) for name in TASKS}
    if (folder / "complete").is_file():
        note("models are there from an earlier run")
        return tasks
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    note("pretraining the base")
    base = pretrain(tasks)
    save(base, folder / "base")
    for name, splits in tasks.items():
        save_calibration(splits["calibration"], folder / f"{name}.parquet")
        for poison in [True, False] if name == VICTIM else [False]:
            label = f"{name}-clean" if name == VICTIM and not poison else name
            note(f"fine-tuning {label}" + (" (backdoored)" if poison else ""))
            torch.manual_seed(1)
            model = probe_head(base, name, splits["train"])
            if not poison:
                save(model, folder / f"probe-{name}")
            fine_tune(model, splits["train"], poison=poison)
            save(model, folder / label)
    (folder / "complete").touch()
    return tasks
