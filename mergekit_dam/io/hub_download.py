"""Download models and LoRAs of the Hub once, at one commit, and use them as local directories.

mergekit 0.1.5 lists a repository's files on every use, so that a cached model cannot be merged without network, and a
branch that moves while a merge runs is read at two commits. `localise` fetches every model first; the recipe keeps its
ids, and the references of the returned configuration hold the local directories.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel
from transformers import PretrainedConfig

from mergekit_dam.errors import DamError, permission_denied
from mergekit_dam.io.adapters import merged_adapter, require_mergeable
from mergekit_dam.io.files import write_atomic
from mergekit_dam.io.hub_client import is_hub_id, with_retries
from mergekit_dam.io.hub_headers import download_headers
from mergekit_dam.io.untrusted import load_json

INPUTS_FILE = "inputs.json"
_WEIGHTS = "*.safetensors"
_WANTED = ["*.json", _WEIGHTS, "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*"]  # other formats, and the masks and heads of a merge, lie in folders
_MASKS = ["dam/*masks*"]  # as large as a model, and used only by a further merge


class LocalReference(ModelReference):
    """A mergekit reference that prints as in the recipe and reads from local directories.

    Attributes:
        model_folder: directory of the model.
        lora_folder: directory of the adapter, or None.
        weightless: for a plan only: the weights may be absent, and a LoRA, which changes no shape, is not merged.
    """

    model_folder: str
    lora_folder: str | None = None
    weightless: bool = False

    def _local(self) -> ModelReference:
        return ModelReference(
            model=ModelPath(path=self.model_folder),
            lora=ModelPath(path=self.lora_folder) if self.lora_folder else None,
            override_architecture=self.override_architecture,
        )

    def require_mergeable(self, *, trust_remote_code: bool) -> None:
        """Refuse an adapter that cannot be merged into its base; see `adapters.require_mergeable`."""
        if self.lora_folder is not None:
            require_mergeable(self._local(), Path(self.lora_folder), trust_remote_code=trust_remote_code)

    def merged(
        self, cache_dir: str | None = None, trust_remote_code: bool = False, lora_merge_dtype: str | None = None
    ) -> ModelReference:
        """Return the base with its LoRA merged, from the cache if their files are the same; without LoRA, itself."""
        if self.lora is None:
            return self
        if self.weightless:
            return self._local().model_copy(update={"lora": None})
        if not cache_dir:
            raise RuntimeError("model+lora needs a cache for the merged model")
        return merged_adapter(
            self._local(), Path(cache_dir), trust_remote_code=trust_remote_code, dtype=lora_merge_dtype
        )

    def config(self, trust_remote_code: bool = False) -> PretrainedConfig:
        """Read config.json of the model."""
        config: PretrainedConfig = self._local().config(trust_remote_code)
        return config

    def local_path(self, cache_dir: str | None = None, ignore_lora: bool = False) -> str:
        """Directory of the model's files; makes no request to the Hub."""
        assert self.lora is None or ignore_lora, "a LoRA must be merged first"
        return self.model_folder


@dataclass(frozen=True)
class LocalRecipe:
    """A recipe whose models are local directories.

    Attributes:
        config: the recipe with `LocalReference`s.
        options: mergekit's options, with a cache for merged LoRAs where the recipe needs one.
        commits: `ORG/NAME@REVISION` as in the recipe -> commit, for models of the Hub.
    """

    config: MergeConfiguration
    options: MergeOptions
    commits: Mapping[str, str]


