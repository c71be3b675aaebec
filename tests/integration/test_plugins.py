"""Objectives, tasks, scanners and kinds of triggers that a module outside this package registers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.architecture import json_definitions
from mergekit.common import ModelReference

import mergekit_dam
from mergekit_dam.artifact.masks_file import load
from mergekit_dam.artifact.triggers_file import load_triggers
from mergekit_dam.config import DamConfig, parse
from mergekit_dam.errors import DamError
from mergekit_dam.learn.estimate import estimate
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.models.plan import build_plan
from mergekit_dam.registry import OBJECTIVES, SCANNERS, TASKS, TRIGGERS, code_of, load_plugins
from mergekit_dam.scan.scanner import scan
from mergekit_dam.scan.triggers import PatchTriggers
from mergekit_dam.tasks import ImageTask, build_tasks
from tests.conftest import FAST
from tests.helpers.tiny_models import make_model

OBJECTIVE = """
from mergekit_dam import register_objective
from mergekit_dam.learn.inversion_search import InversionSearch

class Still(InversionSearch):
    def step(self, step):
        before = self.coefficients.clone()
        super().step(step)
        self.coefficients.copy_(before)

register_objective("still", Still)
"""
TASK = """
from mergekit_dam import register_family, register_task
from mergekit_dam.models.families import load_tensors
from mergekit_dam.tasks import ImageTask

class PlainTask(ImageTask):
    trigger_kinds = ("pixels",)

vit = load_tensors("vit")
changes = {
    "model_type": "deit",
    "prefix": "deit.",
    "headless": ("DeiTModel",),
    "heads": {"DeiTForImageClassification": vit.heads["ViTForImageClassification"]},
    "pre_weights": (*vit.pre_weights, "embeddings.distillation_token"),
}
register_family(vit.model_copy(update=changes))
register_task("deit", PlainTask)
"""
SCANNER = """
from mergekit_dam import register_scanner, register_trigger, seeds
from mergekit_dam.scan.findings import Finding
from mergekit_dam.scan.triggers import PatchTriggers, started

class Corner(PatchTriggers):
    kind = "corner"

def last_class(index, tasks, base, config):
    task = tasks[index]
    trigger = started(task, Corner, 1, seeds.generator("corner", index))
    return [Finding(index, task.input.config.num_labels - 1, trigger, 1.0, 10.0, 0.9, 0.1)]

register_scanner("last class", last_class)
register_trigger(Corner)
PlainTask.scanner, PlainTask.trigger_kinds = "last class", ("corner",)
"""


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    for registry in (OBJECTIVES, SCANNERS, TASKS, TRIGGERS):
        monkeypatch.setattr(registry, "entries", dict(registry.entries))
    for name in ("DeiTModel", "DeiTForImageClassification"):
        monkeypatch.setitem(json_definitions.NAME_TO_ARCH, name, [])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("outside"):
            del sys.modules[name]
    load_plugins.cache_clear()


Outside = Callable[[str, str], Any]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outside:
    """Write a module into a folder of the import path, and import it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> Any:
        (tmp_path / f"{name}.py").write_text(text)
        return importlib.import_module(name)

    return write


def _deits(root: Path) -> list[Path]:
    base = make_model("DeiTModel", root / "base")
    return [
        base,
        *(make_model("DeiTForImageClassification", root / n, seed=i, body=base) for i, n in enumerate("ab", 1)),
    ]


def _plan(paths: list[Path], data: Path, **shared: Any) -> Any:
    base, *models = (ModelReference.parse(str(path)) for path in paths)
    return build_plan(base, models, shared={**FAST, "calibration": str(data), **shared}, per_model={})


def test_an_objective_from_outside_learns(outside: Outside, vit: Path, images: Path) -> None:
    outside("outside_objective", OBJECTIVE)
    plan = _plan([vit / name for name in ("base", "a", "b")], images, objective="still")
    folder, masks = find_or_learn(plan, quiet=True)
    assert len(masks.coefficients.unique()) == 1 and masks.metadata["audit"]
    assert masks.metadata["settings"]["objective"] == "still"
    usual = find_or_learn(_plan([vit / name for name in ("base", "a", "b")], images), quiet=True)
    assert usual[0] != folder and len(usual[1].coefficients.unique()) > 1
    assert estimate(plan).forward_passes == estimate(_plan([vit / "base", vit / "a", vit / "b"], images)).forward_passes


def test_a_task_from_outside_is_scanned_as_it_says(outside: Outside, images: Path, tmp_path: Path) -> None:
    task = outside("outside_task", TASK).PlainTask
    plan = _plan(_deits(tmp_path), images)
    assert all(type(one) is task for one in build_tasks(plan, torch.device("cpu")))
    _, masks = find_or_learn(plan, quiet=True)
    assert {one["kind"] for one in masks.metadata["audit"]} == {"pixels"}


