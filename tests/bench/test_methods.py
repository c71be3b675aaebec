"""Variants of methods by name, for ablations."""

from __future__ import annotations

import pytest
from dam_bench.runs.methods import METHODS, method_named

from mergekit_dam.errors import DamError


@pytest.mark.parametrize("name", METHODS)
def test_a_plain_name_is_the_method_itself(name: str) -> None:
    assert method_named(name) is METHODS[name]


def test_a_variant_changes_the_settings_that_it_names_only() -> None:
    variant = method_named("paper-dual(alpha=2, mask=m1,rescale=false)")
    expected = {**METHODS["paper-dual"].parameters, "alpha": 2, "mask": "m1", "rescale": False}
    assert variant.parameters == expected and variant.name == "paper-dual(alpha=2, mask=m1,rescale=false)"
    assert (variant.family, variant.passes) == ("defence", METHODS["paper-dual"].passes)


@pytest.mark.parametrize("name", ["damn", "ties-0.5(density=1)", "dam(alpa=1)", "dam(alpha=high)", "dam()"])
def test_what_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(DamError):
        method_named(name)
