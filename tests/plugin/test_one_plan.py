"""One merge plans once and reads its masks once, whoever starts it."""

from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

import mergekit_dam
from mergekit_dam.artifact import masks_file
from mergekit_dam.artifact.folder import REPORT_JSON
from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.cli.main import main
from mergekit_dam.io.cache import cache_folder
from mergekit_dam.models import plan as planning
from mergekit_dam.plugin.method import register_dam
from mergekit_dam.plugin.planner import plan_of
from mergekit_dam.publish.report import write_report
from tests.conftest import FAST


def _count(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, calls: list[Any]) -> None:
    """Count entries into the function itself: a name that another module imported is counted, too."""
    function = getattr(module, name)
    body = type(function)(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    counted = lambda *a, **k: (calls.append(name), body(*a, **k))[1]  # noqa: E731
    monkeypatch.setitem(function.__globals__, f"_counted_{name}", counted)
    namespace: dict[str, Any] = {}
    exec(f"def {name}(*a, **k): return _counted_{name}(*a, **k)", namespace)
    monkeypatch.setattr(function, "__code__", namespace[name].__code__)
    monkeypatch.setattr(function, "__kwdefaults__", None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    _count(monkeypatch, planning, "build_plan", found)
    _count(monkeypatch, masks_file, "load", found)
    return found


@pytest.fixture
def recipe(vit: Path, images: Path) -> dict[str, Any]:
    return {
        "merge_method": "dam",
        "base_model": str(vit / "base"),
        "dtype": "float32",
        "models": [{"model": str(vit / name), "parameters": {"calibration": str(images)}} for name in ("a", "b")],
        "parameters": dict(FAST),
    }


ONCE = ["build_plan", "load"]


def test_our_own_merges_plan_and_read_once(recipe: dict[str, Any], tmp_path: Path, calls: list[str]) -> None:
    first = mergekit_dam.merge(recipe, tmp_path / "fresh")
    assert calls == ONCE and (first / "dam" / "report.html").is_file()
    calls.clear()
    mergekit_dam.merge(recipe, tmp_path / "cached")
    assert calls == ONCE
    calls.clear()
    applied = mergekit_dam.merge(recipe, tmp_path / "given", masks=str(first / "dam" / MASKS_FILE))
    assert calls == ONCE
    outs = [path / "model.safetensors" for path in (first, tmp_path / "cached", applied)]
    assert len({out.read_bytes() for out in outs}) == 1


def test_a_report_of_masks_handed_on_says_what_one_of_the_file_says(recipe: dict[str, Any], tmp_path: Path) -> None:
    def facts() -> dict[str, Any]:
        return {k: v for k, v in json.loads((out / "dam" / REPORT_JSON).read_text()).items() if k != "created"}

    out = mergekit_dam.merge(recipe, tmp_path / "out")
    handed_on = facts()
    write_report(out)
    assert facts() == handed_on


def test_the_command_plans_and_reads_once(recipe: dict[str, Any], tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(main, ["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert calls == ONCE


def test_mergekit_itself_plans_and_reads_once(recipe: dict[str, Any], tmp_path: Path, calls: list[str]) -> None:
    register_dam()
    config = MergeConfiguration.model_validate(recipe)
    for out in ("fresh", "cached"):
        calls.clear()
        run_merge(copy.deepcopy(config), str(tmp_path / out), MergeOptions(quiet=True))
        assert calls == ONCE


def test_a_plan_of_other_settings_is_not_taken(recipe: dict[str, Any], tmp_path: Path, calls: list[str]) -> None:
    options = MergeOptions(quiet=True)
    config = MergeConfiguration.model_validate(recipe)
    plan = plan_of(config, options)
    config.parameters = {**FAST, "seed": 7}
    calls.clear()
    with register_dam().with_plan(config, options, plan) as handed:
        run_merge(config, str(tmp_path / "out"), options)
    assert calls == ONCE and handed.masks is None
    assert masks_file.load(tmp_path / "out" / "dam" / MASKS_FILE).metadata["seed"] == 7


def test_merges_that_keep_nothing_leave_the_cache_of_others_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Threads merge at once, some of them without the cache."""
    before = cache_folder()
    begun = threading.Barrier(4)

    def merged(number: int) -> bytes:
        begun.wait()
        mergekit_dam.merge(recipe, tmp_path / str(number), resume=number % 2 == 0, report=False)
        return (tmp_path / str(number) / "model.safetensors").read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(merged, range(4)))) == 1
    assert cache_folder() == before and not list(before.glob("anew-*"))
