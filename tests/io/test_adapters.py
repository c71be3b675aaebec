"""Which adapters are merged, and that the merged model is that of the files as they are now."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.io.adapters import merged_adapter, require_mergeable
from mergekit_dam.models.plan import model_input
from tests.helpers.tiny_models import make_model


def _adapter(base: Path, folder: Path, *, resize: int | None = None, auto: str = "CausalLM", **settings: Any) -> Path:
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(base)
    if resize is not None:
        model.resize_token_embeddings(resize, mean_resizing=False)
    settings = {"target_modules": ["q_proj"], **settings}
    peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **settings)).save_pretrained(folder)
    return folder


def _refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(DamError) as caught:
        require_mergeable(ModelReference(model=ModelPath(path=str(base))), adapter)
    return str(caught.value)


def test_virtual_tokens_are_no_weights(tmp_path: Path) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "prompt")
    assert "PROMPT_TUNING" in _refusal(base, tmp_path / "prompt")


def test_added_tokens_are_named_by_their_rows(tmp_path: Path) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base")
    adapter = _adapter(base, tmp_path / "lora", resize=43, modules_to_save=["embed_tokens", "lm_head"])
    said = _refusal(base, adapter)
    assert "43" in said and "40" in said


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    base = make_model("BertModel", tmp_path / "base")
    adapter = _adapter(
        base, tmp_path / "lora", auto="SequenceClassification", target_modules=["query"], task_type="SEQ_CLS"
    )
    assert "Merge the adapter with peft into the base with its head" in _refusal(base, adapter)


def test_a_head_tied_to_the_embedding(tmp_path: Path) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base", tie_word_embeddings=True)
    assert "tie_word_embeddings" in _refusal(base, _adapter(base, tmp_path / "lora", target_modules=["lm_head"]))


def test_a_failed_merge_leaves_nothing_and_a_new_adapter_is_merged_anew(tmp_path: Path) -> None:
    base, cache = make_model("LlamaForCausalLM", tmp_path / "base"), tmp_path / "cache"
    wide = make_model("LlamaForCausalLM", tmp_path / "wide", hidden_size=32)
    folder = _adapter(wide, tmp_path / "lora")
    ref = ModelReference(model=ModelPath(path=str(base)), lora=ModelPath(path=str(folder)))
    with pytest.raises(DamError):
        merged_adapter(ref, cache)
    assert not list(cache.iterdir())
    found = []
    for _ in range(2):
        _adapter(base, folder)
        require_mergeable(ref.model_copy(update={"lora": None}), folder)
        merged = merged_adapter(ref, cache)
        assert merged_adapter(ref, cache) == merged
        found.append(load_file(Path(merged.model.path) / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"])
    assert not torch.equal(*found)


@pytest.mark.parametrize("part", ["base", "lora", None])
def test_a_merged_adapter_of_mergekits_cache_that_is_stale(part: str | None, tmp_path: Path) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base")
    folder = _adapter(base, tmp_path / "lora")
    ref = ModelReference(model=ModelPath(path=str(base)), lora=ModelPath(path=str(folder)))
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
    model_input("m", ref, ModelSettings(), options)
    if part is None:
        assert model_input("m", ref, ModelSettings(), options).path.parent == tmp_path / "cache"
        return
    file = next((tmp_path / part).glob("*.safetensors"))
    os.utime(file, (time.time() + 60, time.time() + 60))
    with pytest.raises(DamError, match=f"older than .*{part}.* Remove that folder"):
        model_input("m", ref, ModelSettings(), options)
