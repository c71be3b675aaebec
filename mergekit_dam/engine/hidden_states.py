"""Store hidden states of samples at one position of a model in a mapped file, to start passes there.

States are stored without padding. Legend: N samples, B batch, L tokens, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """States (L_i, D) of N samples in a file; `create` makes the file, `open` opens it.

    Args:
        path: path of the file; a JSON file beside it holds lengths, width and dtype.
        lengths_N: L_i.
        width: D.
        dtype: type in the file.
    """

    def __init__(self, path: Path, lengths_N: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self.path, self.lengths_N, self.width, self.dtype = path, tuple(lengths_N), width, dtype
        self._starts = [0, *accumulate(self.lengths_N)]
        size = max(1, self._starts[-1]) * width
        with path.open("ab") as file:
            file.truncate(size * dtype.itemsize)
        self._rows = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(-1, width)

    @classmethod
    def create(cls, path: Path, lengths_N: Sequence[int], width: int, dtype: torch.dtype) -> HiddenStates:
        """Create a file of undefined states, to be filled by `write`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        facts = {"lengths": list(lengths_N), "width": width, "dtype": str(dtype).removeprefix("torch.")}
        path.with_suffix(".json").write_text(json.dumps(facts), "utf-8")
        return cls(path, lengths_N, width, dtype)

    @classmethod
    def open(cls, path: Path) -> HiddenStates:
        """Open a file that `create` made."""
        facts = json.loads(path.with_suffix(".json").read_text("utf-8"))
        return cls(path, facts["lengths"], facts["width"], getattr(torch, facts["dtype"]))

    def rename(self, path: Path) -> None:
        """Give the finished file its name."""
        os.replace(self.path, path)  # both names have the same JSON file
        self.path = path

    def lengths(self, rows_B: Tensor) -> list[int]:
        """Return L_i of these samples."""
        return [self.lengths_N[i] for i in rows_B.tolist()]

    def read(self, rows_B: Tensor) -> Tensor:
        """Return states (B, L, D), zeros after the end of each sample; L is the longest L_i of these samples."""
        parts = [self._rows[self._starts[i] : self._starts[i + 1]] for i in rows_B.tolist()]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def write(self, rows_B: Tensor, hidden_BLD: Tensor) -> None:
        """Write the states of these samples without their padding."""
        for i, states_LD in zip(rows_B.tolist(), hidden_BLD.detach(), strict=True):
            self._rows[self._starts[i] : self._starts[i + 1]] = states_LD[: self.lengths_N[i]].to(self.dtype)
