"""A forward pass in parts: any cut of the blocks gives what the whole pass gives, with those parts' weights alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference

from mergekit_dam.learn.paper_search import UniversalPerturbation
from mergekit_dam.models.plan import build_plan
from mergekit_dam.seeds import generator
from mergekit_dam.tasks import Task, build_tasks
from tests.conftest import FAST
from tests.helpers.tiny_models import make_model, save_tokenizer
from tests.plugin.test_method import FAMILIES

CPU = torch.device("cpu")
END = 4  # embeddings, two blocks, head
CHAINS = [pair for pair in FAMILIES if pair[1] != "CLIPModel"]


def _task(root: Path, base_kind: str, kind: str, data: Path) -> Task:
    base = make_model(base_kind, root / "base", labels=3)
    models = [make_model(kind, root / f"m{i}", seed=i, labels=3, body=base) for i in (1, 2)]
    refs = [ModelReference.parse(str(path)) for path in (base, *models)]
    return build_tasks(build_plan(refs[0], refs[1:], shared={**FAST, "calibration": str(data)}, per_model={}), CPU)[0]


@pytest.mark.parametrize("triggered", [False, True])
@pytest.mark.parametrize(("base_kind", "kind"), CHAINS)
def test_parts_make_the_whole(
    base_kind: str, kind: str, triggered: bool, tmp_path: Path, images: Path, texts: Path
) -> None:
    task = _task(tmp_path, base_kind, kind, images if "ViT" in kind or "CLIP" in kind else texts)
    assert task.chain is not None and task.chain.end == END
    own, inputs = task.own_weights(), task.inputs(torch.arange(5))
    perturb, shape = None, task.perturbation_shape
    if triggered:
        perturb = UniversalPerturbation(shape, task.bounds, eps=0.5, inserts=len(shape) == 2, generator=generator(0))
    with torch.no_grad():
        whole = task.logits(own, inputs, perturb)

    @settings(max_examples=8, deadline=None)
    @given(st.sets(st.integers(1, END - 1)))
    def any_cut(cuts: set[int]) -> None:
        states = None
        for first, stop in pairwise([0, *sorted(cuts), END]):
            weights = {n: t for n, t in own.items() if any(first <= p < stop for p in task.positions[n])}
            with torch.no_grad():
                states = task.through(weights, inputs, first, stop, states, perturb)
        assert states is not None
        torch.testing.assert_close(states, whole)

    any_cut()


def test_inserted_tokens_are_left_out_and_padding_is_counted(tmp_path: Path, texts: Path) -> None:
    task = _task(tmp_path, "LlamaForCausalLM", "LlamaForCausalLM", texts)
    inputs = task.inputs(torch.arange(5))
    length = inputs["input_ids"].shape[1]
    assert task.token_counts(torch.arange(5)) == inputs["attention_mask"].sum(1).tolist()
    hidden_BLD = torch.arange(length + 3.0)[None, :, None].expand(5, -1, 2)
    kept = task.without_trigger(hidden_BLD, length)[0, :, 0].tolist()
    assert kept == [0.0, *range(4, length + 3)]


def test_two_towers_are_no_chain(tmp_path: Path, images: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("cat\ndog\n")
    base = make_model("CLIPModel", tmp_path / "base")
    save_tokenizer(base)
    models = [make_model("CLIPModel", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2)]
    refs = [ModelReference.parse(str(path)) for path in (base, *models)]
    shared = {**FAST, "calibration": str(images), "classes": str(names)}
    assert build_tasks(build_plan(refs[0], refs[1:], shared=shared, per_model={}), CPU)[0].chain is None
