"""mergekit's own options around `dam`: tokenizers, threads, and outputs that cannot be written."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.merge_methods import get
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from safetensors.torch import load_file

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.errors import DamError
from mergekit_dam.models.verify import verify_output
from tests.conftest import FAST, Merge
from tests.helpers.tiny_models import make_model


@pytest.mark.parametrize("tokenizer", [{"tokenizer_source": "base"}, {"tokenizer_source": "union"}])
def test_tokenizer_options_with_equal_vocabularies(
    tokenizer: dict[str, str], merge: Merge, tmp_path: Path, texts: Path
) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base", vocab_size=27)
    models = [make_model("LlamaForCausalLM", tmp_path / f"m{i}", seed=i, body=base, vocab_size=27) for i in (1, 2)]
    parameters = {**FAST, "calibration": str(texts)}
    plain = merge(base, models, out="plain", parameters=parameters, dtype="float32")
    aligned = merge(base, models, out="aligned", parameters=parameters, dtype="float32", **tokenizer)
    first, second = load_file(plain / "model.safetensors"), load_file(aligned / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (aligned / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("rows", "padding", "written"), [(40, None, 27), (40, 8, 32), (27, 8, 32), (32, 16, 32), (27, None, 27)]
)
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_rows_without_a_token_are_cut_or_added(
    kind: str, rows: int, padding: int | None, written: int, merge: Merge, tmp_path: Path, texts: Path
) -> None:
    """mergekit writes as many rows as there are tokens, or a multiple; dam masks those that the models have."""
    base = make_model(kind, tmp_path / "base", vocab_size=rows)
    models = [make_model(kind, tmp_path / f"m{i}", seed=i, body=base, vocab_size=rows) for i in (1, 2)]
    recipe = {"parameters": {**FAST, "scan_steps": 2, "calibration": str(texts)}, "dtype": "float32"}
    plain = load_file(merge(base, models, out="plain", **recipe) / "model.safetensors")
    tokenizer = {"source": "base", **({"pad_to_multiple_of": padding} if padding else {})}
    out = merge(base, models, out="aligned", tokenizer=tokenizer, **recipe)
    verify_output(out, base, dtype=torch.float32)
    for name, tensor in load_file(out / "model.safetensors").items():
        if name.removeprefix("transformer.") not in ("model.embed_tokens.weight", "lm_head.weight", "wte.weight"):
            assert torch.equal(tensor, plain[name]), name
            continue
        assert torch.equal(tensor[:27], plain[name][:27]) and len(tensor) == written
        assert torch.allclose(tensor[27:], tensor[:27].mean(0).expand(written - 27, -1), atol=1e-6)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == written


def test_many_threads_learn_once_and_agree(vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--multi-gpu` calls the method from worker threads, without a planner on their stacks."""
    from mergekit_dam.learn import inversion_search

    runs = []
    real = inversion_search.InversionSearch.run
    monkeypatch.setattr(inversion_search.InversionSearch, "run", lambda self: (runs.append(1), real(self))[1])
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
    base = load_file(vit / "base" / "model.safetensors")
    models = [load_file(vit / name / "model.safetensors") for name in ("a", "b")]
    method = type(get("dam"))()

    def one(name: str) -> torch.Tensor:
        entries = [TensorEntry(refs[0], base[name], is_base=True)]
        entries += [TensorEntry(ref, own[f"vit.{name}"]) for ref, own in zip(refs[1:], models, strict=True)]
        group = TensorGroup(tuple(entries), TensorMetadata(name=name))
        (merged,) = method([group], parameters={**FAST, "calibration": {refs[1]: str(images), refs[2]: str(images)}})
        return merged

    names = [name for name in base if not name.startswith("pooler")]
    with ThreadPoolExecutor(8) as pool:
        together = dict(zip(names, pool.map(one, names), strict=True))
    assert runs == [1]
    for name in names:
        assert torch.equal(together[name], one(name))


def test_other_settings_for_the_same_models_learn_other_masks(vit: Path, images: Path) -> None:
    """Called directly, one method object serves many merges of the same models, each with its own settings."""
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
    name = "encoder.layer.0.attention.attention.key.weight"
    tensors = [load_file(vit / "base" / "model.safetensors")[name]]
    tensors += [load_file(vit / m / "model.safetensors")[f"vit.{name}"] for m in ("a", "b")]
    entries = [TensorEntry(r, t, is_base=i == 0) for i, (r, t) in enumerate(zip(refs, tensors, strict=True))]
    group = TensorGroup(tuple(entries), TensorMetadata(name=name))

    def merged(method: object, weight: float = 0.3, **settings: object) -> torch.Tensor:
        parameters = {**FAST, "calibration": str(images), "weight": weight, **settings}
        (tensor,) = method([group], parameters=parameters)  # type: ignore[operator]
        return tensor

    one = type(get("dam"))()
    for settings in ({"seed": 0}, {"seed": 1}, {"seed": 0, "weight": 0.6}, {"seed": 0}):
        assert torch.equal(merged(one, **settings), merged(type(get("dam"))(), **settings))


def test_another_tensor_than_planned_is_refused(vit: Path, images: Path) -> None:
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
    name = "encoder.layer.0.attention.attention.key.weight"
    moved = load_file(vit / "base" / "model.safetensors")[name.replace("layer.0", "layer.1")]
    group = TensorGroup(
        (TensorEntry(refs[0], moved, is_base=True), *(TensorEntry(ref, moved) for ref in refs[1:])),
        TensorMetadata(name=name),
    )
    with pytest.raises(DamError, match="another tensor from mergekit"):
        type(get("dam"))()([group], parameters={**FAST, "calibration": str(images)})


def test_an_output_that_cannot_be_written(merge: Merge, vit: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dam").write_text("in the way")
    with pytest.raises(DamError, match="a folder that can be written"):
        merge(vit / "base", [vit / "a", vit / "b"], parameters={**FAST, "calibration": str(images)})
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_cache_that_cannot_be_written(
    merge: Merge, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DamError, match="Set MERGEKIT_DAM_CACHE to one"):
        merge(vit / "base", [vit / "a", vit / "b"], parameters={**FAST, "calibration": str(images)})


def test_masks_of_another_base_are_refused(merge: Merge, vit: Path, images: Path, tmp_path: Path) -> None:
    first = merge(vit / "base", [vit / "a", vit / "b"], out="one", parameters={**FAST, "calibration": str(images)})
    masks = first / "dam" / MASKS_FILE
    assert load(masks).metadata["base"]["model"] == str(vit / "base")
    other = make_model("ViTModel", tmp_path / "other", seed=9)
    with pytest.raises(DamError, match=r"base model: expected .* with the recorded content"):
        merge(other, [vit / "a", vit / "b"], out="two", parameters={"masks": str(masks)})
