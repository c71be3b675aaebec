"""The faults, one function per row: what is done, how often, and how many of them a later run survived.

Every function takes a World and a number of trials and returns a Row. A trial counts as lost if a result that looks
finished is wrong, if a file under its final name is damaged, or if the next run does not reach the reference bytes.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

from mergekit_dam.artifact.masks_file import MASKS_FILE, load, save
from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.io.calibration import load_calibration
from tests.faults.child import Job, write_for_ever
from tests.faults.row import Row
from tests.faults.world import Content, Outcome, World, content, finished, sound_masks


def learn_killed(world: World, trials: int) -> Row:
    """kill -9 at a random moment of learning and merging, then the same command again."""
    reference, hit, notes = world.reference(), 0, []
    for _ in range(trials):
        job = world.job()
        outcome = world.run(job, kill_after=world.random.uniform(0, world.seconds[1]))
        hit += outcome.code == -9
        notes += judge(world, job, outcome, [reference], reference)
    return Row(
        "kill -9 while masks are learned and merged",
        trials,
        hit,
        trials - len(notes),
        "the next run goes on or starts again, and gives the same bytes",
        tuple(notes),
    )


def merge_killed(world: World, trials: int) -> Row:
    """kill -9 while a merge with ready masks writes over an older, finished output."""
    old, new, hit, notes = world.reference(1), world.reference(0), 0, []
    older = world.job(seed=1, cache=world.learned(1))
    assert world.run(older).code == 0
    for _ in range(trials):
        job = world.job(cache=world.learned(0))
        shutil.copytree(older.out, job.out)
        outcome = world.run(job, kill_after=world.random.uniform(0, world.merge_seconds))
        hit += outcome.code == -9
        notes += judge(world, job, outcome, [old, new], new)
    return Row(
        "kill -9 while an older output is written over",
        trials,
        hit,
        trials - len(notes),
        "either the whole old or the whole new model, or no config.json; the next run completes it",
        tuple(notes),
    )


def artefact_killed(world: World, trials: int) -> Row:
    """kill -9 while an artefact is saved again and again under one name."""
    sources = [next(world.learned(seed).rglob(MASKS_FILE)) for seed in (0, 1)]
    target = world.root / "rewritten" / MASKS_FILE
    save(target, load(sources[0]))
    written = {sources[i].read_bytes() for i in (0, 1)}
    notes = []
    for trial in range(trials):
        process = world.context.Process(target=write_for_ever, args=(*sources, target))
        process.start()
        process.join(0.05 + world.random.uniform(0, 0.1))
        process.kill()
        process.join()
        if target.read_bytes() not in written or not sound_masks(target.parent):
            notes.append(f"trial {trial}: neither of the two artefacts")
    return Row(
        "kill -9 while dam_masks.safetensors is replaced",
        trials,
        trials,
        trials - len(notes),
        "one of the two artefacts, complete",
        tuple(notes),
    )


def artefact_damaged(world: World, trials: int) -> Row:
    """One bit of a masks file flipped, anywhere; and the cache with such a file used again."""
    original = next(world.learned().rglob(MASKS_FILE)).read_bytes()
    path = world.root / "flipped" / MASKS_FILE
    path.parent.mkdir(exist_ok=True)
    notes = []
    for _ in range(trials):
        data, at = bytearray(original), world.random.randrange(len(original))
        data[at] ^= 1 << world.random.randrange(8)
        path.write_bytes(data)
        try:
            same = load(path)
            if same.metadata != load(next(world.learned().rglob(MASKS_FILE))).metadata:
                notes.append(f"byte {at}: loaded with other metadata")
            elif at > len(original) // 2:
                notes.append(f"byte {at}: loaded")
        except DamError:
            pass
    reference, job = world.reference(), world.job(cache=world.root / "cache-damaged")
    shutil.copytree(world.learned(), job.cache)
    next(job.cache.rglob(MASKS_FILE)).write_bytes(data)
    outcome = world.run(job)
    notes += judge(world, job, outcome, [reference], reference)
    return Row(
        "one bit of dam_masks.safetensors flipped",
        trials + 1,
        trials + 1,
        trials + 1 - len(notes),
        "refused with the reason; a damaged file in the cache is set aside and learned again",
        tuple(notes),
    )


def model_changed(world: World, trials: int) -> Row:
    """A model's weights replaced while masks are learned from them."""
    world.reference()
    hit, notes = 0, []
    for trial in range(trials):
        job = world.job()
        model = job.out.parent / "model"
        shutil.copytree(world.models[0], model)
        job.recipe["models"][0]["model"] = str(model)
        process = world.start(job)
        while process.is_alive() and not list(job.cache.rglob("metrics.jsonl")):  # it has read them and learns
            time.sleep(0.01)
        other = model / "new"
        shutil.copyfile(world.models[1] / "model.safetensors", other)
        other.replace(model / "model.safetensors")
        process.join()
        log = job.log.read_text("utf-8")
        said = process.exitcode == 1 and "expected the file that was read at the start" in log
        hit += said
        if not said or list(job.cache.rglob(MASKS_FILE)) or finished(job.out):
            notes.append(f"trial {trial}: exit {process.exitcode}: {log[-200:]}")
    return Row(
        "a model replaced while masks are learned from it",
        trials,
        hit,
        trials - len(notes),
        "an error that names the file; no masks are kept",
        tuple(notes),
    )


