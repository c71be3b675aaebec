"""Weight hidden states by their Fisher information for a model's answers.

Each token's state is taken relative to its size, as normalising layers read it.
Legend: N samples, B batch, L tokens, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.base import Progress

_AT_ONCE = 8  # samples
_SMALLEST = 1e-30  # what gradients are divided by, at least


@dataclass(frozen=True, eq=False)
class Importance:
    """Weights of the hidden states at one position: weight of the unit times weight of the token, each of mean 1.

    Attributes:
        units_D: weights of the hidden units.
        tokens_N: per sample, the weights (L_i,) of its tokens.
    """

    units_D: Tensor
    tokens_N: Sequence[Tensor] = field(repr=False)

    def of(self, rows_B: Tensor) -> Tensor:
        """Return weights (B, L, D) of these samples, zero after the end of each sample."""
        tokens_BL = torch.nn.utils.rnn.pad_sequence([self.tokens_N[i] for i in rows_B.tolist()], batch_first=True)
        return tokens_BL[..., None] * self.units_D


def importance_of(
    task: Task, weights: Mapping[str, Tensor], stops: Sequence[int], seed: int, progress: Progress
) -> dict[int, Importance]:
    """Compute weights of hidden states from the diagonal Fisher information of the model's own answers.

    The information is the squared gradient of the log-probability of answers sampled from the model, with respect to
    each token's state divided by the root of its mean square. Its mean over tokens and samples weights units, and its
    mean over units weights the tokens of a sample. Each is scaled to mean 1, and a weight is `fisher_floor` plus (1 -
    `fisher_floor`) times it. So tokens that the head reads count more than others. All samples count alike: a sure
    model has nearly all of its information in the few samples that it is not sure of.

    Args:
        task: all of its calibration samples are used.
        weights: the model's weights, whole, by output name.
        stops: positions that read the hidden states.
        seed: seed of the sampled answers.
        progress: wraps the batches in a progress bar with a title.

    Returns:
        Weights by position, on the task's device.
    """
    assert task.chain is not None
    generator, floor = seeds.generator(seed, "fisher", task.index), task.constants.fisher_floor
    units: dict[int, Tensor] = {}
    tokens: dict[int, list[Tensor]] = {stop: [] for stop in stops}
    for first in progress(range(0, task.num_samples, _AT_ONCE), f"answers of {task.name}"):
        rows_B = torch.arange(first, min(first + _AT_ONCE, task.num_samples))
        with task.recomputed(), task.chain.observed(stops) as states:
            log_p = F.log_softmax(task.logits(weights, task.inputs(rows_B)), dim=-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
        log_p.gather(-1, drawn).sum().backward()
        lengths = task.token_counts(rows_B)
        for stop, hidden_BLD in states.items():
            assert hidden_BLD.grad is not None
            relative_BLD = hidden_BLD.grad.float() * mean_square(hidden_BLD.detach().float()).sqrt()
            relative_BLD = relative_BLD / relative_BLD.abs().amax((1, 2), keepdim=True).clamp_min(_SMALLEST)
            squares_BLD = relative_BLD.square()
            squares_BLD = squares_BLD / squares_BLD.mean((1, 2), keepdim=True).clamp_min(_SMALLEST)
            units_D = squares_BLD.sum((0, 1))
            units[stop] = units[stop] + units_D if stop in units else units_D
            for i, own_L in enumerate(squares_BLD.mean(-1)):
                tokens[stop].append(_scaled(own_L if lengths is None else own_L[: lengths[i]], floor))
    return {stop: Importance(_scaled(units[stop], floor), tokens[stop]) for stop in stops}


def mean_square(hidden_BLD: Tensor) -> Tensor:
    """Return the mean square of each token's state (B, L, 1), more than zero."""
    return hidden_BLD.square().mean(-1, keepdim=True).clamp_min(1e-8)


def _scaled(information: Tensor, floor: float) -> Tensor:
    """Scale information to weights of mean 1, each at least `floor`; without any information all weigh the same."""
    mean = information.mean()
    return floor + (1 - floor) * information / mean if mean > 0 else torch.ones_like(information)
