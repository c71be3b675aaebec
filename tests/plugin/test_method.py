"""The method inside mergekit: every family, and the properties that a merge must have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.models.plan import build_plan
from mergekit_dam.models.verify import verify_output
from tests.conftest import FAST, Merge
from tests.helpers.tiny_models import make_model

FAMILIES = [
    ("ViTModel", "ViTForImageClassification"),
    ("ViTForImageClassification", "ViTForImageClassification"),
    ("CLIPVisionModel", "CLIPForImageClassification"),
    ("BertModel", "BertForSequenceClassification"),
    ("BertForMaskedLM", "BertForSequenceClassification"),
    ("RobertaModel", "RobertaForSequenceClassification"),
    ("DistilBertModel", "DistilBertForSequenceClassification"),
    ("LlamaForCausalLM", "LlamaForCausalLM"),
    ("Qwen2ForCausalLM", "Qwen2ForCausalLM"),
    ("MistralForCausalLM", "MistralForCausalLM"),
    ("GPT2LMHeadModel", "GPT2LMHeadModel"),
]


@pytest.mark.parametrize(("base_kind", "kind"), FAMILIES)
@pytest.mark.parametrize("method", ["dam", "ties"])
def test_every_family_merges_completely(
    base_kind: str, kind: str, method: str, merge: Merge, tmp_path: Path, images: Path, texts: Path
) -> None:
    base = make_model(base_kind, tmp_path / "base", seed=0)
    labels = (3, 3) if base_kind == kind else (2, 4)
    models = [make_model(kind, tmp_path / f"m{i}", seed=i + 1, labels=n, body=base) for i, n in enumerate(labels)]
    if method == "dam":
        parameters = {**FAST, "calibration": str(images if "ViT" in kind or "CLIP" in kind else texts)}
    else:
        parameters = {"weight": 0.5, "density": 0.5}
    out = merge(base, models, merge_method=method, parameters=parameters, dtype="float32")
    verify_output(out, base, dtype=torch.float32)
    loaded, info = getattr(transformers, base_kind).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoConfig.from_pretrained(out).architectures == [base_kind]
    assert all(torch.isfinite(p).all() for p in loaded.parameters())


def _recipe(images: Path, **more: object) -> dict[str, object]:
    return {"parameters": {**FAST, "calibration": str(images), **more}, "dtype": "float32"}


def test_streaming_merge_equals_the_differentiable_forward_bit_for_bit(merge: Merge, vit: Path, images: Path) -> None:
    out = merge(vit / "base", [vit / "a", vit / "b"], **_recipe(images))
    masks = load(out / "dam" / MASKS_FILE)
    refs = [yaml.safe_load(str(vit / n)) for n in ("base", "a", "b")]
    from mergekit.common import ModelReference

    base, *models = (ModelReference.parse(ref) for ref in refs)
    plan = build_plan(base, models, shared={"calibration": str(images)}, per_model={})
    vectors = TaskVectors(plan)
    model = MergedModel(vectors, survey(vectors).changed, torch.device("cpu"))
    product = {name: masks.product(name) for name in model.mask_names}
    weights = model.weights({k: v for k, v in product.items() if v is not None}, masks.coefficients)
    written = load_file(out / "model.safetensors")
    assert set(written) == set(weights)
    for name, tensor in written.items():
        assert torch.equal(tensor, weights[name].detach()), name


def test_the_second_run_learns_nothing_and_writes_the_same_bytes(
    merge: Merge, vit: Path, images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = merge(vit / "base", [vit / "a", vit / "b"], out="one", **_recipe(images))
    monkeypatch.setattr("mergekit_dam.learn.paper_search.PaperSearch.run", lambda self: pytest.fail("learned again"))
    second = merge(vit / "base", [vit / "a", vit / "b"], out="two", **_recipe(images))
    name = "model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    third = merge(
        vit / "base",
        [vit / "a", vit / "b"],
        out="three",
        dtype="float32",
        parameters={"masks": str(first / "dam" / MASKS_FILE)},
    )
    assert (first / name).read_bytes() == (third / name).read_bytes()


def test_learning_is_deterministic_and_the_seed_matters(
    merge: Merge, vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for i, seed in enumerate((0, 0, 1)):
        monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path / f"cache{i}"))
        out = merge(vit / "base", [vit / "a", vit / "b"], out=f"o{i}", **_recipe(images, seed=seed))
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_shards_and_threads_do_not_change_the_result(merge: Merge, vit: Path, images: Path) -> None:
    one = merge(vit / "base", [vit / "a", vit / "b"], out="one", **_recipe(images))
    many = merge(
        vit / "base",
        [vit / "a", vit / "b"],
        out="many",
        options={"out_shard_size": 2000, "lazy_unpickle": True},
        **_recipe(images),
    )
    parts = sorted(many.glob("model-*.safetensors"))
    assert len(parts) > 1
    merged = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    for name, tensor in load_file(one / "model.safetensors").items():
        assert torch.equal(tensor, merged[name])


def test_heads_stay_per_task_beside_the_output(merge: Merge, vit: Path, images: Path) -> None:
    out = merge(vit / "base", [vit / "a", vit / "b"], **_recipe(images))
    for name, classes in (("a", 3), ("b", 5)):
        head = load_file(out / "dam" / "heads" / f"{name}.safetensors")
        assert head["classifier.weight"].shape == (classes, 16)
        assert torch.equal(head["classifier.weight"], load_file(vit / name / "model.safetensors")["classifier.weight"])


def test_lm_without_data_samples_its_own_text(merge: Merge, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base", tie_word_embeddings=True)
    models = [make_model("LlamaForCausalLM", tmp_path / f"m{i}", body=base, tie_word_embeddings=True) for i in (1, 2)]
    out = merge(base, models, parameters=FAST, dtype="float32")
    assert "samples its own text" in caplog.text
    assert "lm_head.weight" not in load(out / "dam" / MASKS_FILE).metadata["tensors"]


def test_unknown_setting_warns_in_plain_mergekit(
    merge: Merge, vit: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge(vit / "base", [vit / "a", vit / "b"], **_recipe(images, granularty="row"))
    assert "'granularty'" in caplog.text and "Did you mean 'granularity'?" in caplog.text
