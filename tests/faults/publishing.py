"""After the merge: kill -9 while the report is written, and while the merge is pushed to a Hub on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from tests.faults.child import report, send
from tests.faults.row import Row
from tests.faults.world import World, content
from tests.helpers.hub_server import TOKEN, HubServer

_NAME = "org/merge"


def report_killed(world: World, trials: int) -> Row:
    """kill -9 at a random moment of writing a report, with and without an older report, then once more."""
    reference, hit, notes = world.reference(), 0, []
    older = _copy(world)
    seconds = min(world.call(report, older).seconds for _ in range(2))
    whole = _names(older)
    for trial in range(trials):
        out = _copy(world)
        if trial % 2:
            shutil.copytree(older / "dam", out / "dam", dirs_exist_ok=True)
        outcome = world.call(report, out, kill_after=world.random.uniform(0, 1.2 * seconds))
        hit += outcome.code == -9
        wrong = _broken(out)
        again = world.call(report, out)
        litter = [*out.rglob("*.tmp")]
        if wrong or again.code != 0 or _names(out) != whole or _broken(out) or litter or content(out) != reference:
            notes.append(f"trial {trial}: exit {outcome.code}, damaged {wrong}, then exit {again.code}, left {litter}")
        shutil.rmtree(out.parent)
    return Row(
        "kill -9 while a report is written",
        trials,
        hit,
        trials - len(notes),
        "every page and picture is whole, old or new; the merge is untouched; the next run completes it",
        tuple(notes),
    )


def push_killed(world: World, trials: int) -> Row:
    """kill -9 at a random moment of `mergekit-dam push`, then the same command again."""
    world.reference()
    wanted, seconds = _pushed(world)
    hit, notes = 0, []
    for trial in range(trials):
        hub = HubServer()
        try:
            outcome = world.call(send, world.merged, _NAME, hub.url, TOKEN, kill_after=world.random.uniform(0, seconds))
            hit += outcome.code == -9
            there = _content(hub)
            again = world.call(send, world.merged, _NAME, hub.url, TOKEN)
            after = _content(hub)
        finally:
            hub.close()
        if there not in ({}, wanted) or again.code != 0 or after != wanted or hub.unauthorised_secrets:
            notes.append(f"trial {trial}: exit {outcome.code} left {sorted(there)}, then exit {again.code}")
    return Row(
        "kill -9 while a merge is pushed (a Hub on localhost)",
        trials,
        hit,
        trials - len(notes),
        "the repository is empty or complete; the next push completes it",
        tuple(notes),
    )


def _copy(world: World) -> Path:
    return Path(shutil.copytree(world.merged, world.place() / "merged"))


def _names(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path.name[0] != "."}


def _broken(out: Path) -> list[str]:
    """Files of the report, under their final names, that are not whole."""
    folder, found = out / "dam", []
    page, facts = folder / "report.html", folder / "report.json"
    if page.is_file() and not page.read_text("utf-8").rstrip().endswith("</html>"):
        found.append(page.name)
    try:
        if facts.is_file():
            json.loads(facts.read_text("utf-8"))
    except ValueError:
        found.append(facts.name)
    for picture in (folder / "figures").glob("[!.]*"):
        try:
            with Image.open(picture) as image:
                image.load()
        except OSError:
            found.append(picture.name)
    return found


def _pushed(world: World) -> tuple[dict[str, bytes], float]:
    """What the Hub holds after an undisturbed push, and the seconds that it takes."""
    times = []
    for _ in range(2):  # the first child pays for imports
        hub = HubServer()
        try:
            outcome = world.call(send, world.merged, _NAME, hub.url, TOKEN)
            assert outcome.code == 0, "an undisturbed push failed"
            times.append(outcome.seconds)
            found = _content(hub)
        finally:
            hub.close()
    return found, min(times)


def _content(hub: HubServer) -> dict[str, bytes]:
    repository = hub.repos.get(("model", _NAME))
    return dict(repository.branches["main"]) if repository is not None else {}
