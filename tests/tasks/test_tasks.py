"""Tasks against the real transformers models, and the heads that are not in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.common import ModelReference
from PIL import Image
from safetensors.torch import save_file

from mergekit_dam import load_merged
from mergekit_dam.engine.module_weights import slots_of, swapped
from mergekit_dam.errors import DamError
from mergekit_dam.learn.paper_search import UniversalPerturbation
from mergekit_dam.models.plan import build_plan
from mergekit_dam.seeds import generator
from mergekit_dam.tasks import Task, build_tasks
from tests.conftest import FAST, Merge
from tests.helpers.tiny_models import make_model, save_tokenizer
from tests.plugin.test_method import FAMILIES

CPU = torch.device("cpu")


def _tasks(base: Path, models: list[Path], data: Path, **shared: Any) -> list[Task]:
    refs = [ModelReference.parse(str(path)) for path in (base, *models)]
    settings = {**FAST, "calibration": str(data), **shared}
    return build_tasks(build_plan(refs[0], refs[1:], shared=settings, per_model={}), CPU)


@pytest.mark.parametrize(("base_kind", "kind"), FAMILIES)
def test_logits_are_the_real_models(base_kind: str, kind: str, tmp_path: Path, images: Path, texts: Path) -> None:
    base = make_model(base_kind, tmp_path / "base", labels=3)
    models = [make_model(kind, tmp_path / f"m{i}", seed=i, labels=3, body=base) for i in (1, 2)]
    is_image = "ViT" in kind or "CLIP" in kind
    task = _tasks(base, models, images if is_image else texts)[0]
    inputs = task.inputs(torch.arange(5))
    real = getattr(transformers, kind).from_pretrained(models[0]).eval()
    own = task.own_weights()
    with torch.no_grad():
        logits = task.logits(own, inputs)
        if is_image:
            expected = real(pixel_values=(inputs["pixels"] - 0.5) / 0.5).logits
        else:
            expected = real(**inputs).logits
            if expected.ndim == 3:
                expected = expected[:, -(inputs["input_ids"].shape[1] - 1) :]
                expected = expected[inputs["attention_mask"][:, 1:].bool()]
        torch.testing.assert_close(logits, expected)
        unchanged = task.logits(own, inputs, lambda x, mask: (x, mask))
        torch.testing.assert_close(unchanged, expected)
        shape = task.perturbation_shape
        delta = UniversalPerturbation(shape, task.bounds, eps=0.5, inserts=len(shape) == 2, generator=generator(0))
        perturbed = task.logits(own, inputs, delta)
        assert perturbed.shape == logits.shape and not torch.allclose(perturbed, logits)


def test_gradients_reach_every_merged_tensor(vit: Path, images: Path) -> None:
    task = _tasks(vit / "base", [vit / "a", vit / "b"], images)[0]
    weights = {name: tensor.clone().requires_grad_(True) for name, tensor in task.own_weights().items()}
    task.logits(weights, task.inputs(torch.arange(3))).square().sum().backward()
    assert all(w.grad is not None and bool(w.grad.abs().sum() > 0) for n, w in weights.items() if "key.bias" not in n)


def test_load_merged_gives_each_task_its_head(merge: Merge, vit: Path, images: Path) -> None:
    out = merge(vit / "base", [vit / "a", vit / "b"], parameters={**FAST, "calibration": str(images)}, dtype="float32")
    body = transformers.ViTModel.from_pretrained(out).eval()
    pixels = torch.randn(2, 3, 16, 16)
    for name, classes in (("a", 3), ("b", 5)):
        real = transformers.ViTForImageClassification.from_pretrained(vit / name).eval()
        real.vit.load_state_dict({k: v for k, v in body.state_dict().items() if "pooler" not in k})
        with torch.no_grad():
            logits = load_merged(out, name)(pixels).logits
            assert logits.shape == (2, classes)
            torch.testing.assert_close(logits, real(pixels).logits)
    torch.testing.assert_close(load_merged(out)(pixels).last_hidden_state, body(pixels).last_hidden_state)
    for file in (out / "dam" / "heads").iterdir():
        file.unlink()
    torch.testing.assert_close(load_merged(out, "b")(pixels).logits, real(pixels).logits)
    with pytest.raises(DamError, match="one of a, b, got an unknown task"):
        load_merged(out, "c")


def test_a_merge_in_another_type_takes_its_heads_along(merge: Merge, vit: Path, images: Path) -> None:
    out = merge(vit / "base", [vit / "a", vit / "b"], parameters={**FAST, "calibration": str(images)}, dtype="bfloat16")
    model = load_merged(out, "a")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)).logits.shape == (2, 3)


def test_a_zero_shot_head_of_half_precision_is_that_of_the_same_weights(tmp_path: Path, images: Path) -> None:
    towers = [make_model("CLIPVisionModel", tmp_path / f"v{i}", seed=i) for i in (1, 2)]
    clip = transformers.CLIPModel.from_pretrained(make_model("CLIPModel", tmp_path / "clip")).bfloat16()
    half, whole = tmp_path / "half", tmp_path / "whole"
    for folder in (half, whole):
        clip.to(torch.float32 if folder == whole else torch.bfloat16).save_pretrained(folder)
        save_tokenizer(folder)
    logits = []
    for clip in (half, whole):
        task = _tasks(towers[0], towers, images, classes="movie, film", zero_shot_model=str(clip))[0]
        with torch.no_grad():
            logits.append(task.logits(task.own_weights(), task.inputs(torch.arange(4))))
    torch.testing.assert_close(logits[0], logits[1])


def test_full_clip_merges_with_zero_shot_heads(merge: Merge, tmp_path: Path, images: Path) -> None:
    base = make_model("CLIPModel", tmp_path / "base")
    save_tokenizer(base)
    models = [make_model("CLIPModel", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2)]
    task = _tasks(base, models, images, classes="movie, film, actor")[0]
    inputs = task.inputs(torch.arange(4))
    with torch.no_grad():
        logits = task.logits(task.own_weights(), inputs)
        real = transformers.CLIPModel.from_pretrained(models[0]).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokens = tokenizer(
            [f"a photo of a {c}." for c in ("movie", "film", "actor")], return_tensors="pt", padding=True
        )
        pixels = (inputs["pixels"] - 0.5) / 0.5
        ids = {k: tokens[k] for k in ("input_ids", "attention_mask")}
        torch.testing.assert_close(logits, real(pixel_values=pixels, **ids).logits_per_image)
    out = merge(
        base, models, parameters={**FAST, "calibration": str(images), "classes": "movie, film"}, dtype="float32"
    )
    _, info = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]

    vision_base = make_model("CLIPVisionModel", tmp_path / "vision")
    towers = [make_model("CLIPVisionModel", tmp_path / f"v{i}", seed=i, body=vision_base) for i in (1, 2)]
    clip = transformers.CLIPModel.from_pretrained(base)
    task = _tasks(vision_base, towers, images, classes="movie, film", zero_shot_model=str(base))[0]
    with torch.no_grad():
        logits = task.logits(task.own_weights(), inputs)
        pooled = transformers.CLIPVisionModel.from_pretrained(towers[0]).eval()(pixel_values=pixels).pooler_output
        image = torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)
        tokens = tokenizer(["a photo of a movie.", "a photo of a film."], return_tensors="pt", padding=True)
        features = clip.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        text = torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)
        torch.testing.assert_close(logits, clip.logit_scale.exp() * image @ text.T)


def test_linear_head_from_a_file(tmp_path: Path, images: Path) -> None:
    base = make_model("ViTModel", tmp_path / "base")
    models = [make_model("ViTModel", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2)]
    head = {"weight": torch.randn(4, 16), "bias": torch.randn(4)}
    save_file(head, tmp_path / "head.safetensors")
    task = _tasks(base, models, images, head=str(tmp_path / "head.safetensors"))[0]
    inputs = task.inputs(torch.arange(3))
    with torch.no_grad():
        features = transformers.ViTModel.from_pretrained(models[0]).eval()((inputs["pixels"] - 0.5) / 0.5)
        expected = torch.nn.functional.linear(features.pooler_output, head["weight"], head["bias"])
        torch.testing.assert_close(task.logits(task.own_weights(), inputs), expected)
    save_file({"weight": torch.randn(4, 15)}, tmp_path / "wrong.safetensors")
    with pytest.raises(DamError, match=r"expected weight \(K, 16\)"):
        _tasks(base, models, images, head=str(tmp_path / "wrong.safetensors"))
    with pytest.raises(DamError, match="a classification head"):
        _tasks(base, models, images)


def test_pixels_follow_the_preprocessor_config(tmp_path: Path) -> None:
    from mergekit_dam.io.images import Preprocessing

    image = Image.new("L", (40, 20), 255)
    config = {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": 16, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(__import__("json").dumps(config))
    found = Preprocessing.read([tmp_path], 16)
    assert found.pixels([image]).shape == (1, 3, 16, 16)
    assert torch.equal(found.normalise(torch.ones(1, 3, 2, 2)), torch.ones(1, 3, 2, 2))


def test_swapped_tensors_leave_their_slots_even_after_an_error() -> None:
    layer = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    before = {name: tensor for name, tensor in layer.state_dict(keep_vars=True).items()}
    slots = slots_of(layer, before)
    with pytest.raises(ZeroDivisionError), swapped(slots, {"0.weight": torch.ones(2), "0.running_mean": torch.ones(2)}):
        assert bool((layer[0].weight == 1).all()) and bool((layer[0].running_mean == 1).all())
        _ = 1 / 0
    assert all(tensor is before[name] for name, tensor in layer.state_dict(keep_vars=True).items())
