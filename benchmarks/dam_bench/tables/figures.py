"""Draw the figures of the benchmark as PNGs, from the result JSONs alone.

Colours are Okabe and Ito's, which colour-blind readers can distinguish. Every method also has its own marker, and our
methods' markers are filled, so that the figures can be read in grey. The backend is Agg: no display is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from dam_bench.tables.aggregate import SuiteResults
from dam_bench.tables.pareto import Point
from dam_bench.tables.results import Run, Spread
from dam_bench.tables.sections import figure_names

# Group -> colours and markers, taken in turn by its methods in the order of tables.
_LOOKS: dict[str, tuple[tuple[str, ...], str]] = {
    "reference": (("#000000",), "os"),
    "undefended": (("#0072B2", "#56B4E9", "#009E73"), "^DvP*"),
    "learned": (("#CC79A7",), "<>"),
    "other baseline": (("#7F7F7F",), "phd8H"),
    "defence": (("#7F7F7F", "#332288", "#117733"), "o^sDvP*Xd"),
    "public DAM": (("#E69F00",), "X"),
    "ours": (("#F2B58C", "#A84A00", "#5C2900", "#D55E00"), "^vsoDP"),
    "afterwards": (("#D55E00",), "1234+x"),
}
_LINES = ("-", "--", "-.", ":")
_COLUMNS = 3
_PANEL = (4.3, 3.7)  # inches
_OFFSETS = ((6, 4), (6, -11), (-18, 4), (-18, -11), (-4, 9), (-4, -16), (12, -3), (-24, -3))  # of a label, points


@dataclass(frozen=True)
class _Style:
    colour: str
    marker: str
    line: Any
    filled: bool

    @property
    def options(self) -> dict[str, Any]:
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": 7,
            "markeredgewidth": 0.7 if self.filled else 1.4,
            "markerfacecolor": self.colour if self.filled else "white",
            "markeredgecolor": "black" if self.filled else self.colour,
        }


def write_figures(groups: Iterable[SuiteResults], folder: Path) -> list[Path]:
    """Write the figures that `sections.figure_names` lists, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    draw = {"acc-asr": accuracy_against_success, "asr-coefficient": success_against_coefficient, "density": density}
    for results in groups:
        for name in figure_names(results):
            kind = next(kind for kind in draw if name.endswith(f"{kind}.png"))
            figure = draw[kind](results)
            # Without the version of matplotlib the bytes depend on the figure alone.
            figure.savefig(folder / name, dpi=110, metadata={"Software": None})
            written.append(folder / name)
    return written


def accuracy_against_success(results: SuiteResults) -> Figure:
    """Draw ACC over ASR on the attacked task, a panel per scenario, with bars from the smallest to the largest seed."""
    figure, panels = _panels(results, results.poisoned, "ASR on the attacked task, %", "ACC, %")
    styles = _styles(results)
    notes: dict[str, tuple[list[tuple[float, float, str]], list[Point]]] = {}
    for scenario, axes in panels.items():
        axes.set_title(scenario, fontsize=10)
        labelled, points = notes.setdefault(scenario, ([], []))
        for stem, methods in results.curves(scenario).items():
            ends = ["base"] if results.any_run(methods[0]).coefficient is not None else []
            there = [m for m in ends + methods if _has_point(results, scenario, m)]
            x = [results.success(scenario, method).mean for method in there]
            y = [results.accuracy(scenario, method).mean for method in there]
            axes.plot(x, y, styles[stem].line, linewidth=1.2, color=styles[stem].colour, zorder=2)
        for method in results.methods(scenario):
            if not _has_point(results, scenario, method):
                continue
            run = results.any_run(method)
            success, accuracy = results.success(scenario, method), results.accuracy(scenario, method)
            style = styles[run.stem if run.group == "undefended" else method]
            axes.errorbar(
                [success.mean],
                [accuracy.mean],
                xerr=_bars(success),
                yerr=_bars(accuracy),
                elinewidth=0.9,
                linestyle="none",
                zorder=4 if style.filled else 3,
                **style.options,
            )
            points.append((success.mean, accuracy.mean))
            if run.group == "undefended" and run.coefficient is not None:
                labelled.append((success.mean, accuracy.mean, f"{run.coefficient:g}"))
        axes.set_xlim(-4, 104)
        axes.grid(alpha=0.25)
    _legend(figure, results, styles)
    figure.canvas.draw()  # places the panels, so that overlaps of labels can be computed
    for scenario, (labelled, points) in notes.items():
        _label(figure, panels[scenario], labelled, points)
    return figure


