"""What the recipe says: read from our own commands' config, or from the planner that calls the method.

mergekit hands a method no config (its issue 649), but calls `validate_inputs` from its planner, whose config,
options and output path can be read from the calling frames. They are never changed, and a caller without a
planner (the Python API for single tensors) simply has no context.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError
from mergekit_dam.models.plan import Plan, build_plan


@dataclass
class Context:
    """What the planner knows: read, never changed.

    The planner itself is held weakly, so that what belongs to one merge is freed when that merge ends.
    """

    planner: weakref.ref[Any]
    config: Any
    options: MergeOptions
    out_path: str | None = None


def planner_context() -> Context | None:
    """Config, options and output path from the planner that is calling us, if one is."""
    from mergekit.plan import MergePlanner

    context = None
    frame = sys._getframe(1)
    while frame is not None:
        planner = frame.f_locals.get("self")
        if context is None and isinstance(planner, MergePlanner):
            context = Context(weakref.ref(planner), planner.config, planner.options)
        if context is not None and frame.f_code.co_name == "plan_to_disk":
            context.out_path = frame.f_locals.get("out_path")
            break
        frame = frame.f_back  # type: ignore[assignment]
    return context


def planner_of(context: Context) -> Any:
    """The planner while it plans."""
    planner = context.planner()
    assert planner is not None, "validate_inputs is called by the planner"
    return planner


def forget_planners() -> None:
    """Empty mergekit's cache on MergePlanner, which would keep the last 128 planners, and their merges, in memory.

    Only planning reads it, and it is filled again when needed.
    """
    from mergekit.plan import MergePlanner

    clear = getattr(MergePlanner._model_arch, "cache_clear", None)
    if clear is not None:
        clear()


def configured(
    config: Any, models: Sequence[ModelReference]
) -> tuple[dict[str, Any], dict[ModelReference, dict[str, Any]]]:
    """Raw values, shared and per model, from a normalised config."""
    per_model: dict[ModelReference, dict[str, Any]] = {ref: {} for ref in models}
    for module in (config.modules or {}).values():
        for output in module.slices or []:
            for source in output.sources:
                if source.model in per_model:
                    per_model[source.model] |= source.parameters or {}
    return dict(config.parameters or {}), per_model


def refuse_moved_layers(config: Any) -> None:
    for name, module in (config.modules or {}).items():
        start = 0
        for output in module.slices or []:
            ranges = {tuple(source.layer_range) for source in output.sources}
            length = output.sources[0].layer_range[1] - output.sources[0].layer_range[0]
            if ranges != {(start, start + length)}:
                raise DamError(
                    f"slices of {name}", expected="every model's layers in their own place",
                    got=f"layer ranges {sorted(ranges)} for output layers {start} to {start + length}",
                    cure="Move layers in a stage of its own (mergekit-multi), and merge its output with dam.",
                )  # fmt: skip
            start += length


def plan_of(config: Any, options: MergeOptions) -> Plan:
    """The plan of a recipe, strict about its settings: for our own commands, before mergekit starts.

    Raises:
        DamError: no base, fewer than two models, unknown settings, or anything else that `build_plan` refuses.
    """
    if config.base_model is None or not config.models:
        raise DamError(
            "recipe", expected="base_model and models", got="none of one", cure="Name both at the top level."
        )
    refs = [entry.model for entry in config.models if entry.model != config.base_model]
    own = {entry.model: dict(entry.parameters or {}) for entry in config.models}
    return build_plan(config.base_model, refs, shared=dict(config.parameters or {}), per_model=own, options=options)
