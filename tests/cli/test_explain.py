"""No error of a library reaches the user unexplained: one line, the exit code of the documentation, no traceback."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub.errors
import mergekit.merge
import peft
import pyarrow
import pytest
import safetensors
import transformers
import yaml
from click.testing import CliRunner

from mergekit_dam.cli.explain import TRACEBACK
from mergekit_dam.cli.main import main
from tests.conftest import FAST

LIBRARIES = (mergekit, transformers, peft, safetensors, pyarrow, huggingface_hub)
# command -> the function that raises, its arguments, and the exit code
LOADERS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "check": ("mergekit_dam.models.plan.register_architectures", ("dam.yml",), 3),
    "audit": ("mergekit_dam.recipe.build_tasks", ("dam.yml", "--out", "audit"), 1),
    "learn": ("mergekit_dam.learn.run.build_tasks", ("dam.yml", "out"), 1),
    "merge": ("mergekit_dam.recipe.run_merge", ("dam.yml", "out"), 1),
    "eval": ("mergekit_dam.cli.eval.load_merged", ("vit", "--data", "data"), 1),
    "push": ("mergekit_dam.publish.push.contents_of", ("vit", "org/name"), 1),
}


def _errors() -> list[Exception]:
    """One of every public error class of the libraries that this package imports, and of the system's."""
    roots = {library.__name__ for library in LIBRARIES}
    found: dict[str, type[Exception]] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in roots:
            for value in list(vars(module).values()):
                public = isinstance(value, type) and not value.__name__.startswith("_")
                if public and issubclass(value, Exception) and value.__module__.partition(".")[0] in roots:
                    found[f"{value.__module__}.{value.__name__}"] = value
    return [*map(_made, found.values()), MemoryError(), PermissionError(13, "no"), OSError(28, "No space left")]


def _made(kind: type[Exception]) -> Exception:
    """Some want more than a message: the Hub's hold its answer."""
    try:
        return kind("it broke")
    except TypeError:
        wanted = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        named = [p.name for p in wanted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return kind(**{n: "it broke" if n == "message" else MagicMock(status_code=500, headers={}) for n in named})


def _raiser(error: Exception, module: str = __name__) -> Any:
    """A function that raises the error, as if it stood in a module."""
    place: dict[str, Any] = {"__name__": module, "error": error}
    exec("def fail(*arguments, **keywords):\n    raise error", place)
    return place["fail"]


@pytest.fixture
def files(tmp_path: Path, vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"model": str(vit / name), "parameters": {"calibration": str(images)}} for name in "ab"]
    recipe = {"merge_method": "dam", "base_model": str(vit / "base"), "models": models, "parameters": FAST}
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "vit").symlink_to(vit / "a")
    monkeypatch.chdir(tmp_path)


def _require_one_line(done: Any, code: int) -> None:
    assert done.exit_code == code and isinstance(done.exception, SystemExit), done.exception
    lines = [line for line in done.stderr.splitlines() if not line.startswith("no preprocessor_config")]
    assert len(lines) == 1 and lines[0].startswith("Error: ") and "Traceback" not in done.output, done.stderr
    assert done.stdout == "" and len(lines[0].split(". ", 1)[1]) > 12, "there is no cure"


@pytest.mark.parametrize("command", LOADERS)
def test_errors_of_libraries_are_one_line(command: str, files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class through one command, one of each library through the others: the translation is in one place."""
    place, arguments, code = LOADERS[command]
    errors = _errors()
    assert len(errors) > 40
    if command != "push":
        errors = list({type(error).__module__.partition(".")[0]: error for error in errors}.values())
    for error in errors:
        monkeypatch.setattr(place, _raiser(error))
        done = CliRunner().invoke(main, [command, *arguments])
        _require_one_line(done, code)


@pytest.mark.parametrize("module", ["mergekit.plan", "transformers.modeling", "peft.x", "datasets.load", "torch.nn"])
@pytest.mark.parametrize(
    "kind", [ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError, AssertionError]
)
def test_builtin_errors_are_told_where_a_library_raised_them(
    module: str, kind: type[Exception], files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOADERS["push"][0], _raiser(kind("it broke"), module))
    _require_one_line(CliRunner().invoke(main, ["push", "vit", "org/name"]), 1)
    monkeypatch.setattr(LOADERS["push"][0], _raiser(kind("it broke"), "mergekit_dam.publish.contents"))
    done = CliRunner().invoke(main, ["push", "vit", "org/name"])
    assert type(done.exception) is kind, "a bug of our own keeps its traceback"


def test_the_traceback_is_there_for_who_wants_it(files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    monkeypatch.setattr(LOADERS["push"][0], _raiser(safetensors.SafetensorError("it broke")))
    done = CliRunner().invoke(main, ["push", "vit", "org/name"])
    assert isinstance(done.exception, safetensors.SafetensorError)
