"""The documentation is what the code says: generated pages, code blocks, links, options."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from dam_bench.attacks.registry import ATTACKS
from dam_bench.defences.registry import DEFENCES
from dam_bench.runs.methods import method_named
from dam_bench.suites.base import Poison
from mergekit.architecture import json_definitions

import mergekit_dam
from docs.make_reference import DOCS, PAGES, run
from mergekit_dam import api, load_merged
from mergekit_dam.cli.main import COMMANDS
from mergekit_dam.evaluation import attack_text
from mergekit_dam.registry import OBJECTIVES, PLANTED, SCANNERS, TASKS
from tests import walkthrough
from tests.conftest import FAST, Merge
from tests.helpers.merging import tensors_of
from tests.helpers.tiny_models import make_model

ROOT = DOCS.parent
WRITTEN = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == PAGES[name](), "run python docs/make_reference.py"


def test_a_stale_page_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("docs.make_reference.DOCS", tmp_path)
    assert run(["--check"]) == 1 and "settings.md, commands.md" in capsys.readouterr().err
    assert run([]) == 0 and run(["--check"]) == 0


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    planned = {
        str(file) for entry in _leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]) for file in [entry]
    }
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if not target.startswith("https://"):
            # pictures and pages in the navigation; mkdocs --strict then wants those to exist
            assert (DOCS / target).is_file() or target in planned, f"{page.name} -> {target}"
    assert page.name in planned


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for part in (nav.values() if isinstance(nav, dict) else nav) for leaf in _leaves(part)]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_on_pages_exist(page: Path) -> None:
    for name in re.findall(r"^\s*(?:`)?mergekit-dam ([a-z]+)", page.read_text("utf-8"), re.MULTILINE):
        assert name in COMMANDS, f"{page.name}: mergekit-dam {name}"


def test_the_api_page_has_every_public_name() -> None:
    shown = [name.rpartition(".") for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text("utf-8"), re.M)]
    objects = {name: getattr(import_module(module), name) for module, _, name in shown}
    assert set(mergekit_dam.__all__) <= set(objects)
    functions = {n for n, f in vars(api).items() if inspect.isfunction(f) and f.__module__ == api.__name__}
    assert {name for name in functions if not name.startswith("_")} <= set(objects)
    assert all(inspect.getdoc(found) for found in objects.values())


def test_recipes_on_the_page_are_the_files_that_are_run() -> None:
    page = (DOCS / "recipes.md").read_text("utf-8")
    shown = dict(re.findall(r"<!-- recipe: (\S+) -->\n```yaml\n(.*?)```", page, re.DOTALL))
    assert shown == {path.name: path.read_text("utf-8") for path in (ROOT / "examples" / "recipes").glob("*.yml")}


def test_the_walk_through_finds_its_steps_in_the_readme() -> None:
    said = walkthrough.readme((ROOT / "README.md").read_text("utf-8"))
    assert set(walkthrough.COMMANDS) <= set(said["commands"])
    recipe = yaml.safe_load(said["recipe"])
    assert recipe["base_model"] == "lab/base" and [m["model"] for m in recipe["models"]] == ["lab/digits", "lab/shapes"]
    left = {"flowers", "cars", "FILE", "ORG/NAME", "/models", "/data"}
    assert not any(name in f"{said['recipe']} {said['program']} {said['commands']}" for name in left)


def test_the_blocks_of_extending_run(
    monkeypatch: pytest.MonkeyPatch, merge: Merge, vit: Path, images: Path, tmp_path: Path
) -> None:
    for name in ("DeiTModel", "DeiTForImageClassification"):
        monkeypatch.setitem(json_definitions.NAME_TO_ARCH, name, [])
    monkeypatch.setattr(attack_text, "TRIGGERS", dict(attack_text.TRIGGERS))
    for registry in (ATTACKS, DEFENCES, OBJECTIVES, PLANTED, SCANNERS, TASKS):
        monkeypatch.setattr(registry, "entries", dict(registry.entries))
    module = ModuleType("extending")
    monkeypatch.setitem(sys.modules, "extending", module)  # dataclasses look their module up
    names = vars(module)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 9
    for block in blocks:
        exec(compile(block, "extending.md", "exec"), names)
    stripes = names["StripeTrigger"](2).apply(torch.zeros(1, 3, 4, 4))
    assert stripes[..., :2].eq(1).all() and stripes[..., 2:].eq(0).all()
    assert ATTACKS["vision/stripe"].trigger(None, Poison("stripe", size=2), None) == names["StripeTrigger"](2)  # type: ignore[arg-type]
    assert PLANTED["shade"].draw is names["shade"]
    assert method_named("median(share=0.5)").parameters == {"start": "linear", "share": 0.5}
    models = [{"model": str(vit / n), "parameters": {"calibration": str(images)}} for n in ("a", "b")]
    out = merge(vit / "base", models, parameters={**FAST, "scan_steps": 2, "objective": "anchored"})
    assert (out / "dam" / "dam_masks.safetensors").is_file()
    base = make_model("DeiTModel", tmp_path / "base")
    tuned = [make_model("DeiTForImageClassification", tmp_path / n, seed=i, body=base) for i, n in enumerate("cd", 1)]
    models = [{"model": str(path), "parameters": {"calibration": str(images)}} for path in tuned]
    out = merge(base, models, out="deit", parameters={**FAST, "scan_steps": 2})
    theta, merged, own = tensors_of(base), tensors_of(out), tensors_of(tuned[0])
    assert set(theta) == set(merged) and "embeddings.distillation_token" in merged
    assert all((merged[name] != theta[name]).any() for name in theta if f"deit.{name}" in own)
    assert load_merged(out, "c").classifier.out_features == 3
