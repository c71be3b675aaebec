"""Write the report of a merge; without matplotlib it has no figures, and says how to get them."""

from __future__ import annotations

import json
from pathlib import Path

from mergekit_dam.artifact.folder import FIGURES, METRICS_FILE, REPORT_HTML, REPORT_JSON
from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, load
from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.files import report_lock, write_atomic
from mergekit_dam.io.untrusted import require_no_links_out
from mergekit_dam.publish.facts import read_metrics, report_facts
from mergekit_dam.publish.layers import layers_of
from mergekit_dam.publish.page import own_markup, render, shown_triggers

NO_FIGURES = "The report has no figures, since matplotlib is missing: pip install 'mergekit-dam[report]'"


def write_report(
    output: Path, *, seconds: float | None = None, masks: LearnedMasks | None = None
) -> tuple[Path, list[str]]:
    """Write `dam/report.json`, `dam/report.html` and `dam/figures/*.png` of a merge.

    Args:
        output: directory that mergekit wrote; its folder `dam` has the masks and further files.
        seconds: wall time of the whole merge, or None if it was not measured.
        masks: masks of this merge, if they were read already.

    Returns:
        The page's path, and notes for the user.

    Raises:
        DamError: the artefact is missing or damaged, or there is no right to write.
    """
    folder = output / "dam"
    require_no_links_out(output)
    if not (folder / MASKS_FILE).is_file():
        load(folder / MASKS_FILE)  # raises the error of a missing file
    try:
        with report_lock(folder):
            for stale in (folder / FIGURES).glob(".*.tmp"):
                stale.unlink()  # left by a killed run, since this run holds the lock
            return _write(output, folder, seconds, masks)
    except OSError as error:
        raise DamError(
            f"report in {folder}",
            expected="a folder that can be written",
            got=str(error),
            cure="The merge itself is complete; free space or rights, then merge again: the masks are kept.",
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, DamError):
            raise
        # untrusted files may hold any JSON; nothing was written yet
        raise DamError(
            f"report in {folder}",
            expected="files as learning wrote them",
            got=f"changed values ({first_line(error)})",
            cure="Merge again; a file in this folder was changed.",
        ) from error


def _write(output: Path, folder: Path, seconds: float | None, given: LearnedMasks | None) -> tuple[Path, list[str]]:
    """Draw and render everything, and then write the files."""
    facts, masks, triggers = report_facts(folder, seconds=seconds, masks=given)
    pictures, drawn, notes = _figures(folder, masks, [model["name"] for model in facts["models"]])
    page = render(
        "report.html.j2",
        title=f"Merge {output.resolve().name}",
        facts=facts,
        figures={name: own_markup(svg) for name, svg in drawn.items()},
        triggers=shown_triggers(triggers),
        note=NO_FIGURES if not drawn else "",
    )
    text = json.dumps(facts, indent=1)
    (folder / FIGURES).mkdir(exist_ok=True)
    for name, picture in pictures.items():
        write_atomic(folder / FIGURES / f"{name}.png", picture)
    write_atomic(folder / REPORT_JSON, text)
    write_atomic(folder / REPORT_HTML, page)
    return folder / REPORT_HTML, notes


def _figures(
    folder: Path, masks: LearnedMasks, models: list[str]
) -> tuple[dict[str, bytes], dict[str, str], list[str]]:
    """Draw PNGs for cards and SVGs for the page, and return both with notes."""
    try:
        from mergekit_dam.publish.figures import as_png, as_svg, figures
    except ImportError:
        return {}, {}, [NO_FIGURES]
    drawn = figures(layers_of(masks), read_metrics(folder / METRICS_FILE), models)
    pictures = {name: as_png(draw) for name, draw in drawn.items()}
    return pictures, {name: as_svg(name, draw) for name, draw in drawn.items()}, []
