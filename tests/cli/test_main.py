"""The command line: quick help, one line per command, lazily imported."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from mergekit_dam.cli.main import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_repeats_each_commands_own_help(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None and command.name == name
    first = " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())
    assert first.startswith(COMMANDS[name])
    shown = CliRunner().invoke(main, [name, "--help"])
    assert shown.exit_code == 0 and "Usage" in shown.output


def test_help_and_completion_import_neither_torch_nor_mergekit() -> None:
    program = (
        "import sys, click.testing; from mergekit_dam.cli.main import main; run = click.testing.CliRunner().invoke;"
        "shown = run(main, ['--help']).output;"
        "told = run(main, [], prog_name='mergekit-dam', env={'_MERGEKIT_DAM_COMPLETE': 'bash_complete',"
        "'COMP_WORDS': 'mergekit-dam m', 'COMP_CWORD': '1'}).output;"
        "print(shown, told); print(sorted({'torch', 'mergekit', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60, env=os.environ.copy()
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "plain,merge" in done.stdout and all(text.split(",")[0] in done.stdout for text in COMMANDS.values())


def test_an_unknown_command_is_a_usage_error() -> None:
    done = CliRunner().invoke(main, ["merg"])
    assert done.exit_code == 2 and "merg" in done.output
