"""Files as other versions of transformers, and the Hub, spell them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_dam.models.verify import verify_output
from tests.conftest import FAST, Merge
from tests.helpers.merging import (
    WEIGHTS,
    Tensors,
    assert_task_arithmetic,
    fine_tunes,
    loads_completely,
    rewrite,
    run,
    tensors_of,
)
from tests.helpers.tiny_models import make_model

pytestmark = pytest.mark.usefixtures("registered")


def as_old_bert(tensors: Tensors) -> Tensors:
    return {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }


def test_the_layout_of_bert_base_uncased(merge: Merge, tmp_path: Path) -> None:
    """Its config says BertForMaskedLM; its file has gamma and beta, a pooler and the next-sentence head as well."""
    base = make_model("BertForPreTraining", tmp_path / "base")
    models = fine_tunes("BertForSequenceClassification", tmp_path, base, labels=(2, 5))
    rewrite(base, as_old_bert, architectures=["BertForMaskedLM"])
    rewrite(models[1], as_old_bert)  # saving a model that was loaded from such a file writes it like this again
    out = run(merge, base, models)
    assert set(as_old_bert(tensors_of(out))) == set(tensors_of(base))
    verify_output(out, base, dtype=torch.float32)
    theta, tuned = tensors_of(base), [tensors_of(m) for m in models]
    name = "bert.encoder.layer.1.output.LayerNorm."
    expected = theta[name + "gamma"].clone()
    for weight, model in zip(WEIGHTS, tuned, strict=True):
        own = model[name + ("gamma" if name + "gamma" in model else "weight")]
        expected += weight * (own - theta[name + "gamma"])
    torch.testing.assert_close(tensors_of(out)[name + "weight"], expected)


@pytest.mark.parametrize("kind", ["BertModel", "RobertaModel", "CLIPModel"])
@pytest.mark.parametrize("holder", ["base", "model", "all"])
def test_old_position_ids_are_kept_where_the_base_has_them(
    kind: str, holder: str, merge: Merge, tmp_path: Path
) -> None:
    name = "text_model.embeddings.position_ids" if kind == "CLIPModel" else "embeddings.position_ids"
    base = make_model(kind, tmp_path / "base")
    models = fine_tunes(kind, tmp_path, base)
    holders = {"base": [base], "model": [models[1]], "all": [base, *models]}[holder]
    for path in holders:
        rewrite(path, lambda tensors: tensors | {name: torch.arange(40)[None]})
    out = run(merge, base, models)
    assert set(tensors_of(out)) == set(tensors_of(base))
    assert name not in tensors_of(base) or tensors_of(out)[name].dtype == torch.int64
    verify_output(out, base, dtype=torch.float32)


@pytest.mark.parametrize("prefixed", ["base", "models", "both"])
def test_clip_vision_keeps_the_spelling_of_its_base(prefixed: str, merge: Merge, tmp_path: Path) -> None:
    """transformers before 5 writes, and needs, `vision_model.`; newer versions write bare names and read both."""
    base = make_model("CLIPVisionModel", tmp_path / "base")
    models = fine_tunes("CLIPVisionModel", tmp_path, base)
    for path in {"base": [base], "models": models, "both": [base, *models]}[prefixed]:
        rewrite(path, lambda tensors: {f"vision_model.{name}": tensor for name, tensor in tensors.items()})

    def other(name: str) -> str:
        bare = name.removeprefix("vision_model.")
        return bare if bare != name else f"vision_model.{name}"

    out = run(merge, base, models)
    assert_task_arithmetic(out, base, models, other=other)
    verify_output(out, base, dtype=torch.float32)
    assert loads_completely(out, "CLIPVisionModel")


def test_the_layout_of_gpt2_on_the_hub(merge: Merge, tmp_path: Path) -> None:
    base = make_model("GPT2LMHeadModel", tmp_path / "base")
    models = fine_tunes("GPT2LMHeadModel", tmp_path, base)
    mask = torch.ones(1, 1, 40, 40).tril()
    rewrite(base, lambda t: {n.removeprefix("transformer."): v for n, v in t.items()} | {"h.0.attn.bias": mask})
    out = run(merge, base, models)
    verify_output(out, base, dtype=torch.float32)
    assert loads_completely(out, "GPT2LMHeadModel")


def _with_masks(tensors: Tensors) -> Tensors:
    """The buffers of old GPT-NeoX files."""
    found = dict(tensors)
    for layer in range(2):
        at = f"gpt_neox.layers.{layer}.attention."
        found |= {f"{at}bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), f"{at}masked_bias": torch.tensor(-1e9)}
        found[f"{at}rotary_emb.inv_freq"] = torch.arange(2.0)
    return found


@pytest.mark.parametrize("holder", ["none", "base", "model", "all"])
@pytest.mark.parametrize("method", ["task_arithmetic", "dam"])
def test_gpt_neox_with_and_without_its_old_buffers(
    holder: str, method: str, merge: Merge, tmp_path: Path, texts: Path
) -> None:
    base = make_model("GPTNeoXForCausalLM", tmp_path / "base")
    models = fine_tunes("GPTNeoXForCausalLM", tmp_path, base)
    for path in {"none": [], "base": [base], "model": [models[1]], "all": [base, *models]}[holder]:
        rewrite(path, _with_masks)
    if method == "dam":
        out = merge(base, models, parameters={**FAST, "scan_steps": 2, "calibration": str(texts)})
    else:
        out = run(merge, base, models)
    verify_output(out, base)
    assert loads_completely(out, "GPTNeoXForCausalLM") and len(tensors_of(out)) == 28


@pytest.mark.parametrize("norms", [False, True])
def test_command_r_with_and_without_norms(norms: bool, merge: Merge, tmp_path: Path) -> None:
    base = make_model("CohereForCausalLM", tmp_path / "base", use_qk_norm=norms)
    models = fine_tunes("CohereForCausalLM", tmp_path, base, use_qk_norm=norms)
    out = run(merge, base, models)
    theta, tuned, merged = (tensors_of(path) for path in (base, models[0], out))
    assert set(merged) == set(theta) and any("q_norm" in name for name in merged) == norms
    name = "model.layers.1.mlp.down_proj.weight"
    change = WEIGHTS[0] * (tuned[name] - theta[name]) + WEIGHTS[1] * (tensors_of(models[1])[name] - theta[name])
    torch.testing.assert_close(merged[name], theta[name] + change)
