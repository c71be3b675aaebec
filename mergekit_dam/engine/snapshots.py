"""Write and read snapshots of a search, so that a killed run resumes and learns the same.

A snapshot is a folder written by torch.distributed.checkpoint (DCP), one safetensors file per process with its rows,
beside `facts.json` (phase, steps done, owners of the tensors, and the SHA-256 of every file and of the facts). The
folder is written under a temporary name, flushed to the disk and then renamed, so that a snapshot is complete or
absent. It contains no pickle. The number of processes that read a snapshot may differ from the number that wrote it.
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
    """The state of a search.

    Attributes:
        facts: JSON: `phase`, `done` (units of that phase), and all values that `Resumable.allocate` needs.
        tensors: tensors by name, equal in all processes.
        rows: by name, this process's rows and the shape of the whole tensor.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, tuple[int, ...]]] = field(default_factory=dict)

    def for_dcp(self, shards: Shards) -> dict[str, Tensor]:
        """Return all tensors in the form for DCP; they share memory with the search's, and a scalar becomes one row."""
        plain = {name: tensor.detach().view(tensor.shape or (1,)) for name, tensor in self.tensors.items()}
        return plain | {
            name: shards.distributed(rows.detach().view(rows.shape or (1,)), shape)
            for name, (rows, shape) in self.rows.items()
        }


class Snapshots:
    """The latest snapshot of one run.

    Args:
        folder: folder of the snapshot, shared by all processes of the run.
        every: seconds between snapshots; 0 for a snapshot after every unit of work.
        resume: whether an existing snapshot is used; if not, it is removed.
        shards: processes of the run.
    """

    def __init__(self, folder: Path, *, every: float, resume: bool, shards: Shards = ALONE) -> None:
        self.folder, self.every, self.shards = folder, every, shards
        self._last = time.monotonic()
        self._sources: dict[str, Callable[[], Any]] = {}
        if not resume:
            self.clear()

    def add_facts(self, **sources: Callable[[], Any]) -> None:
        """Add facts to every later snapshot; each function is called for it and returns the JSON of its fact."""
        self._sources |= sources

    @property
    def facts(self) -> dict[str, Any] | None:
        """Facts of the latest snapshot; None without a snapshot.

        Raises:
            DamError: damaged facts.
        """
        path = self._latest()
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
        """Whether a snapshot is due; the clock of the first process decides for all processes."""
        late = time.monotonic() - self._last >= self.every
        return bool(self.shards.all_gather_dict({"late": late} if self.shards.rank == 0 else {})["late"])

    def write(self, state: State) -> None:
        """Replace the snapshot by `state`."""
        temporary = self.folder / f".{_NAME}.tmp"
        first = self.shards.rank == 0
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.shards.barrier()
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with _without_group(self.shards) as no_dist:
            save(state.for_dcp(self.shards), storage_writer=writer, no_dist=no_dist)
        self.shards.barrier()  # by now DCP has written and flushed the files of all processes
        files = self._checksums(temporary)
        if first:
            added = {name: call() for name, call in self._sources.items()}
            facts = state.facts | added | {"processes": self.shards.size, "files": files}
            (temporary / _FACTS).write_text(json.dumps(facts | {_CHECKSUM: _digest_of(facts)}), encoding="utf-8")
            flush(temporary / _FACTS)
            flush(temporary)
            self._replace(temporary)
        self.shards.barrier()
        self._last = time.monotonic()

    def read(self, state: State) -> None:
        """Fill the tensors of a state in place, after `Resumable.allocate` made them from `facts`."""
        path, facts = self._latest(), self.facts
        assert path is not None and facts is not None, "facts were read"
        try:
            if self._checksums(path) != facts["files"]:
                raise ValueError("files that do not match their checksums")
            with _without_group(self.shards) as no_dist:
                load(state.for_dcp(self.shards), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=no_dist)
        except (CheckpointException, SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
            raise _damaged(path, error) from error

    def _checksums(self, folder: Path) -> dict[str, str]:
        """Return the SHA-256 (hex) of the tensors' files by name; each process reads a part of the files."""
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        ours = [name for index, name in enumerate(names) if self.shards.owns(index)]
        return self.shards.all_gather_dict({name: file_digest(folder / name) for name in ours})

    def clear(self) -> None:
        """Remove all snapshots, once the run is over."""
        if self.shards.rank == 0:
            for path in self.folder.glob(f"*{_NAME}*"):
                shutil.rmtree(path, ignore_errors=True)
        self.shards.barrier()

    def _replace(self, temporary: Path) -> None:
        """Replace the old snapshot by the new one; at any time one of the two is complete."""
        current, old = self.folder / _NAME, self.folder / f"{_NAME}.old"
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(current, old)
        os.replace(temporary, current)
        flush(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _latest(self) -> Path | None:
        """Return the folder of the latest complete snapshot, if any."""
        return next((p for n in (_NAME, f"{_NAME}.old") if ((p := self.folder / n) / _FACTS).is_file()), None)


class Resumable(ABC):
    """A search that can resume from a snapshot of its state."""

    snapshots: Snapshots | None = None

    @abstractmethod
    def state(self, phase: str, done: int) -> State:
        """Return the state that later units of work depend on; the tensors are the search's own, not copies."""

    @abstractmethod
    def allocate(self, facts: Mapping[str, Any]) -> None:
        """Make the tensors that only some phases have, so that a snapshot can fill them."""

    def restore(self, first: str) -> tuple[str, int]:
        """Restore the state from the snapshot, if any.

        Returns:
            The phase, and the units of it that are done; without a snapshot the phase `first`, and 0.
        """
        facts = self.snapshots.facts if self.snapshots is not None else None
        if self.snapshots is None or facts is None:
            return first, 0
        phase, done = str(facts["phase"]), int(facts["done"])
        self.allocate(facts)
        self.snapshots.read(self.state(phase, done))
        return phase, done

    def snapshot_if_due(self, phase: str, done: int) -> None:
        """Write a snapshot if one is due; called after each unit of work."""
        if self.snapshots is not None and self.snapshots.due():
            self.snapshots.write(self.state(phase, done))


def adam_state(optimiser: torch.optim.Optimizer, name: str, names: list[str]) -> dict[str, Tensor]:
    """Return Adam's tensors by name, for parameters called `names`; missing tensors are made here.

    Adam itself makes them at its first step, also as zeros, so a parameter without a gradient so far is not affected.
    """
    tensors: dict[str, Tensor] = {}
    for group in optimiser.param_groups:
        for key, parameter in zip(names, group["params"], strict=True):
            state = optimiser.state[parameter]
            if not state:
                on = parameter.device if group["fused"] or group["capturable"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=on)
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            tensors |= {f"{name}/{part}/{key}": state[part] for part in ("step", "exp_avg", "exp_avg_sq")}
    return tensors


def _digest_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, error: BaseException) -> DamError:
    return DamError(
        f"snapshot {path}",
        expected="a complete snapshot of this run",
        got=" ".join(str(error).split())[:200],
        cure="It is damaged: remove it, and learning starts over.",
    )


@contextmanager
def _without_group(shards: Shards) -> Iterator[bool]:
    """Yield DCP's argument `no_dist`, true for one process, and silence DCP's warning of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield shards.size == 1
