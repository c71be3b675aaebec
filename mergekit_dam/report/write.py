"""Writes the report of a merge; without matplotlib it has no figures, and says how to get them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mergekit_dam.artifact import LearnedMasks
from mergekit_dam.artifact_folder import METRICS_FILE
from mergekit_dam.errors import DamError
from mergekit_dam.report.facts import read_metrics, report_facts
from mergekit_dam.report.layers import layers_of
from mergekit_dam.report.page import own_markup, render, shown_triggers

REPORT_JSON, REPORT_HTML, FIGURES = "report.json", "report.html", "figures"
NO_FIGURES = "The report has no figures, since matplotlib is missing: pip install 'mergekit-dam[report]'"


def write_report(output: Path, *, seconds: float | None = None) -> tuple[Path, list[str]]:
    """Write `dam/report.json`, `dam/report.html` and `dam/figures/*.png` of a merge.

    Args:
        output: what mergekit wrote; the masks and the rest are read from its folder `dam`.
        seconds: wall time of the whole merge, where it was measured.

    Returns:
        The page, and notes for the user.

    Raises:
        DamError: no artefact there, a damaged one, or no right to write.
    """
    folder = output / "dam"
    facts, masks, triggers = report_facts(folder, seconds=seconds)
    try:
        drawn, notes = _figures(folder, masks, [model["name"] for model in facts["models"]])
        page = render(
            "report.html.j2", title=f"Merge {output.resolve().name}", facts=facts,
            figures={name: own_markup(svg) for name, svg in drawn.items()}, triggers=shown_triggers(triggers),
            note=NO_FIGURES if not drawn else "",
        )  # fmt: skip
        write_whole(folder / REPORT_JSON, json.dumps(facts, indent=1))
        write_whole(folder / REPORT_HTML, page)
    except OSError as error:
        raise DamError(
            f"report in {folder}", expected="a folder that can be written", got=str(error),
            cure="The merge itself is complete; free space or rights, then run `mergekit-dam report`.",
        ) from error  # fmt: skip
    return folder / REPORT_HTML, notes


def write_whole(file: Path, text: str) -> None:
    """The file is complete under its name, or not there."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _figures(folder: Path, masks: LearnedMasks, models: list[str]) -> tuple[dict[str, str], list[str]]:
    """SVGs for the page; the PNGs are written at once."""
    try:
        from mergekit_dam.report.figures import as_png, as_svg, figures
    except ImportError:
        return {}, [NO_FIGURES]
    drawn = figures(layers_of(masks), read_metrics(folder / METRICS_FILE), models)
    (folder / FIGURES).mkdir(exist_ok=True)
    for name, draw in drawn.items():
        (folder / FIGURES / f"{name}.png").write_bytes(as_png(draw))
    return {name: as_svg(name, draw) for name, draw in drawn.items()}, []
