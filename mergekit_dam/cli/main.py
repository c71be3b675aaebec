"""Define `mergekit-dam`, a group of commands with a module for each.

A command is imported when it is called, so that `mergekit-dam --help` and shell completion import neither torch nor
mergekit. To add a command: a module `cli/NAME.py` with a click command of the module's name, and a line below.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from mergekit_dam import __version__
from mergekit_dam.errors import did_you_mean

INTERRUPTED = 130  # exit code, as shells have it for SIGINT

# name -> the first line of its help; the module is the name with _ for -
COMMANDS = {
    "check": "Resolve models, settings, tensors and data of a recipe without reading a weight.",
    "audit": "Score every input model of a recipe for backdoors, before any merge; or score a finished merge.",
    "learn": "Learn the masks of a recipe into OUT_PATH, without merging.",
    "clean": "Plant backdoors in models and unlearn them, which also weakens unknown backdoors.",
    "merge": "Learn the masks of a recipe, merge with them, and write a report; or run a recipe of any other method.",
    "eval": "Measure a model directory: accuracy on labelled data, and the success of a trigger that you give.",
    "push": "Publish a finished merge on the Hub, with a model card; private unless --public is given.",
    "doctor": "Print versions, the state of the autoload hook, and devices, as JSON.",
}


class LazyGroup(click.Group):
    """A group that lists commands from `COMMANDS` and imports a command only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"mergekit_dam.cli.{module}"), module)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}. {did_you_mean(args[0], COMMANDS)}".rstrip())
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; report an interruption or an error of a library in one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            how = str(stop) or "the same command starts over"
            click.echo(f"{os.linesep if sys.stderr.isatty() else ''}interrupted; {how}", err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from mergekit_dam.cli.explain import translate_error

            translated = translate_error(error, str(ctx.invoked_subcommand))
            if translated is None:
                raise
            raise translated from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Defense-Aware Merging for mergekit."""
