"""Pages of the documentation that are made from the code: settings, and options of the commands.

python docs/make_reference.py            writes docs/settings.md and docs/commands.md
python docs/make_reference.py --check    exits with 1 if one of them is not what the code says
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from mergekit.options import MergeOptions
from pydantic.fields import FieldInfo

from mergekit_dam.cli.main import COMMANDS, main
from mergekit_dam.config import PAPER, DamConfig, ModelSettings
from mergekit_dam.constants import PAPER_CONSTANTS, Constants

DOCS = Path(__file__).resolve().parents[1] / "docs"
_SETTINGS = """# Settings

<!-- made by `python docs/make_reference.py`: change mergekit_dam/config.py and mergekit_dam/constants.py instead -->

All settings are scalars under `parameters:` of a recipe. Those marked *per model* may stand under a model, too; given
under the shared `parameters:` they are the fallback for all. `mergekit-dam check` refuses unknown names and says which
one was meant; plain `mergekit-yaml` warns of them, and refuses names that are no settings any more.

Most merges need the front settings alone. What no user needs to set is a [constant](#constants).
"""
_CONSTANTS = """
## Constants

Numbers that decide what is learned and who is suspect, with what speaks for them. To change some, name a JSON file:

```yaml
parameters: {constants: trial.json}      # trial.json: {"pool_size": 4, "refresh_steps": 10}
```

The file is read when the recipe is. Its values, and not its path, go into the masks file and into the key of the cache:
the same values in another file find the same masks.
"""
# what a user wants to do -> the settings for it
_FRONT = {
    "name the data and heads of a model": ("calibration", "column", "classes", "head"),
    "learn more, or sooner": ("steps", "num_samples", "batch_size"),
    "weigh accuracy against defence": ("alpha", "weight", "suspicion", "clean", "objective"),
    "repeat and reuse": ("seed", "masks"),
    "choose where it runs": ("device",),
}
_ADVANCED = {
    "read other data": ("split", "max_length", "zero_shot_model"),
    "fit large models": ("window", "granularity", "compute_dtype", "gradient_checkpointing", "num_processes"),
    "change how triggers are searched": ("scan_steps", "refresh_every"),
    "change what is learned": ("mask", "detection", "student_steps", "mask_learning_rate"),
    "try other constants": ("constants",),
}
_STAGES = {
    "inputs": "What models are asked",
    "scan": "The scan",
    "twins": "Clean twins, in an audit",
    "suspects": "Who is suspect",
    "fit": "The fit of masks and coefficients",
    "paper": "Objective `paper`",
    "students": "Students of text encoders",
    "vaccine": "Vaccination",
    "run": "How a run goes on (masks do not depend on these)",
}
_COMMANDS = """# Commands and exit codes

<!-- made by `python docs/make_reference.py`: change mergekit_dam/cli/ instead -->

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | a fault in a recipe, a model, data or the machine, in one line: what was expected, what came, the cure |
| 2 | a command line that makes no sense (unknown option, missing argument) |
| 3 | `check`: the recipe cannot be merged; `audit`: a model, or the merge, is over the threshold |
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
    """docs/settings.md from the fields of `DamConfig`, `ModelSettings` and `Constants`."""
    parts, fields = [_SETTINGS], DamConfig.model_fields | ModelSettings.model_fields
    listed = [name for groups in (_FRONT, _ADVANCED) for names in groups.values() for name in names]
    if sorted(listed) != sorted(fields):
        raise ValueError(f"settings without a group, or gone: {sorted(set(listed) ^ set(fields))}")
    for heading, groups in (("Front settings", _FRONT), ("Advanced settings", _ADVANCED)):
        parts.append(f"\n## {heading}\n\n| to | setting | values | default | unit | what it does | source |")
        parts.append("\n| --- | --- | --- | --- | --- | --- | --- |\n")
        for aim, names in groups.items():
            for number, name in enumerate(names):
                aimed = "" if number else aim
                parts.append(f"| {aimed} {_row(name, fields[name], per_model=name in ModelSettings.model_fields)}")
    parts.append(_CONSTANTS)
    for stage, heading in _STAGES.items():
        parts.append(f"\n### {heading}\n\n| constant | values | default | unit | what it is | evidence |")
        parts.append("\n| --- | --- | --- | --- | --- | --- |\n")
        infos: dict[str, Any] = dict(Constants.model_fields)
        parts += [_row(n, info) for n, info in infos.items() if info.json_schema_extra["stage"] == stage]
    paper = ", ".join(f"`{name}: {_value(value).strip('`')}`" for name, value in {**PAPER, **PAPER_CONSTANTS}.items())
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


def _row(name: str, info: FieldInfo, *, per_model: bool = False) -> str:
    extra: Any = info.json_schema_extra or {}
    described = f"Per model. {info.description}" if per_model else info.description or ""
    default = "none" if info.annotation is Constants else _value(info.default)
    cells = [f"`{name}`", _values(info), default, extra.get("unit", "-"), described]
    cells.append(extra.get("source", "-"))
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


_KINDS: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "true or false", Constants: "path"}


def _values(info: FieldInfo) -> str:
    """What a field takes: choices, kinds and limits."""
    is_union = get_origin(info.annotation) in (Union, UnionType)
    found = []
    for kind in get_args(info.annotation) if is_union else (info.annotation,):
        if kind is type(None):
            continue
        limits = list(info.metadata)
        if get_origin(kind) is Annotated:
            kind, field = get_args(kind)
            limits = list(field.metadata)
        if get_origin(kind) is Literal:
            found += [f"`{choice}`" for choice in get_args(kind)]
            continue
        signs = [
            f"{sign} {getattr(limit, key):g}"
            for limit in limits
            for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
            if hasattr(limit, key)
        ]
        found.append(" ".join([_KINDS[kind], ", ".join(signs)]).strip())
    return ", ".join(found)


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
