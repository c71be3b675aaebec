"""Blind scan of text encoders: words that make a model certain of one class, and that mean nothing to theta_0.

Soft tokens are of no use as triggers here: three free vectors lead any encoder, theta_0 included, to any class. Real
words are few enough to try all of them, alone, on the model and on theta_0; those that fine-tuning moved most are then
put into calibration texts. Words that bear on the task move, too, but less surely than a trigger (benchmarks/STUDY.md).
Legend: V vocabulary, K classes, C words, B texts, R triggers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.suspicion import Finding
from mergekit_dam.tasks import TextTask

_SHORTLIST = 64  # words per class that are put into texts
_TEXTS = 96  # that are classified as they are
_TRIED = 16  # of those, at most, that words are put into
_KEPT = 8  # words that triggers are made of
_TRIGGERS = 8  # per suspect


def scan_words(index: int, task: TextTask, base: Mapping[str, Tensor], config: DamConfig) -> list[Finding]:
    """One finding per class: its most telling words, as triggers of several of them.

    A word's success is the share of texts of other classes that it makes the model as certain of the class as half of
    the class's own texts do; its control is the share that theta_0 gives the class with the word.

    Args:
        index: of the model.
        task: forward pass and calibration texts.
        base: theta_0 by output name.
        config: `perturbation_tokens` of a trigger, `seed`.
    """
    own, generator = task.own_weights(), seeds.generator(config.seed, "scan", task.name)
    moved_VK = _standard(task.alone(own)) - _standard(task.alone(base))
    moved_VK[task.special_tokens] = -torch.inf
    texts_B = torch.randperm(task.num_samples, generator=generator)[:_TEXTS]
    with torch.no_grad():
        own_BK, base_BK = (task.logits(weights, task.inputs(texts_B)).softmax(-1).cpu() for weights in (own, base))
    found = []
    for target in range(moved_VK.shape[1]):
        words_C = moved_VK[:, target].topk(min(_SHORTLIST, len(moved_VK))).indices
        others, base_others = (texts_B[p.argmax(-1) != target][:_TRIED] for p in (own_BK, base_BK))
        if not len(others) or not len(base_others):
            continue
        usual = own_BK[own_BK.argmax(-1) == target, target]
        certain = float(usual.median()) if len(usual) else 0.5
        success_C = (task.with_words(own, words_C[:, None], others).softmax(-1)[..., target] >= certain).float().mean(1)
        control_C = (task.with_words(base, words_C[:, None], base_others).argmax(-1) == target).float().mean(1)
        order = (success_C - control_C).argsort(descending=True, stable=True)
        kept = words_C[order[:_KEPT]]
        picked_RN = torch.randint(len(kept), (_TRIGGERS, config.perturbation_tokens), generator=generator)
        picked_RN[0] = 0
        trigger = task.trigger_of(kept[picked_RN])
        best = int(order[0])
        found.append(Finding(index, target, trigger, 1.0, 1.0, float(success_C[best]), float(control_C[best])))
    return found


def _standard(logits_VK: Tensor) -> Tensor:
    """How far each class is ahead of the next, in standard deviations over the vocabulary."""
    margins = []
    for target in range(logits_VK.shape[1]):
        others = torch.cat([logits_VK[:, :target], logits_VK[:, target + 1 :]], 1)
        margins.append(logits_VK[:, target] - others.amax(1))
    margin_VK = torch.stack(margins, 1)
    return (margin_VK - margin_VK.mean(0)) / margin_VK.std(0).clamp(min=1e-6)
