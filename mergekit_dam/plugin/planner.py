"""Read settings from a recipe's config, or from the mergekit planner that calls the method.

mergekit passes a method no config (its issue 649), but calls `validate_inputs` from its planner, whose config,
options and output path can be read from the calling frames. They are never changed. A caller without a planner (the
Python API for single tensors) has no context.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from mergekit._data import chat_templates
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_dam.artifact.masks_file import LearnedMasks
from mergekit_dam.config import unknown_keys
from mergekit_dam.errors import DamError, did_you_mean, first_line
from mergekit_dam.models.plan import Plan, build_plan, parse_settings
from mergekit_dam.tasks.readout import tokenizer_of

_SHORTEST_TEMPLATE = 20  # characters; mergekit accepts no shorter template


@dataclass
class PlannerContext:
    """Config, options and output path of a planner.

    The reference to the planner is weak, so that a merge is freed when it ends.
    """

    planner: weakref.ref[Any]
    config: Any
    options: MergeOptions
    out_path: str | None = None


@dataclass
class PlanHandoff:
    """A plan that a command of this package made before mergekit started; `masks` is set by the merge."""

    config: Any
    options: MergeOptions
    plan: Plan
    masks: LearnedMasks | None = None

    def matches(
        self,
        context: PlannerContext,
        base: Any,
        models: Sequence[ModelReference],
        values: tuple[Mapping[str, Any], Mapping[ModelReference, Mapping[str, Any]]],
    ) -> bool:
        """Whether mergekit plans these config and options objects, with the plan's inputs and settings."""
        if context.config is not self.config or context.options is not self.options:
            return False
        plan = self.plan
        if (plan.base.ref, tuple(model.ref for model in plan.models)) != (base, tuple(models)):
            return False
        shared, per_model = values
        if unknown_keys([*shared, *(key for own in per_model.values() for key in own)]):
            return False
        config, settings = parse_settings(shared, [per_model[ref] for ref in models])
        return (config, config.model_fields_set) == (plan.config, plan.config.model_fields_set) and all(
            new == model.settings for new, model in zip(settings, plan.models, strict=True)
        )


def planner_context() -> PlannerContext | None:
    """Return config, options and output path of the planner among the callers; None without one."""
    from mergekit.plan import MergePlanner

    context = None
    frame = sys._getframe(1)
    while frame is not None:
        planner = frame.f_locals.get("self")
        if context is None and isinstance(planner, MergePlanner):
            context = PlannerContext(weakref.ref(planner), planner.config, planner.options)
        if context is not None and frame.f_code.co_name == "plan_to_disk":
            context.out_path = frame.f_locals.get("out_path")
            break
        frame = frame.f_back  # type: ignore[assignment]
    return context


def require_planner(context: PlannerContext) -> Any:
    """Return the planner, which exists while it plans."""
    planner = context.planner()
    assert planner is not None, "validate_inputs is called by the planner"
    return planner


def clear_planner_cache() -> None:
    """Clear mergekit's cache on MergePlanner, which would keep the last 128 planners and their merges in memory.

    Only planning reads the cache, and fills it again.
    """
    from mergekit.plan import MergePlanner

    clear = getattr(MergePlanner._model_arch, "cache_clear", None)
    if clear is not None:
        clear()


def raw_settings(
    config: Any, models: Sequence[ModelReference]
) -> tuple[dict[str, Any], dict[ModelReference, dict[str, Any]]]:
    """Return raw settings, shared and per model, from a normalised config."""
    per_model: dict[ModelReference, dict[str, Any]] = {ref: {} for ref in models}
    for module in (config.modules or {}).values():
        for output in module.slices or []:
            for source in output.sources:
                if source.model in per_model:
                    per_model[source.model] |= source.parameters or {}
    return dict(config.parameters or {}), per_model


def refuse_moved_layers(config: Any) -> None:
    """Refuse slices that move, repeat or leave out layers.

    Raises:
        DamError: with the layer ranges.
    """
    parts = dict(config.modules or {}) | ({"the recipe": config} if config.slices else {})
    for name, module in parts.items():
        start = 0
        for output in module.slices or []:
            ranges = {tuple(source.layer_range) for source in output.sources}
            length = output.sources[0].layer_range[1] - output.sources[0].layer_range[0]
            if ranges != {(start, start + length)}:
                raise DamError(
                    f"slices of {name}",
                    expected="every model's layers in their own place",
                    got=f"layer ranges {sorted(ranges)} for output layers {start} to {start + length}",
                    cure="Move layers in a stage of its own (mergekit-multi), and merge its output with dam.",
                )
            start += length


