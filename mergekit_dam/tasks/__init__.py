"""One Task per input model; the family follows from the base model's config."""

from __future__ import annotations

import torch

from mergekit_dam.errors import DamError
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks.base import Target, Task
from mergekit_dam.tasks.causal import CausalTask
from mergekit_dam.tasks.image import ImageTask
from mergekit_dam.tasks.text import TextTask

__all__ = ["CausalTask", "ImageTask", "Target", "Task", "TextTask", "build_tasks", "family_of"]
_ENCODERS: dict[str, type[Task]] = {
    "vit": ImageTask, "clip": ImageTask, "clip_vision_model": ImageTask,
    "bert": TextTask, "roberta": TextTask, "distilbert": TextTask,
}  # fmt: skip


def family_of(plan: Plan) -> type[Task]:
    """The kind of task that the base model's class calls for.

    Raises:
        DamError: an unsupported family.
    """
    class_name = (plan.base.config.architectures or [""])[0]
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return CausalTask
    family = _ENCODERS.get(plan.base.config.model_type)
    if family is None:
        raise DamError(
            f"base model class {class_name}", expected=f"a causal LM or one of {', '.join(_ENCODERS)}",
            got=plan.base.config.model_type, cure="See the README for the supported families.",
        )  # fmt: skip
    return family


def build_tasks(plan: Plan, device: torch.device) -> list[Task]:
    """The tasks of a plan, in the order of its models.

    Raises:
        DamError: an unsupported family, or data or heads that do not fit.
    """
    family = family_of(plan)
    return [family(plan, index, device) for index in range(len(plan.models))]