def localise(
    config: MergeConfiguration, options: MergeOptions, *, lora_cache: Path, headers: Path | None = None
) -> LocalRecipe:
    """Download every model and LoRA of a recipe.

    Args:
        config: the recipe.
        options: mergekit's options; `transformers_cache` holds the downloads.
        lora_cache: where LoRAs are merged into their bases if `lora_merge_cache` is not given.
        headers: an empty folder, for a plan only: instead of weights, the headers of their files are written there.

    Raises:
        DamError: an unknown id or revision, a gated model, no network and no copy, or an adapter without its base.
    """
    caches = {"lora_merge_cache": options.lora_merge_cache, "transformers_cache": options.transformers_cache}
    expanded = {name: os.path.expanduser(path) for name, path in caches.items() if path and path.startswith("~")}
    options = options.model_copy(update=expanded) if expanded else options
    references = config.referenced_models()
    if isinstance(config.tokenizer_source, ModelReference):
        references.append(config.tokenizer_source)
    if config.tokenizer is not None and isinstance(config.tokenizer.source, ModelReference):
        references.append(config.tokenizer.source)
    commits: dict[str, str] = {}
    fetched: dict[ModelPath, Path] = {}

    def folder_of(part: ModelPath) -> Path:
        if part not in fetched:
            workspace = None if headers is None else headers / str(len(fetched))
            fetched[part], commit = fetch(
                part.path, part.revision, cache_dir=options.transformers_cache, headers=workspace
            )
            if commit is not None:
                commits[str(part)] = commit
        return fetched[part]

    local = {
        ref: _local_reference(ref, folder_of, commits, weightless=headers is not None)
        for ref in dict.fromkeys(references)
    }
    for ref in local.values():
        ref.require_mergeable(trust_remote_code=options.trust_remote_code)
    if any(ref.lora for ref in local) and options.lora_merge_cache is None:
        options = options.model_copy(update={"lora_merge_cache": str(lora_cache)})
    return LocalRecipe(_replaced(config, local), options, commits)


def fetch(
    path: str,
    revision: str | None,
    *,
    cache_dir: str | None = None,
    everything: bool = False,
    headers: Path | None = None,
) -> tuple[Path, str | None]:
    """Return a model's directory: the path itself if it exists, else a downloaded snapshot of the Hub repository.

    Args:
        path: a directory, or an id.
        revision: branch, tag or commit; None for the main branch.
        cache_dir: of the Hub; None for its default (HF_HOME).
        everything: download subfolders, too, which inputs of a merge do not need.
        headers: where to write the model with headers in place of weights (`hub_headers`); offline, the cache is used.

    Returns:
        The directory, and the commit if it came from the Hub.

    Raises:
        DamError: a revision of a local folder, neither a directory nor an id, or an error of the Hub.
    """
    path = os.path.expanduser(path)  # no shell does it in a recipe
    name = f"{path}@{revision}" if revision else path
    require_readable(Path(path))
    if revision is not None and (Path(path).exists() or Path(name).exists()):
        raise DamError(
            f"model {name}",
            expected="a Hub id before @REVISION",
            got="a local folder",
            cure="In a recipe @ begins a revision, and folders have none: rename the folder, or link to it by a name "
            "without @.",
        )
    if Path(path).exists():
        return Path(path).absolute(), None
    if not is_hub_id(path):
        raise DamError(
            f"model {name}",
            expected="a directory or a Hub id such as ORG/NAME",
            got="neither",
            cure="Check the path; relative ones start at the working directory.",
        )
    unwanted = _MASKS if everything else _UNWANTED
    if headers is not None and not constants.HF_HUB_OFFLINE:
        # by commit: a branch cached by name but without weights would count as complete when the network is gone
        revision = with_retries(lambda: HfApi().model_info(path, revision=revision), f"model {name}").sha
        unwanted = [*unwanted, _WEIGHTS]
    folder = Path(
        with_retries(
            lambda: snapshot_download(
                path, revision=revision, cache_dir=cache_dir, allow_patterns=_WANTED, ignore_patterns=unwanted
            ),
            f"model {name}",
        )
    )
    commit = folder.name  # the cache names snapshots by commit
    if headers is not None and not constants.HF_HUB_OFFLINE:
        folder = download_headers(path, commit, folder, headers, cache_dir=cache_dir)
    return folder, commit


