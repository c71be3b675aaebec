"""Tiny random models of every promised class, saved as real model directories. Shared by the tests.

    base = make_model("BertModel", tmp_path / "base")
    sst2 = make_model("BertForSequenceClassification", tmp_path / "sst2", seed=1, perturb=base, num_labels=2)

A fine-tune has the base's body plus noise, and a head of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

WORDS = (
    "the a an and or but not is was are of in on to for with it this that film movie story actor plot good bad "
    "great poor fine dull fun sad happy love hate best worst goal team match player score market stock bank price "
    "trade space planet star rocket science red green blue one two three photo digit"
).split()
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCAB_SIZE = len(_SPECIAL) + len(WORDS)

IMAGE_KINDS = (
    "ViTModel", "ViTForImageClassification",
    "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification", "CLIPModel",
)  # fmt: skip
TEXT_KINDS = (
    "BertModel", "BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining",
    "RobertaModel", "RobertaForSequenceClassification", "RobertaForMaskedLM",
    "DistilBertModel", "DistilBertForSequenceClassification", "DistilBertForMaskedLM",
)  # fmt: skip
LM_KINDS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "GPT2LMHeadModel")
KINDS = (*IMAGE_KINDS, *TEXT_KINDS, *LM_KINDS)

_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
_IDS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
_GPT2: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40} | _IDS
_CLIP_TEXT: dict[str, Any] = _TEXT | _IDS | {"projection_dim": 12}


def make_model(
    kind: str,
    path: Path,
    *,
    seed: int = 0,
    num_labels: int = 3,
    perturb: Path | None = None,
    scale: float = 0.05,
    **config: Any,
) -> Path:
    """Save a random model of class `kind` with a tokenizer and/or an image preprocessor.

    Args:
        kind: class name in transformers.
        path: directory to create.
        seed: of the weights and of the noise.
        num_labels: classes of a classification head.
        perturb: a model to fine-tune: its body's tensors plus normal noise of standard deviation `scale`.
        scale: see `perturb`.
        config: entries that replace the tiny configuration's; `dtype` sets the stored type.

    Returns:
        `path`.
    """
    dtype = config.pop("dtype", torch.float32)
    model_class: type[PreTrainedModel] = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(_config(kind, num_labels, config))
        with torch.no_grad():
            # fresh biases and norms are constant, which would hide a tensor put in another's place
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
            if perturb is not None:
                _copy_body(model, perturb, scale)
    # transformers names the class of the instance; a base class keeps the name it was asked for
    model.to(dtype).save_pretrained(path)
    if kind in IMAGE_KINDS:
        _save_preprocessor(path, model.config)
    if kind not in IMAGE_KINDS or kind == "CLIPModel":
        _save_tokenizer(path, causal=kind in LM_KINDS)
    return path


def _config(kind: str, num_labels: int, overrides: dict[str, Any]) -> PretrainedConfig:
    classes = {"num_labels": num_labels} if kind.endswith("Classification") else {}
    if kind == "CLIPModel" or kind == "CLIPForImageClassification":
        vision = _VISION | overrides.pop("vision_config", {})
        text = _CLIP_TEXT | overrides.pop("text_config", {})
        return transformers.CLIPConfig(
            vision_config=vision, text_config=text, **({"projection_dim": 12} | classes | overrides)
        )
    if kind.startswith("CLIPVision"):
        return transformers.CLIPVisionConfig(**(_VISION | {"projection_dim": 12} | overrides))
    if kind.startswith("ViT"):
        return transformers.ViTConfig(**(_VISION | classes | overrides))
    if kind.startswith("DistilBert"):
        return transformers.DistilBertConfig(**(_DISTILBERT | classes | overrides))
    if kind == "GPT2LMHeadModel":
        return transformers.GPT2Config(**(_GPT2 | overrides))
    if kind in LM_KINDS:
        own = {"head_dim": 8} if kind.startswith("Qwen3") else {}
        tiny = _TEXT | _IDS | own | {"num_key_value_heads": 1}
        config_class = getattr(transformers, kind.removesuffix("ForCausalLM") + "Config")
        return config_class(**(tiny | overrides))
    family = "Roberta" if kind.startswith("Roberta") else "Bert"
    return getattr(transformers, f"{family}Config")(**(_TEXT | {"type_vocab_size": 2} | classes | overrides))


def _copy_body(model: PreTrainedModel, source: Path, scale: float) -> None:
    """Give `model` the source's values, plus noise, wherever name and shape agree."""
    name = json.loads((source / "config.json").read_text())["architectures"][0]
    values = _bodies(getattr(transformers, name, AutoModel).from_pretrained(source))
    own = _bodies(model)
    shared = {key: tensor for key, tensor in own.items() if key in values and values[key].shape == tensor.shape}
    assert shared, f"{source} shares no tensor with {type(model).__name__}"
    for key, tensor in shared.items():
        if tensor.is_floating_point():
            tensor.copy_(values[key].to(tensor) + torch.randn_like(tensor) * scale)


def _bodies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters by their name without the class prefix, each tied group once."""
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): parameter for name, parameter in model.named_parameters()}


def _save_tokenizer(path: Path, *, causal: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*_SPECIAL, *WORDS))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if not causal:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special: dict[str, str] = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    special |= (
        {"bos_token": "[CLS]", "eos_token": "[SEP]"}
        if causal
        else {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(path)


def _save_preprocessor(path: Path, config: PretrainedConfig) -> None:
    size = getattr(config, "vision_config", config).image_size
    processor = "ViTImageProcessor" if config.model_type == "vit" else "CLIPImageProcessor"
    edges = {"height": size, "width": size}
    settings = {
        "image_processor_type": processor, "do_resize": True, "size": edges, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7],
    }  # fmt: skip
    if processor == "CLIPImageProcessor":
        settings |= {"do_center_crop": True, "crop_size": edges}
    (path / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))
