"""Define the merge method `dam`, which an unmodified mergekit runs.

mergekit passes a method one tensor at a time and never the config, so the masks are learned (or read) in the first
call, under a lock, and then applied per tensor. While it plans, mergekit calls `validate_inputs` from its planner; the
config is read from that planner, so that settings are checked before anything is executed.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_dam.config import (
    KNOWN,
    REMOVED,
    DamConfig,
    ModelSettings,
    unknown_cure,
    unknown_keys,
    unknown_setting,
)
from mergekit_dam.errors import DamError
from mergekit_dam.plugin.exit_check import compare_at_exit
from mergekit_dam.plugin.options import refuse_launcher, require_options
from mergekit_dam.plugin.output import OutputLocks, silence_tokenizer_warning
from mergekit_dam.plugin.planner import (
    PlanHandoff,
    PlannerContext,
    clear_planner_cache,
    kept_tokens,
    planner_context,
    raw_settings,
    refuse_moved_layers,
    require_chat_template,
    require_planner,
)
from mergekit_dam.tasks.readout import has_tokenizer

LOG = logging.getLogger(__name__)
RawSettings = tuple[dict[str, Any], dict[ModelReference, dict[str, Any]]]  # shared, and per model
_KEPT_RUNS = 16  # merges of one process whose masks stay open; these are small handles on files


@dataclass
class _Run:
    """One merge: its planned inputs and, after the first tensor, its masks."""

    base: ModelReference
    models: tuple[ModelReference, ...]
    context: PlannerContext | None
    settings: RawSettings | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: int = field(default_factory=threading.get_ident)
    plan: Any = None
    merger: Any = None
    matched_parameters: Mapping[str, Any] | None = None
    handoff: PlanHandoff | None = None

    def matches(self, context: PlannerContext, base: Hashable, models: Sequence[Hashable]) -> bool:
        """Whether this planner plans this merge."""
        return (
            self.context is not None
            and self.context.planner() is context.planner()  # each run of a config has its own planner
            and (self.base, self.models) == (base, models)
        )

    def matches_group(self, group: TensorGroup, parameters: Mapping[str, Any]) -> bool:
        """Whether the group belongs to this merge: same base, some of its models, and the same settings."""
        ids = {entry.id for entry in group.non_base}
        if group.base is None or group.base.id != self.base or not ids <= set(self.models):
            return False
        if self.settings is None or parameters == self.matched_parameters:
            return True
        shared, per_model = self.settings
        matches = all(parameters.get(name) == shared.get(name) for name in DamConfig.model_fields) and all(
            value == (shared.get(name) if (own := per_model[ref].get(name)) is None else own)
            for name in ModelSettings.model_fields
            for ref, value in parameters.get(name, {}).items()
        )
        if matches:
            self.matched_parameters = dict(parameters)
        return matches


class DAM(GroupMergeMethod):
    """Defense-Aware Merging (Yang et al., ICLR 2025, arXiv 2410.13910) as a mergekit method."""

    spec = MergeMethodSpec(
        name="dam",
        pretty_name="Defense-Aware Merging",
        reference_url="https://arxiv.org/abs/2410.13910",
        # None stands for "not given": defaults are DamConfig's, and values are checked there, all at once
        parameters=tuple(
            ParameterSpec(name, Any, scope, default=None, description=info.description)
            for settings, scope in ((DamConfig, ParameterScope.SHARED), (ModelSettings, ParameterScope.NON_BASE))
            for name, info in settings.model_fields.items()
        ),
        contract=InputContract(base=BasePolicy.REQUIRED),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._handoffs: list[PlanHandoff] = []
        self._lock = threading.Lock()
        self._outputs = OutputLocks()

    @contextmanager
    def with_plan(self, config: Any, options: Any, plan: Any) -> Iterator[PlanHandoff]:
        """Give this plan to a merge of this config during the context; the merge stores its masks in the handoff."""
        handoff = PlanHandoff(config, options, plan)
        with self._lock:
            self._handoffs.append(handoff)
        try:
            yield handoff
        finally:
            with self._lock:
                self._handoffs = [one for one in self._handoffs if one is not handoff]

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        if base_id is None:
            raise DamError(
                "base_model",
                expected="the model that all others were fine-tuned from",
                got="none",
                cure="Add `base_model:` to the recipe.",
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if group_name is None or not group_name.endswith("]") or ".slices[" not in group_name:
            return
        models = tuple(ref for ref in input_ids if ref != base_id)
        context = planner_context()
        if context is not None and any(run.matches(context, base_id, models) for run in self._runs):
            return  # another slice or module of a merge that has a run already
        run = _Run(base_id, models, context)
        if context is not None:
            require_options(context.options)
            refuse_launcher()
            refuse_moved_layers(context.config)
            require_chat_template(context.config)
            run.settings = raw_settings(context.config, run.models)
            for key in unknown_keys([*run.settings[0], *(k for own in run.settings[1].values() for k in own)]):
                if key in REMOVED:  # the recipe relies on a setting that no longer works
                    unknown_setting([key], "parameters", KNOWN, "dam")
                LOG.warning("dam ignores the unknown setting %r. %s", key, unknown_cure(key))
            with self._lock:
                handoffs = tuple(self._handoffs)
            run.handoff = next((h for h in handoffs if h.matches(context, run.base, run.models, run.settings)), None)
            if run.handoff is not None:
                run.plan = run.handoff.plan  # `plan_of` called `kept_tokens`
            else:
                run.plan = _build_plan(run)
                kept_tokens(context.config, run.plan)
                for warning in _class_warnings(run.plan):
                    LOG.warning("dam: %s", warning)
            if context.out_path is not None:
                inputs = [model.path for model in (run.plan.base, *run.plan.models)]
                self._outputs.claim(Path(context.out_path), inputs, until=require_planner(context).out_model_config)
                compare_at_exit(context.out_path, run.plan, context.config, quiet=context.options.quiet)
                if not context.config.chat_template and not has_tokenizer([run.plan.base.path]):
                    silence_tokenizer_warning(require_planner(context).out_model_config)
        with self._lock:
            self._runs = [run, *self._runs][:_KEPT_RUNS]

    @torch.no_grad()
    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        if group.base is None:
            raise DamError(
                f"tensor {group.metadata.name}",
                expected="a base model with this tensor",
                got="a base without it",
                cure="Merge models that were fine-tuned from this base.",
            )
        run = self._run_for(group, parameters)
        with run.lock:
            if run.merger is None:
                clear_planner_cache()
                run.merger = _make_merger(run, parameters)
                if run.handoff is not None:
                    run.handoff.masks = run.merger.masks
        merged: torch.Tensor = run.merger.merge(group)
        return merged

    def _run_for(self, group: TensorGroup, parameters: Mapping[str, Any]) -> _Run:
        """Return the run that a group belongs to; make one for a caller without a planner."""
        with self._lock:
            of_other_thread = None
            for run in self._runs:
                if run.matches_group(group, parameters):
                    if run.thread == threading.get_ident():
                        return run
                    of_other_thread = of_other_thread or run  # several threads may run equal merges
            if of_other_thread is not None:
                return of_other_thread
            assert group.base is not None
            models = tuple(entry.id for entry in group.non_base)
            run = _Run(group.base.id, models, None, _raw_settings_of_call(parameters, models))
            self._runs = [run, *self._runs][:_KEPT_RUNS]
            return run


def _make_merger(run: _Run, parameters: Mapping[str, Any]) -> Any:
    """Return the `MaskedMerge` of a run; learn its masks if needed."""
    from mergekit_dam.plugin.apply import MaskedMerge

    if run.settings is None:
        run.settings = _raw_settings_of_call(parameters, run.models)
    return MaskedMerge(run.plan or _build_plan(run), run.models, run.context)


def _raw_settings_of_call(parameters: Mapping[str, Any], models: Sequence[ModelReference]) -> RawSettings:
    """Return raw settings, shared and per model, from the parameters of one call by mergekit."""
    shared = {name: parameters.get(name) for name in DamConfig.model_fields}
    return shared, {
        ref: {name: parameters[name][ref] for name in ModelSettings.model_fields if name in parameters}
        for ref in models
    }


def _build_plan(run: _Run) -> Any:
    """Build the plan of a run; unknown settings are left out."""
    from mergekit_dam.models.plan import build_plan

    assert run.settings is not None
    shared, per_model = run.settings
    return build_plan(
        run.base,
        run.models,
        shared={k: v for k, v in shared.items() if k in KNOWN},
        per_model={ref: {k: v for k, v in own.items() if k in KNOWN} for ref, own in per_model.items()},
        options=run.context.options if run.context is not None else None,
    )


def _class_warnings(plan: Any) -> list[str]:
    """Return warnings of classes whose names differ between a head and its model."""
    from mergekit_dam.tasks.preflight import renamed_classes

    return renamed_classes(plan)


def register_dam() -> DAM:
    """Register `dam` and the package's model families with mergekit, once, and return the registered method."""
    from mergekit.merge_methods import registry

    from mergekit_dam.models.families import register_architectures

    registered: Any = next((m for m in registry.registered_methods() if m.spec.name == DAM.spec.name), None)
    if registered is None:
        registered = DAM()
        registry.register(registered)
    register_architectures()
    method: DAM = registered
    return method


if "_mergekit_dam_autoload" in sys.modules and os.environ.get("MERGEKIT_DAM_AUTOLOAD", "1") != "0":
    register_dam()  # the autoload hook does nothing while this module is being imported
