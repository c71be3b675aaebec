"""Help that helps: an example in every command that works, and the word that was meant for one that was not."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mergekit_dam.cli.main import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("dam.yml", "ties.yml"):
        Path(file).write_text("")
    Path("out").mkdir()
    shown = CliRunner().invoke(main, [name, "--help"])
    assert shown.exit_code == 0 and "\n  Example:\n" in shown.output
    command = main.get_command(click.Context(main), name)
    assert command is not None
    lines = inspect.cleandoc(command.help or "").partition("Example:\n")[2].splitlines()
    assert lines
    for line in lines:
        assert line in shown.output, "it is wrapped, and cannot be copied"
        program, own, *arguments = shlex.split(line)
        assert (program, own) == ("mergekit-dam", name)
        command.make_context(own, arguments)  # raises for a command line that makes no sense


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["mrege"], "merge"),
        (["chek"], "check"),
        (["merge", "--sead", "1"], "--seed"),
        (["push", "--licence", "x"], "--license"),
    ],
)
def test_what_is_misspelt_is_answered_with_what_was_meant(written: list[str], meant: str) -> None:
    done = CliRunner().invoke(main, written)
    assert done.exit_code == 2 and "Did you mean" in done.stderr and repr(meant) in done.stderr
