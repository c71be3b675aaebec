"""Read and write cleaned models as LoRAs: on the input model, or on the base of its own LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_dam.engine.trained_module import LowRankUpdate
from mergekit_dam.errors import DamError
from mergekit_dam.io.files import replacing
from mergekit_dam.io.untrusted import load_json
from mergekit_dam.merging.checks import require_finite

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# entries of a LoRA's config that a sum of two products cannot express
_BEYOND = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
)


def _require_plain(folder: Path) -> None:
    """Refuse an adapter that no second LoRA can be added to.

    Raises:
        DamError: another kind, or a LoRA with more than products of two matrices.
    """
    settings = load_json(folder / ADAPTER_CONFIG)
    beyond = [key for key in _BEYOND if settings.get(key)]
    kind = settings.get("peft_type")
    if kind != "LORA" or beyond or settings.get("bias", "none") != "none":
        raise DamError(
            f"an adapter for {folder.name}",
            expected="a plain LoRA as the input",
            got=str(kind) if kind != "LORA" else f"one with {', '.join(beyond) or 'biases'}",
            cure="Leave --adapter out: the output is then a whole model.",
        )


def read_adapter(folder: Path) -> list[LowRankUpdate]:
    """Read the products that a plain LoRA adds.

    Raises:
        DamError: another kind of adapter, or tensors that no second LoRA can be added to.
    """
    _require_plain(folder)
    settings, tensors = load_json(folder / ADAPTER_CONFIG), load_file(folder / ADAPTER_WEIGHTS)
    rank = int(settings["r"])
    scale = float(settings["lora_alpha"]) / (rank**0.5 if settings.get("use_rslora") else rank)
    found = []
    for name in sorted(tensors):
        module, _, part = name.removeprefix(_PREFIX).partition(".lora_")
        if part == "A.weight":
            b = tensors[f"{_PREFIX}{module}.lora_B.weight"]
            found.append(LowRankUpdate(module, tensors[name].float(), b.float() * scale))
        elif part != "B.weight":
            raise DamError(
                f"an adapter for {folder.name}",
                expected="LoRAs of linear layers",
                got=name,
                cure="Leave --adapter out: the output is then a whole model.",
            )
    return found


def write_adapter(folder: Path, updates: Iterable[LowRankUpdate], before: Iterable[LowRankUpdate] = ()) -> str:
    """Write the weights of one LoRA that adds the cleaning and the input's own LoRA, all of one rank.

    Products of a lower rank are filled up with zeros.

    Args:
        folder: of the output.
        updates: of the cleaning.
        before: of the LoRA that the input model was made of.

    Returns:
        The text of its adapter_config.json.
    """
    by_module: dict[str, list[LowRankUpdate]] = {}
    for one in (*before, *updates):
        by_module.setdefault(one.module, []).append(one)
    rank = max(sum(len(one.a) for one in ones) for ones in by_module.values())
    tensors: dict[str, Tensor] = {}
    for module, ones in by_module.items():
        a, b = torch.cat([one.a for one in ones]), torch.cat([one.b for one in ones], dim=1)
        missing = rank - len(a)
        parts: Mapping[str, Tensor] = {
            "lora_A": torch.cat([a, a.new_zeros(missing, a.shape[1])]),
            "lora_B": torch.cat([b, b.new_zeros(len(b), missing)], dim=1),
        }
        for part, tensor in parts.items():
            require_finite(tensor, f"{part} of {module}", "the cleaning LoRA", "Lower learning_rate.")
            tensors[f"{_PREFIX}{module}.{part}.weight"] = tensor.contiguous()
    with replacing(folder / ADAPTER_WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(by_module),
        "inference_mode": True,
        "task_type": None,
        "fan_in_fan_out": any(one.transposed for ones in by_module.values() for one in ones),
        "base_model_name_or_path": None,
    }
    return json.dumps(settings, indent=1)
