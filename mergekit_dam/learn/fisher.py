"""How much each hidden unit counts for what a model answers.

Legend: B batch, L tokens, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.tasks import Task

_SAMPLES, _AT_ONCE = 64, 8
_FLOOR = 0.2  # of the weights: units that this model does not read may be read by others


def unit_weights(task: Task, weights: Mapping[str, Tensor], stops: Sequence[int], seed: int) -> dict[int, Tensor]:
    """Weights (D,) of hidden units, mean 1, from the diagonal Fisher information of the model's own answers there.

    It is the mean squared gradient of the log-probability of answers that are sampled from the model, over samples and
    tokens; scaled to mean 1, it makes 0.8 of the weight.

    Args:
        task: whose calibration samples are looked at, 64 at most.
        weights: of the model, whole, by output name.
        stops: positions that read the states.
        seed: of the samples and answers.

    Returns:
        By position, on the task's device.
    """
    assert task.chain is not None
    generator = seeds.generator(seed, "fisher", task.index)
    rows = torch.randperm(task.num_samples, generator=generator)[:_SAMPLES]
    totals: dict[int, Tensor] = {}
    for rows_B in rows.split(_AT_ONCE):
        with task.recomputed(), task.chain.observed(stops) as states:
            log_p = F.log_softmax(task.logits(weights, task.inputs(rows_B)), dim=-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
        log_p.gather(-1, drawn).sum().backward()
        for stop, hidden_BLD in states.items():
            assert hidden_BLD.grad is not None
            squares_D = hidden_BLD.grad.float().square().sum((0, 1))
            totals[stop] = totals.get(stop, torch.zeros_like(squares_D)) + squares_D
    return {stop: _FLOOR + (1 - _FLOOR) * total_D / total_D.mean().clamp_min(1e-30) for stop, total_D in totals.items()}
