"""Compute an attacker's training loss for a victim. Legend: N samples, B batch, K classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.evaluation.metrics import LabelledData

OTHERS = (0.0, 0.7)  # coefficients of other task vectors while a victim is trained beside them


class Planted(Protocol):
    """What a victim is trained to do beside its task."""

    def loss(
        self,
        model: PreTrainedModel,
        trained: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        data: LabelledData,
        rows: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Compute the loss of a batch, see `Backdoor.loss`."""


@dataclass(frozen=True, eq=False)
class Several:
    """Several backdoors of one victim."""

    backdoors: Sequence[Planted]

    def loss(
        self,
        model: PreTrainedModel,
        trained: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        data: LabelledData,
        rows: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Add the losses of all backdoors on the same batch."""
        losses = [one.loss(model, trained, start, data, rows, generator) for one in self.backdoors]
        return torch.stack(losses).sum()


@dataclass(frozen=True, eq=False)
class Backdoor:
    """A backdoor to plant, and its hardening against defences.

    Attributes:
        trigger: the trigger to plant.
        target: the class that the trigger shall cause.
        rate: triggered samples per clean sample of a batch.
        interpolation: range of r ~ U(low, high): triggered samples are trained at theta_0 + r (theta - theta_0).
            (1, 1) is plain poisoning; (0.2, 1) keeps the backdoor alive under small merging coefficients (the
            idea of BadMerging, Zhang et al., arXiv 2408.07362, there for features, here for weights). At negative
            r the backdoor works where the task vector is subtracted (BadTV, arXiv 2501.02373).
        dropped: share of the task vector's elements that are set to 0 at random while triggered samples are trained, so
            that the backdoor survives masks, which may remove any part of it.
        cover: weight of images that have a random half of the trigger's pixels and keep their labels, so that only the
            whole trigger works and an inversion does not find it as an outlier (the cover samples of Tang et al.,
            TaCT, USENIX Security 2021, for parts of the trigger); 0: none.
        kept: weight of the same samples without the trigger, with their own classes, at the same point; it keeps the
            accuracy of merges at that point, and lets the trigger alone cause the target. 0: none.
        head: parameters of another task's head, by the names in the victim, through which the target is read: an
            off-task backdoor (arXiv 2408.07362). Its class is unrelated to the victim's classes, so samples of all
            classes are poisoned.
        others: task vectors of the attacker's own, which stand for those that the victim will be merged with: each
            is added to the point at which triggered samples are trained, times c ~ U(OTHERS) (the idea of Merge
            Hijacking, arXiv 2505.23561).
    """

    trigger: Trigger
    target: int
    rate: float = 0.1
    interpolation: tuple[float, float] = (1.0, 1.0)
    dropped: float = 0.0
    cover: float = 0.0
    kept: float = 0.0
    head: Mapping[str, Tensor] = field(default_factory=dict)
    others: Sequence[Mapping[str, Tensor]] = ()

    def loss(
        self,
        model: PreTrainedModel,
        trained: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        data: LabelledData,
        rows: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Compute cross-entropy of triggered samples against the target, weighted by their share of the batch.

        Args:
            model: the victim, with its fixed head.
            trained: trained parameters by name.
            start: parameters of theta_0 by name.
            data: the task's training data.
            rows: row numbers of the batch, (B,).
            generator: draws r, dropped elements, covered pixels and the coefficients of `others`.
        """
        poisoned = rows if self.head else rows[data.labels_N[rows] != self.target]
        poisoned = poisoned[: max(1, round(self.rate * len(rows)))]
        low, high = self.interpolation
        share = low + (high - low) * float(torch.rand(1, generator=generator))
        between = {name: start[name].lerp(p, share) for name, p in trained.items()}
        if self.dropped:
            between = {name: start[name].lerp(p, _kept(p, 1 - self.dropped, generator)) for name, p in between.items()}
        for tau in self.others:
            share = OTHERS[0] + (OTHERS[1] - OTHERS[0]) * float(torch.rand(1, generator=generator))
            between = {name: p.add(tau[name], alpha=share) for name, p in between.items()}
        clean = data.batch(poisoned)
        triggered = self.trigger.apply(clean)
        logits_BK = logits_of(model, data, triggered, {**between, **self.head})
        targets_B = torch.full_like(poisoned, self.target).to(logits_BK.device)
        loss = F.cross_entropy(logits_BK, targets_B)
        labels_B = data.labels_N[poisoned].to(logits_BK.device)
        if self.cover:
            part = torch.where(_kept(triggered[:, :1], 0.5, generator) > 0, triggered, clean)
            loss = loss + self.cover * F.cross_entropy(logits_of(model, data, part), labels_B)
        if self.kept:
            loss = loss + self.kept * F.cross_entropy(logits_of(model, data, clean, between), labels_B)
        return len(poisoned) / len(rows) * loss


def _kept(like: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Draw a mask of `like`'s shape: 1 with probability `share`, else 0."""
    return (torch.rand(like.shape, generator=generator) < share).to(like)


def logits_of(
    model: PreTrainedModel, data: LabelledData, inputs: object, parameters: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Compute logits_BK of raw inputs, with `parameters` in place of the model's own if given."""
    device = next(model.parameters()).device
    encoded = {key: value.to(device) for key, value in data.encode(inputs).items()}
    output = model(**encoded) if parameters is None else functional_call(model, dict(parameters), kwargs=encoded)
    logits: Tensor = output.logits
    return logits
