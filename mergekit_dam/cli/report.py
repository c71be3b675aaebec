"""`mergekit-dam report`: the report of a finished merge, anew."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_dam.cli.common import existing_folder, hush, quiet_option, result, say
from mergekit_dam.publish.report import REPORT_JSON, write_report


@click.command()
@click.argument("merged_path", type=existing_folder)
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
@quiet_option
def report(merged_path: Path, as_json: bool, quiet: bool) -> None:
    """Write report.html and report.json of a merge anew, e.g. after `eval --save`.

    MERGED_PATH is the output of a merge; what is reported lies in MERGED_PATH/dam.

    \b
    Example:
        mergekit-dam report out
    """
    hush(quiet)
    page, notes = write_report(merged_path)
    for note in notes:
        say(note, quiet=quiet)
    if as_json:
        click.echo((page.parent / REPORT_JSON).read_text("utf-8"))
    else:
        result(str(page), quiet=quiet)
