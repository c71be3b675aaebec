"""Snapshots of a search, so that a run that was killed goes on as if nothing had happened.

A snapshot is a folder that torch.distributed.checkpoint writes, one safetensors file per process with its own rows,
beside `facts.json` (phase, steps done, what the tensors belong to, and the SHA-256 of every file and of the facts). It
is written under a temporary name, flushed to the disk and then renamed: it is complete or not there. Nothing in it is
pickled. It can be read by another number of processes than wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.errors import DamError
from mergekit_dam.io.digests import file_digest
from mergekit_dam.io.files import flush

_FACTS = "facts.json"
_NAME = "snapshot"
_CHECKSUM = "facts_sha256"


@dataclass
class State:
    """What a search is made of at one moment.

    Attributes:
        facts: JSON: `phase`, `done` (units of that phase), and whatever is needed to lay out the tensors.
        tensors: by name, the same in all processes.
        rows: by name, this process's rows and the shape of the whole tensor.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, tuple[int, ...]]] = field(default_factory=dict)

    def for_dcp(self, shards: Shards) -> dict[str, Tensor]:
        """All tensors as DCP takes them; they share memory with the search's own. Scalars become one row."""
        plain = {name: tensor.detach().view(tensor.shape or (1,)) for name, tensor in self.tensors.items()}
        return plain | {
            name: shards.distributed(rows.detach().view(rows.shape or (1,)), shape)
            for name, (rows, shape) in self.rows.items()
        }


class Snapshots:
    """The latest snapshot of one run.

    Args:
        folder: where it is kept; shared by all processes of the run.
        every: seconds between two; 0 after every unit of work.
        resume: whether one that is found is used.
        shards: processes of the run.
    """

    def __init__(self, folder: Path, *, every: float, resume: bool, shards: Shards = ALONE) -> None:
        self.folder, self.every, self.shards = folder, every, shards
        self._last = time.monotonic()
        self._journal: dict[str, Callable[[], Any]] = {}
        if not resume:
            self.clear()

    def follow(self, **journal: Callable[[], Any]) -> None:
        """Have these called with every snapshot; what they return (JSON) is kept in the facts under their names."""
        self._journal |= journal

    @property
    def facts(self) -> dict[str, Any] | None:
        """Facts of the snapshot there is, or None.

        Raises:
            DamError: damaged facts.
        """
        path = self._found()
        if path is None:
            return None
        try:
            facts: dict[str, Any] = json.loads((path / _FACTS).read_text("utf-8"))
            if facts.pop(_CHECKSUM) != _digest_of(facts):
                raise ValueError("facts that do not match their checksum")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise _damaged(path, error) from error
        return facts

    def due(self) -> bool:
        """Whether the time has come; the first process's clock decides for all."""
        late = time.monotonic() - self._last >= self.every
        return bool(self.shards.union({"late": late} if self.shards.rank == 0 else {})["late"])

    def write(self, state: State) -> None:
        """Replace the snapshot by `state`."""
        temporary = self.folder / f".{_NAME}.tmp"
        first = self.shards.rank == 0
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.shards.barrier()
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with _single(self.shards) as no_dist:
            save(state.for_dcp(self.shards), storage_writer=writer, no_dist=no_dist)
        self.shards.barrier()  # everyone's file is written and, by DCP, flushed
        files = self._checksums(temporary)
        if first:
            told = {name: call() for name, call in self._journal.items()}
            facts = state.facts | told | {"processes": self.shards.size, "files": files}
            (temporary / _FACTS).write_text(json.dumps(facts | {_CHECKSUM: _digest_of(facts)}), encoding="utf-8")
            flush(temporary / _FACTS)
            flush(temporary)
            self._replace(temporary)
        self.shards.barrier()
        self._last = time.monotonic()

    def read(self, state: State) -> None:
        """Fill the tensors of a state that was laid out by `facts`, in place."""
        path, facts = self._found(), self.facts
        assert path is not None and facts is not None, "facts were read"
        try:
            if self._checksums(path) != facts["files"]:
                raise ValueError("files that do not match their checksums")
            with _single(self.shards) as no_dist:
                load(state.for_dcp(self.shards), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=no_dist)
        except (CheckpointException, SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
            raise _damaged(path, error) from error

    def _checksums(self, folder: Path) -> dict[str, str]:
        """SHA-256 (hex) of the tensors' files by name; every process reads its share of them."""
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        return self.shards.union({n: file_digest(folder / n) for i, n in enumerate(names) if self.shards.owns(i)})

    def clear(self) -> None:
        """Remove all snapshots, once the run is over."""
        if self.shards.rank == 0:
            for path in self.folder.glob(f"*{_NAME}*"):
                shutil.rmtree(path, ignore_errors=True)
        self.shards.barrier()

    def _replace(self, temporary: Path) -> None:
        """Put the new snapshot in the place of the old one; at every moment one of the two is complete."""
        current, old = self.folder / _NAME, self.folder / f"{_NAME}.old"
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(current, old)
        os.replace(temporary, current)
        flush(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _found(self) -> Path | None:
        return next((p for n in (_NAME, f"{_NAME}.old") if ((p := self.folder / n) / _FACTS).is_file()), None)


class Resumable(ABC):
    """A search whose state can be written and read."""

    snapshots: Snapshots | None = None

    @abstractmethod
    def state(self, phase: str, done: int) -> State:
        """All that later units depend on; the tensors are the search's own, not copies."""

    @abstractmethod
    def lay_out(self, facts: Mapping[str, Any]) -> None:
        """Make the tensors that only some phases have, so that they can be filled."""

    def begin(self, first: str) -> tuple[str, int]:
        """Phase and units of it that are done: from the snapshot, or none of the phase `first`."""
        facts = self.snapshots.facts if self.snapshots is not None else None
        if self.snapshots is None or facts is None:
            return first, 0
        phase, done = str(facts["phase"]), int(facts["done"])
        self.lay_out(facts)
        self.snapshots.read(self.state(phase, done))
        return phase, done

    def keep(self, phase: str, done: int) -> None:
        """After a unit of work: write a snapshot if it is time."""
        if self.snapshots is not None and self.snapshots.due():
            self.snapshots.write(self.state(phase, done))


def adam_state(optimiser: torch.optim.Optimizer, name: str, names: list[str]) -> dict[str, Tensor]:
    """Adam's tensors by name, for parameters called `names`; what Adam makes at its first step is made here.

    Zeros are what Adam itself would start from, so that a parameter without a gradient so far stays untouched.
    """
    found: dict[str, Tensor] = {}
    for group in optimiser.param_groups:
        for key, parameter in zip(names, group["params"], strict=True):
            state = optimiser.state[parameter]
            if not state:
                on = parameter.device if group["fused"] or group["capturable"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=on)
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            found |= {f"{name}/{part}/{key}": state[part] for part in ("step", "exp_avg", "exp_avg_sq")}
    return found


def _digest_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, error: BaseException) -> DamError:
    return DamError(
        f"snapshot {path}",
        expected="a complete one of this run",
        got=" ".join(str(error).split())[:200],
        cure="It is damaged: remove it, and learning starts over.",
    )


@contextmanager
def _single(shards: Shards) -> Iterator[bool]:
    """Whether this process is alone, which DCP warns of although it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield shards.size == 1
