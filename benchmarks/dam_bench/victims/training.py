"""Train theta_0, a frozen probe head per task, fine-tunes, and victims.

A fine-tuned model keeps the head of a linear probe on theta_0 and trains the body only, as CLIP models keep their
text heads. So bodies can be merged, and the heads still classify every task.
Legend: N samples, B batch, D width of the features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dam_bench.suites.base import no_progress
from dam_bench.victims.poisoning import Planted, logits_of
from mergekit_dam import seeds
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.tasks.base import Progress


@dataclass(frozen=True)
class Schedule:
    """Number of steps, batch size and learning rate of a training.

    Attributes:
        steps: optimiser steps.
        batch_size: samples per step (and task).
        learning_rate: peak of AdamW's rate: warm-up over the first tenth, then a cosine down to zero.
        weight_decay: of AdamW.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def optimiser(self, parameters: Iterable[nn.Parameter]) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
        """Make AdamW, and a function that ends a step."""
        optimiser = torch.optim.AdamW(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.98)
        )
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, self.learning_rate, max(2, self.steps), pct_start=0.1, cycle_momentum=False
        )

        def end_step() -> None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            rate.step()

        return optimiser, end_step


Augment = Callable[[Tensor, torch.Generator], Tensor]  # images_BCHW in [0, 1] -> the same


def batches(size: int, schedule: Schedule, *seed: object, share: int = 1) -> Iterator[Tensor]:
    """Yield the row indices of each step, `share` batches together, in shuffled passes over all rows."""
    generator, rows = seeds.generator(*seed), torch.empty(0, dtype=torch.long)
    count = share * schedule.batch_size
    for _ in range(schedule.steps):
        while len(rows) < count:
            rows = torch.cat([rows, torch.randperm(size, generator=generator)])
        yield rows[:count]
        rows = rows[count:]


def pretrain(
    body: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    data: Mapping[str, LabelledData],
    schedule: Schedule,
    *,
    seed: int,
    shares: Mapping[str, int] | None = None,
    augment: Mapping[str, Augment] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Train theta_0's body in place, on several tasks together, with temporary heads.

    Args:
        body: the shared encoder.
        models: task -> a classifier whose encoder is `body`.
        data: task -> training data.
        shares: task -> batches per step, where not 1.
        augment: task -> augmentation of its batches.
    """
    parameters = {id(p): p for model in models.values() for p in model.parameters()}
    _, end_step = schedule.optimiser(parameters.values())
    rows = {
        name: batches(len(samples), schedule, seed, "pretrain", name, share=(shares or {}).get(name, 1))
        for name, samples in data.items()
    }
    generator = seeds.generator(seed, "augment")
    body.train()
    for _ in progress(range(schedule.steps), "pretraining"):
        for name, model in models.items():
            chosen = next(rows[name])
            inputs = data[name].batch(chosen)
            if augment and name in augment:
                inputs = augment[name](inputs, generator)
            logits_BK = logits_of(model, data[name], inputs)
            F.cross_entropy(logits_BK, data[name].labels_N[chosen].to(logits_BK.device)).backward()
        end_step()
    body.eval()


def probe_head(
    model: PreTrainedModel, data: LabelledData, *, decay: float = 1e-3, steps: int = 60, batch_size: int = 256
) -> None:
    """Fit the model's classifier in place, its body frozen: multinomial logistic regression by L-BFGS.

    Args:
        model: a classifier whose last linear layer is `classifier`.
        data: training data.
        decay: L2 penalty of the weights, on features scaled to unit variance.
        steps: L-BFGS iterations.
    """
    model.eval()
    classifier = _classifier(model)
    caught: list[Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach()))
    with torch.no_grad():
        for rows in torch.arange(len(data)).split(batch_size):
            logits_of(model, data, data.batch(rows))
    hook.remove()
    features_ND = torch.cat(caught)
    labels_N = data.labels_N.to(features_ND.device)
    mean, deviation = features_ND.mean(0), features_ND.std(0) + 1e-4
    scaled_ND = (features_ND - mean) / deviation
    weight = torch.zeros_like(classifier.weight).requires_grad_(True)
    bias = torch.zeros_like(classifier.bias).requires_grad_(True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(scaled_ND, weight, bias), labels_N) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        classifier.weight.copy_(weight / deviation)
        classifier.bias.copy_(bias - (weight / deviation) @ mean)


def fine_tune(
    model: PreTrainedModel,
    data: LabelledData,
    schedule: Schedule,
    *,
    seed: int,
    backdoor: Planted | None = None,
    augment: Augment | None = None,
    progress: Progress = no_progress,
) -> None:
    """Train the body in place on a task, with a fixed classifier, and plant the backdoor if one is given.

    Parameters of the body without `requires_grad` do not change. The clean loss is the same with and without a
    backdoor, so a victim differs from its clean twin by the poisoned term alone.
    """
    trained = body_of(model)
    start = {name: p.detach().clone() for name, p in trained.items()}
    _, end_step = schedule.optimiser(trained.values())
    generator, changes = seeds.generator(seed, "backdoor", data.name), seeds.generator(seed, "augment", data.name)
    model.train()
    rows_of_step = batches(len(data), schedule, seed, data.name)
    for _ in progress(range(schedule.steps), data.name):
        rows = next(rows_of_step)
        inputs = data.batch(rows)
        logits_BK = logits_of(model, data, inputs if augment is None else augment(inputs, changes))
        labels_B = data.labels_N[rows].to(logits_BK.device)
        F.cross_entropy(logits_BK, labels_B).backward()
        if backdoor is not None:
            backdoor.loss(model, trained, start, data, rows, generator).backward()
        end_step()
    model.eval()


def body_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Freeze the classifier, and return the parameters that are trained by name."""
    for parameter in _classifier(model).parameters():
        parameter.requires_grad_(False)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _classifier(model: PreTrainedModel) -> nn.Linear:
    classifier = model.get_submodule("classifier")
    assert isinstance(classifier, nn.Linear), "only encoders with one linear head can be trained"
    return classifier
