"""Write a cleaned model's directory: the input's own files, with the tensors that the vaccination changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from mergekit_dam.engine.trained_module import UpdatedWeights
from mergekit_dam.errors import DamError
from mergekit_dam.io.files import cannot_write, replacing, write_atomic
from mergekit_dam.io.untrusted import load_json, require_no_links_out
from mergekit_dam.merging.checks import require_finite
from mergekit_dam.models.plan import ModelInput
from mergekit_dam.tasks import Task
from mergekit_dam.vaccine.adapter import ADAPTER_CONFIG, read_adapter, write_adapter

FACTS_FILE = "vaccine.json"
WORK = ".vaccine"  # snapshots, while it lasts
_LOCK = ".vaccine.lock"
_KEPT = (".json", ".txt", ".model", ".jinja")
_INDEX, _CONFIG = "model.safetensors.index.json", "config.json"
_LEFT_OUT = (FACTS_FILE, _INDEX, _CONFIG, ADAPTER_CONFIG, "trainer_state.json", "inputs.json")


def require_free(folder: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an output that is not ours to replace.

    Args:
        folder: of one cleaned model.
        inputs: what is read, by what it is to be called.

    Raises:
        DamError: one of the models, a file, a folder with other things in it, or a link out of it.
    """
    for what, path in inputs.items():
        if folder.resolve() == path.resolve():
            raise DamError(
                f"output {folder}",
                expected="a directory of its own",
                got=what,
                cure="Choose another output: this one would be overwritten while it is read.",
            )
    if folder.is_dir():
        others = [p.name for p in folder.iterdir() if p.name not in (WORK, _LOCK)]
        if others and not (folder / FACTS_FILE).is_file() and not (folder / WORK).is_dir():
            raise DamError(
                f"output {folder}",
                expected="a new directory, or one that `clean` wrote",
                got=f"one with {min(others)}",
                cure="Choose another output, or remove this one.",
            )
        require_no_links_out(folder, ("",))
    elif folder.exists():
        raise DamError(f"output {folder}", expected="a directory", got="a file", cure="Choose another output.")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock an output folder: in this context, no other vaccination writes there.

    A new folder is removed if the context fails before anything is in it.

    Raises:
        DamError: another one does, or the folder cannot be written.
    """
    lock, is_new = FileLock(folder / _LOCK), not folder.exists()
    try:
        (folder / WORK).mkdir(parents=True, exist_ok=True)  # marks the folder as ours
        lock.acquire(blocking=False)
    except Timeout as error:
        raise DamError(
            f"output {folder}",
            expected="no other `clean` that writes there",
            got="one under way",
            cure="Wait until it ends, or choose another output.",
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
        (folder / _LOCK).unlink(missing_ok=True)
    finally:
        lock.release()
        if is_new and not any(p.is_file() and p.name != _LOCK for p in folder.rglob("*")):
            shutil.rmtree(folder)


def finished(folder: Path, identity: str, *, adapter: bool) -> dict[str, Any] | None:
    """Read the facts of a finished model in the folder; None if it is not whole or of another identity."""
    if not (folder / (ADAPTER_CONFIG if adapter else _CONFIG)).is_file() or not (folder / FACTS_FILE).is_file():
        return None
    facts = load_json(folder / FACTS_FILE)
    return facts if facts.get("identity") == identity else None


def write_cleaned(
    folder: Path, task: Task, weights: Mapping[str, Tensor], facts: Mapping[str, Any], *, adapter: bool
) -> None:
    """Write a cleaned model; config.json, which makes it one, comes last.

    Args:
        folder: it is emptied of what an earlier run left.
        task: the model's.
        weights: tensors that changed, by output name, float32.
        facts: for vaccine.json.
        adapter: write a LoRA instead, on the model or on the base of the LoRA that it was made of; `weights` must then
            be `UpdatedWeights`.

    Raises:
        DamError: no space or right to write, or weights that are not finite.
    """
    try:
        for old in folder.iterdir():
            if old.name in (_CONFIG, ADAPTER_CONFIG):
                old.unlink()  # first: from here on it is no model
        for old in folder.iterdir():
            if old.is_file() and old.name != _LOCK:
                old.unlink()
        if adapter:
            assert isinstance(weights, UpdatedWeights), "settings are checked before"
            lora = lora_of(task.input)
            before = [] if lora is None else read_adapter(lora)
            last = {ADAPTER_CONFIG: write_adapter(folder, weights.updates.values(), before).encode()}
        else:
            _write_weights(folder, task, weights)
            last = {_CONFIG: (task.input.path / _CONFIG).read_bytes()}
        for file in sorted(task.input.path.iterdir()):
            if file.is_file() and file.suffix in _KEPT and file.name not in _LEFT_OUT:
                write_atomic(folder / file.name, file.read_bytes())
        write_atomic(folder / FACTS_FILE, json.dumps(facts, indent=1))
        for name, content in last.items():
            write_atomic(folder / name, content)
        shutil.rmtree(folder / WORK, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


def lora_of(model: ModelInput) -> Path | None:
    """The folder of the LoRA that a model was made of; None without one."""
    ref = model.ref
    return None if ref.lora is None else Path(getattr(ref, "lora_folder", None) or ref.lora.path)


def _write_weights(folder: Path, task: Task, weights: Mapping[str, Tensor]) -> None:
    """Write the checkpoint's own files, each tensor in its own type."""
    changed = {task.sources[name]: name for name in weights}
    for file, names in task.checkpoint.files.items():
        tensors = {}
        for name in names:
            stored = task.checkpoint.tensor(name)
            tensors[name] = stored
            if name in changed:
                cleaned = weights[changed[name]].to(stored.dtype).contiguous()
                require_finite(cleaned, f"tensor {name}", f"the cleaned {task.name}", "Lower learning_rate.")
                tensors[name] = cleaned
        with replacing(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    if (task.checkpoint.path / _INDEX).is_file():
        write_atomic(folder / _INDEX, (task.checkpoint.path / _INDEX).read_bytes())
