"""A merged output against its base: what is a gap, what is only another spelling."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mergekit.architecture import WeightInfo, get_architecture_info, json_definitions
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mergekit_dam.errors import DamError
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.families import register_architectures
from mergekit_dam.models.verify import check_coverage, verify_output
from tests.conftest import Merge
from tests.helpers.tiny_models import make_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A base and a copy of it whose tensors `change` alters, as an output."""

    def build(kind: str, change: Callable[[Tensors], Tensors], **extra: object) -> tuple[Path, Path]:
        base = make_model(kind, tmp_path / "base", **extra)
        out = tmp_path / "out"
        shutil.copytree(base, out)
        changed = {name: t.contiguous() for name, t in change(load_file(out / "model.safetensors")).items()}
        save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
        return out, base

    return build


Pair = Callable[..., tuple[Path, Path]]


def test_an_equal_output_passes_without_reading_a_tensor(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    out, base = pair("ViTForImageClassification", lambda t: t)
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: pytest.fail("read a tensor"))
    verify_output(out, base)


def test_missing_tensors_are_named_and_counted(pair: Pair) -> None:
    out, base = pair("ViTModel", lambda t: {n: v for n, v in t.items() if ".layer.1." not in n})
    with pytest.raises(DamError) as caught:
        verify_output(out, base)
    assert "expected the 40 tensors" in str(caught.value)
    assert "16 missing (encoder.layer.1." in str(caught.value)


def test_an_extra_tensor_is_named(pair: Pair) -> None:
    out, base = pair("BertModel", lambda t: t | {"stowaway": torch.zeros(2)})
    with pytest.raises(DamError, match=r"0 missing \(none\), 1 unknown \(stowaway\)"):
        verify_output(out, base)


def test_a_head_that_the_base_lacks_is_extra(pair: Pair) -> None:
    out, base = pair("ViTModel", lambda t: t | {"classifier.weight": torch.zeros(3, 16)})
    with pytest.raises(DamError, match=r"1 unknown \(classifier.weight\)"):
        verify_output(out, base)


def test_another_shape(pair: Pair) -> None:
    name = "pooler.dense.bias"
    out, base = pair("BertModel", lambda t: t | {name: torch.zeros(7)})
    with pytest.raises(DamError, match=r"pooler.dense.bias .*expected \(16,\) torch.float32, got \(7,\)"):
        verify_output(out, base)


def test_the_asked_dtype(pair: Pair) -> None:
    out, base = pair("BertModel", lambda t: {name: tensor.bfloat16() for name, tensor in t.items()})
    verify_output(out, base, dtype=torch.bfloat16)
    verify_output(out, base)
    with pytest.raises(DamError, match=r"torch.float32, got .*torch.bfloat16"):
        verify_output(out, base, dtype=torch.float32)


def test_integers_never_pass_for_floats(pair: Pair) -> None:
    out, base = pair("BertModel", lambda t: t | {"pooler.dense.bias": torch.zeros(16, dtype=torch.int64)})
    with pytest.raises(DamError, match=r"got \(16,\) torch.int64"):
        verify_output(out, base)


@pytest.mark.parametrize(
    ("kind", "respell"),
    [
        ("BertModel", lambda name: f"bert.{name}"),
        ("BertForSequenceClassification", lambda name: name.removeprefix("bert.")),
        ("BertModel", lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma")),
        ("CLIPVisionModel", lambda name: f"vision_model.{name}"),
        ("GPT2LMHeadModel", lambda name: name.removeprefix("transformer.")),
    ],
)
def test_another_spelling_is_no_gap(kind: str, respell: Callable[[str], str], pair: Pair) -> None:
    out, base = pair(kind, lambda t: {respell(name): tensor for name, tensor in t.items()})
    assert set(Checkpoint.open(out).names) != set(Checkpoint.open(base).names)
    verify_output(out, base)
    verify_output(base, out)


@pytest.mark.parametrize("tied", [True, False])
def test_a_second_copy_of_a_tied_tensor_is_no_gap(tied: bool, pair: Pair) -> None:
    def with_head(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    def without_head(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}

    out, base = pair("LlamaForCausalLM", with_head if tied else without_head, tie_word_embeddings=tied)
    if tied:
        verify_output(out, base)
        verify_output(base, out)
    else:
        with pytest.raises(DamError, match=r"1 missing \(lm_head.weight\)"):
            verify_output(out, base)


def test_a_buffer_that_the_class_does_not_load_may_go_but_not_come(pair: Pair) -> None:
    out, base = pair("BertModel", lambda t: t | {"bert.embeddings.position_ids": torch.arange(40)[None]})
    verify_output(base, out)
    with pytest.raises(DamError, match=r"1 unknown \(bert.embeddings.position_ids\)"):
        verify_output(out, base)


def test_shards_count_as_one_checkpoint(pair: Pair) -> None:
    out, base = pair("BertModel", lambda t: t)
    tensors = list(load_file(out / "model.safetensors").items())
    (out / "model.safetensors").unlink()
    files = {}
    for i, part in enumerate((dict(tensors[:10]), dict(tensors[10:]))):
        file = f"model-{i}.safetensors"
        save_file(part, out / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    verify_output(out, base)


def test_a_base_taken_without_its_head(pair: Pair) -> None:
    out, base = pair(
        "ViTForImageClassification",
        lambda t: {n.removeprefix("vit."): v for n, v in t.items() if not n.startswith("classifier")},
    )
    config = AutoConfig.from_pretrained(base)
    config.architectures = ["ViTModel"]
    verify_output(out, base, base_config=config)
    with pytest.raises(DamError, match=r"2 missing \(classifier.bias, classifier.weight\)"):
        verify_output(out, base)


def test_mergekits_own_merge_of_vit_is_caught_before_and_after(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself mergekit 0.1.5 writes a fraction of a ViT's tensors and reports success."""
    register_architectures()  # now, so that no import in between does it
    for kind in ("ViTModel", "ViTForImageClassification"):
        monkeypatch.delitem(json_definitions.NAME_TO_ARCH, kind)
    base, model = make_model("ViTModel", tmp_path / "base"), make_model("ViTModel", tmp_path / "m", seed=1)
    out = merge(base, [model], merge_method="task_arithmetic", parameters={"weight": 1.0})
    with pytest.raises(DamError, match=r"3\d missing \(encoder.layer.0"):
        verify_output(out, base)
    config = MergeConfiguration(
        merge_method="task_arithmetic", base_model=str(base), models=[{"model": str(base)}, {"model": str(model)}]
    )
    weights = get_architecture_info(config, MergeOptions()).all_weights(AutoConfig.from_pretrained(base))
    with pytest.raises(DamError, match=r"3\d unknown to mergekit: .*encoder.layer.0"):
        check_coverage(weights, Checkpoint.open(base).names, ignored=frozenset())


def test_coverage_counts_aliases_and_tied_names() -> None:
    weights = [WeightInfo(name="a", aliases=("b",)), WeightInfo(name="c", optional=True, tied_names=("d",))]
    check_coverage(weights, ["a", "b", "c", "d"], ignored=frozenset())
    check_coverage(weights, ["a", "head"], ignored=frozenset({"head"}))
    with pytest.raises(DamError, match=r"all 2 tensors of the base, got 1 unknown to mergekit: head"):
        check_coverage(weights, ["a", "head"], ignored=frozenset())


def test_long_lists_are_cut() -> None:
    with pytest.raises(DamError, match=r"t0, t1, t2, ... \(5 in all\)"):
        check_coverage([], [f"t{i}" for i in range(5)], ignored=frozenset())
