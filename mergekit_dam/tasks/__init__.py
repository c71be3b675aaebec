"""One Task per input model; the family follows from the base model's config."""

from __future__ import annotations

import torch

from mergekit_dam.errors import DamError
from mergekit_dam.plan import Plan
from mergekit_dam.tasks.base import Task
from mergekit_dam.tasks.image import ImageTask
from mergekit_dam.tasks.text import CausalTask, TextTask

__all__ = ["Task", "build_tasks"]
_ENCODERS: dict[str, type[Task]] = {
    "vit": ImageTask, "clip": ImageTask, "clip_vision_model": ImageTask,
    "bert": TextTask, "roberta": TextTask, "distilbert": TextTask,
}  # fmt: skip


def build_tasks(plan: Plan, device: torch.device) -> list[Task]:
    """The tasks of a plan, in the order of its models.

    Raises:
        DamError: an unsupported family, or data or heads that do not fit.
    """
    class_name = (plan.base.config.architectures or [""])[0]
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        family: type[Task] | None = CausalTask
    else:
        family = _ENCODERS.get(plan.base.config.model_type)
    if family is None:
        raise DamError(
            f"base model class {class_name}", expected=f"a causal LM or one of {', '.join(_ENCODERS)}",
            got=plan.base.config.model_type, cure="See the README for the supported families.",
        )  # fmt: skip
    return [family(plan, index, device) for index in range(len(plan.models))]
