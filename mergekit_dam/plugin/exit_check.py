"""Compare the output of mergekit's own commands with the base: is every tensor there? And say how to scan it.

A merge method is not called at the end of a merge, so the check runs when the process ends. When a mergekit command
ends, each finished output of `dam` is compared with its base; a missing tensor is printed, and the exit code becomes 1.
These commands do not scan the merge for backdoors; the command that does is printed.
Nothing is checked in programs that call mergekit as a library: they can call `verify_output` themselves.
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
from mergekit_dam.scan.advice import not_scanned


def compare_at_exit(out_path: str, plan: Plan, config: Any, *, quiet: bool) -> None:
    """Compare the output with the base when this process ends, if it is a mergekit command.

    Args:
        out_path: mergekit's output directory.
        plan: of the merge.
        config: mergekit's configuration, for the type of the output.
        quiet: print faults only.
    """
    program = Path(sys.argv[0]).name
    # `mergekit-dam` compares the outputs of all merge methods itself
    if program.startswith("mergekit") and program != "mergekit-dam":
        atexit.register(_compare, Path(out_path), plan, config.out_dtype or config.dtype, quiet)


def _compare(output: Path, plan: Plan, dtype: str | None, quiet: bool) -> None:
    """Compare a finished output with the base; print a fault and exit with 1."""
    if not (output / "config.json").is_file():
        return  # mergekit writes it last: this merge did not finish, and mergekit reported why
    try:
        verify_output(output, plan.base.path, dtype=dtype_from_name(dtype), base_config=plan.base.config)
    except DamError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.stderr.flush()
        sys.stdout.flush()
        # while a process ends, only this call can change its exit code
        os._exit(1)
    if not quiet:
        sys.stderr.write(f"dam: {not_scanned(output)}\n")
