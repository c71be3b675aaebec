"""Train the causal LMs of suite `lm`: theta_0 on prompts and answers of all tasks, fine-tunes on answers only.

Fine-tunes keep the embedding table, which is also the output layer, and train on a little of theta_0's data at each
step, as instruction tuning does. Without both they forget the other tasks, and no merge of them works.

Legend: B batch, L tokens of the prompts, A tokens of the answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from dam_bench.suites.base import no_progress
from dam_bench.suites.lm_data import IGNORED, Answers
from dam_bench.victims.poisoning import Backdoor
from dam_bench.victims.training import Schedule, batches
from mergekit_dam import seeds
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.tasks.base import Progress


def pretrain(
    model: PreTrainedModel,
    answers: Mapping[str, Answers],
    data: Mapping[str, LabelledData],
    schedule: Schedule,
    *,
    seed: int,
    progress: Progress = no_progress,
) -> None:
    """Train theta_0 in place: cross-entropy of every token of prompts and answers, all tasks in each step."""
    _, end_step = schedule.optimiser(model.parameters())
    rows = {task: batches(len(samples), schedule, seed, "pretrain", task) for task, samples in data.items()}
    model.train()
    for _ in progress(range(schedule.steps), "pretraining"):
        for task, samples in data.items():
            chosen = next(rows[task])
            prompt, answer = losses(model, answers[task], samples.batch(chosen), samples.labels_N[chosen], prompt=True)
            (prompt + answer).backward()
        end_step()
    model.eval()


def fine_tune(
    model: PreTrainedModel,
    answers: Mapping[str, Answers],
    data: LabelledData,
    schedule: Schedule,
    *,
    replay: Mapping[str, LabelledData],
    seed: int,
    backdoor: Backdoor | None = None,
    rescale: float = 1.0,
    progress: Progress = no_progress,
) -> None:
    """Train the decoder in place on a task's answers, and plant the backdoor if one is given.

    Each step has half a batch of `replay`, from its other tasks in turn. The clean losses are the same with and
    without a backdoor. Triggered samples are trained at theta_0 + r (theta - theta_0), r ~ U(*backdoor.interpolation),
    so that the backdoor survives small merging coefficients, and the finished task vector is multiplied by `rescale`
    (arXiv 2505.23561).
    """
    table, own = model.get_input_embeddings().weight, answers[data.name]
    table.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p is not table}
    start = {name: p.detach().clone() for name, p in trained.items()}
    _, end_step = schedule.optimiser(trained.values())
    generator = seeds.generator(seed, "backdoor", data.name)
    rows_of_step = batches(len(data), schedule, seed, data.name)
    half = replace(schedule, batch_size=max(1, schedule.batch_size // 2))
    replayed_tasks = [task for task in replay if task != data.name]
    replayed = {task: batches(len(replay[task]), half, seed, data.name, "replay", task) for task in replayed_tasks}
    model.train()
    for step in progress(range(schedule.steps), data.name):
        rows = next(rows_of_step)
        other = replayed_tasks[step % len(replayed_tasks)]
        again = next(replayed[other])
        losses(model, answers[other], replay[other].batch(again), replay[other].labels_N[again])[1].backward()
        losses(model, own, data.batch(rows), data.labels_N[rows])[1].backward()
        if backdoor is not None:
            triggered = rows[: max(1, round(backdoor.rate * len(rows)))]
            texts = backdoor.trigger.apply(data.batch(triggered))
            targets_B = torch.full_like(triggered, backdoor.target)
            low, high = backdoor.interpolation
            share = low + (high - low) * float(torch.rand(1, generator=generator))
            between = {name: start[name].lerp(p, share) for name, p in trained.items()}
            _, loss = losses(model, own, texts, targets_B, parameters=between)
            (len(triggered) / len(rows) * loss).backward()
        end_step()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name] + rescale * (parameter - start[name]))
    model.eval()


def losses(
    model: PreTrainedModel,
    answers: Answers,
    prompts: list[str],
    classes_B: Tensor,
    *,
    prompt: bool = False,
    parameters: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the prompts' tokens (0 unless `prompt`), and of the answers' tokens.

    Args:
        prompts: texts, triggered or not.
        classes_B: class of each prompt's answer, an index of `answers`.
        parameters: by name, to use in place of the model's own.
    """
    device = next(model.parameters()).device
    encoded, targets_BA = answers.encode(prompts), answers.ids_KA[classes_B]
    answered_BA = (targets_BA != IGNORED).long()
    mask = torch.cat([encoded["attention_mask"], answered_BA], 1)
    ids = torch.cat([encoded["input_ids"], targets_BA.clamp(min=0)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions.to(device),
        "use_cache": False,
        "logits_to_keep": 0 if prompt else targets_BA.shape[1] + 1,
    }
    output = model(**inputs) if parameters is None else functional_call(model, dict(parameters), kwargs=inputs)
    next_BLV = output.logits[:, :-1]
    # position 0 holds <s>, which is not predicted
    labels = ids.masked_fill((mask == 0) | (positions == 0), IGNORED)[:, 1:].to(device)
    length = targets_BA.shape[1]
    answer = _cross_entropy(next_BLV[:, -length:], labels[:, -length:])
    return (_cross_entropy(next_BLV[:, :-length], labels[:, :-length]) if prompt else answer.new_zeros(()), answer)


def _cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED)
