"""NaN and infinity named where they arise, every mix of types, degenerate inputs said aloud."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.errors import DamError
from mergekit_dam.merging.checks import (
    finite_flags,
    require_finite,
    require_flags,
    warn_about_masks,
    warn_about_task_vectors,
)
from mergekit_dam.merging.rule import merge as merge_rule
from tests.conftest import Merge, fast
from tests.helpers.tiny_models import edit

# the models themselves are merged, whose values are looked at here
QUICK = {"scan_steps": 2, "refresh_every": 2, "refresh_steps": 1, "student_steps": 0}


def _copy(source: Path, target: Path, change: Any = None) -> Path:
    """The model with each tensor passed through `change(name, tensor)`."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    if change is not None:
        tensors = {k: change(k, v).contiguous() for k, v in load_file(source / "model.safetensors").items()}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _recipe(texts: Path, **more: Any) -> dict[str, Any]:
    return {"parameters": fast(**{**QUICK, "calibration": str(texts), **more})}


@given(st.lists(st.floats(width=32), min_size=1, max_size=9), st.sampled_from([torch.float32, torch.float64]))
def test_a_tensor_is_refused_exactly_if_it_is_not_finite(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    bad = sum(not math.isfinite(v) for v in tensor.tolist())
    if bad:
        with pytest.raises(DamError, match=f"w of m: expected finite weights, got {bad} of {len(values)} NaN"):
            require_finite(tensor, "w", "m")
    else:
        require_finite(tensor, "w", "m")
    flags = finite_flags([torch.zeros(2), tensor])
    if bad:
        with pytest.raises(DamError, match="gradient of w at step 7"):
            require_flags(["a", "w"], flags, 7)
    else:
        require_flags(["a", "w"], flags, 7)


def test_a_head_that_only_one_model_has_is_checked(merge: Merge, bert: Path, tmp_path: Path, texts: Path) -> None:
    """The survey sees what the base has; the head is model t's alone."""
    model = _copy(bert / "m2", tmp_path / "m2")
    edit(model, classifier__bias=torch.tensor([0.0, float("nan"), float("inf")]))
    with pytest.raises(DamError, match=r"tensor classifier.bias of the head of model m2: .* got 2 of 3 NaN"):
        merge(bert / "base", [bert / "m1", model], **_recipe(texts))


def _poison_the_third_step(patch: pytest.MonkeyPatch) -> None:
    """One NaN in the first gradient of the masks' step 2."""
    real, calls = MergedModel.logit_gradients, []

    def poisoned(self: MergedModel, *args: Any, **options: Any) -> Iterator[tuple[str, list[torch.Tensor]]]:
        calls.append(1)
        for number, (name, found) in enumerate(real(self, *args, **options)):
            if len(calls) == 3 and number == 0:  # steps count from 0
                found[0].view(-1)[0] = float("nan")
            yield name, found

    patch.setattr(MergedModel, "logit_gradients", poisoned)


@pytest.mark.parametrize("objective", ["inversion", "paper"])
def test_a_gradient_that_is_not_finite_stops_at_its_step(
    objective: str, merge: Merge, bert: Path, texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison_the_third_step(monkeypatch)
    with pytest.raises(DamError, match=r"gradient of mask \w+ for embeddings.\S+ at step 2: expected finite"):
        merge(bert / "base", [bert / "m1", bert / "m2"], **_recipe(texts, objective=objective))
    assert not list(cache.rglob(MASKS_FILE)), "a step that failed left masks"


def test_the_last_good_snapshot_stays_after_a_bad_step(
    merge: Merge, bert: Path, texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that fails leaves the state of the one before it, and a sound run goes on from there to equal bytes."""
    recipe = _recipe(texts, snapshot_every=0.0)
    with monkeypatch.context() as patch:
        _poison_the_third_step(patch)
        with pytest.raises(DamError, match="at step 2: expected finite"):
            merge(bert / "base", [bert / "m1", bert / "m2"], **recipe)
    (facts,) = cache.glob("*/run/snapshot/facts.json")
    assert json.loads(facts.read_text())["done"] == 2
    resumed = merge(bert / "base", [bert / "m1", bert / "m2"], **recipe)
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(cache / "another"))
    whole = merge(bert / "base", [bert / "m1", bert / "m2"], out="whole", **recipe)
    for name in ("model.safetensors", f"dam/{MASKS_FILE}"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_the_same_seed_gives_the_same_bytes(
    merge: Merge, bert: Path, texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned twice, in two caches; another seed gives other masks."""
    written = []
    for number, seed in enumerate((0, 0, 1)):
        monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(cache / str(number)))
        out = merge(bert / "base", [bert / "m1", bert / "m2"], out=str(number), **_recipe(texts, seed=seed))
        written.append([(out / name).read_bytes() for name in ("model.safetensors", f"dam/{MASKS_FILE}")])
    assert written[0] == written[1] and written[0][0] != written[2][0] and written[0][1] != written[2][1]


TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (("fp32", "fp32", "fp32"), "float32"),
        (("fp16", "fp16", "fp16"), "float16"),
        (("bf16", "bf16", "bf16"), "bfloat16"),
        (("fp32", "fp16", "bf16"), "float32"),
        (("bf16", "fp32", "fp16"), None),
    ],
)
def test_all_types_of_weights_and_their_mixtures(
    kinds: tuple[str, ...], dtype: str | None, merge: Merge, bert: Path, tmp_path: Path, texts: Path
) -> None:
    """The written tensor is the merge equation in float32 on the stored values, rounded once."""
    base, *models = [
        _copy(bert / name, tmp_path / name, lambda _, t, kind=kind: t.to(TYPES[kind]))
        for name, kind in zip(("base", "m1", "m2"), kinds, strict=True)
    ]
    out = merge(base, models, **({"dtype": dtype} if dtype else {}), **_recipe(texts))
    written, theta = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    tuned, masks = [load_file(m / "model.safetensors") for m in models], load(out / "dam" / MASKS_FILE)
    kind = dtype or "float32"  # mergekit promotes a mixture
    unit = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[kind]
    for name, tensor in written.items():
        assert tensor.dtype == getattr(torch, kind)
        stored = [theta[name], *(m[f"bert.{name}"] for m in tuned)]
        used = [t.to(getattr(torch, dtype)) if dtype else t for t in stored]
        expected = merge_rule(used[0], used[1:], masks.coefficients_of(name), masks.product(name))
        torch.testing.assert_close(tensor.float(), expected, rtol=2 * unit, atol=1e-6)


