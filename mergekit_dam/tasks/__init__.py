"""One Task per input model: the forward pass of a model family, with a model's own head and unlabelled data."""

from __future__ import annotations

from typing import TypeGuard

import torch
import transformers

from mergekit_dam.errors import DamError
from mergekit_dam.models.families import CAUSAL_CLASSES
from mergekit_dam.models.plan import ModelInput, Plan
from mergekit_dam.registry import TASKS
from mergekit_dam.tasks.base import Target, Task
from mergekit_dam.tasks.causal import CausalTask, cache_argument
from mergekit_dam.tasks.image import ImageTask
from mergekit_dam.tasks.text import TextTask

__all__ = [
    "CausalTask",
    "ImageTask",
    "Target",
    "Task",
    "TextTask",
    "build_tasks",
    "family_of",
    "generates",
    "reads_text",
    "register_task",
]
_ENCODERS: dict[str, type[Task]] = {
    "vit": ImageTask,
    "clip": ImageTask,
    "clip_vision_model": ImageTask,
    "bert": TextTask,
    "roberta": TextTask,
    "distilbert": TextTask,
}


def register_task(model_type: str, task: type[Task]) -> None:
    """Have models of a family be learned on through a Task.

    Args:
        model_type: as the family's config.json says it.
        task: ours, such as `ImageTask`, or one of your own.

    Raises:
        DamError: the family has a Task already.
    """
    TASKS.add(model_type, task)


for _model_type, _task in _ENCODERS.items():
    register_task(_model_type, _task)


def reads_text(task: Task) -> TypeGuard[TextTask]:
    """Whether a task's samples are texts; such a task offers all that `TextTask` does."""
    return task.modality == "text"


def generates(task: Task) -> TypeGuard[CausalTask]:
    """Whether a task's model goes on with texts; such a task offers all that `CausalTask` does."""
    return not task.classifies


def family_of(plan: Plan) -> type[Task]:
    """The Task class that the classes of base and models call for.

    Raises:
        DamError: an unsupported family, or a model of another kind than the base.
    """
    family = _family(plan.base)
    for model in plan.models:
        if _family(model) is not family:
            raise DamError(
                f"model {model.name}",
                expected=f"the base's kind, {_class_name(plan.base)}",
                got=_class_name(model),
                cure="Merge models that were fine-tuned from this base, for the same kind of output.",
            )
    return family


def _class_name(model: ModelInput) -> str:
    return str((model.config.architectures or [""])[0])


def _family(model: ModelInput) -> type[Task]:
    class_name, model_type = _class_name(model), model.config.model_type
    known: type[Task] | None = TASKS.get(model_type)
    if known is not None and model_type not in _ENCODERS:
        return known  # registered from outside, whatever the class
    if class_name.endswith(CAUSAL_CLASSES):
        model_class = getattr(transformers, class_name, None)
        if model_class is not None and cache_argument(model_class) is None:
            raise DamError(
                f"model {model.name}",
                expected="a causal LM with attention and a key-value cache",
                got=class_name,
                cure="State space and recurrent models cannot be learned on; other methods, such as ties, merge them.",
            )
        return CausalTask
    if known is None:
        raise DamError(
            f"class {class_name} of model {model.name}",
            expected=f"a causal LM or one of {', '.join(TASKS.entries)}",
            got=model_type,
            cure="See the README for the supported families.",
        )
    return known


def build_tasks(plan: Plan, device: torch.device) -> list[Task]:
    """The tasks of a plan, in the order of its models.

    Raises:
        DamError: an unsupported family, or data or heads that do not fit.
    """
    family = family_of(plan)
    return [family(plan, index, device) for index in range(len(plan.models))]
