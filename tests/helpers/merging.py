"""Classes promised, and merges of tiny models with mergekit's own methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conftest import Merge
from tests.helpers.tiny_models import make_model

Tensors = dict[str, torch.Tensor]
OURS = [
    "ViTModel",
    "ViTForImageClassification",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CLIPForImageClassification",
    "CLIPModel",
    "BertModel",
    "BertForSequenceClassification",
    "BertForMaskedLM",
    "BertForPreTraining",
    "RobertaModel",
    "RobertaForSequenceClassification",
    "RobertaForMaskedLM",
    "DistilBertModel",
    "DistilBertForSequenceClassification",
    "DistilBertForMaskedLM",
]
LMS = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "GPT2LMHeadModel"]
WEIGHTS = (0.5, 0.25)
# (base, fine-tunes with heads of different size, the prefix under which the fine-tunes keep the body)
MIXED = [
    ("ViTModel", "ViTForImageClassification", "vit."),
    ("CLIPVisionModel", "CLIPForImageClassification", "vision_model."),
    ("CLIPVisionModelWithProjection", "CLIPForImageClassification", "vision_model."),
    ("BertModel", "BertForSequenceClassification", "bert."),
    ("BertForMaskedLM", "BertForSequenceClassification", "bert."),
    ("BertForPreTraining", "BertForSequenceClassification", "bert."),
    ("RobertaModel", "RobertaForSequenceClassification", "roberta."),
    ("RobertaForMaskedLM", "RobertaForSequenceClassification", "roberta."),
    ("DistilBertModel", "DistilBertForSequenceClassification", "distilbert."),
    ("DistilBertForMaskedLM", "DistilBertForSequenceClassification", "distilbert."),
]


def tensors_of(path: Path) -> Tensors:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(path: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """Give a saved model the tensor names, and config entries, that other versions of transformers wrote."""
    changed = {name: tensor.contiguous() for name, tensor in change(load_file(path / "model.safetensors")).items()}
    save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(found | config))
    return path


def fine_tunes(kind: str, root: Path, body: Path, labels: tuple[int, int] = (3, 3), **extra: Any) -> list[Path]:
    return [make_model(kind, root / f"m{i}", seed=i + 1, labels=n, body=body, **extra) for i, n in enumerate(labels)]


def recipe(models: list[Path], method: str) -> dict[str, Any]:
    own = [{"weight": w} | ({"density": 0.5} if method == "ties" else {}) for w in WEIGHTS]
    return {
        "models": [{"model": str(m), "parameters": p} for m, p in zip(models, own, strict=True)],
        "merge_method": method,
    }


def run(merge: Merge, base: Any, models: list[Path], method: str = "task_arithmetic", **more: Any) -> Path:
    return merge(base, **recipe(models, method), **more)


def loads_completely(path: Path, kind: str) -> bool:
    _, info = getattr(transformers, kind).from_pretrained(path, output_loading_info=True)
    return not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def assert_task_arithmetic(out: Path, base: Path, models: list[Path], *, other: Callable[[str], str] = str) -> None:
    """Every tensor equals base + sum of weight * (model - base), a model without it adding nothing."""
    written, theta, tuned = tensors_of(out), tensors_of(base), [tensors_of(m) for m in models]
    assert set(written) == set(theta)
    moved = 0
    for name, tensor in written.items():
        expected = theta[name].clone()
        for weight, model in zip(WEIGHTS, tuned, strict=True):
            source = name if name in model else other(name)
            if source in model:
                expected += weight * (model[source] - theta[name])
                moved += 1
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)
    assert moved >= len(models) * 30, "the fine-tunes' tensors were not found"
