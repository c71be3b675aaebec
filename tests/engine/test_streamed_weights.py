"""`gather: block`: the merged model block by block gives the results of the whole one, and holds less of it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekit_dam.engine.streamed_weights import StreamedWeights, blocks_of, streamed_blocks
from tests.helpers.searching import learned

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "paper"},
        {"objective": "inversion", "suspicion": 0.0, "scan_steps": 2, "refresh_every": 1, "refresh_steps": 2},
        {"objective": "inversion", "mask": "m1", "granularity": "row", "rescale": True},
    ],
    ids=["paper", "inversion with triggers", "rows"],
)
def test_masks_learned_block_by_block_equal_those_of_the_whole_model(
    settings: dict[str, Any], vit: Path, images: Path
) -> None:
    whole, streamed = (learned(vit, images, blockwise=how, **settings) for how in (False, True))
    assert whole[2] == pytest.approx(streamed[2], rel=1e-4) and len(whole[2]) >= 3
    torch.testing.assert_close(streamed[1], whole[1], rtol=1e-3, atol=1e-5)
    # Adam's first steps have the size of the learning rate wherever a gradient is not zero: signs must agree
    for name, logits in whole[0].items():
        assert float((streamed[0][name] - logits).abs().gt(1e-2).float().mean()) < 0.02, name


def test_a_causal_lm_with_tied_embeddings_streams(llama: Path, texts: Path) -> None:
    whole, streamed = (learned(llama, texts, objective="inversion", blockwise=how) for how in (False, True))
    assert whole[2] == pytest.approx(streamed[2], rel=1e-4)
    torch.testing.assert_close(streamed[1], whole[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("blockwise", [False, True])
def test_bfloat16_learns_about_the_same(blockwise: bool, llama: Path, texts: Path) -> None:
    settings: dict[str, Any] = {"objective": "inversion", "blockwise": blockwise}
    exact, rough = (learned(llama, texts, compute_dtype=name, **settings) for name in ("float32", "bfloat16"))
    assert rough[2] == pytest.approx(exact[2], rel=0.1) and rough[2] != exact[2]
    assert all(logits.dtype == torch.float32 for logits in rough[0].values())
    torch.testing.assert_close(rough[1], exact[1], rtol=0.1, atol=0.03)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_only_one_block_exists_at_a_time_and_gradients_are_autograds() -> None:
    torch.manual_seed(0)
    net, plain = Net().to("meta"), Net()
    values = {name: p.detach() for name, p in plain.named_parameters()}
    alive: list[str] = []
    most = 0
    found: dict[str, Tensor] = {}

    def form(name: str) -> Tensor:
        nonlocal most
        formed = values[name].clone()
        alive.append(name)
        weakref.finalize(formed, alive.remove, name)
        most = max(most, len(alive))
        return formed

    weights = StreamedWeights(values, form, consume=lambda name, gradient: found.update({name: gradient}))
    blocks: dict[str, dict[str, str]] = {}
    for parameter, block in blocks_of(net).items():
        blocks.setdefault(block, {})[parameter] = parameter
    assert list(blocks) == ["layers.0", "layers.1", "layers.2"]
    x = torch.randn(5, 4)
    with weights.kept_as_names(blocks), streamed_blocks(net, weights, blocks):
        outside = {name: weights[name] for name in ("first.weight", "first.bias")}
        y = torch.func.functional_call(net, outside, (x,))
    weights.let_go(outside)
    del outside
    assert not alive and most == 4 and all(p.is_meta for p in net.parameters())
    torch.testing.assert_close(y, plain(x))
    y.square().sum().backward()
    plain(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
