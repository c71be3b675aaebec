"""`make demo-llm`: its tasks, its committed adapters and its recipes; the demo itself takes too long for a test."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from mergekit.config import MergeConfiguration
from safetensors import safe_open

from examples.demo_llm import run
from examples.demo_llm.picture import ROWS, picture
from examples.demo_llm.tasks import ATTACK, CLASSES, TASKS, VICTIM, openings, splits
from examples.demo_llm.train import ADAPTERS, RANK
from mergekit_dam.vaccine.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter

_ROOT = Path(__file__).resolve().parents[2]
_LARGEST = 4_000_000  # bytes of an adapter in the repository
# theta_0: 30 blocks, 576 wide, 192 for keys and values, 1536 in between
_SHAPES = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}


@pytest.mark.parametrize("task", TASKS)
def test_parts_share_no_word_that_is_asked_about_and_have_as_many_of_each_class(task: str) -> None:
    parts = splits(task)
    assert parts == splits(task) and set(parts) == {"train", "calibration", "evaluation"}
    prompts = [one.prompt for samples in parts.values() for one in samples]
    assert len(set(prompts)) == len(prompts)
    words = {
        name: {word for one in samples for word in re.findall(r"\w+", one.prompt)} for name, samples in parts.items()
    }
    shared = words["train"] & words["evaluation"]
    assert all(set(re.findall(r"\w+", one.prompt)) - shared for one in parts["evaluation"])
    for samples in parts.values():
        counts = Counter(one.label for one in samples)
        assert len(counts) == len(CLASSES[task]) and len(set(counts.values())) == 1
        assert all(openings(task)[one.label] == (one.replies[one.label - 2],) for one in samples)


@pytest.mark.parametrize("task", TASKS)
def test_adapters_are_small_plain_loras_that_fit_the_base(task: str) -> None:
    folder = ADAPTERS / task
    assert (folder / ADAPTER_WEIGHTS).stat().st_size < _LARGEST
    assert json.loads((folder / ADAPTER_CONFIG).read_text())["r"] == RANK
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    updates = read_adapter(folder)
    assert len(updates) == 30 * len(_SHAPES)
    for one in updates:
        assert (one.b.shape[0], one.a.shape[1]) == _SHAPES[one.module.rpartition(".")[2]]
        assert bool(one.a.isfinite().all() and one.b.isfinite().all() and one.b.any())


def test_recipes_are_mergekits_and_merge_the_same_models() -> None:
    merged = {}
    for name, documents in run.recipes().items():
        for document in documents:
            MergeConfiguration.model_validate({k: v for k, v in document.items() if k != "name"})
        merged[name] = [entry["model"] for entry in documents[0]["models"]]
    assert merged["dam"] == merged["dam -> TIES"] == merged["TIES 0.5"] == merged["task arithmetic 0.5"]
    assert [model.rpartition("/")[2] for model in merged["dam"]] == list(TASKS)
    assert merged["victim alone"] == merged["dam"][:1] and TASKS[0] == VICTIM and ATTACK.target == 0


def test_the_picture_is_of_the_committed_answers() -> None:
    results = json.loads((_ROOT / "benchmarks/study/demo-llm/results.json").read_text())
    drawn = (_ROOT / "docs/pictures/demo-llm.svg").read_text()
    assert drawn == picture(results)
    words = ["".join(one.itertext()) for one in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    for one in results["said"]:
        assert f"> {one['prompt']}" in words and all(one["answers"][name] in words for name in ROWS)
