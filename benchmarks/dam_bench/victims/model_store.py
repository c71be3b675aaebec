"""Build the models of a suite once, and store them by the content of their inputs."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file, save_file

from dam_bench.attacks.registry import outside_code
from dam_bench.suites.base import Poison, Scenario, Suite, attacked_half, no_progress
from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.evaluation.metrics import Attack
from mergekit_dam.tasks.base import Progress

_VERSION = 1  # of the build procedure; a new number rebuilds all models
_DONE = "complete.json"


class ModelStore:
    """Store of theta_0, fine-tunes, victims, triggers and calibration files of a suite.

    Args:
        suite: builds the models.
        root: folder of the store.
        progress: wraps the steps of long work.
    """

    def __init__(self, suite: Suite, root: Path, progress: Progress = no_progress) -> None:
        self.suite, self.root, self.progress = suite, root, progress

    def base(self) -> Path:
        """Return the folder of theta_0, built if missing."""
        return self._built({"kind": "base"}, "base", lambda folder: self.suite.save_base(folder, self.progress))

    def calibration(self, task: str) -> Path:
        """Return the file of a task's calibration split, written if missing."""
        folder = self._built(
            {"kind": "calibration", "task": task}, task, lambda folder: self.suite.save_calibration(task, folder)
        )
        return next(path for path in sorted(folder.iterdir()) if path.name != _DONE)

    def trigger(self, task: str, poison: Poison, seed: int) -> Trigger:
        """Return the attacker's trigger of a task; a trigger that is optimised on theta_0 is optimised once."""
        task, poison = attacked_half(task, poison)

        def build(folder: Path) -> None:
            pattern = self.suite.optimise_pattern(self.base(), task, poison, seed)
            save_file({} if pattern is None else {"pattern": pattern.contiguous()}, folder / "pattern.safetensors")

        folder = self._built(self.trigger_key(task, poison, seed), "trigger", build)
        return self.suite.trigger(poison, load_file(folder / "pattern.safetensors").get("pattern"))

    def attacks(self, name: str, task: str, poison: Poison, seed: int) -> list[Attack]:
        """Return what a poison shall do to a merge, to be measured: the first by this name, others as `name#2`, ..."""
        task, poison = attacked_half(task, poison)
        trigger = self.trigger(task, poison, seed)
        behaviours = self.suite.attacker(poison).behaviours(self.suite, task, poison, trigger)
        names = [name, *(f"{name}#{number}" for number in range(2, len(behaviours) + 1))]
        return [Attack(own, poison.onto or task, *does) for own, does in zip(names, behaviours, strict=True)]

    def model(self, task: str, poison: Poison | None, seed: int) -> Path:
        """Return the folder of a fine-tune or victim, built if missing; its name is the task's."""

        def build(folder: Path) -> None:
            trigger = None if poison is None else self.trigger(task, poison, seed)
            self.suite.save_model(self.base(), task, poison, trigger, seed, folder, self.progress)

        def build_pair(folder: Path) -> None:
            assert poison is not None
            attacked, half = attacked_half(task, poison)
            trigger = self.trigger(attacked, half, seed)
            self.suite.save_pair(self.base(), attacked, half, trigger, seed, folder, self.progress)

        if poison is not None and poison.partner:
            return self._built(self.model_key(task, poison, seed), "pair", build_pair) / task
        return self._built(self.model_key(task, poison, seed), task, build)

    def models(self, scenario: Scenario, seed: int) -> dict[str, Path]:
        """Return task -> folder of the input model, for all tasks of a scenario."""
        return {task: self.model(task, scenario.poisons.get(task), seed) for task in self.suite.tasks}

    def has_model(self, task: str, poison: Poison | None, seed: int) -> bool:
        """Whether a model is complete in the store."""
        name = "pair" if poison is not None and poison.partner else task
        return (self._folder(self.model_key(task, poison, seed), name) / _DONE).is_file()

    def made_from(
        self,
        task: str,
        poison: Poison | None,
        seed: int,
        kind: str,
        key: dict[str, Any],
        make: Callable[[Path], object],
    ) -> Path:
        """Return the folder of what is made from a model, made if missing.

        Args:
            kind: name of what is made.
            key: JSON of all that it depends on beside the model.
            make: writes into the folder that it is given.
        """
        whole = {**key, "model": self.model_key(task, poison, seed), "kind": kind}
        return self._built(whole, task, make)

    def trigger_key(self, task: str, poison: Poison, seed: int) -> dict[str, Any]:
        """JSON that determines a trigger: neither the rate of poisoned samples nor the finished task vector's scale."""
        later = ("rate", "rescale", "amplify", "density", "partner")
        what = {k: v for k, v in self._attack_key(poison).items() if k not in later}
        return {"kind": "trigger", "task": task, "poison": what, "seed": seed}

    def model_key(self, task: str, poison: Poison | None, seed: int) -> dict[str, Any]:
        """JSON that determines a model beside the suite; the halves of a pair have the same."""
        if poison is None:
            return {"kind": "model", "task": task, "poison": None, "seed": seed}
        task, poison = attacked_half(task, poison)
        kind = "pair" if poison.partner else "model"
        return {"kind": kind, "task": task, "poison": self._attack_key(poison), "seed": seed}

    def _attack_key(self, poison: Poison) -> dict[str, Any]:
        code = outside_code(self.suite.attacker(poison))
        return poison.to_json() | self.suite.attack_settings(poison) | code

    def _folder(self, key: dict[str, Any], name: str) -> Path:
        whole = {
            "version": _VERSION,
            "suite": self.suite.name,
            "preset": self.suite.preset,
            "fingerprint": self.suite.fingerprint(),
            **key,
        }
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
        return self.root / self.suite.name / str(key["kind"]) / digest / name

    def _built(self, key: dict[str, Any], name: str, build: Callable[[Path], object]) -> Path:
        folder = self._folder(key, name)
        if (folder / _DONE).is_file():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if (folder / _DONE).is_file():
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
            try:
                build(temporary)
                (temporary / _DONE).write_text(json.dumps(key, sort_keys=True, indent=1), "utf-8")
                temporary.chmod(0o755)  # mkdtemp makes it private
                temporary.rename(folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        return folder
