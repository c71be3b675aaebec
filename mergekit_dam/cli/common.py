"""Define arguments, options, exit codes and output of several commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mergekit_dam.config import expand_home

# 0 success, 1 a fault (DamError), 2 a wrong command line (click), 130 interrupted (main.py)
FINDING = 3  # `check`: the recipe cannot be merged; `audit`: a model or the merge is over the threshold

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class UserPath(click.Path):
    """A path in which ~ is the user's home, also if no shell expanded it (quotes, `--out=~/x`, other programs)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(expand_home(value), param, ctx)


existing_folder = UserPath(exists=True, file_okay=False)
existing_file = UserPath(exists=True, dir_okay=False)
config_file: Decorator = click.argument("config_file", type=existing_file)
out_path: Decorator = click.argument("out_path", type=UserPath(file_okay=False))
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option: Decorator = click.option(
    "--quiet", is_flag=True, help="Suppress progress bars and other non-essential output"
)
dry_run_option: Decorator = click.option("--dry-run", is_flag=True, help="Only show the plan, as `check` does.")
resume_option: Decorator = click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Use masks from the cache that were learned on the same inputs and settings, or learn masks again.",
)
lm_eval_option: Decorator = click.option(
    "--lm-eval",
    metavar="TASKS",
    help="Causal LMs: tasks of lm-evaluation-harness (extra lm-eval) or YAML files of tasks, separated by commas.",
)
seed_option: Decorator = click.option("--seed", type=click.IntRange(0), help="Use this seed, not the recipe's.")


def apply_quiet(quiet: bool) -> None:
    """Silence libraries if `quiet`."""
    if quiet:
        from mergekit_dam.engine.progress import silence_libraries

        silence_libraries()


def print_result(text: str, *, quiet: bool = False) -> None:
    """Print the result of a command on stdout, for people; with `quiet` print nothing."""
    if not quiet:
        click.echo(text)


def message(text: str, *, quiet: bool = False) -> None:
    """Print a message on stderr, so that stdout holds only the result; with `quiet` print nothing."""
    if not quiet:
        click.echo(text, err=True)


def print_suspects(metadata: Mapping[str, Any], *, quiet: bool) -> list[dict[str, Any]]:
    """Return the findings that the masks were fitted against, and print each on stderr."""
    suspects = [finding for finding in metadata.get("audit", []) if finding.get("suspect")]
    for finding in suspects:
        task, target = finding["task"], finding["target"]
        model = finding.get("model", task)
        of_task = f" of {task}" if model != task else ""
        message(f"suspect: {model}, class {target}{of_task} (suspicion {finding['suspicion']})", quiet=quiet)
    return suspects
