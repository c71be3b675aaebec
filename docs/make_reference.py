"""Pages of the documentation that are made from the code: settings, and options of the commands.

python docs/make_reference.py            writes docs/settings.md and docs/commands.md
python docs/make_reference.py --check    exits with 1 if one of them is not what the code says
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from mergekit.options import MergeOptions
from pydantic.fields import FieldInfo

from mergekit_dam.cli.main import COMMANDS, main
from mergekit_dam.config import PAPER, DamConfig, ModelSettings

DOCS = Path(__file__).resolve().parents[1] / "docs"
_SETTINGS = """# Settings

<!-- made by `python docs/make_reference.py`: change mergekit_dam/config.py instead -->

All settings are scalars under `parameters:` of a recipe. Those of one model stand under that model; given under the
shared `parameters:` they are the fallback for all. `mergekit-dam check` refuses unknown names and says which one was
meant; plain `mergekit-yaml` warns.
"""
_COMMANDS = """# Commands and exit codes

<!-- made by `python docs/make_reference.py`: change mergekit_dam/cli/ instead -->

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | a fault in a recipe, a model, data or the machine, in one line: what was expected, what came, the cure |
| 2 | a command line that makes no sense (unknown option, missing argument) |
| 3 | `check`: the recipe cannot be merged; `audit`: a model is over the threshold |
| 130 | interrupted (Ctrl-C); one line says how to go on |

Errors of the libraries below are told in one line as well; `MERGEKIT_DAM_TRACEBACK=1` keeps their traceback, for a
bug report.

The result goes to stdout, with `--json` as JSON; messages, logs and progress bars go to stderr, and `--quiet` stops
them. No command writes colours, so `NO_COLOR` holds in any case.

Commands that take a recipe also have the options of `mergekit-yaml` (`--device`, `--lora-merge-cache`,
`--trust-remote-code`, ...), with the same names; `mergekit-dam COMMAND --help` lists them.

**Shell completion** is click's: put `eval "$(_MERGEKIT_DAM_COMPLETE=bash_source mergekit-dam)"` into `~/.bashrc`,
`eval "$(_MERGEKIT_DAM_COMPLETE=zsh_source mergekit-dam)"` into `~/.zshrc`, or for fish
`_MERGEKIT_DAM_COMPLETE=fish_source mergekit-dam | source` into `~/.config/fish/completions/mergekit-dam.fish`.
"""


def settings_page() -> str:
    """docs/settings.md from the fields of `DamConfig` and `ModelSettings`."""
    parts = [_SETTINGS]
    for heading, settings in (("Per model", ModelSettings), ("Shared", DamConfig)):
        parts.append(f"\n## {heading}\n\n| setting | values | default | unit | what it does | source |")
        parts.append("\n| --- | --- | --- | --- | --- | --- |\n")
        parts += [_row(name, info) for name, info in settings.model_fields.items()]
    paper = ", ".join(f"`{name}: {_value(value).strip('`')}`" for name, value in PAPER.items())
    parts.append(f"\nWith `objective: paper` the defaults are the paper's where they differ: {paper}.\n")
    return "".join(parts)


def commands_page() -> str:
    """docs/commands.md from the commands themselves."""
    parts = [_COMMANDS]
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None, f"{name} is in the table"
        context = click.Context(command, info_name=f"mergekit-dam {name}")
        usage = command.get_usage(context).removeprefix("Usage: ")
        parts.append(f"\n## {name}\n\n    {' '.join(usage.split())}\n\n{_prose(command)}\n")
        options = [option for option in command.params if isinstance(option, click.Option)]
        merges = "allow_crimes" in {option.name for option in options}
        own = [option for option in options if not merges or option.name not in MergeOptions.model_fields]
        if own:
            parts.append("\n| option | meaning |\n| --- | --- |\n")
            parts += [_option(option) for option in own]
    return "".join(parts)


def _row(name: str, info: FieldInfo) -> str:
    extra: Any = info.json_schema_extra or {}
    cells = [f"`{name}`", _values(info), _value(info.default), extra.get("unit", "-"), info.description or ""]
    cells.append(extra.get("source", "-"))
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def _values(info: FieldInfo) -> str:
    kinds = [kind for kind in (get_args(info.annotation) or [info.annotation]) if kind is not type(None)]
    literal = next((kind for kind in (info.annotation, *kinds) if get_origin(kind) is Literal), None)
    if literal is not None:
        return ", ".join(f"`{choice}`" for choice in get_args(literal))
    names: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    limits = [
        f"{sign} {getattr(limit, key):g}"
        for limit in info.metadata
        for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if hasattr(limit, key)
    ]
    return " ".join([names[kinds[0]], ", ".join(limits)]).strip()


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _prose(command: click.Command) -> str:
    """A command's help; the lines of its example are code, which click marks in a way of its own."""
    return inspect.cleandoc(command.help or "").replace("\b\nExample:\n", "Example:\n\n")


def _option(option: click.Option) -> str:
    names = "/".join([*option.opts, *option.secondary_opts])
    default = option.default if option.show_default and option.default is not None else None
    if isinstance(default, bool):
        default = option.opts[0] if default else option.secondary_opts[0]
    text = " ".join((option.help or "").split()) + ("" if default is None else f" Default: `{default}`.")
    return f"| `{names}` | {text.replace('|', chr(92) + '|')} |\n"


PAGES = {"settings.md": settings_page, "commands.md": commands_page}


def run(arguments: Sequence[str]) -> int:
    """Write the pages, or with `--check` compare them; the exit code."""
    stale = []
    for name, make in PAGES.items():
        text, file = make(), DOCS / name
        if arguments == ["--check"]:
            stale += [name] if not file.is_file() or file.read_text("utf-8") != text else []
        else:
            file.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"{', '.join(stale)}: not what the code says; run python docs/make_reference.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
