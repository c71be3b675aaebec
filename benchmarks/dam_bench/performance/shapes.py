"""Make random models with the shapes of real models, and data for them, to measure time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mergekit_dam.seeds import generator

_CLASSES = 100  # of the linear head of an image task
_SAMPLES = 32
_NOISE = 1e-3  # standard deviation of the task vectors


def seven_billion(blocks: int) -> dict[str, Any]:
    """Sizes of a 7B model with so many of its 32 blocks, a vocabulary of 152,000, and ends that are not tied."""
    return {
        "vocab_size": 152_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": blocks,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


# class, sizes, and tokens per text; CLIPVisionConfig's defaults are ViT-B/32's
SHAPES: dict[str, tuple[str, dict[str, Any], int]] = {
    "clip": ("CLIPVisionModel", {}, 0),
    "llama": (
        "LlamaForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
        64,
    ),
    "llama-1b": (
        "LlamaForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
        128,
    ),
    **{f"llama-7b-{blocks}": ("LlamaForCausalLM", seven_billion(blocks), 512) for blocks in (4, 8)},
    "clip-tiny": (
        "CLIPVisionModel",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        0,
    ),
    "llama-tiny": (
        "LlamaForCausalLM",
        {
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        },
        16,
    ),
}


@dataclass(frozen=True)
class ModelFiles:
    """Files of a set of models, and of their data.

    Attributes:
        models: theta_0 and theta_1..T.
        calibration: a folder of images or a file of texts.
        head: a linear head for all tasks, or None where the class has a head.
        length: tokens per text, 0 for images.
    """

    models: tuple[Path, ...]
    calibration: Path
    head: Path | None
    length: int


def make_models(shapes: str, tasks: int, folder: Path, dtype: torch.dtype = torch.float32) -> ModelFiles:
    """Make T fine-tunes of a random base, or reuse existing files.

    Of a 7B shape one file serves as every fine-tune, which spares the disk and changes no time.
    """
    kind, sizes, length = SHAPES[shapes]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**sizes)
    root = folder / f"{shapes}-{dtype}".replace("torch.", "")
    paths = tuple(root / name for name in ("base", *(f"m{t}" for t in range(tasks))))
    if not (paths[0] / "model.safetensors").is_file():
        torch.manual_seed(0)
        with _fast_device():
            base = model_class(config)
        base.to(dtype).save_pretrained(paths[0], max_shard_size="100GB")
    for path in paths[1:]:
        if not (path / "model.safetensors").is_file():
            if path != paths[1] and "-7b-" in shapes:
                path.mkdir()
                for name in ("config.json", "model.safetensors"):
                    (path / name).hardlink_to(paths[1] / name)
            else:
                _fine_tune(paths[0], path)
    head = None if length else root / "head.safetensors"
    if head is not None:
        source = generator("head", shapes)
        save_file({"weight": torch.randn(_CLASSES, config.hidden_size, generator=source)}, head)
        return ModelFiles(paths, _images(root / "images", config.image_size), head, length)
    for path in paths:
        _tokenizer(path, config.vocab_size)
    return ModelFiles(paths, _texts(root / "texts.txt", config.vocab_size, length), None, length)


def _fast_device() -> torch.device:
    """Device that draws random numbers: on a CPU billions of them take minutes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fine_tune(base: Path, path: Path) -> None:
    device = _fast_device()
    torch.manual_seed(1 + int(path.name[1:]))
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, device=device).mul_(_NOISE)
        tensors[name] = tensor + noise.to(tensor.dtype).cpu()
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text((base / "config.json").read_text())
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _images(folder: Path, edge: int) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(_SAMPLES):
        Image.fromarray(rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def _texts(file: Path, vocabulary: int, length: int) -> Path:
    rng = np.random.default_rng(0)
    lines = [" ".join(f"w{i}" for i in rng.integers(3, vocabulary, length)) for _ in range(_SAMPLES)]
    file.write_text("\n".join(lines))
    return file


def _tokenizer(path: Path, vocabulary: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