def data_changed(world: World, trials: int) -> Row:
    """Calibration texts rewritten in place, over and over, while they are read."""
    path = world.root / "changing.txt"
    path.write_text(_version(0))
    process = world.context.Process(target=rewrite_for_ever, args=(path,))
    process.start()
    while path.read_text() == _version(0):
        time.sleep(0.01)  # until the writer is at work
    hit, notes = 0, []
    for trial in range(trials):
        try:
            found = load_calibration(
                ModelSettings(calibration=str(path)), "text", num_samples=4000, seed=0, task="t"
            ).samples
            whole = [match for text in found if (match := _LINE.fullmatch(text))]
            # a writer that was stopped half way leaves the first lines of one version, the last one cut
            if (
                len(found) - len(whole) > 1
                or len({match[1] for match in whole}) != 1
                or {int(match[2]) for match in whole} != set(range(len(whole)))
            ):
                notes.append(f"trial {trial}: {len(found)} texts, {len(whole)} of them whole")
        except DamError:
            hit += 1
    process.kill()
    process.join()
    return Row(
        "calibration data rewritten while they are read",
        trials,
        hit,
        trials - len(notes),
        "an error, or what the file held at one moment",
        tuple(notes),
    )


_LINES = 400
_LINE = re.compile(r"v(\d+) text (\d+) end")


def _version(number: int) -> str:
    return "\n".join(f"v{number} text {line} end" for line in range(_LINES))


def rewrite_for_ever(path: Path) -> None:
    """New versions of the same length of lines, written in place, until killed."""
    number = 0
    while True:
        number += 1
        with path.open("w", encoding="utf-8", buffering=4096) as file:
            file.write(_version(number))
        time.sleep(0.003)


def judge(world: World, job: Job, outcome: Outcome, allowed: list[Content], wanted: Content) -> list[str]:
    """What was lost in a trial, at most one note: looks at the wreck, then runs the merge again undisturbed."""
    notes = []
    if finished(job.out) and content(job.out) not in allowed:
        notes.append(f"exit {outcome.code} after {outcome.seconds:.2f} s left a wrong output that looks finished")
    elif not sound_masks(job.cache, job.out):
        notes.append(f"exit {outcome.code} after {outcome.seconds:.2f} s left a damaged masks file")
    else:
        again, litter = world.run(job), [*job.out.rglob("*.tmp"), *job.cache.rglob("*.tmp")]
        if again.code != 0 or content(job.out) != wanted or litter:
            other = sorted(set(content(job.out).items()) ^ set(wanted.items()))
            notes.append(f"after exit {outcome.code}, the next run: exit {again.code}, {again.log[-300:]} {other}")
    shutil.rmtree(job.out.parent, ignore_errors=True)
    return notes
