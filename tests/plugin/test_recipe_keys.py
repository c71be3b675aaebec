"""Names that mergekit would drop in silence are refused with the place where they belong."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_dam.errors import DamError
from mergekit_dam.models.plan import parse_settings
from mergekit_dam.plugin.method import register_dam
from mergekit_dam.plugin.recipe_keys import require_known_keys

MODELS = [{"model": "a"}, {"model": "b"}]


def _recipe(method: str = "dam", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "base_model": "base", "models": MODELS, **more}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (_recipe(steps=4), "'steps'.*under `parameters:` of the recipe"),
        (_recipe(dtyp="float16"), "Did you mean 'dtype'"),
        (_recipe(models=[{"model": "a", "calibration": "x"}]), "models 1: 'calibration'.*of this model"),
        (_recipe(models=[{"model": "a", "dtype": "float16"}]), "top level"),
        (_recipe(tokenizer={"sorce": "base"}), "tokenizer: 'sorce'.*'source'"),
        (_recipe(base_model={"model": "x", "overide_architecture": "Y"}), "'override_architecture'"),
        (_recipe("ties", parameters={"densty": 0.5}), "'densty'.*ties.*'density'"),
        (_recipe("linear", models=[{"model": "a", "parameters": {"density": 0.5}}]), "models 1.*another method"),
        (_recipe("ties", parameters={"density": [{"value": 1, "filtr": "mlp"}]}), "'filter'"),
        (_recipe("tise"), "merge_method.*'ties'"),
        (
            {"merge_method": "dam", "slices": [{"sources": [], "parameters": {"steps": 4}}]},
            "slices 1.*of the recipe.*move it",
        ),
    ],
)
def test_what_would_be_dropped_is_refused(recipe: dict[str, Any], said: str) -> None:
    register_dam()
    with pytest.raises(DamError, match=said):
        require_known_keys(recipe)


def test_what_mergekit_knows_is_taken() -> None:
    register_dam()
    require_known_keys(_recipe("ties", parameters={"density": 0.5, "int8_mask": True}, chat_template="auto"))
    require_known_keys(
        _recipe("slerp", parameters={"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}, models=MODELS)
    )
    require_known_keys(_recipe(tokenizer={"source": "union", "tokens": {"<x>": {"source": "base", "force": True}}}))
    require_known_keys(["no mapping"])


def test_settings_of_other_methods_are_named_as_such() -> None:
    register_dam()
    for name in ("int8_mask", "density", "normalize"):
        with pytest.raises(DamError, match="another method") as refused:
            parse_settings({name: 1}, [{}])
        assert "Did you mean" not in str(refused.value) and len(str(refused.value)) < 300
