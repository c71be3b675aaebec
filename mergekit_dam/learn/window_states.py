"""Store the hidden states of one task's samples between windows, and compute the losses of a window.

Streams per task, each in a file (engine/hidden_states.py): `merged`, clean samples after the finished windows of the
merge; `triggered-i`, the same with suspect i's triggers; `own`, clean samples after the same blocks of model t; and
`target`, what the current window is fitted to: its input from `merged`, after model t's own window.
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
from mergekit_dam.learn.fisher import Importance, mean_square
from mergekit_dam.learn.trigger_pool import WeightedTrigger
from mergekit_dam.scan.triggers import TriggerBatch
from mergekit_dam.tasks import Task
from mergekit_dam.tasks.bounds import Perturb

MERGED, OWN, TARGET = "merged", "own", "target"
_CLEAN = (MERGED, OWN, TARGET)
_AT_ONCE = 32  # samples
_SMALLEST = 1e-12  # least loss of theta_0, since losses are divided by it


@dataclass(frozen=True)
class Window:
    """Window number `number`, from 0, of positions first..stop-1."""

    number: int
    first: int
    stop: int


class TaskStates:
    """The streams of one task.

    Args:
        task: the task.
        pools: triggers of each suspect of this task; they may grow, see `assign_triggers`.
        folder: folder of the files.
        config: shared settings.
    """

    def __init__(self, task: Task, pools: Sequence[Sequence[WeightedTrigger]], folder: Path, config: DamConfig) -> None:
        self.task, self.pools, self.folder, self.config = task, pools, folder, config
        self._open: dict[Path, HiddenStates] = {}
        self._version = 0
        self._trigger_rows: list[Tensor] = []

    def assign_triggers(self, version: int) -> None:
        """Draw one trigger of each suspect's current pool for every sample.

        Args:
            version: version of the pools, part of the names of the triggered streams' files.
        """
        self._version = version
        generator = seeds.generator(self.config.seed, "which trigger", self.task.index, version)
        count = self.task.num_samples
        self._trigger_rows = [torch.randint(len(pool), (count,), generator=generator) for pool in self.pools]

    @property
    def merged_streams(self) -> tuple[str, ...]:
        """The streams of samples that go through the merge."""
        return (MERGED, *(f"triggered-{i}" for i in range(len(self.pools))))

    def perturb(self, stream: str, rows_B: Tensor) -> Perturb | None:
        """Return the perturbation of a stream's samples; None for clean streams."""
        if stream in _CLEAN:
            return None
        number = int(stream.rpartition("-")[2])
        triggers = TriggerBatch.stack([one.trigger for one in self.pools[number]])
        return triggers.perturb(self._trigger_rows[number][rows_B].to(self.task.device))

    def weight(self, stream: str, rows_B: Tensor) -> float:
        """Return the weight of a stream's loss."""
        if stream == MERGED:
            return 1.0
        number = int(stream.rpartition("-")[2])
        weights_R = torch.tensor([one.weight for one in self.pools[number]])
        return self.config.alpha * float(weights_R[self._trigger_rows[number][rows_B]].mean())

    def through(self, stream: str, window: Window, weights: Mapping[str, Tensor], rows_B: Tensor) -> Tensor:
        """Run a stream's samples through the window; return hidden states (B, L, D), or logits."""
        source, entering = MERGED if stream == TARGET else stream, None
        if window.first > 0:
            entering = self._states(source, window.first).read(rows_B).to(self.task.device)
        inputs = self.task.inputs(rows_B)
        perturb = self.perturb(stream, rows_B)
        return self.task.through(weights, inputs, window.first, window.stop, entering, perturb)

    @torch.no_grad()
    def advance(self, stream: str, window: Window, weights: Mapping[str, Tensor]) -> None:
        """Run a whole stream through the window and store the states, unless an earlier run stored them."""
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

    def remove(self, position: int) -> None:
        """Remove the states at a position."""
        for path in self.folder.glob(f"{self.task.index}-*-{position}.*"):
            self._open.pop(path, None)
            path.unlink()

    def loss(
        self, stream: str, window: Window, weights: Mapping[str, Tensor], rows_B: Tensor, importance: Importance
    ) -> tuple[Tensor, int]:
        """Return the weighted squared distance to the clean samples' target states, and its number of tokens.

        Tokens that a trigger inserted do not count.

        Args:
            importance: weights of the states.
        """
        target_BLD = self._states(TARGET, window.stop).read(rows_B).to(self.task.device).float()
        hidden_BLD = self.through(stream, window, weights, rows_B).float()
        hidden_BLD = self.task.without_trigger(hidden_BLD, target_BLD.shape[1])
        squares_BLD = relative_squares(hidden_BLD, target_BLD) * importance.of(rows_B)
        return squares_BLD.mean(-1).sum(), sum(self.lengths(TARGET, window.stop, rows_B))

    @torch.no_grad()
    def base_loss(self, stream: str, window: Window, base: Mapping[str, Tensor], importance: Importance) -> float:
        """Return a stream's mean loss per token with theta_0 in this window; losses are relative to it."""
        total, count = 0.0, 0
        for rows_B in torch.arange(min(self.task.num_samples, 2 * _AT_ONCE)).split(_AT_ONCE):
            loss, tokens = self.loss(stream, window, base, rows_B, importance)
            total, count = total + float(loss), count + tokens
        return max(_SMALLEST, total / count)

    def lengths(self, stream: str, position: int, rows_B: Tensor) -> list[int]:
        """Return the number of stored tokens of each of these samples."""
        return self._states(stream, position).lengths(rows_B)

    def _states(self, stream: str, position: int) -> HiddenStates:
        path = self._path(stream, position)
        if path not in self._open:
            self._open[path] = HiddenStates.open(path)
        return self._open[path]

    def _path(self, stream: str, position: int) -> Path:
        version = "" if stream in _CLEAN else f"-version-{self._version}"
        return self.folder / f"{self.task.index}-{stream}{version}-{position}.states"

    def _lengths(self, hidden_BLD: Tensor, rows_B: Tensor) -> list[int]:
        """Return the number of tokens of each sample of the task, tokens of a trigger included."""
        count = self.task.token_counts(rows_B)
        if count is None:
            return [hidden_BLD.shape[1]] * self.task.num_samples
        inserted = hidden_BLD.shape[1] - max(count)
        return [n + inserted for n in self.task.token_counts(torch.arange(self.task.num_samples)) or ()]


def relative_squares(hidden_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    """Return squared differences (B, L, D) of states, each divided by the root of its token's mean square.

    So states are compared as normalising layers read them. A few tokens of a causal LM, most often the first, are a
    hundred times as long as others in all inputs alike (Sun et al., arXiv 2402.17762); their lengths, which differ
    between models and which nothing depends on, would be all that counts.
    """
    hidden_BLD, target_BLD = (states / mean_square(states).sqrt() for states in (hidden_BLD, target_BLD))
    return (hidden_BLD - target_BLD).square()
