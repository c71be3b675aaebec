"""Map checkpoint tensor names to parameter names of the transformers module.

Since transformers 5 a checkpoint's names need not be the module's: `encoder.layer.0.attention.attention.query`
of a ViT file is `layers.0.attention.q_proj` in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from threading import Lock

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mergekit_dam.errors import DamError

# accelerate replaces a method of nn.Module meanwhile: two threads would undo that in the wrong order, and all models
# that are built later in this process would have no weights
_ONE_AT_A_TIME = Lock()


def meta_model(config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """Build the class that `config.architectures` names, with parameters on the meta device and buffers on `device`.

    Raises:
        DamError: transformers has no such class.
    """
    name = (config.architectures or ["?"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise DamError(
            f"architecture {name}",
            expected="a class of the installed transformers",
            got="no such class",
            cure="dam runs no remote code; upgrade transformers if the class is new.",
        )
    with _ONE_AT_A_TIME, init_empty_weights(include_buffers=False):
        model: PreTrainedModel = model_class(_config_of(model_class, config))
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    model.eval().requires_grad_(False)
    return model


def _config_of(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """Copy the config, since building a model writes to it; of a nested config, copy the part for this class."""
    wanted = model_class.config_class or PretrainedConfig
    parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    own = copy.deepcopy(next((part for part in parts if isinstance(part, wanted)), config))
    # the attention implementation changes no weight, and the kernels that a config names need not be installed here
    if own._attn_implementation not in (None, "eager", "sdpa"):
        own._attn_implementation = None
    for part in {id(p): p for p in (own, own.get_text_config())}.values():
        pad, vocab_size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(vocab_size, int) and not 0 <= pad < vocab_size:
            part.pad_token_id = None  # the embedding has no such row
    return own


def module_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Map checkpoint names to parameter or buffer names of `model`; names without a counterpart are left out.

    Raises:
        DamError: loading would fuse a tensor with further tensors, e.g. the experts of a mixture.
    """
    known = model.state_dict()
    return {name: target for name, target in load_names(model, names).items() if target in known}


def load_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Map checkpoint names to the names that loading looks up in `model`, whether the model has them or not.

    Raises:
        DamError: see `module_names`.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = model.state_dict()
    targets = {}
    for name in names:
        target, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if fused is not None:
            raise DamError(
                f"tensor {name}",
                expected="a tensor that becomes one parameter",
                got="a tensor that loading fuses with further tensors",
                cure="This architecture (fused tensors, mixture of experts) is not supported yet.",
            )
        targets[name] = target
    return targets


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map the further names of each shared parameter to its first name."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return aliases
