"""Merge with the public DAM step: fusion_bench's classes, run by benchmarks/peer in a separate process.

fusion_bench has a separate environment (`make -C benchmarks/peer`), so that neither its code nor its requirements
reach this package.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dam_bench.runs.methods import LEARNED_STEPS
from mergekit_dam.errors import DamError

PYTHON_VARIABLE = "MERGEKIT_DAM_PEER_PYTHON"
FOLDER = Path(__file__).resolve().parents[2] / "peer"


@dataclass(frozen=True)
class PeerSettings:
    """Settings of the peer that differ from fusion_bench's published settings.

    Attributes:
        steps: mask steps.
        coefficient_steps: steps on the coefficients once the mask is fixed.
        batch_size: samples per task and step.
        num_samples: calibration samples per task, the first ones of each file.
        max_length: tokens per text.
        seed: of masks and batches.
        device: `cpu` or `cuda`.
    """

    steps: int = 1000
    coefficient_steps: int = 1000
    batch_size: int = 16
    num_samples: int = 512
    max_length: int = 64
    seed: int = 0
    device: str = "cpu"


def peer_python(python: Path | str | None = None) -> Path:
    """Path of the interpreter with fusion_bench: the argument, MERGEKIT_DAM_PEER_PYTHON, or benchmarks/peer/.venv.

    Raises:
        DamError: the interpreter does not exist.
    """
    path = Path(python or os.environ.get(PYTHON_VARIABLE) or FOLDER / ".venv" / "bin" / "python").expanduser()
    if not path.is_file():
        raise DamError(
            "python of the peer",
            expected="an interpreter with fusion_bench",
            got=f"no file {path}",
            cure=f"Run `make -C benchmarks/peer` in a checkout, or set {PYTHON_VARIABLE} to an interpreter.",
        )
    # not resolved: the link to the interpreter identifies its environment
    return path.absolute()


def peer_merge(
    base: Path,
    models: Mapping[Path, Path],
    out: Path,
    *,
    settings: PeerSettings | None = None,
    python: Path | str | None = None,
    script: Path | None = None,
) -> Path:
    """Merge with the public DAM step.

    Args:
        base: theta_0, a local directory in safetensors: ViTModel, BertModel, or the CLIPModel of suite clip-paper.
        models: directory of a fine-tune with its head -> its calibration file, a parquet.
        out: folder to write the merged body to, beside `peer.json` (times, memory, versions) and `peer.log`.
        settings: steps, sizes and seed.
        python: interpreter of the peer; see `peer_python`.
        script: the peer's program; default: benchmarks/peer/run.py of the checkout.

    Returns:
        `out`, for `load_merged(out, task)` with a task named as the last part of a model's path, or
        `ClipPaperSuite.load_merge`.

    Raises:
        DamError: no interpreter, no program, models with the same name, or a failed run.
    """
    names = [path.name for path in models]
    if len(set(names)) < len(names) or len(names) < 2:
        raise DamError(
            "models of the peer",
            expected="two or more with different last parts of their paths",
            got=", ".join(names) or "none",
            cure="Rename their directories.",
        )
    program = script or FOLDER / "run.py"
    if not program.is_file():
        raise DamError(
            "program of the peer",
            expected="benchmarks/peer/run.py of a checkout",
            got=f"no file {program}",
            cure="Run the benchmark from a checkout of the repository.",
        )
    command = [str(peer_python(python)), str(program), "--base", str(base), "--out", str(out)]
    for path, calibration in models.items():
        command += ["--model", str(path), str(calibration)]
    for key, value in asdict(settings or PeerSettings()).items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    out.mkdir(parents=True, exist_ok=True)
    _run(command, out / "peer.log")
    recipe = {"merge_method": "fusion_bench", "base_model": str(base.resolve())}
    entries = [{"model": str(path.resolve()), "parameters": {"calibration": str(c)}} for path, c in models.items()]
    (out / "mergekit_config.yml").write_text(yaml.safe_dump({**recipe, "models": entries}, sort_keys=False), "utf-8")
    return out


def merge_with_fusion_bench(
    base: Path, models: Mapping[str, Path], calibration: Mapping[str, Path], *, seed: int, folder: Path
) -> Path:
    """Merge task -> model with task -> calibration into FOLDER/out, by `peer_merge` with the benchmark's steps."""
    settings = PeerSettings(steps=LEARNED_STEPS, coefficient_steps=LEARNED_STEPS, seed=seed)
    return peer_merge(
        base, {path: calibration[task] for task, path in models.items()}, folder / "out", settings=settings
    )


def peer_report(out: Path) -> dict[str, Any]:
    """Read `peer.json` of a finished merge: versions, settings, samples, seconds, peak memory in bytes."""
    report: dict[str, Any] = json.loads((out / "peer.json").read_text("utf-8"))
    return report


def _run(command: list[str], log: Path) -> None:
    # PYTHONPATH would put this checkout's environment into the peer's
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with log.open("w", encoding="utf-8") as lines:
        done = subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        last = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()][-1:]
        raise DamError(
            f"peer (log {log})",
            expected="a run without errors",
            got=f"exit code {done.returncode}: {' '.join(last)}",
            cure="Read the log; `make -C benchmarks/peer` sets the environment up.",
        )
