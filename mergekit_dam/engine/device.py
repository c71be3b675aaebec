"""The device that a setting or an option names."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from mergekit_dam.errors import DamError

CPU = torch.device("cpu")


def device_of(name: str, what: str = "setting 'device'") -> torch.device:
    """The device called `name`; `auto` is accelerate's choice.

    Args:
        what: where the name was given, for the error.

    Raises:
        DamError: this machine has none of that name.
    """
    if name == "auto":
        chosen: torch.device = Accelerator().device
        return chosen
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DamError(
            what,
            expected="cpu or an accelerator of this machine",
            got=f"{name}, which is not here",
            cure="Leave it out, or run where there is one.",
        ) from error


def device_kind(name: str) -> torch.device:
    """Say on what kind of device worker processes will compute; none is opened here.

    Args:
        name: of the setting `device`.
    """
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or CPU
