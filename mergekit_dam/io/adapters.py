"""Check peft adapters against their base, merge them, and cache the merged models by the content of their files.

mergekit finds a merged LoRA by its two paths alone, so it would miss an adapter that was trained again into the same
folder. It also creates the folder before it loads anything, so a failed merge would stay there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from filelock import FileLock
from mergekit.common import ModelPath, ModelReference, get_auto_cls
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.untrusted import load_json

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_ADAPTER_MIXTURES = {"POLY", "XLORA"}  # they choose among several adapters by the input
_MERGE_WITH_HEAD = "Merge the adapter with peft into the base with its head first (num_labels as in the adapter)"


def require_mergeable(ref: ModelReference, adapter: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse an adapter that cannot be merged into the weights of this base.

    Args:
        ref: the base, in a local directory.
        adapter: peft's folder; a folder without weights or without peft's configuration is refused elsewhere.

    Raises:
        DamError: the adapter does not change weights, its shapes differ from the base's, the base lacks its head, or
            the base ties the head to the embedding.
    """
    if not (adapter / _CONFIG).is_file():
        return
    settings = load_json(adapter / _CONFIG)
    kind = str(settings.get("peft_type"))
    tuner = next((t for name, t in peft.PEFT_TYPE_TO_TUNER_MAPPING.items() if name == kind), None)
    if not hasattr(tuner, "merge_and_unload") or kind in _ADAPTER_MIXTURES:
        raise DamError(
            f"adapter {adapter}",
            expected="an adapter of weights, such as LORA",
            got=f"peft_type {kind}",
            cure="Only adapters of weights can be merged: virtual tokens are no part of a model's weights.",
        )
    if not (adapter / _WEIGHTS).is_file():
        return
    try:
        config = ref.config(trust_remote_code)
        with torch.device("meta"):
            auto = get_auto_cls(config.architectures[0])
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
        with safe_open(adapter / _WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DamError(
            f"adapter {adapter}",
            expected="an adapter and a base that can be read",
            got=first_line(error),
            cure="Save the adapter again with peft, or check its base.",
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return  # the code that reads the base refuses one that cannot be built, and knows the cause
    _require_fit(ref, adapter, settings, model, shapes)


def _require_fit(
    ref: ModelReference, adapter: Path, settings: dict[str, Any], model: Any, shapes: dict[str, tuple[int, ...]]
) -> None:
    modules = dict(model.named_modules())
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)) and len(ends) == 2
    saved = settings.get("modules_to_save") or ()
    for name, got in shapes.items():
        path = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        owner, _, part = path.partition(".lora_")
        learned = bool(part) or any(path.rpartition(".")[0].endswith(s) for s in saved)
        module_name = owner if part else path.rpartition(".")[0]
        module = modules.get(module_name)
        if module is None:
            if part or learned:
                raise DamError(
                    f"adapter {adapter}",
                    expected=f"an adapter of {type(model).__name__}, the class of {ref.model}",
                    got=f"one of {module_name}, which it lacks",
                    cure=f"{_MERGE_WITH_HEAD}, and give the result as the model.",
                )
            continue
        want = _lora_shape(module, part, got) if part else state.get(path, got)
        if want != got:
            raise DamError(
                f"adapter {adapter}",
                expected=f"{module_name} as in {ref.model}: {want}",
                got=str(got),
                cure="It was trained on another base. Where training added tokens or classes, merge it with peft into "
                "a base resized alike, and give the result as the model.",
            )
        if tied and learned and any(module is end for end in ends):
            raise DamError(
                f"adapter {adapter}",
                expected="no change of head or embedding alone where the base ties them",
                got=f"one of {module_name}, and tie_word_embeddings in {ref.model}",
                cure="Merged into the shared matrix it would be another model: untie the base (a head of its own, "
                "tie_word_embeddings=false), or train without this module.",
            )


def _lora_shape(module: nn.Module, part: str, got: tuple[int, ...]) -> tuple[int, ...]:
    """Shape that a LoRA tensor must have on this module; `got` itself where the module sets none."""
    if isinstance(module, nn.Linear):
        inner, outer = module.in_features, module.out_features
    elif isinstance(module, Conv1D):
        inner, outer = module.weight.shape
    elif isinstance(module, nn.Embedding) and part.startswith("embedding_"):
        inner, outer = module.num_embeddings, module.embedding_dim
    else:
        return got
    if part in ("A.weight", "embedding_A"):
        return (got[0], inner)
    if part in ("B.weight", "embedding_B"):
        return (outer, got[1])
    return got


def merged_adapter(
    ref: ModelReference, cache: Path, *, trust_remote_code: bool = False, dtype: str | None = None
) -> ModelReference:
    """Merge an adapter into its base, or return the cached merge of the same files.

    Args:
        ref: base and adapter in local directories.
        cache: folder of merged models; a merge appears there only when it is complete.

    Raises:
        DamError: peft cannot merge it.
    """
    assert ref.lora is not None
    target = cache / f"{Path(ref.lora.path).name}-{_fingerprint(ref, dtype)}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.parent / f".{cache.name}-{target.name}.lock"):
            if not target.is_dir():
                _merge(ref, target, trust_remote_code, dtype)
    return ModelReference(model=ModelPath(path=str(target)))


def require_merged_after(ref: ModelReference, merged: Path) -> None:
    """Refuse a merged adapter in mergekit's own cache that is older than its adapter or base.

    mergekit identifies it by name alone.

    Args:
        ref: BASE+LORA.
        merged: the folder that mergekit uses for `ref`.

    Raises:
        DamError: the adapter or its base was written later.
    """
    made = min((file.stat().st_mtime_ns for file in merged.glob("*.safetensors")), default=None)
    if made is None:
        return
    parts = [Path(part.path) for part in (ref.model, ref.lora) if part is not None]
    later = [
        file
        for part in parts
        if part.is_dir()
        for file in part.iterdir()
        if file.name.endswith((".safetensors", "adapter_config.json")) and file.stat().st_mtime_ns > made
    ]
    if later:
        raise DamError(
            f"adapter {ref}",
            expected="a merged model that is newer than adapter and base",
            got=f"{merged}, which is older than {later[0]}",
            cure="Remove that folder: mergekit would merge what the adapter was before.",
        )


def _merge(ref: ModelReference, target: Path, trust_remote_code: bool, dtype: str | None) -> None:
    workspace = tempfile.mkdtemp(prefix=".merging-", dir=target.parent)
    try:
        done = ModelReference.merged(ref, workspace, trust_remote_code, dtype)
        os.replace(done.model.path, target)
    except Exception as error:  # peft raises errors of many kinds
        raise DamError(
            f"LoRA {ref.lora}",
            expected=f"an adapter that peft merges into {ref.model}",
            got=first_line(error),
            cure="Check that the adapter was trained on this base.",
        ) from error
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _fingerprint(ref: ModelReference, dtype: str | None) -> str:
    assert ref.lora is not None
    digest = hashlib.sha256(repr((str(ref), ref.override_architecture, dtype)).encode())
    for folder in (ref.model.path, ref.lora.path):
        for file in sorted(p for p in Path(folder).iterdir() if p.is_file()):
            status = file.stat()
            digest.update(repr((file.name, status.st_size, status.st_ino, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]
