"""After a merge by mergekit's own commands: is every tensor of the base in the output?

A method does not see the end of a merge, but the process does. When a mergekit command ends, each finished output
of `dam` is compared with its base; a gap is printed and makes the exit code 1. Programs that call mergekit as a
library are left alone: they can call `verify_output` themselves.
"""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import Any

from mergekit.common import dtype_from_name

from mergekit_dam.errors import DamError
from mergekit_dam.models.plan import Plan
from mergekit_dam.models.verify import verify_output


def compare_at_exit(out_path: str, plan: Plan, config: Any) -> None:
    """Have the output compared with the base when this process, a mergekit command, ends."""
    program = Path(sys.argv[0]).name
    # our own command compares by itself, and for every merge method
    if program.startswith("mergekit") and program != "mergekit-dam":
        atexit.register(_compare, Path(out_path), plan, config.out_dtype or config.dtype)


def _compare(output: Path, plan: Plan, dtype: str | None) -> None:
    if not (output / "config.json").is_file():
        return  # mergekit writes it last: this merge did not finish, and says so itself
    try:
        verify_output(output, plan.base.path, dtype=dtype_from_name(dtype), base_config=plan.base.config)
    except DamError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.stderr.flush()
        sys.stdout.flush()
        # at this point nothing but this call can still change the exit code
        os._exit(1)
