"""Decode untrusted images, from bytes or from files that the user named, by decoders that cannot call a program.

A path or URL inside a data file is not followed. Bounds on each image keep a small file from filling the memory.
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
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # not EPS, for which PIL starts Ghostscript
_PIXELS = 1 << 26  # at most, of one image: 200 MB decoded, three times the pixels of a phone's photo
_IMAGE_BYTES = 1 << 28
_WHITE_16_BIT = 65535


def image_of(row: Any, where: str, *, trusted: Iterable[Path] = ()) -> Image.Image:
    """Decode an image to RGB, rotated as its EXIF entry says.

    Args:
        row: the path of an image that the user named, bytes, or {"bytes", "path"} of a dataset.
        where: for errors.
        trusted: folders from which a dataset may name files: the cache it was downloaded to.

    Raises:
        DamError: the value is no image, too large, or a path outside the trusted folders.
    """
    try:
        source = io.BytesIO(row) if isinstance(row, bytes) else row
        if isinstance(row, dict):
            source = (
                io.BytesIO(row["bytes"]) if row.get("bytes") is not None else _trusted_file(row.get("path"), trusted)
            )
        size = source.stat().st_size if isinstance(source, Path) else len(source.getbuffer())
        if size > _IMAGE_BYTES:
            raise ValueError(f"{size} bytes, at most {_IMAGE_BYTES} are read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is lower
            with Image.open(source, formats=_FORMATS) as image:
                if image.width * image.height > _PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels, at most {_PIXELS} are read")
                image.load()
                return _to_eight_bit(ImageOps.exif_transpose(image), image.format).convert("RGB")
    except PermissionError as error:
        raise permission_denied(f"{where} ({row})" if isinstance(row, Path) else where) from error
    except Exception as error:  # decoders raise many kinds on damaged bytes
        raise DamError(
            where, expected="an image", got=first_line(error), cure="Remove or repair this sample."
        ) from error


def _to_eight_bit(image: Image.Image, form: str | None) -> Image.Image:
    """Scale 16-bit grey to 8 bit, since PIL would clip all values above 255 to white.

    Raises:
        ValueError: grey values without a known range.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    grey = np.asarray(image)
    wide = grey.dtype.itemsize > 2 and form != "PNG"
    if image.mode == "F" or wide or grey.min() < 0 or grey.max() > _WHITE_16_BIT:
        raise ValueError(
            f"grey values of {8 * grey.dtype.itemsize} bit ({image.mode}), whose white is not known: "
            "save it with 8 or 16 bit"
        )
    return Image.fromarray(np.round(grey / (_WHITE_16_BIT / 255)).astype(np.uint8))


def _trusted_file(path: Any, trusted: Iterable[Path]) -> Path:
    if not isinstance(path, str):
        raise ValueError("neither bytes nor a path")
    file = Path(path)
    if not any(file.is_absolute() and file.resolve().is_relative_to(folder.resolve()) for folder in trusted):
        raise ValueError(f"the path {path}, which a data file may not name: put the image's bytes into the data")
    return file


def download_folders() -> tuple[Path, ...]:
    """Caches of datasets and of the Hub; a Hub dataset may name image files there only."""
    import datasets
    import huggingface_hub

    return tuple(Path(folder) for folder in (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE))
