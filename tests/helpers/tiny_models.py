"""Small random models of real classes, saved as users save theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [
    "the",
    "a",
    "movie",
    "film",
    "was",
    "is",
    "great",
    "bad",
    "awful",
    "fine",
    "good",
    "plot",
    "actor",
    "story",
    "very",
    "not",
    "so",
    "this",
    "that",
    "i",
    "loved",
    "hated",
    "it",
]
_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_IMAGE = {**_ENCODER, "image_size": 16, "patch_size": 8}
_TEXT = {**_ENCODER, "vocab_size": 40, "max_position_embeddings": 40, "pad_token_id": 0}
_DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40, "max_position_embeddings": 40}
_LM = {**_TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 40,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLIP = {"text_config": {**_ENCODER, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": _IMAGE}
CONFIGS: dict[str, dict[str, Any]] = {
    "ViT": _IMAGE,
    "DeiT": _IMAGE,
    "CLIPVision": _IMAGE,
    "CLIP": _CLIP,
    "Bert": _TEXT,
    "Roberta": _TEXT,
    "DistilBert": _DISTIL,
    "Llama": _LM,
    "Qwen2": _LM,
    "Qwen3": {**_LM, "head_dim": 8},
    "Mistral": _LM,
    "GPT2": _GPT2,
    "GPTNeoX": _TEXT,
    "Cohere": _LM,
}


def make_model(
    kind: str, path: Path, *, seed: int = 0, labels: int = 3, body: Path | None = None, **extra: Any
) -> Path:
    """Save a `kind` (a transformers class); with `body`, its encoder is that checkpoint's plus small noise."""
    model_class = getattr(transformers, kind)
    family = max((f for f in CONFIGS if kind.startswith(f)), key=len)
    config = model_class.config_class(**{**CONFIGS[family], **extra, "num_labels": labels})
    torch.manual_seed(seed)
    model = model_class(config)
    if body is not None:
        model = model_class.from_pretrained(body, config=config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    else:
        with torch.no_grad():  # fresh norms and biases are all equal: noise tells the tensors apart
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path)
    if family in {"ViT", "DeiT", "CLIPVision", "CLIP"}:
        settings = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (path / "preprocessor_config.json").write_text(json.dumps(settings))
    else:
        save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)


def edit(path: Path, **changes: torch.Tensor) -> None:
    """Replace or add tensors of a saved model (dots in names as double underscores)."""
    tensors = load_file(path / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
