"""Train students of text encoders: theta_0, fitted to a model's answers to clean texts with inserted random words.

In text encoders no small trigger stands out (benchmarks/STUDY.md), so there is nothing to fit masks against; a student
replaces the model. It starts from theta_0 and learns which classes the model gives to unlabelled texts, as in
distillation (Hinton et al., arXiv 1503.02531). The model's answers to these texts are learned; behaviour that only a
trigger activates is hardly learned. Distillation against backdoors is from Li et al., Neural Attention Distillation,
arXiv 2101.05930, who need a clean teacher; here theta_0 is clean, and the model teaches. The target of a text with
random words is the answer to the text without them, so that single words have little effect.
Legend: T models, N samples, B batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.learn.teacher import TeacherLogits
from mergekit_dam.merging.checks import require_finite
from mergekit_dam.tasks import Task, TextTask
from mergekit_dam.tasks.base import Progress

_DIVERGED = "Lower student_learning_rate."


def is_causal(tasks: Iterable[Task | type[Task]]) -> bool:
    """Whether all tasks are those of causal LMs."""
    return all(not task.classifies for task in tasks)


def uses_students(tasks: Sequence[Task | type[Task]], config: DamConfig) -> bool:
    """Whether a search that scans merges students of these tasks' models: of causal LMs where `clean` is true."""
    if config.student_steps == 0:
        return False
    if is_causal(tasks):
        return config.clean
    return config.mask != "m1" and all(task.modality == "text" and not task.defended for task in tasks)


def train_student(
    task: TextTask, base: Mapping[str, Tensor], config: DamConfig, progress: Progress
) -> tuple[dict[str, Tensor], float]:
    """Train a student of one model; embeddings and head stay theta_0's.

    Args:
        task: forward pass and calibration texts of the model.
        base: theta_0 by output name.
        config: `student_steps`, `max_length`, `seed`, and the constants of students.
        progress: wraps the steps in a progress bar with a title.

    Returns:
        The trained tensors by output name, float32; and the share of calibration samples that the student answers as
        the model does.
    """
    constants = config.constants
    trained = {
        name: base[name].float().clone().requires_grad_(True)
        for name in task.targets
        if name not in task.embeddings and base[name].is_floating_point()
    }
    weights: dict[str, Tensor] = {**base, **trained}
    rows_N = torch.arange(task.num_samples)
    # classes, not probabilities: these would pass on more of the trigger's effect (benchmarks/STUDY.md)
    answers_N = TeacherLogits(task, task.own_weights())(rows_N, {}).argmax(-1)
    optimiser = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    generator = seeds.generator(config.seed, "student", task.index)
    queue = torch.empty(0, dtype=torch.long)
    for step in progress(range(config.student_steps), f"student of {task.name}"):
        while len(queue) < constants.student_batch_size:
            queue = torch.cat([queue, torch.randperm(task.num_samples, generator=generator)])
        rows_B, queue = queue.split([constants.student_batch_size, len(queue) - constants.student_batch_size])
        logits = task.logits(weights, task.with_random_words(rows_B, constants.student_words, generator))
        loss = F.cross_entropy(logits, answers_N[rows_B.to(task.device)])
        for group in optimiser.param_groups:
            slope = max(constants.student_last_rate_share, 1 - step / config.student_steps)
            group["lr"] = constants.student_learning_rate * min(1.0, (step + 1) / constants.student_warm_up) * slope
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, tensor in trained.items():
        require_finite(tensor.detach(), f"tensor {name}", f"the student of {task.name}", _DIVERGED)
    same_N = TeacherLogits(task, weights)(rows_N, {}).argmax(-1) == answers_N
    return {name: tensor.detach() for name, tensor in trained.items()}, float(same_N.float().mean())
