"""The device that a setting names."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from mergekit_dam.errors import DamError

CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """`auto` is accelerate's choice."""
    if name == "auto":
        chosen: torch.device = Accelerator().device
        return chosen
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DamError(
            "setting 'device'", expected="auto, cpu or an accelerator of this machine", got=name,
            cure="Leave it out to let accelerate pick.",
        ) from error  # fmt: skip
