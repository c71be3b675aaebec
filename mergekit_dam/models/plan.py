"""Resolve model references and raw settings to a frozen Plan of the tensors to merge, without reading a weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo, arch_info_for_config, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_dam.config import KNOWN, DamConfig, ModelSettings, parse, unknown_keys, unknown_setting
from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.adapters import require_mergeable, require_merged_after
from mergekit_dam.io.hub_client import hub_cause, hub_error
from mergekit_dam.io.hub_download import LocalReference
from mergekit_dam.io.untrusted import file_safe, require_plausible_config
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.compatible import (
    missing_tensor,
    require_equal_depth,
    require_equal_tying,
    require_plain_weights,
    require_window,
)
from mergekit_dam.models.families import register_architectures
from mergekit_dam.models.parameter_names import meta_model, module_names
from mergekit_dam.models.verify import check_coverage

_REMOTE_CODE = "It needs code of its own, which dam does not run; other methods merge it with --trust-remote-code."
# buffers that only older files hold; they are computed from the config
_OLD_BUFFER = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|\.(attn|attention)\.(masked_)?bias)$"
)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that the merge writes.

    Attributes:
        name: output name, the base checkpoint's own spelling wherever mergekit keeps it.
        shape: in base and models alike.
        dtype: element type in the base's checkpoint.
        base_source: name in the base's checkpoint.
        sources: name in each model's checkpoint, or None where the model lacks the tensor (task vector 0).
        mask_name: name of the mask; tied tensors share a mask.
        vocabulary_axis: axis with a row per token; None without such an axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    base_source: str
    sources: tuple[str | None, ...]
    mask_name: str
    vocabulary_axis: int | None = None


@dataclass(frozen=True)
class ModelInput:
    """A model of the merge, in the local directory `path` with any LoRA already merged."""

    name: str
    ref: ModelReference
    path: Path
    config: PretrainedConfig
    settings: ModelSettings


@dataclass(frozen=True)
class Plan:
    """Models, tensors and settings of a merge, known before a weight is read.

    Attributes:
        base: theta_0.
        models: the fine-tuned models.
        tensors: what is merged.
        config: shared settings.
        cache: folder where its masks and its scan are kept; None: the user's (`cache_folder`).
    """

    base: ModelInput
    models: tuple[ModelInput, ...]
    tensors: tuple[TensorSpec, ...]
    config: DamConfig
    cache: Path | None = None


def build_plan(
    base: ModelReference,
    models: Sequence[ModelReference],
    *,
    shared: Mapping[str, Any],
    per_model: Mapping[ModelReference, Mapping[str, Any]],
    options: MergeOptions | None = None,
    least: int = 2,
) -> Plan:
    """Resolve the models, settings and tensors of a merge.

    Args:
        base: theta_0.
        models: the fine-tuned models, T >= `least`, without the base.
        shared: raw values under `parameters:`; None means not given.
        per_model: raw values per model; they override shared values.
        options: mergekit's options (caches, trust_remote_code).
        least: smallest number of models; 1 where nothing is merged.

    Raises:
        DamError: too few models, unknown settings, a missing model, or tensors that do not match.
    """
    options = options or MergeOptions()
    if len(models) < least:
        raise DamError(
            "models",
            expected=f"at least {'two' if least == 2 else 'one'} besides base_model",
            got=str(len(models)),
            cure="A merge needs two fine-tuned models of one base."
            if least == 2
            else "Give a fine-tuned model and the base that it was made from.",
        )
    config, settings = parse_settings(shared, [per_model.get(model, {}) for model in models])
    register_architectures()
    names = _task_names(models)
    base_input = model_input("base", base, ModelSettings(), options)
    inputs = tuple(model_input(name, ref, own, options) for name, ref, own in zip(names, models, settings, strict=True))
    require_window(config, [model.config for model in (base_input, *inputs)])
    merge_config = MergeConfiguration(
        merge_method="dam", base_model=base, models=[{"model": ref} for ref in (base, *models)]
    )
    weights = _weights(merge_config, options, (base_input, *inputs))
    base_checkpoint, *checkpoints = (Checkpoint.open(model.path) for model in (base_input, *inputs))
    for model, own in zip((base_input, *inputs), (base_checkpoint, *checkpoints), strict=True):
        require_equal_depth(base_input, model)
        require_plain_weights(model, own)
        meta_model(model.config, torch.device("cpu"))  # refuses a class that learning could not build
    check_coverage(weights, base_checkpoint.names, ignored=_excluded_names(base_input, base_checkpoint))
    tensors = tuple(_tensor_specs(weights, base_input, base_checkpoint, inputs, checkpoints))
    return Plan(base_input, inputs, tensors, config)


def _weights(config: MergeConfiguration, options: MergeOptions, inputs: Sequence[ModelInput]) -> list[WeightInfo]:
    """List the tensors that mergekit would merge.

    Raises:
        DamError: a config does not name the model's class, or mergekit cannot merge these classes.
    """
    for model in inputs:
        if not model.config.architectures:
            raise DamError(
                f"config.json of model {model.ref}",
                expected="the model's class under `architectures`",
                got="none",
                cure='Add it, e.g. "architectures": ["LlamaForCausalLM"], or save the model with save_pretrained(...).',
            )
    classes = ", ".join(dict.fromkeys(str((model.config.architectures or [""])[0]) for model in inputs))
    try:
        # where classes differ, mergekit would use any of them; the output has the base's class
        known = arch_info_for_config(inputs[0].config) if options.allow_crimes else None
        return list((known or get_architecture_info(config, options)).all_weights(inputs[0].config))
    except DamError:
        raise
    except Exception as error:  # mergekit raises many kinds on unknown classes
        several = "," in classes
        raise DamError(
            "classes of base and models",
            expected="one class for all" if several else "a class that mergekit can merge",
            got=f"{classes} ({first_line(error)})",
            cure="Merge models of one class, fine-tuned from this base."
            if several
            else "See the README for the classes that can be merged.",
        ) from error


def _excluded_names(base: ModelInput, checkpoint: Checkpoint) -> frozenset[str]:
    """Names in the base's files that its class does not load: old buffers, and the head of a base used without it."""
    model = meta_model(base.config, torch.device("cpu"))
    if base.ref.override_architecture is not None:
        return frozenset(checkpoint.names) - frozenset(module_names(model, checkpoint.names))
    buffers = [name for name in checkpoint.names if _OLD_BUFFER.search(name)]
    return frozenset(buffers) - frozenset(module_names(model, buffers))


