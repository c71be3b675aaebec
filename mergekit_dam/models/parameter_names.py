"""Checkpoint tensor names <-> parameter names of the transformers module, in one place.

Since transformers 5 a checkpoint's names need not be the module's: `encoder.layer.0.attention.attention.query`
of a ViT file is `layers.0.attention.q_proj` in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mergekit_dam.errors import DamError


def meta_model(config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """The class that `config.architectures` names, parameters on the meta device, buffers real on `device`.

    Raises:
        DamError: transformers has no such class.
    """
    name = (config.architectures or ["?"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise DamError(
            f"architecture {name}",
            expected="a class of the installed transformers",
            got="none of that name",
            cure="Models with remote code cannot be learned on; upgrade transformers if the class is new.",
        )
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = model_class(_config_of(model_class, config))
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    model.eval().requires_grad_(False)
    return model


def _config_of(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """A copy (building a model writes to it), of the part for this class where the config covers several models."""
    wanted = model_class.config_class or PretrainedConfig
    parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    found = copy.deepcopy(next((part for part in parts if isinstance(part, wanted)), config))
    # how attention is computed changes no weight, and the kernels that a config asks for need not be installed here
    if found._attn_implementation not in (None, "eager", "sdpa"):
        found._attn_implementation = None
    for part in {id(p): p for p in (found, found.get_text_config())}.values():
        pad, words = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(words, int) and not 0 <= pad < words:
            part.pad_token_id = None  # no row of the embedding
    return found


def module_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> parameter or buffer name of `model`; names that nothing takes are left out.

    Raises:
        DamError: a tensor that loading would fuse with others, e.g. the experts of a mixture.
    """
    known = model.state_dict()
    return {name: target for name, target in load_names(model, names).items() if target in known}


def load_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> the name under which loading looks for a parameter of `model`, there or not.

    Raises:
        DamError: see `module_names`.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = model.state_dict()
    found = {}
    for name in names:
        target, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if fused is not None:
            raise DamError(
                f"tensor {name}",
                expected="a tensor that one parameter takes",
                got="one that loading fuses",
                cure="This architecture (fused tensors, mixture of experts) is not supported yet.",
            )
        found[name] = target
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of shared parameters -> the first name."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return aliases
