"""What several commands share: arguments, options and exit codes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

# 0 success, 1 a fault (DamError), 2 a wrong command line (click), 130 interrupted (main.py)
FINDING = 3  # `check`: the recipe cannot be merged; `audit`: a model is over the threshold

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class UserPath(click.Path):
    """A path; ~ is the user's home also where no shell expanded it (quotes, `--out=~/x`, other programs)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(at_home(value), param, ctx)


def at_home(value: Any) -> Any:
    """A text with ~ expanded, if it begins with it; anything else as it is."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


existing_folder = UserPath(exists=True, file_okay=False)
existing_file = UserPath(exists=True, dir_okay=False)
config_file: Decorator = click.argument("config_file", type=existing_file)
out_path: Decorator = click.argument("out_path", type=UserPath(file_okay=False))
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option: Decorator = click.option(
    "--quiet", is_flag=True, help="Suppress progress bars and other non-essential output"
)
dry_run_option: Decorator = click.option("--dry-run", is_flag=True, help="Say what would be done, as `check` does.")
resume_option: Decorator = click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Take masks that were learned before on the same inputs and settings, or learn them anew.",
)
lm_eval_option: Decorator = click.option(
    "--lm-eval",
    metavar="TASKS",
    help="Of causal LMs: tasks of lm-evaluation-harness (extra lm-eval) or YAML files of such, separated by commas.",
)
seed_option: Decorator = click.option("--seed", type=click.IntRange(0), help="Use this seed, not the recipe's.")


def hush(quiet: bool) -> None:
    """With `--quiet`, nothing of the libraries either."""
    if quiet:
        from mergekit_dam.engine.progress import silence_libraries

        silence_libraries()


def result(text: str, *, quiet: bool = False) -> None:
    """What a command was run for, in words, on stdout; `--quiet` leaves the exit code, and `--json` the facts."""
    if not quiet:
        click.echo(text)


def say(text: str, *, quiet: bool = False) -> None:
    """A message for a person: on stderr, so that stdout holds the result alone."""
    if not quiet:
        click.echo(text, err=True)


def name_suspects(metadata: Mapping[str, Any], *, quiet: bool) -> list[dict[str, Any]]:
    """The classes that the masks were fitted against; each is also said on stderr."""
    found = [finding for finding in metadata.get("audit", []) if finding.get("suspect")]
    for one in found:
        aimed = f" of {one['task']}" if one.get("model", one["task"]) != one["task"] else ""
        said = f"suspect: {one.get('model', one['task'])}, class {one['target']}{aimed} (suspicion {one['suspicion']})"
        say(said, quiet=quiet)
    return found