def require_chat_template(config: Any) -> None:
    """Refuse a `chat_template` that mergekit cannot use: the output would have no tokenizer.

    Raises:
        DamError: neither `auto`, nor a name that mergekit knows, nor a Jinja template.
    """
    template = config.chat_template
    if not template or template == "auto":
        return
    known = {file.name.removesuffix(".jinja") for file in files(chat_templates).iterdir() if ".jinja" in file.name}
    if template in known:
        return
    got = repr(template[:60])
    if len(template) >= _SHORTEST_TEMPLATE and "{" in template:
        try:
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
            return
        except jinja2.TemplateSyntaxError as error:
            if "generation" in str(error):  # a tag that only transformers knows
                return
            got = f"{got} ({first_line(error)})"
    raise DamError(
        "chat_template",
        expected=f"auto, a Jinja template, or one of {', '.join(sorted(known))}",
        got=got,
        cure=did_you_mean(template, known) or "Correct it, or leave it out to keep the base's.",
    )


def plan_of(config: Any, options: MergeOptions, *, least: int = 2) -> Plan:
    """Build the plan of a recipe before mergekit starts, and refuse unknown settings.

    Raises:
        DamError: no base, fewer than two models, unknown settings, or any other fault that `build_plan` refuses.
    """
    if config.base_model is None:
        raise DamError(
            "recipe", expected="base_model and models", got="no base_model", cure="Name it at the top level."
        )
    refuse_moved_layers(config)
    own: dict[ModelReference, dict[str, Any]] = {}
    for entry in _entries(config):
        own.setdefault(entry.model, {}).update(entry.parameters or {})
    refs = [ref for ref in own if ref != config.base_model]
    shared = dict(config.parameters or {})
    plan = build_plan(config.base_model, refs, shared=shared, per_model=own, options=options, least=least)
    kept_tokens(config, plan)
    return plan


def _entries(config: Any) -> Iterator[Any]:
    """Yield the entries of `models`, `slices` and `modules` that name a model."""
    yield from config.models or ()
    for part in (config, *(config.modules or {}).values()):
        if part is not config:
            yield from part.models or ()
        for output in part.slices or ():
            yield from output.sources


def kept_tokens(config: Any, plan: Plan) -> int | None:
    """Return the number of rows of embedding and head that mergekit keeps under a tokenizer setting.

    Masks are learned on the rows that the models have. Rows without a token can be cut, and rows can be added after the
    last token; tokens that move or have another source cannot be masked.

    Returns:
        N: the first N rows stay; None without a tokenizer setting.

    Raises:
        DamError: tokenizers that differ, tokens without a row, or sources of single tokens.
    """
    if not (config.tokenizer_source or config.tokenizer):
        return None
    setting = "tokenizer_source" if config.tokenizer_source else "tokenizer"
    cure = f"Leave out {setting} (the output gets the base's tokenizer), or apply it in a stage of its own."
    folders = [model.path for model in (plan.base, *plan.models)]
    vocabulary = tokenizer_of(folders, "base").get_vocab()
    rows = int(plan.base.config.get_text_config().vocab_size)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))) or len(vocabulary) > rows:
        raise DamError(
            f"setting {setting}",
            expected=f"tokens 0 to at most {rows - 1}, the rows of the embedding, without a gap",
            got=f"{len(vocabulary)} tokens up to {max(vocabulary.values())}: mergekit would move rows",
            cure=cure,
        )
    if config.tokenizer is not None and config.tokenizer.tokens:
        raise DamError(
            f"setting {setting}.tokens",
            expected="no such entry with dam",
            got=", ".join(list(config.tokenizer.tokens)[:3]),
            cure="Give tokens another source in a stage of its own (mergekit-multi), and merge its output with dam.",
        )
    for model in plan.models:
        own = tokenizer_of((model.path, plan.base.path), model.name).get_vocab()
        if own != vocabulary:
            raise DamError(
                f"setting {setting}",
                expected="one vocabulary in all models",
                got=f"another vocabulary in {model.name}: mergekit would move rows",
                cure=cure,
            )
    return len(vocabulary)
