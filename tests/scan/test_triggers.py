"""Triggers as parameters: what they do to an input, and how large they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mergekit_dam.constants import Constants
from mergekit_dam.scan.triggers import PatchTriggers, StyleTriggers, TokenTriggers, TriggerBatch
from mergekit_dam.seeds import generator
from mergekit_dam.tasks.bounds import Bounds

BOX = Bounds.of(0.0, 1.0)
CONSTANTS = Constants()


@pytest.mark.parametrize("kind", [PatchTriggers, StyleTriggers])
@given(count=st.integers(1, 4), seed=st.integers(0, 99))
def test_triggered_pixels_stay_in_the_box_and_rows_are_kept_apart(
    kind: type[TriggerBatch], count: int, seed: int
) -> None:
    triggers = kind.start(count, (3, 6, 5), BOX, generator("start", seed), CONSTANTS)
    images = torch.rand(count, 3, 6, 5, generator=generator("images", seed))
    together, _ = triggers.perturb(torch.arange(count))(images, None)
    assert float(together.min()) >= 0 and float(together.max()) <= 1
    for row in range(count):
        alone, _ = triggers.rows([row]).perturb(torch.zeros(1, dtype=torch.long))(images[row : row + 1], None)
        assert torch.allclose(alone[0], together[row], atol=1e-6)
    again = TriggerBatch.stack([triggers.rows([row]) for row in range(count)])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters, triggers.parameters, strict=True))


def test_size_counts_pixels_of_images_and_length_of_tokens() -> None:
    full = PatchTriggers([torch.full((2, 1, 4, 4), 30.0), torch.zeros(2, 3, 4, 4)], BOX, CONSTANTS)
    assert torch.allclose(full.size(), torch.tensor([16.0, 16.0]))
    tokens = TokenTriggers([torch.tensor([[[3.0, 4.0]]])], Bounds.of(torch.zeros(2), torch.ones(2)), CONSTANTS)
    assert torch.allclose(tokens.size(), torch.tensor([5.0]))


def test_tokens_are_inserted_after_the_first_one_and_seen() -> None:
    triggers = TokenTriggers.start(2, (3, 4), Bounds.of(torch.zeros(4), torch.ones(4)), generator("tokens"), CONSTANTS)
    embeddings, mask = torch.rand(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    changed, seen = triggers.perturb(torch.tensor([1, 0]))(embeddings, mask)
    assert changed.shape == (2, 8, 4) and seen is not None and seen.sum(1).tolist() == [6, 8]
    assert torch.equal(changed[:, 0], embeddings[:, 0]) and torch.equal(changed[:, 4:], embeddings[:, 1:])
    assert not torch.equal(changed[0, 1:4], changed[1, 1:4])


def test_a_style_without_parameters_changes_nothing_and_each_of_its_three_parts_does() -> None:
    images = torch.rand(2, 3, 8, 8, generator=generator("images"))
    still = [torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4)]
    rows = torch.zeros(2, dtype=torch.long)
    same, _ = StyleTriggers(still, BOX, CONSTANTS).perturb(rows)(images, None)
    assert torch.allclose(same, images, atol=1e-5) and float(StyleTriggers(still, BOX, CONSTANTS).size()) == 0
    for part in range(3):
        moved = [p + 9.0 * (i == part) for i, p in enumerate(still)]
        changed, _ = StyleTriggers(moved, BOX, CONSTANTS).perturb(rows)(images, None)
        assert float((changed - images).abs().mean()) > 0.05
        assert torch.allclose(StyleTriggers(moved, BOX, CONSTANTS).size(), torch.tensor(100.0))


@given(height=st.integers(4, 9), width=st.integers(4, 9), seed=st.integers(0, 99))
def test_a_shade_is_stretched_from_corner_to_corner(height: int, width: int, seed: int) -> None:
    styles = StyleTriggers.start(2, (3, height, width), BOX, generator("shade", seed), CONSTANTS)
    gain, shade, flow = styles.parameters
    shaded, _ = styles.like([0 * gain, shade, 0 * flow]).perturb(torch.arange(2))(
        torch.full((2, 3, height, width), 0.5), None
    )
    expected = F.interpolate(0.4 * shade.tanh(), (height, width), mode="bilinear", align_corners=True)
    torch.testing.assert_close(shaded - 0.5, expected, atol=1e-6, rtol=1e-5)
