"""The Python API: its examples run, its names are lazy, and it takes recipes in every form."""

from __future__ import annotations

import doctest
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file

import mergekit_dam
from mergekit_dam import api
from mergekit_dam.errors import DamError
from mergekit_dam.publish.push import plan_push, push
from tests.helpers.hub_server import HubServer


@pytest.fixture
def workplace(vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples speak of: models/base, models/flowers, models/cars, and images."""
    for source, name in (("base", "base"), ("a", "flowers"), ("b", "cars")):
        shutil.copytree(vit / source, tmp_path / "models" / name)
    for name in ("flowers", "cars"):
        shutil.copytree(images, tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("function", [api.merge, api.learn_masks, api.audit, api.clean], ids=lambda f: f.__name__)
def test_the_examples_run(function: object, workplace: Path) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(function, "example", globs={})
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert result.attempted >= 4 and result.failed == 0


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import mergekit_dam, sys; print({m.partition('.')[0] for m in sys.modules} & {'torch', 'mergekit', 'click'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "set()", done.stderr


def test_all_names_are_there_and_typed() -> None:
    for name in mergekit_dam.__all__:
        assert getattr(mergekit_dam, name).__module__.startswith("mergekit_dam.") and name in dir(mergekit_dam)
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        mergekit_dam.mrege  # noqa: B018


def test_every_form_of_a_recipe_is_the_same_recipe(workplace: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "models/base",
        "models": [{"model": f"models/{name}", "parameters": {"weight": 0.5}} for name in ("flowers", "cars")],
    }
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    forms = [recipe, "recipe.yml", Path("recipe.yml"), MergeConfiguration.model_validate(recipe)]
    outs = [mergekit_dam.merge(form, f"out{i}") for i, form in enumerate(forms)]
    first = load_file(outs[0] / "model.safetensors")
    assert all((load_file(out / "model.safetensors")[n] == t).all() for out in outs for n, t in first.items())
    with pytest.raises(DamError, match="Only dam learns masks"):
        mergekit_dam.learn_masks(recipe)
    with pytest.raises(DamError, match=r"recipe missing\.yml"):
        mergekit_dam.merge("missing.yml", "out")


def test_what_was_pushed_is_loaded_back(hub: HubServer, merged: Path) -> None:
    push(plan_push(merged, "org/merge"))
    here, there = mergekit_dam.load_merged(merged, "a"), mergekit_dam.load_merged("org/merge", "a", revision="main")
    assert type(there) is type(here)
    theirs = there.state_dict()
    assert all((theirs[name] == tensor).all() for name, tensor in here.state_dict().items())
    with pytest.raises(DamError, match="Check the id"):
        mergekit_dam.load_merged("org/other", "a")
