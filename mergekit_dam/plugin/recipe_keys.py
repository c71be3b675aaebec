"""Refuse unknown keys and parameters in a recipe, which mergekit would ignore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods import registry
from mergekit.tokenizer.config import TokenEmbeddingConfig, TokenizerConfig
from pydantic import BaseModel

from mergekit_dam.config import ModelSettings, unknown_setting
from mergekit_dam.errors import DamError, did_you_mean

# (class, key) -> class of the value, of the entries of a list, or of the values of a mapping
_PARTS: Mapping[tuple[type[BaseModel], str], type[BaseModel]] = {
    (MergeConfiguration, "models"): InputModelDefinition,
    (MergeConfiguration, "slices"): OutputSliceDefinition,
    (MergeConfiguration, "modules"): OutputModuleDefinition,
    (MergeConfiguration, "tokenizer"): TokenizerConfig,
    (MergeConfiguration, "base_model"): ModelReference,
    (OutputModuleDefinition, "models"): InputModelDefinition,
    (OutputModuleDefinition, "slices"): OutputSliceDefinition,
    (OutputSliceDefinition, "sources"): InputSliceDefinition,
    (OutputSliceDefinition, "base_model"): ModelReference,
    (InputModelDefinition, "model"): ModelReference,
    (InputSliceDefinition, "model"): ModelReference,
    (ModelReference, "model"): ModelPath,
    (ModelReference, "lora"): ModelPath,
    (TokenizerConfig, "tokens"): TokenEmbeddingConfig,
}
_NAMED = {"modules", "tokens"}  # mappings whose keys are names that the user chose


def require_known_keys(content: Any) -> None:
    """Refuse keys and parameters that mergekit would ignore, and unknown merge methods.

    Args:
        content: a recipe, parsed from YAML. A value of the wrong type is left for mergekit to refuse.

    Raises:
        DamError: with the first such key, and its correct place.
    """
    if not isinstance(content, Mapping):
        return
    method = content.get("merge_method")
    settings = {m.spec.name: {p.name for p in m.spec.parameters} for m in registry.registered_methods()}
    if isinstance(method, str) and method not in settings:
        raise DamError(
            "merge_method",
            expected="a method that mergekit knows",
            got=method,
            cure=did_you_mean(method, settings) or f"Known: {', '.join(sorted(settings))}.",
        )
    _walk(content, MergeConfiguration, "", str(method), settings.get(str(method)))


def _walk(value: Any, kind: type[BaseModel], place: str, method: str, settings: set[str] | None) -> None:
    """Check the keys of a value of class `kind`, and of all values in it."""
    if not isinstance(value, Mapping):
        return
    for key in value:
        if key not in kind.model_fields:
            raise _misplaced(str(key), kind, place, settings or set())
    for key, part in value.items():
        inner = f"{place}{key}"
        if key == "parameters" and isinstance(part, Mapping):
            _parameters(part, kind, place, method, settings)
        below = _PARTS.get((kind, key))
        if below is None or part is None:
            continue
        if isinstance(part, list):
            for i, entry in enumerate(part, 1):
                _walk(entry, below, f"{inner} {i}: ", method, settings)
        elif key in _NAMED and isinstance(part, Mapping):
            for name, entry in part.items():
                _walk(entry, below, f"{inner} {name}: ", method, settings)
        else:
            _walk(part, below, f"{inner}: ", method, settings)


def _parameters(
    values: Mapping[Any, Any], kind: type[BaseModel], place: str, method: str, settings: set[str] | None
) -> None:
    """Check the names under one `parameters:`."""
    where = f"{place}parameters"
    if settings is not None and method != "dam":
        unknown_setting([key for key in values if key not in settings], where, settings, method)
    for key, value in values.items():
        for i, entry in enumerate(value if isinstance(value, list) else [value], 1):
            if isinstance(entry, Mapping):
                _conditional(entry, f"{where}: {key}{f' {i}' if isinstance(value, list) else ''}")
    if method == "dam" and values and kind in (OutputSliceDefinition, OutputModuleDefinition):
        key = str(next(iter(values)))
        own = key in ModelSettings.model_fields
        raise DamError(
            f"setting {key!r} in {where}",
            expected=f"it under `parameters:` of {'a model' if own else 'the recipe'}",
            got="it in a slice or module",
            cure="dam learns all layers with the same settings: move it there.",
        )


def _conditional(entry: Mapping[Any, Any], where: str) -> None:
    """Check the keys of a parameter that has a filter."""
    known = ConditionalParameter.model_fields
    for key in entry:
        if key not in known:
            raise DamError(
                f"{where}: {key!r}",
                expected=" and ".join(known),
                got="an unknown key",
                cure=did_you_mean(str(key), known) or "Remove it.",
            )


def _misplaced(key: str, kind: type[BaseModel], place: str, settings: Iterable[str]) -> DamError:
    """Return the error for an unknown key, with the place of a setting, or with the nearest known key."""
    known = list(kind.model_fields)
    if key in settings and "parameters" in known:
        cure = f"It is a setting: write it under `parameters:` {'of this model' if place else 'of the recipe'}."
    elif key in MergeConfiguration.model_fields and kind is not MergeConfiguration:
        cure = "It belongs at the top level of the recipe."
    else:
        cure = did_you_mean(key, known) or did_you_mean(key, settings) or f"Known here: {', '.join(known)}."
    return DamError(f"{place}{key!r}", expected="a key of mergekit's recipes", got="an unknown one", cure=cure)