def test_a_scanner_and_a_kind_of_triggers_from_outside_are_used(outside: Outside, images: Path, tmp_path: Path) -> None:
    outside("outside_scanner", TASK + SCANNER)
    folder, masks = find_or_learn(_plan(_deits(tmp_path), images), quiet=True)
    found = [(one["task"], one["target"], one["kind"], one["suspect"]) for one in masks.metadata["audit"]]
    assert found == [("a", 2, "corner", True), ("b", 2, "corner", True)]
    shown = load_triggers(folder / "triggers.safetensors")
    assert [one.tensors["pattern"].shape for one in shown] == [(3, 16, 16)] * 2


def _installed(folder: Path, module: str) -> Path:
    """A folder of the import path in which a distribution says that this module is a plugin."""
    facts = folder / "outside-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[mergekit_dam.plugins]\nmine = {module}\n")
    return folder


def _python(*arguments: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "not available" not in done.stderr, done.stderr


def test_a_plugin_is_known_to_mergekit_and_to_its_worker_processes(images: Path, tmp_path: Path) -> None:
    folder = _installed(tmp_path / "site", "outside_all")
    (folder / "outside_all.py").write_text(OBJECTIVE + TASK + SCANNER)
    base, *models = _deits(tmp_path)
    recipe = {
        "merge_method": "dam",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": {"calibration": str(images)}} for path in models],
        "parameters": {**FAST, "objective": "still", "num_processes": 2},
    }
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(recipe))
    program, out = Path(sys.executable).with_name("mergekit-yaml"), tmp_path / "out"
    _python(str(program), str(tmp_path / "dam.yml"), str(out), folder=folder)
    masks = load(out / "dam" / "dam_masks.safetensors")
    assert len(masks.coefficients.unique()) == 1
    assert {one["kind"] for one in masks.metadata["audit"]} == {"corner"}
    assert json.loads((out / "dam" / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("first", ["mergekit.merge_methods.registry", "mergekit_dam.plugin.method", "mergekit_dam"])
def test_a_plugin_may_import_all_of_the_package_in_every_order(first: str, tmp_path: Path) -> None:
    folder = _installed(tmp_path, "outside_all")
    (folder / "outside_all.py").write_text(OBJECTIVE + TASK + SCANNER)
    told = "from mergekit_dam.registry import OBJECTIVES; assert 'still' in OBJECTIVES"
    _python("-c", f"import {first}; from mergekit.merge_methods import get; get('dam'); {told}", folder=folder)


def test_a_plugin_that_fails_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(_installed(tmp_path, "outside_lost"))
    load_plugins.cache_clear()
    assert "no such objective" not in OBJECTIVES
    assert "the plugin 'mine' (outside_lost) is left out: No module named 'outside_lost'" in caplog.text


@pytest.mark.parametrize(
    ("register", "name", "entry"),
    [
        ("register_objective", "paper", type("Mine", (InversionSearch,), {"__module__": "outside"})),
        ("register_task", "vit", type("Mine", (ImageTask,), {"__module__": "outside"})),
        ("register_scanner", "classes", lambda index, tasks, base, config: []),
    ],
)
def test_a_name_that_is_taken_is_refused(register: str, name: str, entry: Any) -> None:
    with pytest.raises(DamError, match=rf"'{name}': expected a new name, got a name that is taken by mergekit.dam"):
        getattr(mergekit_dam, register)(name, entry)
    with pytest.raises(DamError, match="kind of triggers 'pixels': expected a new name"):
        mergekit_dam.register_trigger(type("Mine", (PatchTriggers,), {"__module__": "outside"}))


def test_the_same_entry_may_be_registered_again() -> None:
    mergekit_dam.register_task("vit", ImageTask)
    assert TASKS["vit"] is ImageTask


def test_unknown_names_are_refused_with_the_nearest_known_one(vit: Path, images: Path) -> None:
    with pytest.raises(DamError, match=r"setting 'objective' in the recipe: expected one of inversion, paper, got 'x'"):
        parse(DamConfig, {"objective": "x"}, where="the recipe")
    plan = _plan([vit / name for name in ("base", "a", "b")], images)
    tasks = build_tasks(plan, torch.device("cpu"))
    tasks[0].scanner = "clases"  # type: ignore[misc]
    with pytest.raises(DamError, match=r"scanner 'clases': expected one of .*classes.* Did you mean 'classes'\?"):
        scan(tasks, {}, plan.config, range(1))


def test_code_from_outside_has_a_digest_that_an_edit_changes(outside: Outside, tmp_path: Path) -> None:
    module = outside("outside_objective", OBJECTIVE)
    before = OBJECTIVES.code_of("still")
    assert before == code_of(module.Still) != code_of(type("Mine", (), {"__module__": "outside"}))
    (tmp_path / "outside_objective.py").write_text(OBJECTIVE + "\n# edited\n")
    assert OBJECTIVES.code_of("still") not in (None, before)
    assert OBJECTIVES.code_of("inversion") is None is code_of(ImageTask)
