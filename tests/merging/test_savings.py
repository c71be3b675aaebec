"""What saves time or memory leaves the results as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_dam.engine.shards import schedule
from mergekit_dam.io import cache
from mergekit_dam.io.cache import cached_fact
from mergekit_dam.merging.mask_product import MaskProduct
from mergekit_dam.merging.rule import gradients, logit_gradients
from mergekit_dam.models.plan import build_plan
from mergekit_dam.tasks import build_tasks
from tests.conftest import FAST
from tests.helpers.searching import learned
from tests.helpers.tiny_models import make_model

CPU = torch.device("cpu")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    base = make_model("LlamaForCausalLM", tmp_path / "base", seed=0)
    for i, name in enumerate("ab"):
        make_model("LlamaForCausalLM", tmp_path / name, seed=i + 1, body=base)
    return tmp_path


@given(
    shape=st.sampled_from([(), (1,), (5,), (3, 4), (2, 3, 2)]),
    num_models=st.integers(1, 3),
    num_masks=st.integers(0, 2),
    missing=st.booleans(),
    half=st.booleans(),
    own=st.booleans(),
    temperature=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_one_reading_gives_the_gradients_of_two(
    shape: tuple[int, ...],
    num_models: int,
    num_masks: int,
    missing: bool,
    half: bool,
    own: bool,
    temperature: float,
    seed: int,
) -> None:
    source = torch.Generator().manual_seed(seed)
    new = lambda: torch.randn(shape, generator=source)  # noqa: E731
    base, gradient = (t.bfloat16() if half else t for t in (new(), new()))
    models: list[Tensor | None] = [new() for _ in range(num_models)]
    models = [None, *models] if missing else models
    coefficients = torch.randn(len(models), generator=source)
    own = own or num_masks == 0
    mask = MaskProduct(
        tuple(new() for _ in range(num_masks)),
        logits=True,
        temperature=temperature,
        own=tuple(new() for _ in models if own),
    )
    wanted = range(len(mask.parts))
    there, here = torch.zeros(len(models)), torch.zeros(len(models))
    to_mask = torch.zeros(mask.gradient_shape)
    gradients(gradient, base, models, coefficients, mask, mask_out=to_mask, coefficient_out=there)
    expected = mask.logit_gradients(to_mask, wanted)
    found = logit_gradients(gradient, base, models, coefficients, mask, wanted, coefficient_out=here)
    # what models have of their own is multiplied in another order
    same = partial(torch.allclose, rtol=1e-5, atol=1e-6) if own else torch.equal
    assert torch.equal(here, there) and all(map(same, found, expected)) and len(found) == len(mask.parts)


@given(batch_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), size=st.integers(1, 12))
def test_every_sample_is_dealt_to_one_process(batch_sizes: list[int], size: int) -> None:
    seen: list[tuple[int, int]] = []
    lengths = set()
    for rank in range(size):
        ours = schedule(batch_sizes, SimpleNamespace(size=size, rank=rank))  # type: ignore[arg-type]
        lengths.add(len(ours))
        for item in ours:
            if item is not None:
                seen += [(item.task, int(i)) for i in item.of(torch.arange(batch_sizes[item.task]))]
                assert len(item.of(torch.arange(batch_sizes[item.task])))
    assert sorted(seen) == [(task, i) for task, count in enumerate(batch_sizes) for i in range(count)]
    assert len(lengths) == 1


def test_recomputed_blocks_learn_the_same(llama: Path, texts: Path) -> None:
    plain, again = (learned(llama, texts, objective="inversion", gradient_checkpointing=on) for on in (False, True))
    assert plain[2] == again[2] and torch.equal(plain[1], again[1])
    assert all(torch.equal(again[0][name], logits) for name, logits in plain[0].items())


def test_recomputed_blocks_keep_less(llama: Path, texts: Path) -> None:
    kept = {}
    for on in (False, True):
        refs = [ModelReference.parse(str(llama / name)) for name in ("base", "a", "b")]
        shared = {**FAST, "calibration": str(texts), "gradient_checkpointing": on}
        task = build_tasks(build_plan(refs[0], refs[1:], shared=shared, per_model={}), CPU)[0]
        weights = {name: tensor.requires_grad_(True) for name, tensor in task.own_weights().items()}
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            task.logits(weights, task.inputs(torch.arange(4)))
        kept[on] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_bfloat16_learns_about_the_same(llama: Path, texts: Path) -> None:
    exact, rough = (
        learned(llama, texts, compute_dtype=name, objective="inversion") for name in ("float32", "bfloat16")
    )
    assert rough[2] == pytest.approx(exact[2], rel=0.1) and rough[2] != exact[2]
    assert all(logits.dtype == torch.float32 for logits in rough[0].values())
    torch.testing.assert_close(rough[1], exact[1], rtol=0.1, atol=0.03)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_MIN_AGE", -1.0)
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(cache._CACHED_FROM)
    yield path


def _reads(path: Path, answers: Sequence[str]) -> list[str]:
    """What is told while the reader would give one answer after another."""
    return [cached_fact(path, "fact", lambda answer=answer: answer) for answer in answers]  # type: ignore[misc]


def test_an_unchanged_file_is_read_once(large: Path) -> None:
    assert _reads(large, "abc") == ["a", "a", "a"]
    assert cached_fact(large, "other fact", lambda: "x") == "x"


def test_a_changed_file_is_read_again_though_its_date_was_put_back(large: Path) -> None:
    _reads(large, "a")
    before = large.stat()
    with large.open("r+b") as file:
        file.write(b"x")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = large.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert _reads(large, "b") == ["b"]
    other = large.with_name("other")
    other.write_bytes(large.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, large)
    assert _reads(large, "c") == ["c"]


@pytest.mark.parametrize("fault", ["writable by all", "broken", "young file", "small file", "no cache"])
def test_what_cannot_be_relied_on_is_not_used(fault: str, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "young file":
        monkeypatch.setattr(cache, "_MIN_AGE", 60.0)
    if fault == "small file":
        os.truncate(large, cache._CACHED_FROM - 1)
    if fault == "no cache":
        (large.parent / "file").touch()
        monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(large.parent / "file"))
    _reads(large, "a")
    for entry in (large.parent / "cache" / "known").glob("*.json"):
        if fault == "writable by all":
            entry.chmod(0o666)
        if fault == "broken":
            entry.write_text("{")
    assert _reads(large, "b") == ["b"]


def test_what_a_reader_raises_is_not_remembered(large: Path) -> None:
    def damaged() -> str:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        cached_fact(large, "fact", damaged)
    assert _reads(large, "a") == ["a"]
