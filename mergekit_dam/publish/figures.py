"""Draw the figures of the report with matplotlib (extra `report`), as SVG for the page and PNG for a model card.

In the SVG all text and lines have the colour of the page's text, so that it is legible on light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from mergekit_dam.merging.mask_keys import BACKDOOR_DETECTION, TASK_SHARED
from mergekit_dam.publish.layers import BOTH, Layer

_INK = "#010203"  # stands for currentColor until the SVG is finished
_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#14b8a6", "#ec4899", "#84cc16")
_LABELS = {TASK_SHARED: "M1, task-shared", BACKDOOR_DETECTION: "M2, backdoor-detection", BOTH: "both: what is kept"}
_OF_MASK = dict(zip(_LABELS, _COLOURS, strict=False))
_TALLEST = 64  # models, beyond which a figure does not grow
_NAMED = 60  # at most, layers with a label on an axis
_ANNOTATED = 120  # at most, cells of a heat map that shows their values
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # names of models are no formulas
    "svg.fonttype": "none",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}
Draw = Callable[[Figure], None]


def figures(layers: Sequence[Layer], records: Sequence[Mapping[str, Any]], models: Sequence[str]) -> dict[str, Draw]:
    """Choose the figures that the data allow, as file name -> function that draws it.

    Args:
        layers: layers of the masks.
        records: records of metrics.jsonl.
        models: names of the T models.
    """
    steps = [record for record in records if "loss" in record and "step" in record]
    drawn: dict[str, Draw] = {}
    if steps:
        drawn["loss"] = lambda figure: _loss(figure, steps)
    if any(layer.density for layer in layers):
        drawn["density"] = lambda figure: _density(figure, layers)
    drawn["coefficients"] = lambda figure: _coefficients(figure, layers, models)
    return drawn


def as_svg(name: str, draw: Draw) -> str:
    """Draw a figure as an `<svg>` element without a fixed size, in the page's text colour."""
    colours: Any = {
        key: _INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    }
    with rc_context({**_STYLE, **colours, "svg.hashsalt": name}):
        figure = Figure(figsize=(7.2, 2.6), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace(_INK, "currentColor")
    start = text.index("<svg")
    end = text.index(">", start)
    (box,) = (part for part in text[start:end].split('" ') if "viewBox" in part)
    view = box.partition('viewBox="')[2].rstrip('"')
    # two figures on one page must not share the ids of their clip paths
    body = text[end + 1 :].replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
    body = body.replace('xlink:href="#', f'xlink:href="#{name}-')
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{name}" viewBox="{view}">'
    return head + body.strip()


def as_png(draw: Draw) -> bytes:
    """Draw a figure as a PNG, black on white, at twice the size of the page's."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 2.6), layout="constrained", facecolor="white")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _loss(figure: Figure, steps: Sequence[Mapping[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    figure.set_size_inches(7.2, 3.0)
    numbers, shown = range(len(steps)), list[float]()
    for colour, (label, prefix) in zip(
        _COLOURS, (("all", ""), ("answers kept", "/perf/"), ("under triggers", "/safe/")), strict=False
    ):
        values = [_total(record, prefix) for record in steps]
        shown += [value for value in values if value is not None]
        if any(value is not None for value in values):
            left.plot(numbers, [float("nan") if v is None else v for v in values], color=colour, label=label, lw=1.2)
    # a logarithmic axis within one decade would have no numbers
    if min(shown) > 0.0 and max(shown) >= 10 * min(shown):
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter(NullFormatter())
    left.set(title="loss, summed over tasks", xlabel="step")
    left.legend()
    for mask, colour in _OF_MASK.items():
        shares = [record.get(f"density/{mask}", float("nan")) for record in steps]
        if any(f"density/{mask}" in record for record in steps):
            right.plot(numbers, shares, color=colour, label=_LABELS[mask])
    right.set(title="share that a mask keeps", xlabel="step", ylim=(0, 1.02))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if right.lines:
        right.legend()


def _total(record: Mapping[str, Any], prefix: str) -> float | None:
    if not prefix:
        return float(record["loss"])
    parts = [float(value) for key, value in record.items() if prefix in key]
    return sum(parts) if parts else None


def _density(figure: Figure, layers: Sequence[Layer]) -> None:
    axes = figure.subplots()
    places = range(len(layers))
    for mask, colour in _OF_MASK.items():
        if any(mask in layer.density for layer in layers):
            values = [layer.density.get(mask, float("nan")) for layer in layers]
            axes.plot(places, values, color=colour, marker="o", ms=3.5, lw=1.2, label=_LABELS[mask])
    axes.set(title="share of the task vectors that the masks keep, by layer", ylim=(0, 1.02))
    _name_layers(axes, layers)
    axes.legend(loc="lower right", ncols=3, fontsize=8)


def _coefficients(figure: Figure, layers: Sequence[Layer], models: Sequence[str]) -> None:
    figure.set_size_inches(7.2, 1.9 + 0.5 * min(len(models), _TALLEST))
    upper, lower = figure.subplots(2, 1)
    given = [[layer.coefficients[t] for layer in layers] for t in range(len(models))]
    kept = [[layer.coefficients[t] * layer.density.get(BOTH, 1.0) for layer in layers] for t in range(len(models))]
    top = max(max(map(max, given)), 1e-9)
    for axes, values, title in ((upper, given, "coefficient"), (lower, kept, "coefficient x share that is kept")):
        picture = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=top, interpolation="nearest")
        axes.set_yticks(range(len(models)), models)
        axes.set_title(f"{title}, by model and layer")
        if axes is lower:
            _name_layers(axes, layers)
        else:
            axes.set_xticks([])
        if len(models) * len(layers) <= _ANNOTATED:
            for t, row in enumerate(values):
                for i, value in enumerate(row):
                    shade = "black" if value > 0.6 * top else "white"
                    axes.text(i, t, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=shade)
        figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.01)


def _name_layers(axes: Axes, layers: Sequence[Layer]) -> None:
    every = max(1, len(layers) // 24)
    chosen = [i for i in range(len(layers)) if i % every == 0 or not layers[i].label[-1].isdecimal()]
    chosen = chosen if len(chosen) <= _NAMED else chosen[:: -(-len(chosen) // _NAMED)]
    rotation = 90 if any(len(layers[i].label) > 4 for i in chosen) else 0
    axes.set_xticks(chosen, [layers[i].label for i in chosen], rotation=rotation, fontsize=7)
