"""Losses of unlabelled outputs: pure functions of logits_BK, mean over the batch, in nats."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def entropy(logits_BK: Tensor) -> Tensor:
    """H(softmax(f(x))), the unlabelled task loss of AdaMerging (arXiv 2310.02575)."""
    log_p = F.log_softmax(logits_BK, dim=-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def consistency(perturbed_BK: Tensor, clean_BK: Tensor) -> Tensor:
    """KL(f(x) || f(x + delta)): zero only where the perturbation changes nothing.

    The clean output is the fixed reference. Entropy of f(x + delta), which the public DAM code minimises
    instead, is also low for a confident answer with the attacker's target.
    """
    reference = F.log_softmax(clean_BK.detach(), dim=-1)
    return F.kl_div(F.log_softmax(perturbed_BK, dim=-1), reference, reduction="batchmean", log_target=True)


def distillation(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """KL(f_t(x) || f(x)): the merged model keeps the answers of the fine-tuned one."""
    return consistency(student_BK, teacher_BK)


def disagreement(perturbed_BK: Tensor, clean_BK: Tensor) -> Tensor:
    """Cross-entropy of f(x + delta) against argmax f(x): what the universal perturbation drives up.

    Source: untargeted universal perturbation (arXiv 1610.08401), step 3 of the published DAM loop.
    """
    return F.cross_entropy(perturbed_BK, clean_BK.detach().argmax(-1))
