"""Read a local model directory of safetensors files lazily through memory maps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mergekit_dam.errors import DamError
from mergekit_dam.io.cache import cached_fact, file_state
from mergekit_dam.io.digests import file_digest
from mergekit_dam.io.untrusted import load_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Checkpoint:
    """Tensors of one model directory, by name.

    `tensor` returns a view of a private memory map, so that content is read when it is first used. Do not write to
    the views; the file itself cannot change through them.
    """

    def __init__(self, path: Path, files: dict[str, str]) -> None:
        self.path = path
        self._files = files
        self._handles: dict[str, Any] = {}
        self._hashed_states: dict[str, tuple[int, ...] | None] = {}

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open the safetensors checkpoint in a local directory.

        Raises:
            DamError: the directory is missing, has no safetensors (pickle files are never loaded), or a damaged file.
        """
        path = Path(path)
        if not path.is_dir():
            raise DamError(
                f"model {path}",
                expected="a local model directory",
                got="no such directory",
                cure="Check the path, or download the model first.",
            )
        if (path / _INDEX).is_file():
            files = cls._read_index(path)
        elif (path / _SINGLE).is_file():
            files = dict.fromkeys(_keys(path / _SINGLE), _SINGLE)
        else:
            pickled = sorted(p.name for p in path.glob("*.bin"))
            raise DamError(
                f"model {path}",
                expected=f"{_SINGLE} or {_INDEX}",
                got=f"pickle files ({', '.join(pickled[:2])})" if pickled else "neither",
                cure="Pickle can run code and is never loaded: convert it with "
                "from_pretrained(...).save_pretrained(...) in a sandbox."
                if pickled
                else "Save the model with save_pretrained(...).",
            )
        if not files:
            raise DamError(
                f"model {path}", expected="at least one tensor", got="none", cure="Download or save it again."
            )
        return cls(path, files)

    @staticmethod
    def _read_index(path: Path) -> dict[str, str]:
        try:
            weight_map = load_json(path / _INDEX)["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (KeyError, AttributeError) as error:
            raise DamError(
                f"{path / _INDEX}",
                expected="JSON with a weight_map",
                got=repr(error),
                cure="Save the model again with save_pretrained(...).",
            ) from error
        for file in sorted(set(files.values())):
            if Path(file).name != file or not file.endswith(".safetensors") or not (path / file).is_file():
                raise DamError(
                    f"{path / _INDEX}",
                    expected="safetensors files beside the index",
                    got=repr(file),
                    cure="Download the missing shard; names with folders, and pickle files, are refused.",
                )
        return files

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in the order of the files that hold them."""
        return tuple(self._files)

    @property
    def files(self) -> dict[str, list[str]]:
        """File name -> names of its tensors."""
        files: dict[str, list[str]] = {}
        for name, file in self._files.items():
            files.setdefault(file, []).append(name)
        return files

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            handle = _safe_open(self.path / file)
            missing = {name for name, holder in self._files.items() if holder == file} - set(handle.keys())
            if missing:
                raise DamError(
                    f"{self.path / file}",
                    expected=f"the tensor {min(missing)}, as the index says",
                    got="none",
                    cure="Download the index and the shards again, of one revision.",
                )
            self._handles[file] = handle
        return self._handles[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._open(self._files[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor, from the header alone."""
        code = self._open(self._files[name]).get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise DamError(
                f"tensor {name} of {self.path}",
                expected=f"one of {', '.join(_DTYPES)}",
                got=str(code),
                cure="Save the model in float32, bfloat16 or float16.",
            )
        return _DTYPES[code]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in its own type, as a view of the memory-mapped file."""
        tensor: torch.Tensor = self._open(self._files[name]).get_tensor(name)
        return tensor

    def digest(self) -> str:
        """SHA-256 (hex) over the content of all weight files; names and locations of the files do not count."""
        files = sorted(set(self._files.values()))
        self._hashed_states = {file: _state(self.path / file) for file in files}
        with ThreadPoolExecutor(max_workers=4) as pool:
            parts = list(pool.map(lambda file: _sha256(self.path / file), files))
        return hashlib.sha256("".join(parts).encode()).hexdigest() if len(parts) > 1 else parts[0]

    def require_unchanged(self) -> None:
        """Refuse weight files that changed since `digest` read them.

        Raises:
            DamError: a file was replaced, written to, or removed.
        """
        for file, state in self._hashed_states.items():
            if _state(self.path / file) != state:
                raise DamError(
                    f"{self.path / file}",
                    expected="the file that was read at the start",
                    got="a changed file",
                    cure="Run again, and leave the models alone while they are merged.",
                )


def _state(path: Path) -> tuple[int, ...] | None:
    """Device, inode, size and time of content change; None if the file is missing. Much cheaper than a new hash."""
    state = file_state(path)
    return None if state is None else state[:4]  # new rights or links change the inode's time, but no weight


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise DamError(
            f"{path}",
            expected="a complete safetensors file",
            got=str(error),
            cure="Download or save it again; it is truncated or damaged.",
        ) from error


def _keys(path: Path) -> list[str]:
    handle = _safe_open(path)
    # offset_keys: disks and the page cache are fastest in file order
    return list(handle.offset_keys())


def _sha256(path: Path) -> str:
    return cached_fact(path, "sha256", lambda: file_digest(path))
