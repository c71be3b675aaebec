"""What every search for masks holds, whatever it minimises. T tasks, P masked tensors."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.snapshots import Resumable, Snapshots
from mergekit_dam.errors import DamError
from mergekit_dam.learn.masks import Whole
from mergekit_dam.scan.scanner import KnownScan
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.base import Progress

Track = Callable[[dict[str, Any]], None]


class MaskSearch(Resumable):
    """State of one optimisation.

    Args:
        model: merged weights of T models.
        tasks: one per model, in the same order.
        config: shared settings.
        start: what multiplies each task vector at the start, (T,).
        track: called with one flat record per step.
        progress: wraps an iterable of steps in a progress bar with a title.
        snapshots: where the state is kept between runs; None: nowhere.
        known: where a scan is kept for other runs; None: nowhere.

    Attributes:
        scans: whether it looks for backdoors first. Then students or vaccinated models take the place of models whose
            backdoors no scan finds.
    """

    scans: ClassVar[bool] = False

    def __init__(
        self,
        model: MergedModel,
        tasks: Sequence[Task],
        config: DamConfig,
        start: Tensor,
        *,
        track: Track,
        progress: Progress,
        snapshots: Snapshots | None = None,
        known: KnownScan | None = None,
    ) -> None:
        self.model, self.tasks, self.config, self.shards = model, tasks, config, model.shards
        self.track, self.progress, self.snapshots, self.known = track, progress, snapshots, known
        columns = 1 if config.constants.coefficients == "task" else len(model.mask_names)
        self.start = start.to(model.device)[:, None].repeat(1, columns)  # (T, 1) or (T, P)
        self.set_up()

    @abstractmethod
    def set_up(self) -> None:
        """Make masks, coefficients, optimisers and what else this search holds."""

    @abstractmethod
    def run(self) -> tuple[Whole, Tensor]:
        """Learn. Returns probabilities as bytes by mask and tensor, and the coefficients (T, 1) or (T, P)."""

    def audit(self) -> list[dict[str, Any]]:
        """The scan's findings as JSON; nothing where none is made."""
        return []

    @abstractmethod
    def facts_of_masks(self) -> dict[str, Any]:
        """`densities` by mask, and `own_masks`: names of those that each model has one of."""

    def remaining(self) -> list[dict[str, Any]]:
        """What recovered triggers of suspects do to their model and to the merge; nothing where none was searched."""
        return []

    def track_step(self, record: dict[str, Any]) -> None:
        """Pass a step's record on.

        Raises:
            DamError: a value in it is NaN or infinite.
        """
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DamError(
                    f"{name} at step {record['step']}",
                    expected="a finite number",
                    got=str(value),
                    cure="Lower mask_learning_rate or the models' weight.",
                )
        self.track(record)
