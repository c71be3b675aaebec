"""Render HTML pages from templates, with every value escaped, and recovered triggers as images or words."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mergekit_dam.artifact.triggers_file import StoredTrigger

_EDGE = 96  # pixels, at least, of an image, which is enlarged without smoothing


def render(template: str, /, **values: Any) -> str:
    """Render a page from `templates/`.

    Raises:
        ValueError, TypeError: values that the template cannot show.
    """
    environment = Environment(
        loader=PackageLoader("mergekit_dam.publish", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "short": _short, "moment": _moment, "share": _share}
    try:
        return environment.get_template(template).render(**values)
    except TemplateError as error:
        raise ValueError(f"{template}: {error}") from error


def shown_triggers(triggers: Sequence[StoredTrigger]) -> list[dict[str, Any]]:
    """Prepare recovered triggers for a page: facts, words, and images as data URIs."""
    return [{**trigger.facts, "pictures": _pictures(trigger.tensors)} for trigger in triggers]


def own_markup(svg: str) -> Markup:
    """Mark a figure of ours as safe markup; matplotlib has escaped the names in it."""
    return Markup(svg)


def _pictures(tensors: Mapping[str, Tensor]) -> list[dict[str, str]]:
    if "mask" not in tensors:
        return []
    mask_1HW, pattern_CHW = tensors["mask"].float(), tensors["pattern"].float()
    stamped = 0.5 * (1 - mask_1HW) + pattern_CHW * mask_1HW
    return [
        {"label": "on grey", "uri": _uri(stamped)},
        {"label": "where (white: replaced)", "uri": _uri(mask_1HW)},
    ]


def _uri(image_CHW: Tensor) -> str:
    pixels = (image_CHW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3])
    factor = max(1, -(-_EDGE // max(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _percent(counts: Sequence[int]) -> str:
    hits, total = counts
    return f"{100 * hits / total:.1f} % ({hits}/{total})" if total else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _moment(timestamp: Any) -> str:
    """Write an ISO 8601 time in UTC, to the minute, for readers; any other value unchanged."""
    try:
        return f"{datetime.fromisoformat(str(timestamp)).astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return str(timestamp)


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else "-"
