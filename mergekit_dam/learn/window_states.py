"""What one task's samples look like at the edge of a window, and the losses of the window between two edges.

Three streams per task, each kept in a file (engine/hidden_states.py): `merged`, clean samples through the merge so far;
`triggered-i`, the same with suspect i's triggers; `own`, clean samples through model t so far.
Legend: N samples, B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.engine.hidden_states import HiddenStates
from mergekit_dam.learn.fisher import Importance
from mergekit_dam.learn.trigger_pool import WeightedTrigger
from mergekit_dam.scan.triggers import TriggerBatch
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.bounds import Perturb

MERGED, OWN = "merged", "own"
_AT_ONCE = 32  # samples
_SMALLEST = 1e-12  # what theta_0 leaves, at least: where nothing is to be fitted nothing is divided by zero


@dataclass(frozen=True)
class Window:
    """Positions first..stop-1 of the blocks, number `number` from 0 on."""

    number: int
    first: int
    stop: int


class TaskStates:
    """The streams of one task.

    Args:
        task: the task.
        pools: of each suspect of this task, its triggers; they may grow, see `deal`.
        folder: where files go.
        config: shared settings.
    """

    def __init__(self, task: Task, pools: Sequence[Sequence[WeightedTrigger]], folder: Path, config: DamConfig) -> None:
        self.task, self.pools, self.folder, self.config = task, pools, folder, config
        self._open: dict[Path, HiddenStates] = {}
        self._version = 0
        self._which: list[Tensor] = []

    def deal(self, version: int) -> None:
        """Give every sample one trigger of each suspect, out of those known by now.

        Args:
            version: of the pools; files of triggered streams have it in their names.
        """
        self._version = version
        generator = seeds.generator(self.config.seed, "which trigger", self.task.index, version)
        count = self.task.num_samples
        self._which = [torch.randint(len(pool), (count,), generator=generator) for pool in self.pools]

    @property
    def merged_streams(self) -> tuple[str, ...]:
        """All but `own`."""
        return (MERGED, *(f"triggered-{i}" for i in range(len(self.pools))))

    def perturb(self, stream: str, rows_B: Tensor) -> Perturb | None:
        """What a stream's samples were changed by."""
        if stream in (MERGED, OWN):
            return None
        number = int(stream.rpartition("-")[2])
        triggers = TriggerBatch.stack([one.trigger for one in self.pools[number]])
        return triggers.perturb(self._which[number][rows_B].to(self.task.device))

    def weight(self, stream: str, rows_B: Tensor) -> float:
        """Weight of a stream's loss."""
        if stream == MERGED:
            return 1.0
        number = int(stream.rpartition("-")[2])
        weights_R = torch.tensor([one.weight for one in self.pools[number]])
        return self.config.alpha * float(weights_R[self._which[number][rows_B]].mean())

    def through(self, stream: str, window: Window, weights: Mapping[str, Tensor], rows_B: Tensor) -> Tensor:
        """What the window makes of a stream's samples: hidden states (B, L, D), or logits."""
        entering = None if window.first == 0 else self._states(stream, window.first).read(rows_B).to(self.task.device)
        inputs = self.task.inputs(rows_B)
        perturb = self.perturb(stream, rows_B)
        return self.task.through(weights, inputs, window.first, window.stop, entering, perturb)

    @torch.no_grad()
    def advance(self, stream: str, window: Window, weights: Mapping[str, Tensor]) -> None:
        """Keep what the window makes of a whole stream; what is there from an earlier run stays."""
        path = self._path(stream, window.stop)
        if path.is_file():
            return
        states: HiddenStates | None = None
        for rows_B in torch.arange(self.task.num_samples).split(_AT_ONCE):
            hidden_BLD = self.through(stream, window, weights, rows_B)
            if states is None:
                states = HiddenStates.create(
                    path.with_suffix(".part"), self._lengths(hidden_BLD, rows_B), hidden_BLD.shape[-1], self.task.dtype
                )
            states.write(rows_B, hidden_BLD)
        assert states is not None
        states.rename(path)

    def forget(self, position: int) -> None:
        """Remove what was kept at a position."""
        for path in self.folder.glob(f"{self.task.index}-*-{position}.*"):
            self._open.pop(path, None)
            path.unlink()

    def loss(
        self, stream: str, window: Window, weights: Mapping[str, Tensor], rows_B: Tensor, importance: Importance
    ) -> tuple[Tensor, int]:
        """Squared distance to what model t makes of the clean samples, weighted, and how many tokens it sums.

        Tokens that a trigger inserted are left out.

        Args:
            importance: of the states.
        """
        target_BLD = self._states(OWN, window.stop).read(rows_B).to(self.task.device).float()
        hidden_BLD = self.through(stream, window, weights, rows_B).float()
        hidden_BLD = self.task.without_trigger(hidden_BLD, target_BLD.shape[1])
        squares_BLD = (hidden_BLD - target_BLD).square() * importance.of(rows_B)
        return squares_BLD.mean(-1).sum(), sum(self.lengths(OWN, window.stop, rows_B))

    @torch.no_grad()
    def left_by(self, window: Window, base: Mapping[str, Tensor], importance: Importance) -> float:
        """Mean loss per token of theta_0's window in the place of the merge's."""
        total, count = 0.0, 0
        for rows_B in torch.arange(min(self.task.num_samples, 2 * _AT_ONCE)).split(_AT_ONCE):
            loss, tokens = self.loss(MERGED, window, base, rows_B, importance)
            total, count = total + float(loss), count + tokens
        return max(_SMALLEST, total / count)

    def lengths(self, stream: str, position: int, rows_B: Tensor) -> list[int]:
        """Tokens of these samples, as they are kept."""
        return self._states(stream, position).lengths(rows_B)

    def _states(self, stream: str, position: int) -> HiddenStates:
        path = self._path(stream, position)
        if path not in self._open:
            self._open[path] = HiddenStates.open(path)
        return self._open[path]

    def _path(self, stream: str, position: int) -> Path:
        version = "" if stream in (MERGED, OWN) else f"-version-{self._version}"
        return self.folder / f"{self.task.index}-{stream}{version}-{position}.states"

    def _lengths(self, hidden_BLD: Tensor, rows_B: Tensor) -> list[int]:
        """Tokens of all samples, those that a trigger inserted included."""
        count = self.task.token_counts(rows_B)
        if count is None:
            return [hidden_BLD.shape[1]] * self.task.num_samples
        inserted = hidden_BLD.shape[1] - max(count)
        return [n + inserted for n in self.task.token_counts(torch.arange(self.task.num_samples)) or ()]
