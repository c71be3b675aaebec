"""Defend by weight averaging (WAG): the plain mean of the input models, a baseline of arXiv 2412.20476.

A backdoor that one of T models has keeps 1/T of its change of weights. It is the undefended method `linear`, which
averages task vectors, under the name and formula of the literature on defences: a row to check the harness by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dam_bench.defences.base import Defence, DefenceInputs


class WeightAveraging(Defence):
    """theta = 1/T sum_t theta_t, tensor by tensor; heads stay the tasks' own."""

    needs_data: ClassVar[bool] = False

    def changed_weights(self, given: DefenceInputs) -> Mapping[str, Tensor]:
        return {spec.name: torch.stack(given.input_weights(spec.name)).mean(0) for spec in given.plan.tensors}
