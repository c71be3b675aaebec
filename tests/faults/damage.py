"""Damage on the disk: one bit of a snapshot flipped."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from safetensors import safe_open

from mergekit_dam.engine.snapshots import Snapshots, State
from mergekit_dam.errors import DamError
from tests.faults.row import Row
from tests.faults.rows import judge
from tests.faults.world import Outcome, World, finished


def snapshot_damaged(world: World, trials: int) -> Row:
    """One bit of a snapshot flipped, anywhere in its files; then a run that would go on from it."""
    reference, job = world.reference(), world.job()
    process = world.start(job)
    while process.is_alive() and not (found := [*job.cache.glob("*/run/snapshot/facts.json")]):
        time.sleep(0.005)
    process.kill()
    process.join()
    (run,) = {path.parents[1] for path in found}
    used = Snapshots(run, every=0.0, resume=True)._latest()
    assert used is not None, "the run was killed after its first snapshot"
    files = sorted(used.iterdir())
    layout = _layout(files)
    notes = []
    for trial in range(trials):
        original = world.random.choice(files)
        data = bytearray(original.read_bytes())
        at = world.random.randrange(len(data))
        data[at] ^= 1 << world.random.randrange(8)
        folder = Path(shutil.copytree(run, world.place() / "run"))
        (folder / original.relative_to(run)).write_bytes(data)
        try:
            snapshots = Snapshots(folder, every=0.0, resume=True)
            assert snapshots.facts is not None
            snapshots.read(State(snapshots.facts, dict(layout)))
            notes.append(f"trial {trial}: byte {at} of {original.name}: read")
        except DamError:
            pass
        if trial == trials - 1:
            notes += _run_on(world, folder, run, reference)
        shutil.rmtree(folder.parent)
    return Row(
        "one bit of a snapshot flipped",
        trials,
        trials,
        trials - len(notes),
        "refused with the reason; resume: false learns anew",
        tuple(notes),
    )


def _layout(files: list[Path]) -> dict[str, torch.Tensor]:
    """Tensors of the shapes and types that are in the files."""
    found = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                found |= {name: torch.empty_like(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    return found


def _run_on(world: World, damaged: Path, run: Path, reference: dict[str, str]) -> list[str]:
    shutil.rmtree(run)
    shutil.copytree(damaged, run)
    cache = run.parents[1]
    again = world.job(cache=cache)
    outcome = world.run(again)
    if outcome.code != 1 or "learning starts over" not in outcome.log or finished(again.out):
        return [f"a run on a damaged snapshot: exit {outcome.code}: {outcome.log[-300:]}"]
    anew = world.job(cache=cache)
    anew.recipe["parameters"]["constants"] = world.constants(resume=False)
    return judge(world, anew, Outcome(1, 0.0, ""), [reference], reference)
