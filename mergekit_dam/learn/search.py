"""Define the base class of all searches for masks. T tasks, P masked tensors."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.snapshots import Resumable, Snapshots
from mergekit_dam.errors import DamError
from mergekit_dam.learn.masks import ProbabilityBytes
from mergekit_dam.scan.scanner import KnownScan
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.base import Progress

Track = Callable[[dict[str, Any]], None]


class MaskSearch(Resumable):
    """A search for masks: an objective and its state.

    Args:
        model: merged weights of T models.
        tasks: one task per model, in the same order.
        config: shared settings.
        start: initial merging coefficients, (T,).
        track: called with one flat record per step.
        progress: wraps an iterable of steps in a progress bar with a title.
        snapshots: store of the state for a resumed run; None: no snapshots.
        known: store of the scan for other runs; None: the scan is not stored.
        teach: makes students of models, by index, and returns the merged model with them in the models' places; None:
            suspects are merged as they are.

    Attributes:
        scans: whether the search scans for backdoors first. If so, students or vaccinated models replace models whose
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
        teach: Callable[[Collection[int]], MergedModel] | None = None,
    ) -> None:
        self.model, self.tasks, self.config, self.shards = model, tasks, config, model.shards
        self.track, self.progress, self.snapshots, self.known = track, progress, snapshots, known
        self.teach = teach
        columns = 1 if config.constants.coefficients == "task" else len(model.mask_names)
        self.start = start.to(model.device)[:, None].repeat(1, columns)  # (T, 1) or (T, P)
        self.set_up()

    @abstractmethod
    def set_up(self) -> None:
        """Make masks, coefficients, optimisers and other state of this search."""

    @abstractmethod
    def run(self) -> tuple[ProbabilityBytes, Tensor]:
        """Learn; return probabilities as bytes by mask and tensor, and the coefficients (T, 1) or (T, P)."""

    def audit(self) -> list[dict[str, Any]]:
        """Return the findings of the scan as JSON; none without a scan."""
        return []

    @abstractmethod
    def facts_of_masks(self) -> dict[str, Any]:
        """Return `densities` by mask, and `own_masks`, the names of masks that each model has for itself."""

    def remaining(self) -> list[dict[str, Any]]:
        """Return the success of suspects' triggers on their models and on the merge; none without a scan."""
        return []

    def track_step(self, record: dict[str, Any]) -> None:
        """Refuse a record of a step with NaN or infinity, and pass it to `track`.

        Raises:
            DamError: a value in the record is NaN or infinite.
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
