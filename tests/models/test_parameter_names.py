"""Checkpoint names against what transformers itself loads, and models built without their weights."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mergekit_dam.errors import DamError
from mergekit_dam.models.parameter_names import meta_model, module_names, tied_names
from tests.helpers.merging import LMS, MIXED, OURS
from tests.helpers.tiny_models import make_model

CPU = torch.device("cpu")


def skeleton(path: Path, class_name: str | None = None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    if class_name is not None:
        config.architectures = [class_name]
    return meta_model(config, CPU)


def parameters_of(path: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by parameter name, tied ones under each name."""
    tensors = load_file(path / "model.safetensors")
    found = {target: tensors[name] for name, target in module_names(model, tensors).items()}
    return found | {alias: found[main] for alias, main in tied_names(model).items() if main in found}


def test_models_are_built_as_ever_after_threads_built_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model is built without weights, all modules of the process are; that must end with the last of them."""
    path, usual = make_model("ViTModel", tmp_path / "m"), transformers.ViTModel.__init__
    begun, seconds = Barrier(4), iter((0.1, 0.2, 0.3, 0.4))

    def slowly(self: Any, *args: Any, **given: Any) -> None:
        time.sleep(next(seconds))
        usual(self, *args, **given)

    def build(_: int) -> None:
        begun.wait()
        skeleton(path)

    register = torch.nn.Module.register_parameter
    monkeypatch.setattr(torch.nn.Module, "register_parameter", register)  # for the tests after one that fails
    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(transformers.ViTModel, "__init__", slowly)
        list(pool.map(build, range(4)))
    assert torch.nn.Module.register_parameter is register
    assert torch.nn.Linear(2, 2).weight.device == CPU


@pytest.mark.parametrize("kind", OURS + LMS)
def test_names_are_those_that_loading_uses(kind: str, tmp_path: Path) -> None:
    path = make_model(kind, tmp_path / "m")
    found = parameters_of(path, skeleton(path))
    loaded = getattr(transformers, kind).from_pretrained(path).state_dict()
    assert set(found) == set(loaded)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("headless", "headed", "prefix"), MIXED)
@pytest.mark.parametrize("into_headless", [True, False])
def test_a_checkpoint_of_another_class_of_the_family(
    headless: str, headed: str, prefix: str, into_headless: bool, tmp_path: Path
) -> None:
    stored, asked = (headed, headless) if into_headless else (headless, headed)
    path = make_model(stored, tmp_path / "m")
    names = list(load_file(path / "model.safetensors"))
    other = make_model(asked, tmp_path / "other")
    model = skeleton(other)
    found = module_names(model, names)
    config = AutoConfig.from_pretrained(other)
    loaded = getattr(transformers, asked).from_pretrained(path, config=config, output_loading_info=True)[1]
    left_out = set(names) - set(found)
    assert left_out == set(loaded["unexpected_keys"])
    assert len(set(found.values())) == len(found)
    # transformers 5 itself finds nothing of a bare CLIPVisionModel for a CLIPForImageClassification
    assert len(found) >= 30 or (stored, asked) == ("CLIPVisionModel", "CLIPForImageClassification")
    if into_headless:
        assert not [name for name in left_out if name.startswith(prefix) and "pooler" not in name]


def test_legacy_layer_norm_names(tmp_path: Path) -> None:
    path = make_model("BertModel", tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    assert len(set(old) - set(tensors)) == 10
    model = skeleton(path)
    assert sorted(module_names(model, old).values()) == sorted(module_names(model, tensors).values())
    found = module_names(model, old)
    assert found["embeddings.LayerNorm.gamma"] == "embeddings.LayerNorm.weight"


def test_names_that_no_parameter_takes_are_left_out(tmp_path: Path) -> None:
    model = skeleton(make_model("ViTModel", tmp_path / "m"))
    names = ["classifier.weight", "head.of.another.class", "embeddings.cls_token"]
    assert module_names(model, names) == {"embeddings.cls_token": "embeddings.cls_token"}


def test_fused_experts_are_refused() -> None:
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=20,
        num_local_experts=2,
        architectures=["MixtralForCausalLM"],
    )
    model = meta_model(config, CPU)
    with pytest.raises(DamError, match="fuses") as caught:
        module_names(model, ["model.layers.0.block_sparse_moe.experts.0.w1.weight"])
    assert "not supported yet" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "extra", "tied"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, {"lm_head.weight": "model.embed_tokens.weight"}),
        ("LlamaForCausalLM", {"tie_word_embeddings": False}, {}),
        ("GPT2LMHeadModel", {}, {"lm_head.weight": "transformer.wte.weight"}),
        (
            "BertForMaskedLM",
            {},
            {
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
        ("ViTModel", {}, {}),
    ],
)
def test_tied_names(kind: str, extra: dict[str, bool], tied: dict[str, str], tmp_path: Path) -> None:
    assert tied_names(skeleton(make_model(kind, tmp_path / "m", **extra))) == tied


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "BertModel", "CLIPModel"])
def test_parameters_are_meta_and_buffers_are_real(kind: str, tmp_path: Path) -> None:
    path = make_model(kind, tmp_path / "m")
    model = skeleton(path)
    assert not model.training
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    expected = dict(getattr(transformers, kind).from_pretrained(path).named_buffers())
    buffers = dict(model.named_buffers())
    assert set(buffers) == set(expected)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in buffers.items())


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification"])
def test_the_skeleton_with_a_checkpoints_weights_computes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    path = make_model(kind, tmp_path / "m")
    ids = torch.tensor([[1, 5, 9, 2], [1, 7, 7, 2]])
    model = skeleton(path)
    with torch.no_grad():
        ours = functional_call(model, parameters_of(path, model), kwargs={"input_ids": ids}, tie_weights=False).logits
        theirs = getattr(transformers, kind).from_pretrained(path).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_vision_skeleton_with_a_checkpoints_weights(tmp_path: Path) -> None:
    path = make_model("ViTForImageClassification", tmp_path / "m")
    pixels_BCHW = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = skeleton(path)
    weights = parameters_of(path, model)
    with torch.no_grad():
        ours = functional_call(model, weights, kwargs={"pixel_values": pixels_BCHW}).logits
        theirs = transformers.ViTForImageClassification.from_pretrained(path).eval()(pixels_BCHW).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_tower_of_a_full_clip(tmp_path: Path) -> None:
    """`override_architecture: CLIPVisionModel` leaves mergekit with the config of the whole CLIP."""
    path = make_model("CLIPModel", tmp_path / "m")
    model = skeleton(path, "CLIPVisionModel")
    found = parameters_of(path, model)
    assert set(found) == set(model.state_dict())
    assert all(found[name].shape == tensor.shape for name, tensor in model.state_dict().items())


def test_the_callers_config_is_not_written_to(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(make_model("CLIPModel", tmp_path / "m"))
    before = config.to_dict(), dict(vars(config))
    meta_model(config, CPU)
    assert (config.to_dict(), dict(vars(config))) == before


@pytest.mark.parametrize("named", [["NoSuchModel"], None])
def test_a_class_that_transformers_lacks(named: list[str] | None) -> None:
    with pytest.raises(DamError, match="class of the installed transformers"):
        meta_model(PretrainedConfig(architectures=named), CPU)


def test_a_file_of_an_older_transformers_loads_the_same(tmp_path: Path) -> None:
    """CLIPVisionModel files begin with `vision_model.` before transformers 5."""
    path = make_model("CLIPVisionModel", tmp_path / "m")
    new = module_names(skeleton(path), load_file(path / "model.safetensors"))
    old = {f"vision_model.{name}": t for name, t in load_file(path / "model.safetensors").items()}
    save_file(old, path / "model.safetensors", metadata={"format": "pt"})
    assert module_names(skeleton(path), old) == {f"vision_model.{name}": target for name, target in new.items()}
