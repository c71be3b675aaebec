"""The merge method `dam`, as an unmodified mergekit runs it.

mergekit hands a method one tensor at a time and never the config, so the masks are learned (or read) in the first
call, under a lock, and then applied per tensor. At plan time, where mergekit calls `validate_inputs` from its
planner, the config is read from there: settings are then checked before anything is executed.
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
from mergekit_dam.plugin.output import OutputLocks, expect_no_tokenizer
from mergekit_dam.plugin.planner import (
    Context,
    Handed,
    configured,
    forget_planners,
    kept_tokens,
    planner_context,
    planner_of,
    refuse_moved_layers,
    require_chat_template,
)
from mergekit_dam.tasks.readout import has_tokenizer

LOG = logging.getLogger(__name__)
Values = tuple[dict[str, Any], dict[ModelReference, dict[str, Any]]]  # raw settings: shared, and per model
_KEPT_RUNS = 16  # merges whose masks stay open in one process; they are small handles on files


@dataclass
class _Run:
    """One merge: its inputs as planned and, from the first tensor on, its masks."""

    base: ModelReference
    models: tuple[ModelReference, ...]
    context: Context | None
    values: Values | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: int = field(default_factory=threading.get_ident)
    plan: Any = None
    state: Any = None
    served: Mapping[str, Any] | None = None
    handed: Handed | None = None

    def is_for(self, context: Context, base: Hashable, models: Sequence[Hashable]) -> bool:
        return (
            self.context is not None
            and self.context.planner() is context.planner()  # a config may be run again, a planner is new each time
            and (self.base, self.models) == (base, models)
        )

    def serves(self, group: TensorGroup, parameters: Mapping[str, Any]) -> bool:
        """Whether the group belongs to this merge: same base, some of its models, and the same settings."""
        ids = {entry.id for entry in group.non_base}
        if group.base is None or group.base.id != self.base or not ids <= set(self.models):
            return False
        if self.values is None or parameters == self.served:
            return True
        shared, per_model = self.values
        found = all(parameters.get(name) == shared.get(name) for name in DamConfig.model_fields) and all(
            value == (shared.get(name) if (own := per_model[ref].get(name)) is None else own)
            for name in ModelSettings.model_fields
            for ref, value in parameters.get(name, {}).items()
        )
        if found:
            self.served = dict(parameters)
        return found


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
        self._handed: list[Handed] = []
        self._lock = threading.Lock()
        self._outputs = OutputLocks()

    @contextmanager
    def handing(self, config: Any, options: Any, plan: Any) -> Iterator[Handed]:
        """While this lasts, a merge of this config need not plan again, and hands on the masks that it applied."""
        handed = Handed(config, options, plan)
        with self._lock:
            self._handed.append(handed)
        try:
            yield handed
        finally:
            with self._lock:
                self._handed = [one for one in self._handed if one is not handed]

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
        if context is not None and any(run.is_for(context, base_id, models) for run in self._runs):
            return  # another slice or module of a merge that is planned already
        run = _Run(base_id, models, context)
        if context is not None:
            require_options(context.options)
            refuse_launcher()
            refuse_moved_layers(context.config)
            require_chat_template(context.config)
            run.values = configured(context.config, run.models)
            for key in unknown_keys([*run.values[0], *(k for own in run.values[1].values() for k in own)]):
                if key in REMOVED:  # to merge without it would be another merge than was asked for
                    unknown_setting([key], "parameters", KNOWN, "dam")
                LOG.warning("dam ignores the unknown setting %r. %s", key, unknown_cure(key))
            with self._lock:
                handed = tuple(self._handed)
            run.handed = next((h for h in handed if h.is_for(context, run.base, run.models, run.values)), None)
            if run.handed is not None:
                run.plan = run.handed.plan  # `plan_of` compared the vocabularies
            else:
                run.plan = _build_plan(run)
                kept_tokens(context.config, run.plan)
                for warning in _renamed(run.plan):
                    LOG.warning("dam: %s", warning)
            if context.out_path is not None:
                inputs = [model.path for model in (run.plan.base, *run.plan.models)]
                self._outputs.claim(Path(context.out_path), inputs, until=planner_of(context).out_model_config)
                compare_at_exit(context.out_path, run.plan, context.config)
                if not context.config.chat_template and not has_tokenizer([run.plan.base.path]):
                    expect_no_tokenizer(planner_of(context).out_model_config)
        with self._lock:
            self._runs = [run, *self._runs][:_KEPT_RUNS]

    @torch.no_grad()
    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        if group.base is None:
            raise DamError(
                f"tensor {group.metadata.name}",
                expected="a base model that has it",
                got="one without it",
                cure="Merge models that were fine-tuned from this base.",
            )
        run = self._run_for(group, parameters)
        with run.lock:
            if run.state is None:
                forget_planners()
                run.state = _apply(run, parameters)
                if run.handed is not None:
                    run.handed.masks = run.state.masks
        merged: torch.Tensor = run.state.merge(group)
        return merged

    def _run_for(self, group: TensorGroup, parameters: Mapping[str, Any]) -> _Run:
        with self._lock:
            other = None
            for run in self._runs:
                if run.serves(group, parameters):
                    if run.thread == threading.get_ident():
                        return run
                    other = other or run  # threads may run equal merges at once, each into its own output
            if other is not None:
                return other
            assert group.base is not None
            models = tuple(entry.id for entry in group.non_base)
            run = _Run(group.base.id, models, None, _given(parameters, models))
            self._runs = [run, *self._runs][:_KEPT_RUNS]
            return run


def _apply(run: _Run, parameters: Mapping[str, Any]) -> Any:
    """The run's masks, learned if need be."""
    from mergekit_dam.plugin.apply import Applied

    if run.values is None:
        run.values = _given(parameters, run.models)
    return Applied(run.plan or _build_plan(run), run.models, run.context)


def _given(parameters: Mapping[str, Any], models: Sequence[ModelReference]) -> Values:
    """Raw values, shared and per model, from what mergekit hands to one call."""
    shared = {name: parameters.get(name) for name in DamConfig.model_fields}
    return shared, {
        ref: {name: parameters[name][ref] for name in ModelSettings.model_fields if name in parameters}
        for ref in models
    }


def _build_plan(run: _Run) -> Any:
    from mergekit_dam.models.plan import build_plan

    assert run.values is not None
    shared, per_model = run.values
    return build_plan(
        run.base,
        run.models,
        shared={k: v for k, v in shared.items() if k in KNOWN},
        per_model={ref: {k: v for k, v in own.items() if k in KNOWN} for ref, own in per_model.items()},
        options=run.context.options if run.context is not None else None,
    )


def _renamed(plan: Any) -> list[str]:
    from mergekit_dam.tasks.preflight import renamed_classes

    return renamed_classes(plan)


def register_dam() -> DAM:
    """Make `dam` and our model families known to mergekit, and return the registered method. Idempotent."""
    from mergekit.merge_methods import registry

    from mergekit_dam.models.families import register_architectures

    found: Any = next((m for m in registry.registered_methods() if m.spec.name == DAM.spec.name), None)
    if found is None:
        found = DAM()
        registry.register(found)
    register_architectures()
    method: DAM = found
    return method


if "_mergekit_dam_autoload" in sys.modules and os.environ.get("MERGEKIT_DAM_AUTOLOAD", "1") != "0":
    register_dam()  # the hook steps aside when it meets this module half imported
