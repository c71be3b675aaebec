"""Resolve the device that a setting or an option names."""

from __future__ import annotations

from threading import Lock

import torch
from accelerate import Accelerator

from mergekit_dam.errors import DamError

CPU = torch.device("cpu")
# accelerate publishes its shared state before the state is complete: a second thread would read a device of None
_ACCELERATES_STATE = Lock()


def device_of(name: str, what: str = "setting 'device'") -> torch.device:
    """Return the device called `name`; for `auto`, the device that accelerate chooses.

    Args:
        what: the setting or option that holds the name, for the error.

    Raises:
        DamError: this machine has no device of that name.
    """
    if name == "auto":
        with _ACCELERATES_STATE:
            chosen: torch.device = Accelerator().device
        return chosen
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DamError(
            what,
            expected="cpu or an accelerator of this machine",
            got=f"{name}, which this machine does not have",
            cure="Leave it out, or run on a machine that has one.",
        ) from error


def device_kind(name: str) -> torch.device:
    """Return the kind of device on which worker processes will compute, without opening a device.

    Args:
        name: value of the setting `device`.
    """
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or CPU
