"""How much each hidden state counts for what a model answers.

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

_AT_ONCE = 8  # samples


@dataclass(frozen=True, eq=False)
class Importance:
    """Weights of the hidden states at one position: that of the unit times that of the token, each of mean 1.

    Attributes:
        units_D: by unit.
        tokens_N: by sample, its L_i tokens.
    """

    units_D: Tensor
    tokens_N: Sequence[Tensor] = field(repr=False)

    def of(self, rows_B: Tensor) -> Tensor:
        """Weights (B, L, D) of these samples, zero after the end of each."""
        tokens_BL = torch.nn.utils.rnn.pad_sequence([self.tokens_N[i] for i in rows_B.tolist()], batch_first=True)
        return tokens_BL[..., None] * self.units_D


def importance_of(task: Task, weights: Mapping[str, Tensor], stops: Sequence[int], seed: int) -> dict[int, Importance]:
    """Weights from the diagonal Fisher information of the model's own answers.

    It is the squared gradient of the log-probability of answers that are sampled from the model. Its mean over tokens
    and samples weighs units, its mean over units weighs tokens; scaled to mean 1, it makes all of each weight but
    `fisher_floor`. So the tokens that a head reads count more than those it does not.

    Args:
        task: whose calibration samples are looked at, all of them.
        weights: of the model, whole, by output name.
        stops: positions that read the states.
        seed: of the answers.

    Returns:
        By position, on the task's device.
    """
    assert task.chain is not None
    generator = seeds.generator(seed, "fisher", task.index)
    units: dict[int, Tensor] = {}
    tokens: dict[int, list[Tensor]] = {stop: [] for stop in stops}
    for rows_B in torch.arange(task.num_samples).split(_AT_ONCE):
        with task.recomputed(), task.chain.observed(stops) as states:
            log_p = F.log_softmax(task.logits(weights, task.inputs(rows_B)), dim=-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
        log_p.gather(-1, drawn).sum().backward()
        lengths = task.token_counts(rows_B)
        for stop, hidden_BLD in states.items():
            assert hidden_BLD.grad is not None
            squares_BLD = hidden_BLD.grad.float().square()
            units_D = squares_BLD.sum((0, 1))
            units[stop] = units[stop] + units_D if stop in units else units_D
            for i, own_L in enumerate(squares_BLD.mean(-1)):
                tokens[stop].append(own_L if lengths is None else own_L[: lengths[i]])
    floor = task.constants.fisher_floor
    return {stop: Importance(_scaled(units[stop], floor), _all_scaled(tokens[stop], floor)) for stop in stops}


def _scaled(information: Tensor, floor: float) -> Tensor:
    return floor + (1 - floor) * information / information.mean().clamp_min(1e-30)


def _all_scaled(information_N: Sequence[Tensor], floor: float) -> list[Tensor]:
    """Of all tokens of all samples together."""
    return list(_scaled(torch.cat(list(information_N)), floor).split([len(one) for one in information_N]))
