"""Images of strangers: decoded here, from bytes or files that the user named, by decoders that cannot call a program.

A path or URL inside a data file is not followed. Bounds on one image keep a small file from filling the memory.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mergekit_dam.errors import DamError, first_line, permission_denied

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # PIL knows EPS, too, and hands it to Ghostscript
_PIXELS = 1 << 26  # of one image: 200 MB once decoded, three times what a phone takes
_IMAGE_BYTES = 1 << 28
_WHITE = 65535  # of grey with 16 bit


def image_of(row: Any, where: str, *, trusted: Iterable[Path] = ()) -> Image.Image:
    """RGB, turned as its EXIF entry says.

    Args:
        row: the path of an image that the user named, bytes, or {"bytes", "path"} of a dataset.
        where: for errors.
        trusted: folders from which a dataset may name files: the cache it was downloaded to.

    Raises:
        DamError: no image, too large a one, or one that lies elsewhere.
    """
    try:
        source = io.BytesIO(row) if isinstance(row, bytes) else row
        if isinstance(row, dict):
            source = io.BytesIO(row["bytes"]) if row.get("bytes") is not None else _inside(row.get("path"), trusted)
        size = source.stat().st_size if isinstance(source, Path) else len(source.getbuffer())
        if size > _IMAGE_BYTES:
            raise ValueError(f"{size} bytes, at most {_IMAGE_BYTES} are read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is lower
            with Image.open(source, formats=_FORMATS) as image:
                if image.width * image.height > _PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels, at most {_PIXELS} are read")
                image.load()
                return _eight_bit(ImageOps.exif_transpose(image), image.format).convert("RGB")
    except PermissionError as error:
        raise permission_denied(f"{where} ({row})" if isinstance(row, Path) else where) from error
    except Exception as error:  # decoders raise whatever they meet in damaged bytes
        raise DamError(
            where, expected="an image", got=first_line(error), cure="Remove or repair this sample."
        ) from error


def _eight_bit(image: Image.Image, form: str | None) -> Image.Image:
    """Grey of 16 bit as 8 bit, since PIL cuts off what is above 255 and leaves a white picture.

    Raises:
        ValueError: grey values without a known range.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    grey = np.asarray(image)
    wide = grey.dtype.itemsize > 2 and form != "PNG"
    if image.mode == "F" or wide or grey.min() < 0 or grey.max() > _WHITE:
        raise ValueError(
            f"grey values of {8 * grey.dtype.itemsize} bit ({image.mode}), whose white is not known: "
            "save it with 8 or 16 bit"
        )
    return Image.fromarray(np.round(grey / (_WHITE / 255)).astype(np.uint8))


def _inside(path: Any, trusted: Iterable[Path]) -> Path:
    if not isinstance(path, str):
        raise ValueError("neither bytes nor a path")
    found = Path(path)
    if not any(found.is_absolute() and found.resolve().is_relative_to(folder.resolve()) for folder in trusted):
        raise ValueError(f"the path {path}, which a data file may not name: put the image's bytes into the data")
    return found


def download_folders() -> tuple[Path, ...]:
    """Where datasets keeps what it downloaded; only files there may be named by a Hub dataset."""
    import datasets
    import huggingface_hub

    return tuple(Path(folder) for folder in (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE))
