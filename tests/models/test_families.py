"""Every promised class merges completely in an unmodified mergekit, also where base and fine-tunes differ in class."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml

from mergekit_dam.models import families
from mergekit_dam.models.verify import verify_output
from tests.conftest import Merge
from tests.helpers.merging import (
    LMS,
    MIXED,
    OURS,
    WEIGHTS,
    assert_task_arithmetic,
    fine_tunes,
    loads_completely,
    recipe,
    run,
    tensors_of,
)
from tests.helpers.tiny_models import make_model

pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize("kind", OURS + LMS)
def test_task_arithmetic_of_one_class(kind: str, merge: Merge, tmp_path: Path) -> None:
    base = make_model(kind, tmp_path / "base")
    models = fine_tunes(kind, tmp_path, base)
    out = run(merge, base, models)
    written, theta, tuned = tensors_of(out), tensors_of(base), [tensors_of(m) for m in models]
    assert set(written) == set(theta)
    for name, tensor in written.items():
        expected = theta[name] + sum(w * (m[name] - theta[name]) for w, m in zip(WEIGHTS, tuned, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)
    verify_output(out, base, dtype=torch.float32)
    assert loads_completely(out, kind)


@pytest.mark.parametrize("kind", OURS + LMS)
def test_ties_of_one_class(kind: str, merge: Merge, tmp_path: Path) -> None:
    base = make_model(kind, tmp_path / "base")
    out = run(merge, base, fine_tunes(kind, tmp_path, base), "ties")
    assert {n: t.shape for n, t in tensors_of(out).items()} == {n: t.shape for n, t in tensors_of(base).items()}
    verify_output(out, base, dtype=torch.float32)
    assert loads_completely(out, kind)


@pytest.mark.parametrize(("base_kind", "kind", "prefix"), MIXED)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_base_without_the_models_heads(
    base_kind: str, kind: str, prefix: str, method: str, merge: Merge, tmp_path: Path
) -> None:
    base = make_model(base_kind, tmp_path / "base")
    models = fine_tunes(kind, tmp_path, base, labels=(2, 5))
    out = run(merge, base, models, method)
    verify_output(out, base, dtype=torch.float32)
    assert loads_completely(out, base_kind)
    if method == "task_arithmetic":
        assert_task_arithmetic(out, base, models, other=lambda name: prefix + name)


@pytest.mark.parametrize(
    ("own", "override", "kind"),
    [
        ("ViTForImageClassification", "ViTModel", "ViTForImageClassification"),
        ("BertForSequenceClassification", "BertModel", "BertForSequenceClassification"),
        ("BertForMaskedLM", "BertModel", "BertForSequenceClassification"),
        ("RobertaForSequenceClassification", "RobertaModel", "RobertaForSequenceClassification"),
        ("DistilBertForMaskedLM", "DistilBertModel", "DistilBertForSequenceClassification"),
        ("CLIPModel", "CLIPVisionModel", "CLIPForImageClassification"),
    ],
)
def test_override_architecture_takes_the_base_without_its_head(
    own: str, override: str, kind: str, merge: Merge, tmp_path: Path
) -> None:
    base = make_model(own, tmp_path / "base")
    models = [make_model(kind, tmp_path / f"m{n}", seed=n, labels=n) for n in (2, 5)]
    out = run(merge, {"model": str(base), "override_architecture": override}, models)
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.architectures == [override]
    verify_output(out, base, dtype=torch.float32, base_config=config)
    assert not any("classifier" in n or n.startswith(("cls.", "vocab_", "text_model.")) for n in tensors_of(out))
    _, info = getattr(transformers, override).from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"]
    # a class with a pooler cannot find one in a file that never had it
    assert all(name.startswith("pooler.") for name in info["missing_keys"])


def test_heads_of_other_sizes_than_the_bases_are_refused_by_mergekit(merge: Merge, tmp_path: Path) -> None:
    base = make_model("ViTForImageClassification", tmp_path / "base", labels=3)
    models = [make_model("ViTForImageClassification", tmp_path / f"m{n}", labels=n) for n in (2, 5)]
    with pytest.raises(ValueError, match=r"size mismatch for classifier"):
        run(merge, base, models)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_tied_embeddings_are_written_once(kind: str, merge: Merge, tmp_path: Path) -> None:
    base = make_model(kind, tmp_path / "base", tie_word_embeddings=True)
    models = fine_tunes(kind, tmp_path, base, tie_word_embeddings=True)
    out = run(merge, base, models)
    assert "lm_head.weight" not in tensors_of(out)
    verify_output(out, base, dtype=torch.float32)


def test_bfloat16_and_shards(merge: Merge, tmp_path: Path) -> None:
    base = make_model("CLIPModel", tmp_path / "base")
    models = fine_tunes("CLIPModel", tmp_path, base)
    out = run(merge, base, models, options={"out_shard_size": 4000}, out_dtype="bfloat16")
    assert len(list(out.glob("*.safetensors"))) > 1
    verify_output(out, base, dtype=torch.bfloat16)
    assert loads_completely(out, "CLIPModel")


def test_slices_set_the_number_of_layers(merge: Merge, tmp_path: Path) -> None:
    base = make_model("BertModel", tmp_path / "bert")
    out = merge(
        base, [], merge_method="passthrough", slices=[{"sources": [{"model": str(base), "layer_range": [1, 2]}]}]
    )
    assert transformers.AutoConfig.from_pretrained(out).num_hidden_layers == 1
    assert loads_completely(out, "BertModel")


def test_modules_of_clip_can_be_merged_apart(merge: Merge, tmp_path: Path) -> None:
    base = make_model("CLIPModel", tmp_path / "clip")
    one = {"slices": [{"sources": [{"model": str(base), "layer_range": [0, 1]}]}]}
    out = merge(
        base,
        [],
        out="less",
        merge_method="passthrough",
        modules={"vision_model": one, "text_model": {"models": [{"model": str(base)}]}},
    )
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) == (1, 2)
    assert loads_completely(out, "CLIPModel")


def test_plain_mergekit_yaml_merges_vit_with_different_heads(tmp_path: Path) -> None:
    base = make_model("ViTModel", tmp_path / "base")
    models = fine_tunes("ViTForImageClassification", tmp_path, base, labels=(2, 5))
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump({"base_model": str(base), **recipe(models, "ties")}))
    program = Path(sys.executable).parent / "mergekit-yaml"
    done = subprocess.run(
        [program, tmp_path / "recipe.yml", tmp_path / "out", "--quiet"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    verify_output(tmp_path / "out", base, dtype=torch.float32)


def test_names_are_read_while_another_thread_loads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit's threads share one table of loaders, which grows while it is read."""
    loaders: dict[Any, Any] = {}

    class Growing:
        def __init__(self, path: str) -> None:
            self.path = path

        @property
        def model(self) -> Growing:
            loaders[len(loaders)] = None
            return self

    index = SimpleNamespace(index=SimpleNamespace(tensor_paths={"one": "file"}))
    loaders.update({Growing("other"): index, Growing("wanted"): index})
    monkeypatch.setattr(families, "LoaderCache", lambda: SimpleNamespace(loaders=loaders))
    assert families._names_on_disk(SimpleNamespace(name_or_path="wanted")) == {"one"}  # type: ignore[arg-type]