def test_a_result_beyond_the_type_is_named_not_written(merge: Merge, bert: Path, tmp_path: Path, texts: Path) -> None:
    """65,504 is float16's largest number: base and models fit, the merge does not."""
    name = "embeddings.position_embeddings.weight"
    large = [
        _copy(bert / n, tmp_path / n, lambda k, t, v=v: torch.full_like(t, v) if k.endswith(name) else t)
        for n, v in (("base", 4e4), ("m1", 6e4), ("m2", 6e4))
    ]
    entry = _recipe(texts, weight=1.0, steps=0, initial_logit=10.0)
    with pytest.raises(DamError, match=rf"merged tensor {name} in torch.float16 of the merge: .* infinite") as caught:
        merge(large[0], large[1:], out_dtype="float16", dtype="float32", **entry)
    assert "write bfloat16 or float32" in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()
    merge(large[0], large[1:], out="wide", dtype="float32", **entry)


def test_one_model_equal_to_the_base_and_one_far_away(
    merge: Merge, bert: Path, tmp_path: Path, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theta = load_file(bert / "base" / "model.safetensors")
    twin = _copy(bert / "m1", tmp_path / "twin", lambda k, t: theta.get(k.removeprefix("bert."), t))
    far = _copy(bert / "m2", tmp_path / "far", lambda k, t: t * 1e4 if k.endswith("word_embeddings.weight") else t)
    out = merge(bert / "base", [bert / "m1", bert / "m2", twin, far], dtype="float32", **_recipe(texts))
    assert "model twin equals theta_0 in every shared tensor: it adds nothing" in caplog.text
    assert "model far is" in caplog.text and "times as far from theta_0 as the median model" in caplog.text
    assert all(bool(torch.isfinite(t).all()) for t in load_file(out / "model.safetensors").values())


@pytest.mark.parametrize(("logit", "end"), [(10.0, "1"), (-10.0, "0")])
def test_masks_that_collapse_are_reported(
    logit: float, end: str, merge: Merge, bert: Path, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when they come from the cache, or from a file."""
    recipe = _recipe(texts, initial_logit=logit, steps=0, mask="m2", coefficients="task")
    out = merge(bert / "base", [bert / "m1", bert / "m2"], **recipe)
    assert caplog.text.count(f"mask backdoor_detection has collapsed to {end}") == 1
    merge(bert / "base", [bert / "m1", bert / "m2"], out="cached", **recipe)
    assert caplog.text.count(f"mask backdoor_detection has collapsed to {end}") == 2
    merge(bert / "base", [bert / "m1", bert / "m2"], out="given", parameters={"masks": str(out / "dam" / MASKS_FILE)})
    assert caplog.text.count(f"mask backdoor_detection has collapsed to {end}") == 3


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.booleans())
def test_what_is_said_about_masks_follows_from_their_means(means: list[float], zero: bool) -> None:
    masks = {"m": {f"t{i}": torch.full((3,), mean, dtype=torch.float64) for i, mean in enumerate(means)}}
    said = warn_about_masks(masks, torch.zeros(2, 1) if zero else torch.ones(2, 1))
    mean = sum(means) / len(means)
    assert any("coefficients are 0" in line for line in said) == zero
    assert any("collapsed to 0" in line for line in said) == (mean < 1e-3)
    assert any("collapsed to 1" in line for line in said) == (mean > 1 - 1e-3)
    assert any("is 0 in" in line for line in said) == (mean >= 1e-3 and any(m < 1e-3 for m in means))


@given(st.lists(st.floats(1e-3, 10), min_size=2, max_size=6), st.floats(0.01, 1000), st.integers(0, 5))
def test_an_outlier_is_one_against_the_median(norms: list[float], factor: float, at: int) -> None:
    norms[at % len(norms)] *= factor
    middle = sorted(norms)[(len(norms) - 1) // 2]
    said = warn_about_task_vectors([f"m{i}" for i in range(len(norms))], norms)
    assert len(said) == sum(norm > 100 * middle for norm in norms)