def parse_settings(
    shared: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]]
) -> tuple[DamConfig, list[ModelSettings]]:
    """Split raw values into shared and per-model settings, and validate both."""
    for where, values in (("parameters", shared), *((f"model {i + 1}", own) for i, own in enumerate(per_model))):
        given = [key for key, value in values.items() if value is not None]
        unknown_setting(unknown_keys(given), where, KNOWN, "dam")
    config = parse(
        DamConfig, {k: v for k, v in shared.items() if k in DamConfig.model_fields}, where="the shared parameters"
    )
    fallback = {k: v for k, v in shared.items() if k in ModelSettings.model_fields and v is not None}
    settings = [
        parse(ModelSettings, fallback | {k: v for k, v in own.items() if v is not None}, where="a model's parameters")
        for own in per_model
    ]
    return config, settings


def model_input(name: str, ref: ModelReference, settings: ModelSettings, options: MergeOptions) -> ModelInput:
    """Resolve a reference to a local directory, merge its LoRA, and read its config.

    Raises:
        DamError: the model cannot be read.
    """
    refuse_unsafe(ref)
    try:
        merged = ref.merged(
            cache_dir=options.lora_merge_cache,
            trust_remote_code=options.trust_remote_code,
            lora_merge_dtype=options.lora_merge_dtype,
        )
        config = ref.config(trust_remote_code=options.trust_remote_code)
        path = Path(merged.local_path(cache_dir=options.transformers_cache))
    except DamError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if (cause := hub_cause(error)) is not None:
            raise hub_error(cause, f"model {ref}") from error
        raise DamError(
            f"model {ref}",
            expected="a local model directory or a Hub id that can be read",
            got=first_line(error),
            cure=_REMOTE_CODE
            if "trust_remote_code" in str(error)
            else "Check the path or id, and HF_TOKEN for gated models; model+lora needs --lora-merge-cache DIR.",
        ) from error
    if path != Path(ref.model.path):
        require_plausible_config(path)
        if ref.lora is not None and not isinstance(ref, LocalReference):
            require_merged_after(ref, path)
    return ModelInput(name, ref, path, config, settings)


