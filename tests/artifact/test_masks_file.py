"""The artefact's format, byte for byte: what one version writes, the next must read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergekit_dam.artifact.masks_file import MASKS_FILE, SCHEMA, LearnedMasks, load, save
from mergekit_dam.errors import DamError
from mergekit_dam.merging.mask_bytes import STEPS, to_bytes, to_probabilities
from mergekit_dam.merging.rule import merge as merge_tensor
from tests.conftest import FAST, Merge

GOLDEN = Path(__file__).parents[1] / "golden" / "dam_masks.safetensors"
FORMER = GOLDEN.with_name("dam_masks_schema1.safetensors")  # probabilities in float16
WITHOUT_CHECKSUM = GOLDEN.with_name("dam_masks_schema1_without_checksum.safetensors")


def _masks() -> LearnedMasks:
    values = torch.arange(6).reshape(2, 3) * (STEPS // 8) / STEPS
    probabilities = {"task_shared": {"w": values, "b": values[:, 0]}, "backdoor_detection": {"w": 1 - values}}
    metadata = {
        "schema": SCHEMA,
        "settings": {"rescale": True},
        "base": {"model": "base", "sha256": "0" * 64},
        "models": [{"name": n, "model": n, "sha256": n * 64, "settings": {}, "samples": []} for n in "ab"],
        "tensors": ["w", "b"],
    }
    return LearnedMasks(probabilities, torch.tensor([[0.25, 0.5], [0.125, 1.0]]), metadata)


def test_writing_gives_the_golden_bytes(tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", _masks())
    assert (tmp_path / "m.safetensors").read_bytes() == GOLDEN.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(("file", "unit"), [(GOLDEN, (STEPS // 8) / STEPS), (FORMER, 1 / 8), (WITHOUT_CHECKSUM, 1 / 8)])
def test_golden_files_are_read_and_applied(file: Path, unit: float) -> None:
    masks = load(file)
    first = torch.arange(6).reshape(2, 3) * unit
    expected = (first / first.mean()) * ((1 - first) / (1 - first).mean())
    found = masks.mask("w")
    assert found is not None
    torch.testing.assert_close(found, expected)
    assert torch.equal(masks.coefficients_of("b"), torch.tensor([0.5, 1.0]))
    assert not masks.has("c") and masks.mask("c") is None


def test_a_file_of_the_former_schema_is_written_in_the_present_one(tmp_path: Path) -> None:
    former = load(FORMER)
    save(tmp_path / "m.safetensors", former)
    again = load(tmp_path / "m.safetensors")
    assert again.metadata["schema"] == SCHEMA != former.metadata["schema"]
    for name in former.metadata["tensors"]:
        torch.testing.assert_close(again.mask(name), former.mask(name), rtol=0, atol=0.02)


def _own() -> LearnedMasks:
    """M1 of all models, and an M2 of each."""
    masks = _masks()
    values = masks.probabilities["task_shared"]["w"]
    own = {f"{t}.{name}": (v if t else 1 - v) for t in range(2) for name, v in {"w": values, "b": values[:, 0]}.items()}
    metadata = {**masks.metadata, "settings": {"rescale": False}, "own_masks": ["backdoor_detection"]}
    return replace(masks, probabilities={**masks.probabilities, "backdoor_detection": own}, metadata=metadata)


def test_masks_of_each_models_own_are_read_and_applied(tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", _own())
    masks = load(tmp_path / "m.safetensors")
    shared = masks.probabilities["task_shared"]["w"] / STEPS
    found = masks.mask("w")
    assert found is not None
    torch.testing.assert_close(found, torch.stack([shared * (1 - shared), shared * shared]), rtol=0, atol=0.01)
    base, models = torch.zeros(2, 3), [torch.ones(2, 3), 2 * torch.ones(2, 3)]
    expected = 0.25 * found[0] + 0.125 * 2 * found[1]
    torch.testing.assert_close(merge_tensor(base, models, masks.coefficients_of("w"), masks.product("w")), expected)


@pytest.mark.parametrize("missing", ["0.w", "1.b"])
def test_a_mask_that_some_model_lacks_is_refused(missing: str, tmp_path: Path) -> None:
    masks = _own()
    del masks.probabilities["backdoor_detection"][missing]  # type: ignore[attr-defined]
    save(tmp_path / "m.safetensors", masks)
    with pytest.raises(DamError, match="that some model lacks"):
        load(tmp_path / "m.safetensors")


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
def test_bytes_are_within_half_a_step(values: list[float]) -> None:
    probabilities = torch.tensor(values)
    kept = to_bytes(probabilities)
    assert kept.dtype == torch.uint8 and int(kept.max()) <= STEPS
    found = to_probabilities(kept)
    torch.testing.assert_close(found, probabilities, rtol=0, atol=0.5001 / STEPS)
    assert torch.equal(to_bytes(found), kept) and torch.equal(to_bytes(kept), kept)
    exact = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(to_probabilities(to_bytes(exact)), exact)


def test_masks_of_one_entry_per_tensor_are_still_applied(merge: Merge, vit: Path, images: Path, tmp_path: Path) -> None:
    """`granularity: tensor` can be learned no more, but there are files of it."""
    models = [vit / "a", vit / "b"]
    learned = load(merge(vit / "base", models, parameters={**FAST, "calibration": str(images)}) / "dam" / MASKS_FILE)
    single = {
        mask: {key: to_probabilities(v).mean().reshape([1] * v.ndim) for key, v in by_key.items()}
        for mask, by_key in learned.probabilities.items()
    }
    settings = {**learned.metadata["settings"], "granularity": "tensor"}
    former = replace(learned, probabilities=single, metadata={**learned.metadata, "settings": settings})
    save(tmp_path / MASKS_FILE, former)
    out = merge(vit / "base", models, out="applied", parameters={"masks": str(tmp_path / MASKS_FILE)}, dtype="float32")
    masks, (base, *tuned) = (
        load(tmp_path / MASKS_FILE),
        (load_file(p / "model.safetensors") for p in (vit / "base", *models)),
    )
    written = load_file(out / "model.safetensors")
    name = next(n for n in masks.metadata["tensors"] if n in base and base[n].ndim == 2)
    factor, lambdas = masks.mask(name), masks.coefficients_of(name)
    assert factor is not None and factor.numel() in (1, len(models))
    factors = factor.flatten().expand(len(models))
    moved = sum(m * c * (t[f"vit.{name}"] - base[name]) for m, c, t in zip(factors, lambdas, tuned, strict=True))
    torch.testing.assert_close(written[name], base[name] + moved)
