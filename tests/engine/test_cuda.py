"""What needs an accelerator: the search there gives the masks of the CPU, however the models come to it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from safetensors.torch import load_file

from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.merging.foreach import are_finite, groups, sums_of_sigmoids
from mergekit_dam.models.plan import build_plan
from tests.conftest import FAST, Merge
from tests.helpers.searching import learned, new_search
from tests.helpers.tiny_models import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = torch.device("cuda")
INVERSION = {"objective": "inversion", "suspicion": 0.0, "scan_steps": 2, "refresh_every": 1, "refresh_steps": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "paper"},
        INVERSION,
        {"objective": "inversion", "granularity": "row"},
        {"objective": "inversion", "mask": "m1", "granularity": "row", "rescale": True},
        {"objective": "inversion", "gradient_checkpointing": True},
    ],
    ids=["paper", "inversion with triggers", "rows", "rescaled rows", "checkpointing"],
)
def test_masks_equal_those_of_the_cpu(settings: dict[str, Any], vit: Path, images: Path) -> None:
    wanted = learned(vit, images, **settings)
    found = learned(vit, images, device=CUDA, **settings)
    assert wanted[2] == pytest.approx(found[2], rel=1e-3) and len(found[2]) >= 3
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-2, atol=1e-4)
    # Adam's first steps have the size of the learning rate wherever a gradient is not zero: signs must agree
    for name, logits in wanted[0].items():
        assert float((found[0][name] - logits).abs().gt(1e-2).float().mean()) < 0.05, name


def test_a_second_run_gives_the_same_bits(vit: Path, images: Path) -> None:
    first, second = (learned(vit, images, device=CUDA, **INVERSION) for _ in range(2))
    assert first[2] == second[2] and torch.equal(first[1], second[1])
    assert all(torch.equal(second[0][name], logits) for name, logits in first[0].items())


def test_bfloat16_stays_near(vit: Path, images: Path) -> None:
    exact, rough = (learned(vit, images, device=CUDA, compute_dtype=name) for name in ("float32", "bfloat16"))
    assert rough[2] != exact[2] and rough[2] == pytest.approx(exact[2], abs=0.02), "a loss is 0.07 at the start"
    torch.testing.assert_close(rough[1], exact[1], rtol=0.1, atol=0.02)


def test_mergekit_learns_and_merges_there(vit: Path, images: Path, merge: Merge) -> None:
    models, parameters = [vit / "a", vit / "b"], {**FAST, "calibration": str(images)}
    first = merge(vit / "base", models, parameters=parameters, dtype="float32", out="cpu")
    # finds the masks of the first one
    second = merge(vit / "base", models, parameters=parameters, dtype="float32", out="cuda", options={"cuda": True})
    assert json.loads((first / "dam" / "run.json").read_text())["device"].startswith("cuda")
    assert (first / "dam" / MASKS_FILE).read_bytes() == (second / "dam" / MASKS_FILE).read_bytes()
    on_cpu, on_cuda = (load_file(out / "model.safetensors") for out in (first, second))
    for name, tensor in on_cpu.items():
        torch.testing.assert_close(on_cuda[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["text", "causal"])
def test_students_and_continuations(kind: str, bert: Path, texts: Path, merge: Merge, tmp_path: Path) -> None:
    if kind == "causal":
        base = make_model("LlamaForCausalLM", tmp_path / "base", seed=0)
        models = [make_model("LlamaForCausalLM", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2)]
    else:
        base, models = bert / "base", [bert / "m1", bert / "m2"]
    found = []
    for device in ("cpu", CUDA.type):
        parameters = {**FAST, "calibration": str(texts), "device": device}
        out = merge(base, models, parameters=parameters, dtype="float32", out=device)
        found.append(load_file(out / "model.safetensors"))
        (out / "dam" / MASKS_FILE).unlink()
        shutil.rmtree(os.environ["MERGEKIT_DAM_CACHE"])  # or the second run would find the masks of the first
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-2, atol=5e-3)


def test_windows_learn_what_they_learn_on_the_cpu(vit: Path, images: Path) -> None:
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
    shared = {**FAST, "calibration": str(images), "window": 2, "suspicion": 0.0, "detection": "model"}
    plan = build_plan(refs[0], refs[1:], shared=shared, per_model={})
    wanted, found = (new_search(WindowSearch, plan, device=device).run() for device in (torch.device("cpu"), CUDA))
    torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=1e-2, atol=1e-3)
    for name, by_key in wanted[0].items():
        for key, values in by_key.items():
            far = (found[0][name][key].int() - values.int()).abs() > 2
            assert float(far.float().mean()) < 0.05, key


def test_grouped_reductions() -> None:
    tensors = [torch.randn(n, device=CUDA) for n in (5, 4000, 70001)]
    tensors.append(torch.tensor([1.0, torch.nan], device=CUDA))
    tensors.append(torch.tensor([-torch.inf, 1.0], device=CUDA))
    assert are_finite(tensors).tolist() == [True, True, True, False, False]
    sums = torch.stack([t.sigmoid().sum() for t in tensors[:3]])
    torch.testing.assert_close(sums_of_sigmoids(tensors[:3]), sums)
    assert [len(group) for group in groups([*tensors, tensors[0][:0]], 4005, torch.Tensor.numel)] == [2, 1, 2]
