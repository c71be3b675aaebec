"""Variants of methods by name, for ablations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dam_bench.runs.methods import METHODS, method_named

from mergekit_dam.config import DamConfig, parse
from mergekit_dam.errors import DamError


@pytest.mark.parametrize("name", METHODS)
def test_a_plain_name_is_the_method_itself(name: str) -> None:
    assert method_named(name) is METHODS[name]


def test_a_variant_changes_the_settings_that_it_names_only() -> None:
    variant = method_named("paper-dual(alpha=2, mask=m1,rescale=false)")
    expected = {**METHODS["paper-dual"].parameters, "alpha": 2, "mask": "m1", "rescale": False}
    assert variant.parameters == expected and variant.name == "paper-dual(alpha=2, mask=m1,rescale=false)"
    assert (variant.family, variant.passes) == ("defence", METHODS["paper-dual"].passes)


def test_constants_of_a_variant_go_to_a_file_that_the_recipe_names(tmp_path: Path) -> None:
    suite: Any = SimpleNamespace(
        model_parameters=lambda path: {}, shared_parameters=lambda base: {}, base_entry=lambda base: str(base)
    )
    paths = {"a": tmp_path / "a", "b": tmp_path / "b"}
    method = method_named("dam(alpha=2,pool_size=4,refresh_steps=10)")
    recipe = method.recipe(suite, tmp_path / "base", paths, paths, 1, tmp_path)
    config = parse(DamConfig, recipe["parameters"], where="the recipe")
    assert config.given == {"alpha", "seed", "pool_size", "refresh_steps"}
    assert (config.alpha, config.constants.pool_size, config.constants.refresh_steps) == (2, 4, 10)
    assert method.parameters == {"alpha": 2, "pool_size": 4, "refresh_steps": 10}, "as results have them"


def test_cleaned_models_are_a_method_of_their_own() -> None:
    plain, some = method_named("clean+ties-0.5"), method_named("clean(plant=false,rounds=2)+dam(alpha=2)")
    assert plain.cleaned == {} and plain.parameters == METHODS["ties-0.5"].parameters
    assert some.cleaned == {"plant": False, "rounds": 2} and some.parameters["alpha"] == 2
    assert some.name == "clean(plant=false,rounds=2)+dam(alpha=2)" and METHODS["dam"].cleaned is None


@pytest.mark.parametrize(
    "name",
    [
        "clean(plants=1)+dam",
        "clean+damn",
        "clean(rounds=0)+dam",
        "damn",
        "ties-0.5(density=1)",
        "dam(alpa=1)",
        "dam(alpha=high)",
        "dam(pool_size=0)",
        "dam()",
    ],
)
def test_what_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(DamError):
        method_named(name)