def success_against_coefficient(results: SuiteResults) -> Figure:
    """Draw ASR of undefended merges over the coefficient, a panel per scenario, with floors as thin dashed lines."""
    figure, panels = _panels(results, results.poisoned, "merging coefficient", "ASR on the attacked task, %")
    styles = _styles(results)
    shown: dict[str, Any] = {}
    for scenario, axes in panels.items():
        axes.set_title(scenario, fontsize=10)
        for stem, methods in results.curves(scenario).items():
            points = [(results.any_run(method).coefficient, method) for method in methods]
            for dashed in (False, True):
                spreads = [
                    (c, results.floor(scenario, m) if dashed else results.success(scenario, m))
                    for c, m in points
                    if c is not None
                ]
                measured = [(c, spread) for c, spread in spreads if spread.values]
                if not measured:
                    continue
                x, y = [c for c, _ in measured], [spread.mean for _, spread in measured]
                style = {**styles[stem].options, "markersize": 4 if dashed else 7, "linewidth": 0.9 if dashed else 1.6}
                label = f"{stem}, floor (all-clean)" if dashed else stem
                (shown[label],) = axes.plot(x, y, linestyle=(0, (4, 3)) if dashed else "-", **style)
                low, high = [spread.low for _, spread in measured], [spread.high for _, spread in measured]
                axes.fill_between(x, low, high, color=styles[stem].colour, alpha=0.15, linewidth=0)
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.25)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def density(results: SuiteResults) -> Figure:
    """Draw the kept fraction over layers, a panel per mask and a line per method, mean over scenarios and seeds."""
    runs = [run for run in results.runs.values() if run.density]
    masks = sorted({mask for run in runs for layer in run.density.values() for mask in layer})
    layers = sorted(
        {layer for run in runs for layer in run.density},
        key=lambda k: (not k.isdigit(), int(k) if k.isdigit() else 0, k),
    )
    figure, panels = _panels(results, masks, "layer", "density (kept fraction)")
    styles = _styles(results)
    shown: dict[str, Any] = {}
    methods = sorted({(run.order, run.method) for run in runs})
    for mask, axes in panels.items():
        axes.set_title(f"mask {mask}", fontsize=10)
        for place, (_, method) in enumerate(methods):
            values = [_densities(runs, method, layer, mask) for layer in layers]
            there = [place for place, values_of_layer in enumerate(values) if values_of_layer]
            if there:
                y = [sum(values[i]) / len(values[i]) for i in there]
                style = styles[method]
                (shown[method],) = axes.plot(there, y, linestyle=_LINES[place % len(_LINES)], **style.options)
        axes.set_xticks(range(len(layers)), layers)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _panels(results: SuiteResults, titles: Iterable[str], xlabel: str, ylabel: str) -> tuple[Figure, dict[str, Any]]:
    """Make a figure with a named panel per title, and a heading with suite, preset and seeds."""
    names = list(titles)
    columns = 2 if len(names) in (2, 4) else min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    width, height = max(2, columns) * _PANEL[0], rows * _PANEL[1] + 1.3
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        seeds = f"{len(results.seeds)} seed{'s' if len(results.seeds) > 1 else ''}"
        figure.suptitle(f"{results.suite}, {results.preset}, {seeds}", fontsize=11)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(names) :]:
        axes.remove()
    for place, axes in enumerate(grid[: len(names)]):
        axes.set_xlabel(xlabel)
        if place % columns == 0:
            axes.set_ylabel(ylabel)
    return figure, dict(zip(names, grid, strict=False))


def _styles(results: SuiteResults) -> dict[str, _Style]:
    """Choose a style per method (undefended: per stem), the same in every panel and figure."""
    styles: dict[str, _Style] = {}
    counts: dict[str, int] = {}
    for _, method in sorted({(run.order, run.method) for run in results.runs.values()}):
        run: Run = results.any_run(method)
        name = run.stem if run.group == "undefended" else method
        if name in styles:
            continue
        nth = counts.setdefault(run.group, 0)
        colours, markers = _LOOKS[run.group]
        colour, marker = colours[nth % len(colours)], markers[nth % len(markers)]
        styles[name] = _Style(colour, marker, _LINES[nth % len(_LINES)], run.group == "ours")
        counts[run.group] += 1
    return styles


def _has_point(results: SuiteResults, scenario: str, method: str) -> bool:
    return bool(results.success(scenario, method).values and results.accuracy(scenario, method).values)


def _bars(spread: Spread) -> list[list[float]]:
    # the mean of equal values can differ from them in the last bit
    return [[max(0.0, spread.mean - spread.low)], [max(0.0, spread.high - spread.mean)]]


def _densities(runs: Iterable[Run], method: str, layer: str, mask: str) -> list[float]:
    return [run.density[layer][mask] for run in runs if run.method == method and mask in run.density.get(layer, {})]


def _label(figure: Figure, axes: Any, labels: Iterable[tuple[float, float, str]], points: list[Point]) -> None:
    """Write small labels beside points where they cover no label or marker; leave labels out without such a place."""
    size = 5 * figure.dpi / 72  # half a marker's edge, in dots
    centres = axes.transData.transform(points) if points else []
    taken = [Bbox.from_bounds(x - size, y - size, 2 * size, 2 * size) for x, y in centres]
    for x, y, text in labels:
        for offset in _OFFSETS:
            note = axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", fontsize=8, zorder=5)
            note.set_path_effects([withStroke(linewidth=2, foreground="white")])
            box = note.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def _legend(figure: Figure, results: SuiteResults, styles: dict[str, _Style]) -> None:
    drawn = {
        run.stem if run.group == "undefended" else run.method: run.group == "undefended" and run.coefficient is not None
        for run in results.runs.values()
    }
    handles = [
        Line2D([], [], linestyle=style.line if drawn[name] else "none", label=name, **style.options)
        for name, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
