"""The artefact's format, byte for byte: what one version writes, the next must read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_dam.artifact import SCHEMA, LearnedMasks, load, save

GOLDEN = Path(__file__).parent / "golden" / "dam_masks.safetensors"
WITHOUT_CHECKSUM = GOLDEN.with_name("dam_masks_without_checksum.safetensors")  # as version 0.1 wrote it


def _masks() -> LearnedMasks:
    values = torch.arange(6, dtype=torch.float16).reshape(2, 3) / 8
    probabilities = {"task_shared": {"w": values, "b": values[:, 0]}, "backdoor_detection": {"w": 1 - values}}
    metadata = {
        "schema": SCHEMA, "settings": {"rescale": True}, "base": {"model": "base", "sha256": "0" * 64},
        "models": [{"name": n, "model": n, "sha256": n * 64, "settings": {}, "samples": []} for n in "ab"],
        "tensors": ["w", "b"],
    }  # fmt: skip
    return LearnedMasks(probabilities, torch.tensor([[0.25, 0.5], [0.125, 1.0]]), metadata)


def test_writing_gives_the_golden_bytes(tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", _masks())
    assert (tmp_path / "m.safetensors").read_bytes() == GOLDEN.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("file", [GOLDEN, WITHOUT_CHECKSUM])
def test_the_golden_file_is_read_and_applied(file: Path) -> None:
    masks = load(file)
    first = torch.arange(6).reshape(2, 3) / 8
    expected = (first / first.mean()) * ((1 - first) / (1 - first).mean())
    found = masks.mask("w")
    assert found is not None
    torch.testing.assert_close(found, expected)
    assert torch.equal(masks.coefficients_of("b"), torch.tensor([0.5, 1.0]))
    assert not masks.has("c") and masks.mask("c") is None
