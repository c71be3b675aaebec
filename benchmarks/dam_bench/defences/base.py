"""Define what a defence is: settings, the families that it suits, and the weights that it changes in a merge.

A defence is given theta_0, the input models and unlabelled calibration samples, as `dam` is. It never sees a trigger,
a target, a label, or which model is bad.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from torch import Tensor

from dam_bench.suites.base import FAMILIES, Family, Suite
from mergekit_dam.config import StrictSettings, setting
from mergekit_dam.engine.device import device_of
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.errors import DamError
from mergekit_dam.io.files import replacing
from mergekit_dam.merging.checks import require_finite
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.plan import Plan
from mergekit_dam.recipe import open_recipe
from mergekit_dam.tasks import Task, build_tasks


@dataclass(frozen=True)
class DefenceInputs:
    """What a defence reads, and where it writes.

    Attributes:
        suite: gives the recipe's entries for its kind of model.
        base: theta_0.
        models: task -> directory of the input model.
        calibration: task -> file of unlabelled samples; empty for defences that use no data.
        seed: of all that is drawn.
        start: an undefended merge of these models, which the defence changes or replaces.
        out: directory to write.
    """

    suite: Suite
    base: Path
    models: Mapping[str, Path]
    calibration: Mapping[str, Path]
    seed: int
    start: Path
    out: Path

    @cached_property
    def plan(self) -> Plan:
        """The models and their tensors, with the samples and the limits on them that `dam` has by default."""
        data = {task: {"calibration": str(path)} for task, path in self.calibration.items()}
        entries = [
            {"model": str(path), "parameters": {**data.get(task, {}), **self.suite.model_parameters(path)}}
            for task, path in self.models.items()
        ]
        recipe: dict[str, Any] = {"merge_method": "dam", "base_model": self.suite.base_entry(self.base)}
        shared = {"seed": self.seed, **self.suite.shared_parameters(self.base)}
        return open_recipe({**recipe, "models": entries, "parameters": shared}).plan

    @cached_property
    def tasks(self) -> Sequence[Task]:
        """One task per model: its forward pass with any weights, its own head, its unlabelled samples."""
        return build_tasks(self.plan, device_of(self.plan.config.device))

    @cached_property
    def _vectors(self) -> TaskVectors:
        return TaskVectors(self.plan)

    def input_weights(self, name: str) -> list[Tensor]:
        """The tensor of every input model by output name, float32; theta_0's where a model lacks it."""
        base = self._vectors.base(name)
        return [(base if tensor is None else tensor).float() for tensor in self._vectors.models(name)]

    def base_weights(self, name: str) -> Tensor:
        """The tensor of theta_0 by output name, float32."""
        return self._vectors.base(name).float()

    def start_weights(self, merge: Path | None = None) -> dict[str, Tensor]:
        """The tensors of the undefended merge by output name, float32 where they are floats.

        Args:
            merge: another merge of these models.

        Raises:
            DamError: the merge lacks one of them.
        """
        merge = merge or self.start
        checkpoint = Checkpoint.open(merge)
        device = device_of(self.plan.config.device)
        for spec in self.plan.tensors:
            if spec.name not in checkpoint:
                raise DamError(
                    f"merge {merge}",
                    expected=f"the tensor {spec.name}",
                    got="none",
                    cure="Start from a merge of the same base and models.",
                )
        stored = {spec.name: checkpoint.tensor(spec.name).to(device) for spec in self.plan.tensors}
        return {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}

    def write(self, changed: Mapping[str, Tensor]) -> None:
        """Write the merge with these tensors in place of the undefended ones, each in its stored type.

        Args:
            changed: by output name, in the shapes of the undefended merge.

        Raises:
            DamError: NaN or infinity, a tensor that the merge does not have, or another shape.
        """
        checkpoint = Checkpoint.open(self.start)
        for name, tensor in changed.items():
            wanted = checkpoint.shape(name) if name in checkpoint else None
            if wanted != tuple(tensor.shape):
                raise DamError(
                    f"tensor {name} of the defended merge",
                    expected=f"the shape {wanted}" if wanted else "a tensor that the merge has",
                    got=str(tuple(tensor.shape)),
                    cure="Return tensors by output name.",
                )
            require_finite(tensor, f"tensor {name}", "the defended merge", "Lower learning_rate.")
        shutil.copytree(
            self.start,
            self.out,
            ignore=lambda folder, names: set(checkpoint.files) if Path(folder) == self.start else set(),
            dirs_exist_ok=True,
        )
        for file, names in checkpoint.files.items():
            tensors = {name: checkpoint.tensor(name) for name in names}
            tensors |= {
                n: changed[n].detach().cpu().to(t.dtype).contiguous() for n, t in tensors.items() if n in changed
            }
            with replacing(self.out / file) as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})


class Defence(StrictSettings):
    """A defence with its settings, which are its fields.

    Attributes:
        families: kinds of models that it can defend.
        needs_data: whether it reads calibration samples.
    """

    families: ClassVar[tuple[Family, ...]] = FAMILIES
    needs_data: ClassVar[bool] = True

    start: str = setting("linear", "The method, a recipe of mergekit, whose merge the defence changes.")

    @property
    def passes(self) -> int:
        """Forward and backward passes of one batch per task, for the estimate of time."""
        return 0

    @abstractmethod
    def changed_weights(self, given: DefenceInputs) -> Mapping[str, Tensor]:
        """Compute the tensors of the merge that differ from the undefended one, by output name.

        Raises:
            DamError: models or data that do not fit.
        """

    def defend(self, given: DefenceInputs) -> None:
        """Write the defended merge to `given.out`, as a directory that `suite.load_merge` reads."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(given.seed)
            given.write(self.changed_weights(given))


def run_recipe(recipe: Mapping[str, Any], seed: int, out: Path) -> None:
    """Merge by mergekit in this process, without its progress bars and with a cache of this merge's own beside `out`.

    Args:
        recipe: mergekit's configuration.
        seed: of what mergekit draws.
        out: directory to write.
    """
    os.environ["MERGEKIT_DAM_CACHE"] = str(out.parent / "cache")  # a run must not reuse the masks of an earlier run
    config = MergeConfiguration.model_validate(recipe)
    options = MergeOptions(quiet=True, copy_tokenizer=False, random_seed=seed)
    with contextlib.redirect_stderr(io.StringIO()):
        run_merge(config, str(out), options, config_source=yaml.safe_dump(recipe))  # which names the heads' models
