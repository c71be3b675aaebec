"""`mergekit-dam doctor`: print the facts for a bug report."""

from __future__ import annotations

import json
import os
import sys

import click
import torch
from mergekit.merge_methods import registered_methods

from mergekit_dam.io.cache import library_versions
from mergekit_dam.merging import triton_merge


@click.command()
def doctor() -> None:
    """Print versions, the state of the autoload hook, and devices, as JSON.

    \b
    Example:
        mergekit-dam doctor
    """
    click.echo(
        json.dumps(
            {
                "versions": library_versions(),
                "autoload": {
                    "MERGEKIT_DAM_AUTOLOAD": os.environ.get("MERGEKIT_DAM_AUTOLOAD", "1"),
                    "TORCH_DEVICE_BACKEND_AUTOLOAD": os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1"),
                    "hook loaded": "_mergekit_dam_autoload" in sys.modules,
                },
                # this command does not register it, so the value is the same for mergekit's own commands
                "dam registered": "dam" in {method.spec.name for method in registered_methods()},
                "accelerators": torch.accelerator.device_count() if torch.accelerator.is_available() else 0,
                "kernels for accelerators (Triton)": triton_merge.triton_kernels is not None,
            },
            indent=2,
        )
    )