def refuse_unsafe(ref: ModelReference) -> None:
    """Refuse pickled weights, also of an adapter, and sizes that exhaust the machine, before a library reads them.

    Raises:
        DamError: a local directory holds such files. A model that is not local is checked after its download.
    """
    local = isinstance(ref, LocalReference)
    folder = Path(ref.model_folder if local else ref.model.path)
    if folder.is_dir():
        require_plausible_config(folder)
        Checkpoint.open(folder)
    adapter = Path((ref.lora_folder if local else None) or ref.lora.path) if ref.lora is not None else None
    if adapter is not None and adapter.is_dir() and not (adapter / "adapter_model.safetensors").is_file():
        raise DamError(
            f"adapter {adapter}",
            expected="adapter_model.safetensors",
            got=", ".join(sorted(p.name for p in adapter.glob("*.bin"))[:2]) or "no such file",
            cure="Pickle can run code and is never loaded: save the adapter again with safe_serialization=True.",
        )
    if adapter is not None and folder.is_dir() and not local:  # a local reference was checked when it was made
        require_mergeable(ref.model_copy(update={"lora": None}), adapter)


def _task_names(models: Sequence[ModelReference]) -> list[str]:
    """A short, unique, file-safe name per model: the last part of its path, numbered where two are equal."""
    names: list[str] = []
    taken = {"base"}  # theta_0's own name; compared without case, since some file systems ignore case
    for ref in models:
        stem = file_safe(Path((ref.lora or ref.model).path).name)
        name, count = stem, 2
        while name.casefold() in taken:
            name, count = f"{stem}-{count}", count + 1
        names.append(name)
        taken.add(name.casefold())
    return names


def _tensor_specs(
    weights: Iterable[WeightInfo],
    base: ModelInput,
    checkpoint: Checkpoint,
    models: Sequence[ModelInput],
    checkpoints: Sequence[Checkpoint],
) -> Iterable[TensorSpec]:
    tied = bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False))
    for weight in weights:
        spellings = (weight.name, *(weight.aliases or ()))
        sources = [_source(spellings, weight.tied_names, c) for c in checkpoints]
        base_source = _source(spellings, weight.tied_names, checkpoint)
        for model, source, own in zip(
            (base, *models), (base_source, *sources), (checkpoint, *checkpoints), strict=True
        ):
            if source is None and not weight.optional:
                raise missing_tensor(model, weight, own)
        if not any(name in c for c in (checkpoint, *checkpoints) for name in spellings):
            continue
        if base_source is None:
            raise DamError(
                f"tensor {weight.name}",
                expected="in the base, since a model has it",
                got="a base without this tensor",
                cure="Merge models that were fine-tuned from this base.",
            )
        for model in models if weight.tied_names else ():
            require_equal_tying(base, model, weight)
        shape = checkpoint.shape(base_source)
        for model, source, own in zip(models, sources, checkpoints, strict=True):
            if source is not None and own.shape(source) != shape:
                raise _shape_error(weight, base, shape, model, own.shape(source))
        mask_name = weight.tied_names[0] if tied and weight.tied_names else weight.name
        yield TensorSpec(
            weight.name,
            shape,
            checkpoint.dtype(base_source),
            base_source,
            tuple(sources),
            mask_name,
            weight.vocabulary_axis,
        )


def _source(spellings: Sequence[str], tied: Sequence[str] | None, checkpoint: Checkpoint) -> str | None:
    return next((name for name in (*spellings, *(tied or ())) if name in checkpoint), None)


def _shape_error(
    weight: WeightInfo, base: ModelInput, shape: tuple[int, ...], model: ModelInput, got: tuple[int, ...]
) -> DamError:
    axis = weight.vocabulary_axis
    differing = [i for i, sizes in enumerate(zip(shape, got, strict=False)) if sizes[0] != sizes[1]]
    if axis is not None and len(shape) == len(got) and differing == [axis % len(shape)]:
        cure = "Vocabularies differ: align them first with tokenizer: {source: base} in a separate stage."
    elif "classifier" in weight.name or "score" in weight.name:
        cure = (
            "Heads of different tasks cannot be merged: use the base without its head, "
            f"base_model: {{model: {base.ref}, override_architecture: <class without head>}}."
        )
    else:
        cure = "Merge models that were fine-tuned from this base."
    return DamError(
        f"tensor {weight.name} of model {model.name}", expected=f"the base's shape {shape}", got=str(got), cure=cure
    )


def revision_of(model: ModelInput) -> str | None:
    """The commit that a Hub id was resolved to, by the name of its snapshot folder; None for a local directory."""
    return model.path.name if model.path.parent.name == "snapshots" else None
