"""Download a Hub model without its weights: configs, tokenizer, and the headers of its safetensors files.

A plan needs names, shapes and types of tensors, and a safetensors file begins with them. So only its first bytes are
requested, and written to the front of a sparse file of the full length. Such a file takes no room on the disk and
reads like the checkpoint, with zeros for weights. It lies in a folder of the caller, never in the cache of the Hub,
where a merge could read it.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata  # type: ignore[attr-defined]  # public, as above

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.hub_client import with_retries
from mergekit_dam.io.untrusted import load_json, plain_name

_SINGLE, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_PARALLEL_REQUESTS = 8  # for headers: large models have a hundred files


def download_headers(path: str, commit: str, snapshot: Path, folder: Path, *, cache_dir: str | None = None) -> Path:
    """Make a directory that reads like the repository at this commit, with zeros for weights.

    Args:
        path: ORG/NAME.
        commit: of the repository.
        snapshot: local directory of the repository's other files.
        folder: a new folder to write to.
        cache_dir: of the Hub; weight files that it holds are linked.

    Returns:
        `folder/snapshots/COMMIT`, named like a snapshot in the cache.

    Raises:
        DamError: the Hub does not give a file, or it is no safetensors file, or its stated size exceeds the disk.
    """
    target = folder / "snapshots" / commit
    target.mkdir(parents=True)
    for file in snapshot.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (target / file.name).symlink_to(file.resolve())
    missing = []
    for name in _weight_files(path, commit, snapshot):
        cached = try_to_load_from_cache(path, name, cache_dir=cache_dir, revision=commit)
        if isinstance(cached, str):
            (target / name).symlink_to(Path(cached).resolve())
        else:
            missing.append(name)
    with ThreadPoolExecutor(max_workers=_PARALLEL_REQUESTS) as pool:
        for name, header in zip(missing, pool.map(lambda name: _header(path, commit, name), missing), strict=True):
            _write(target / name, header)
    return target


def _weight_files(path: str, commit: str, snapshot: Path) -> list[str]:
    """Names of the repository's weight files: those in its index, else the single file, and an adapter's."""
    info = with_retries(lambda: HfApi().model_info(path, revision=commit), f"model {path}")
    present = {sibling.rfilename for sibling in info.siblings or []}
    wanted = {_SINGLE, _ADAPTER}
    if (snapshot / _INDEX).is_file():
        weight_map = load_json(snapshot / _INDEX).get("weight_map")
        # opening the checkpoint refuses any other value, with a cure
        wanted = {_ADAPTER, *map(str, weight_map.values())} if isinstance(weight_map, dict) else {_ADAPTER}
    return sorted(plain_name(name, f"file of model {path}") for name in wanted & present if "/" not in name)


def _header(path: str, commit: str, name: str) -> SafetensorsFileMetadata:
    try:
        return with_retries(
            lambda: HfApi().parse_safetensors_file_metadata(path, name, revision=commit), f"{name} of model {path}"
        )
    except (SafetensorsParsingError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DamError):
            raise
        raise _damaged(path, name, first_line(error)) from error


def _write(file: Path, metadata: SafetensorsFileMetadata) -> None:
    """Write a sparse file of the full length with this header; opening it refuses impossible types or ranges."""
    entries: dict[str, object] = {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for name, tensor in metadata.tensors.items()
    }
    header = json.dumps({"__metadata__": metadata.metadata or {}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    try:
        length = max((tensor.data_offsets[1] for tensor in metadata.tensors.values()), default=0)
        with file.open("wb") as opened:
            opened.write(len(header).to_bytes(8, "little") + header)
            opened.truncate(8 + len(header) + length)
    except (OSError, OverflowError, TypeError) as error:
        raise _damaged(file.parent.name, file.name, first_line(error)) from error


def _damaged(where: str, name: str, got: str) -> DamError:
    return DamError(
        f"{name} of model {where}",
        expected="a complete safetensors file",
        got=got,
        cure="Ask its owner to upload it again; it is truncated or damaged.",
    )
