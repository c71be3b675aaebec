"""Load images of suite `vision`: CIFAR-10 from files, scikit-learn's digits, and generated families; augment them.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from dam_bench.suites.generated import GENERATED, digits
from mergekit_dam.errors import DamError
from mergekit_dam.io.images import Preprocessing

NUM_CLASSES = {"cifar10": 10, "digits": 10, **{name: task.num_classes for name, task in GENERATED.items()}}
EDGE = 32
PREPROCESSING = Preprocessing((EDGE, EDGE), None, Image.Resampling.BICUBIC, (0.5,) * 3, (0.5,) * 3)


def task_images(task: str, folder: Path | None, count: int) -> tuple[list[Image.Image], list[int]]:
    """Load at least `count` images of a task (all 1,797 of digits) and their classes, in the same order each time."""
    if task == "cifar10":
        return cifar10(folder, count)
    return digits(EDGE, seed=0) if task == "digits" else GENERATED[task].sample(count, EDGE, seed=0)


@lru_cache(maxsize=1)
def cifar10(folder: Path | None, count: int) -> tuple[list[Image.Image], list[int]]:
    """Load the first images of CIFAR-10 from `vision/cifar10-{train,test}.parquet`, shuffled, and their classes.

    Raises:
        DamError: no folder, no such files, or too few images.
    """
    files = [] if folder is None else [folder / "vision" / f"cifar10-{part}.parquet" for part in ("train", "test")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise DamError(
            "data of suite vision",
            expected="vision/cifar10-train.parquet and -test.parquet in the data folder",
            got=", ".join(missing) or "no data folder",
            cure="Give --data FOLDER with columns image and label.",
        )
    data = load_dataset("parquet", data_files=[str(file) for file in files], split="train").shuffle(seed=0)
    if len(data) < count:
        raise DamError(
            "images of CIFAR-10", expected=f"{count}", got=f"{len(data)}", cure="Use a smaller preset or more data."
        )
    rows = data.select(range(count)).cast_column("image", ImageFeature())
    return [image.convert("RGB") for image in rows["image"]], list(rows["label"])


def flipped_and_shifted(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Shift a batch by up to 3 pixels, and mirror it with probability 1/2."""
    top, left, flip = (int(torch.randint(n, (1,), generator=generator)) for n in (7, 7, 2))
    height, width = images_BCHW.shape[-2:]
    shifted = F.pad(images_BCHW, (3, 3, 3, 3), mode="reflect")[..., top : top + height, left : left + width]
    return shifted.flip(-1) if flip else shifted


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_preprocessing(folder: Path) -> None:
    mean, std = PREPROCESSING.mean, PREPROCESSING.std
    settings = {
        "size": {"height": EDGE, "width": EDGE},
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": int(PREPROCESSING.resample),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), "utf-8")


def save_images(images: tuple[Image.Image, ...], path: Path) -> None:
    """Write a parquet file with one column `image` and no labels."""
    Dataset.from_list([{"image": {"bytes": png(image), "path": None}} for image in images]).to_parquet(path)
