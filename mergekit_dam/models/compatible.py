"""Refuse models that cannot be merged, by their headers and configs, before mergekit or learning reads weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from mergekit.architecture import WeightInfo
from transformers import PretrainedConfig

from mergekit_dam.config import DamConfig
from mergekit_dam.errors import DamError
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.parameter_names import meta_model, module_names

_PACKED = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}
_SCALES = (
    ".SCB",
    ".qweight",
    ".qzeros",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".weight.absmax",
    ".g_idx",
)
# entries of config.json that do not affect what the weights compute
_WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "_attn_implementation_autoset",
    "attn_implementation",
    "_attn_implementation",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "vision_config",
    "text_config",
    "model_type",
    "projection_dim",
    "logit_scale_init_value",
    "initializer_factor",
    "initializer_range",
}


class Model(Protocol):
    """Name and config of a model."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> PretrainedConfig: ...


def require_plain_weights(model: Model, checkpoint: Checkpoint) -> None:
    """Refuse checkpoints with empty or quantised tensors, which cannot be added.

    Raises:
        DamError: a tensor is empty or quantised.
    """
    for name in checkpoint.names:
        if 0 in checkpoint.shape(name):
            raise DamError(
                f"tensor {name} of model {model.name}",
                expected="its values",
                got="an empty tensor",
                cure="A process that held only a part saved it (DeepSpeed ZeRO-3): save again with gathered weights "
                "(zero_to_fp32.py).",
            )
        kind = checkpoint.dtype(name)
        if name.endswith(_SCALES) or (kind in _PACKED and name.endswith("weight")):
            raise DamError(
                f"model {model.name}",
                expected="16-bit or 32-bit weights",
                got=f"quantised weights ({name} is {kind})",
                cure="Use the original weights of the same model, in bfloat16 or float16.",
            )


def require_equal_depth(base: Model, model: Model) -> None:
    """Refuse a model whose number of layers differs from the base's.

    Raises:
        DamError: the numbers of layers differ.
    """
    wanted, got = _layers(base.config), _layers(model.config)
    if wanted is not None and got is not None and wanted != got:
        raise DamError(
            f"model {model.name}",
            expected=f"the base's {wanted} layers",
            got=f"{got} layers",
            cure="The sizes differ: merge models that were fine-tuned from this base.",
        )


def _layers(config: PretrainedConfig) -> int | None:
    part = getattr(config, "vision_config", None) or config.get_text_config()
    layers = getattr(part, "num_hidden_layers", None)
    return layers if isinstance(layers, int) else None


def missing_tensor(model: Model, weight: WeightInfo, checkpoint: Checkpoint) -> DamError:
    """Make the error for a model that lacks a tensor that mergekit requires."""
    prefix = next((n[: -len(weight.name)] for n in checkpoint.names if n.endswith(f".{weight.name}")), None)
    if prefix:
        got = f"no such name among {len(checkpoint.names)}; its names begin with {prefix!r}"
        cure = "Save the model again without the wrapper that renames its tensors."
    elif not module_names(meta_model(model.config, torch.device("cpu")), [weight.name]):
        got = "none, and its config asks for none"
        cure = "mergekit defines another variant of this architecture, and cannot merge this variant."
    else:
        got = f"no such name among {len(checkpoint.names)} (such as {checkpoint.names[0]})"
        cure = "Download or save the model again; it lacks weights."
    return DamError(
        f"model {model.name}", expected=f"the tensor {weight.name}, as its architecture has it", got=got, cure=cure
    )


def require_equal_tying(base: Model, model: Model, weight: WeightInfo) -> None:
    """Refuse a model that ties its head to the embedding where the base does not, or the reverse.

    Raises:
        DamError: base and model differ in tie_word_embeddings.
    """
    wanted, got = (bool(getattr(m.config.get_text_config(), "tie_word_embeddings", False)) for m in (base, model))
    if wanted != got:
        raise DamError(
            f"model {model.name}",
            expected=f"tie_word_embeddings: {str(wanted).lower()}, as the base has it",
            got=f"{str(got).lower()} ({weight.name})",
            cure="Untie the base first: give it a head of its own, a copy of its embedding, and "
            "tie_word_embeddings: false."
            if wanted
            else "Untie this model first: give it a head of its own, a copy of its embedding.",
        )


def differing_entries(base: PretrainedConfig, model: PretrainedConfig) -> list[str]:
    """Describe entries of config.json that affect the computation and differ from the base's, which the output gets."""
    ours, theirs = base.to_dict(), model.to_dict()
    return [
        f"{key} ({_short(theirs[key])}, base {_short(ours[key])})"
        for key in sorted(ours.keys() & theirs.keys() - _WITHOUT_EFFECT)
        if ours[key] != theirs[key]
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_chain(config: PretrainedConfig) -> bool:
    """Whether a model is one chain of blocks; a full CLIP has two towers."""
    return "CLIPModel" not in (config.architectures or ())


def against_windows(config: DamConfig, configs: Sequence[PretrainedConfig]) -> str | None:
    """What needs the whole model at a time, or is no chain of blocks; None where masks can be learned in windows."""
    found = {
        f"objective: {config.objective}": config.objective != "inversion",
        "a CLIP of two towers": not all(map(is_chain, configs)),
    }
    return next((what for what, is_so in found.items() if is_so), None)


def require_window(config: DamConfig, configs: Sequence[PretrainedConfig]) -> None:
    """Refuse `window: N` where masks cannot be learned so.

    Raises:
        DamError: what stands against it.
    """
    what = against_windows(config, configs) if isinstance(config.window, int) else None
    if what is not None:
        raise DamError(
            f"setting window: {config.window}",
            expected="objective inversion, and models of one chain of blocks",
            got=what,
            cure="Set window: all, or leave one of the two out.",
        )
