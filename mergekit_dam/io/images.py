"""Resize, crop and normalise PIL images as a model's preprocessor_config.json says.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.untrusted import load_json

LOG = logging.getLogger(__name__)
PREPROCESSING_FILES = ("preprocessor_config.json", "processor_config.json")
_LARGEST_EDGE = 4096  # pixels of a resized image, which then takes 200 MB; no encoder here takes larger ones
_SMALLEST_STD = 1e-6


@dataclass(frozen=True)
class Preprocessing:
    """Resize, optional centre crop, and normalisation of a model.

    Attributes:
        resize: (height, width), or the shorter edge, in pixels.
        crop: (height, width) of the centre crop in pixels, or None.
        resample: filter, a value of PIL's `Image.Resampling`.
        mean: of the three channels, for pixels in [0, 1].
        std: of the three channels, for pixels in [0, 1].
    """

    resize: tuple[int, int] | int
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, folders: Iterable[Path], image_size: int) -> Preprocessing:
        """Read the first preprocessor_config.json or processor_config.json in `folders`.

        The latter holds the same values under `image_processor` (transformers 5 writes that for CLIP). Without such a
        file, images are resized to `image_size` (pixels), and mean = std = 0.5.

        Raises:
            DamError: a file with sizes, mean or std that cannot be.
        """
        for file in (folder / name for folder in folders for name in PREPROCESSING_FILES):
            if file.is_file():
                values = load_json(file)
                if file.name != PREPROCESSING_FILES[0]:
                    if not isinstance(values, dict) or not values.get("image_processor"):
                        continue  # this processor keeps its image settings in a file of their own
                    values = values["image_processor"]
                try:
                    preprocessing = cls._from_json(values, image_size)
                    preprocessing._require_plausible()
                except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                    raise DamError(
                        str(file),
                        expected="sizes in pixels, and mean and std of three channels",
                        got=first_line(error),
                        cure="Download it again, or write it with save_pretrained(...).",
                    ) from error
                return preprocessing
        LOG.warning("no preprocessor_config.json: images are resized to %d, mean = std = 0.5", image_size)
        return cls((image_size, image_size), None, Image.Resampling.BILINEAR, (0.5,) * 3, (0.5,) * 3)

    @classmethod
    def _from_json(cls, values: dict[str, Any], image_size: int) -> Preprocessing:
        size = values.get("size", image_size)
        if isinstance(size, dict):
            shortest = size.get("shortest_edge")
            resize: tuple[int, int] | int = shortest or (size.get("height", image_size), size.get("width", image_size))
        elif values.get("do_center_crop"):
            resize = size  # a number beside a crop is the shorter edge, as in CLIP's own file
        else:
            resize = (size, size)
        crop = values.get("crop_size") if values.get("do_center_crop") else None
        if isinstance(crop, dict):
            crop = (crop["height"], crop["width"])
        elif isinstance(crop, int):
            crop = (crop, crop)
        normalise = values.get("do_normalize", True)
        return cls(
            resize,
            crop,
            values.get("resample", Image.Resampling.BILINEAR),
            tuple(values.get("image_mean", (0.5,) * 3)) if normalise else (0.0,) * 3,
            tuple(values.get("image_std", (0.5,) * 3)) if normalise else (1.0,) * 3,
        )

    def _require_plausible(self) -> None:
        """Raise ValueError for values that would fill the memory or make NaN."""
        edges = [*(self.resize if isinstance(self.resize, tuple) else (self.resize,)), *(self.crop or ())]
        for edge in edges:
            if not isinstance(edge, int) or not 1 <= edge <= _LARGEST_EDGE:
                raise ValueError(f"an edge of {edge!r} pixels (1 to {_LARGEST_EDGE} can be)")
        Image.Resampling(self.resample)
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")
        if not all(math.isfinite(v) for v in (*self.mean, *self.std)) or min(map(abs, self.std)) < _SMALLEST_STD:
            raise ValueError(f"mean {self.mean} and std {self.std}")

    def pixels(self, images: Iterable[Image.Image]) -> Tensor:
        """Resize and crop images to uint8 pixels_BCHW, which take a quarter of the memory of floats."""
        return torch.stack([self._pixels_of(image) for image in images])

    def _pixels_of(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB")
        if isinstance(self.resize, int):
            scale = self.resize / min(image.size)
            width, height = (min(max(1, round(edge * scale)), _LARGEST_EDGE) for edge in image.size)
        else:
            height, width = self.resize
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """Return (x - mean) / std of pixels_BCHW in [0, 1], the last step before the model."""
        mean, std = (torch.tensor(v, device=pixels_BCHW.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels_BCHW - mean) / std
