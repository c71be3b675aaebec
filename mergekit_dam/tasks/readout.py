"""Heads that turn an encoder's output into logits_BK, where the fine-tuned model itself has none.

A linear head from a file, or CLIP's zero-shot head from class names (arXiv 2103.00020). B batch, K classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.io.files import is_readable_file
from mergekit_dam.io.hub_download import fetch
from mergekit_dam.io.untrusted import read_utf8
from mergekit_dam.merging.checks import require_finite

PROMPT = "a photo of a {}."
# one of these is in every folder that a tokenizer can be loaded from
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True, eq=False)
class Readout:
    """A head: turns an encoder's output into logits_BK.

    Attributes:
        read: the function.
        tensors: its weights, from files beside the model.
    """

    read: Callable[[Any], Tensor]
    tensors: tuple[Tensor, ...] = ()

    def __call__(self, output: Any) -> Tensor:
        return self.read(output)


def has_tokenizer(folders: Sequence[Path]) -> bool:
    """Whether one of the folders has the files of a tokenizer."""
    return any((folder / file).is_file() for folder in folders for file in _TOKENIZER_FILES)


def tokenizer_of(folders: Sequence[Path], owner: str) -> Any:
    """The tokenizer of the first folder that has one."""
    for folder in folders:
        if has_tokenizer([folder]):
            try:
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            except Exception as error:  # the libraries below raise bare exceptions on damaged files
                raise DamError(
                    f"tokenizer of {owner} ({folder})",
                    expected="files that transformers can read by itself",
                    got=first_line(error),
                    cure="Save it again with save_pretrained(...); code in it is never run.",
                ) from error
    raise DamError(
        f"tokenizer of {owner}",
        expected="tokenizer files beside the model or the base",
        got="none",
        cure="Save the tokenizer into the model's directory.",
    )


def own_head() -> Readout:
    """The logits of a class with a head of its own."""
    return Readout(lambda output: torch.as_tensor(output.logits).float())


def image_text_head() -> Readout:
    """The logits of a full CLIP, whose text tower is merged, too."""
    return Readout(lambda output: torch.as_tensor(output.logits_per_image).float())


def pooled(output: Any) -> Tensor:
    """features_BD: CLIP's projection, the pooler's output, or the first token."""
    for name in ("image_embeds", "pooler_output"):
        features = getattr(output, name, None)
        if features is not None:
            return torch.as_tensor(features).float()
    first: Tensor = output.last_hidden_state[:, 0].float()
    return first


def linear_head(source: str, width: int, owner: str, device: torch.device) -> Readout:
    """logits = features_BD @ weight_KD^T + bias_K from a safetensors file.

    Raises:
        DamError: no such file, no `weight` of shape (K, width), or a bias of another size.
    """
    try:
        tensors = load_file(source)
        weight = tensors["weight"].to(device, torch.float32)
        bias = tensors["bias"].to(device, torch.float32) if "bias" in tensors else None
    except (OSError, SafetensorError, KeyError) as error:
        raise DamError(
            f"head of {owner} ({source})",
            expected="a safetensors file with `weight` (K, D) and optional `bias` (K,)",
            got=repr(error),
            cure="Save the head with safetensors.torch.save_file.",
        ) from error
    if weight.ndim != 2 or weight.shape[1] != width or (bias is not None and bias.shape != weight.shape[:1]):
        raise DamError(
            f"head of {owner} ({source})",
            expected=f"weight (K, {width}) and bias (K,)",
            got=f"weight {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)}",
            cure="Give the head that belongs to this encoder.",
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_finite(tensor, name, f"head of {owner} ({source})")
    given = (weight,) if bias is None else (weight, bias)
    return Readout(lambda output: F.linear(pooled(output), weight, bias), given)


def require_rows(encoded: Sequence[Sequence[int]], rows: int, tokenizer: Any, owner: str) -> None:
    """Refuse calibration texts with a token that the embedding has no row for.

    Raises:
        DamError: naming token and text.
    """
    for number, ids in enumerate(encoded):
        found = next((i for i in ids if i >= rows), None)
        if found is not None:
            raise DamError(
                f"calibration text {number + 1} of {owner}",
                expected=f"tokens of the embedding's {rows} rows",
                got=f"{tokenizer.convert_ids_to_tokens(found)!r} ({found})",
                cure="The tokenizer got tokens and the embedding was never resized: take the token out of the texts, "
                "or give the model the tokenizer that it was trained with.",
            )


def class_names(setting: str, owner: str) -> list[str]:
    """Read class names from a file with one per line, or from a comma-separated list."""
    path, where = Path(setting).expanduser(), f"classes of {owner}"
    text = read_utf8(path, where).splitlines() if is_readable_file(path, where) else setting.split(",")
    names = [name.strip() for name in text if name.strip()]
    if len(names) < 2:
        raise DamError(
            f"classes of {owner}",
            expected="at least two class names",
            got=repr(setting),
            cure="Separate them by commas, or name a file with one per line.",
        )
    return names


def prompts(names: Sequence[str], folders: Sequence[Path], owner: str) -> dict[str, Tensor]:
    """Token ids and mask of the K class prompts."""
    encoded = tokenizer_of(folders, owner)([PROMPT.format(name) for name in names], padding=True, return_tensors="pt")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


@torch.no_grad()
def zero_shot_head(names: Sequence[str], clip_path: str, owner: str, device: torch.device) -> Readout:
    """Make a fixed zero-shot head for a CLIP vision model from a full CLIP: its class features and projection."""
    try:
        path, _, revision = (clip_path, "", "") if Path(clip_path).exists() else clip_path.partition("@")
        folder, _ = fetch(path, revision or None)
        clip = CLIPModel.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        ).eval()
    except DamError:
        raise
    except (OSError, ValueError) as error:
        raise DamError(
            f"zero_shot_model of {owner}",
            expected="a full CLIP (CLIPModel)",
            got=first_line(error),
            cure="Name the CLIP that the vision models come from.",
        ) from error
    text = clip.get_text_features(**prompts(names, (folder,), owner))
    features_KD = F.normalize(pooled(text) if not isinstance(text, Tensor) else text, dim=-1).to(device)
    projection, scale = clip.visual_projection.weight.to(device), clip.logit_scale.exp().to(device)

    def read(output: Any) -> Tensor:
        embedded = pooled(output)
        # a vision model without projection ends in the tower's width, one with it in the joint space
        if getattr(output, "image_embeds", None) is None:
            embedded = F.linear(embedded, projection)
        logits: Tensor = scale * F.normalize(embedded, dim=-1) @ features_KD.T
        return logits

    return Readout(read, (features_KD, projection, scale))