def require_readable(folder: Path) -> None:
    """Refuse a model folder that this user may not read, or that holds such a file.

    Raises:
        DamError: the right to read is missing.
    """
    try:
        if not folder.exists():
            return
        needed = os.R_OK | os.X_OK if folder.is_dir() else os.R_OK
        files = [*folder.glob(_WEIGHTS), *folder.glob("*config.json"), *folder.glob("tokenizer*")]
        denied = next((file for file in files if file.is_file() and not os.access(file, os.R_OK)), None)
        if os.access(folder, needed):
            if denied is None:
                return
            folder = denied
    except PermissionError:
        pass  # raised by the folder itself, or by a folder on the way to it
    raise permission_denied(str(folder))


def require_dataset(name: str, revision: str | None, subject: str) -> None:
    """Raise a precise error if a Hub dataset cannot be read, which `datasets` does not; offline, do nothing.

    Raises:
        DamError: no such data set or revision, or a gated one.
    """
    if constants.HF_HUB_OFFLINE:
        return
    api = HfApi()
    with_retries(lambda: api.dataset_info(name, revision=revision), subject)
    with_retries(lambda: api.auth_check(name, repo_type="dataset"), subject)


def record_inputs(folder: Path, commits: Mapping[str, str]) -> None:
    """Write the commits of a merge's models to `inputs.json` in `folder`."""
    if commits:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / INPUTS_FILE, json.dumps(dict(sorted(commits.items())), indent=1))


def _local_reference(
    ref: ModelReference, folder_of: Callable[[ModelPath], Path], commits: Mapping[str, str], *, weightless: bool
) -> LocalReference:
    whole = str(ref)
    if ref.lora is not None and Path(whole).exists() and not Path(ref.lora.path).expanduser().exists():
        raise DamError(
            f"model {whole}",
            expected="BASE+LORA",
            got="a local folder whose name has a +",
            cure="In a recipe + adds a LoRA: rename the folder, or link to it by a name without +.",
        )
    folder = folder_of(ref.model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = load_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise DamError(
            f"model {ref}",
            expected="a whole model",
            got="a LoRA adapter without its base",
            cure=f"Write it as BASE+ADAPTER: {base or 'BASE'}+{ref.model}.",
        )
    adapter = folder_of(ref.lora) if ref.lora else None
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise DamError(
            f"LoRA {ref.lora}",
            expected="adapter_config.json",
            got="a repository or folder without it",
            cure="After the + comes an adapter that peft saved.",
        )
    if not any(folder.glob("*.safetensors")) and commits.get(str(ref.model)):
        raise DamError(
            f"model {ref}",
            expected="safetensors files",
            got="a repository without any",
            cure="Pickle can run code and is never loaded: ask its owner for safetensors, or convert it in a sandbox.",
        )
    return LocalReference(
        model=_absolute(ref.model),
        lora=_absolute(ref.lora) if ref.lora else None,
        override_architecture=ref.override_architecture,
        model_folder=str(folder),
        lora_folder=str(adapter) if adapter else None,
        weightless=weightless,
    )


def _absolute(part: ModelPath) -> ModelPath:
    """Make a local path absolute: mergekit would look a relative path up on the Hub when it writes the card."""
    path = Path(part.path).expanduser() if part.path.startswith("~") else Path(part.path)
    if part.revision is None and path.exists():
        return ModelPath(path=str(path.absolute()))
    return part


def _replaced(value: Any, local: Mapping[ModelReference, LocalReference]) -> Any:
    """Replace the references inside a value; a part without references stays the same object."""
    if isinstance(value, ModelReference):
        return local.get(value, value)
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        new = {name: _replaced(field, local) for name, field in fields.items()}
        changed = {name: field for name, field in new.items() if field is not fields[name]}
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, dict):
        entries = {key: _replaced(entry, local) for key, entry in value.items()}
        return entries if any(entries[key] is not value[key] for key in value) else value
    if isinstance(value, list):
        items = [_replaced(item, local) for item in value]
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
