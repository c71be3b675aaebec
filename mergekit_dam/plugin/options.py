"""Refuse options of mergekit that this machine or the comparison with the base does not support, before any work."""

from __future__ import annotations

import os

from mergekit.options import MergeOptions

from mergekit_dam.engine.device import device_of
from mergekit_dam.errors import DamError


def require_options(options: MergeOptions) -> None:
    """Refuse a device that this machine does not have, and pickled outputs, which this package never opens.

    Raises:
        DamError: with the name of the option.
    """
    if not options.safe_serialization:
        raise DamError(
            "option --no-safe-serialization",
            expected="safetensors as output",
            got="pickle",
            cure="Leave it out: pickle can run code, and an output in it cannot be compared with its base.",
        )
    device = str(options.device or "cpu")
    device_of(device, f"option {'--cuda' if device == 'cuda' else '--device'}")


def refuse_launcher() -> None:
    """Refuse to merge under `torchrun` or `accelerate launch`, which are for learning only.

    Raises:
        DamError: several processes were started.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise DamError(
            "merging",
            expected="one process",
            got=f"a launcher's {os.environ['WORLD_SIZE']}",
            cure="Use it with `mergekit-dam learn` only; then merge without it: the merge takes the learned masks "
            "from the cache or from the setting `masks`.",
        )
