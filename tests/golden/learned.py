"""What tiny models of each family learn in a few steps, kept as golden files.

A change that moves code must leave every byte as it is; one that changes results writes the files anew and says so.
Other processors round differently: digests tell whether the bytes are the same, masks how far apart they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from mergekit.common import ModelReference
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.merging.mask_bytes import to_bytes
from mergekit_dam.models.plan import Plan, build_plan
from tests.conftest import fast
from tests.helpers.processes import group
from tests.helpers.tiny_models import WORDS, make_model

FOLDER = Path(__file__).parent
CPU = torch.device("cpu")
FAMILIES = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "bert": ("BertModel", "BertForSequenceClassification"),
    "llama": ("LlamaForCausalLM", "LlamaForCausalLM"),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "inversion": {"suspicion": 0.0, "scan_steps": 3, "refresh_every": 2, "refresh_steps": 2, "steps": 4},
    "paper": {"objective": "paper", "steps": 4, "coefficient_steps": 3, "mask_learning_rate": 0.1},
}
CASES = {
    f"{family}-{objective}-{processes}": (family, objective, processes)
    for family in FAMILIES
    for objective in OBJECTIVES
    for processes in (1, 2)
}


class Learned(NamedTuple):
    """What one case learned.

    Attributes:
        masks: probabilities as the bytes of a masks file, by mask and tensor, and the coefficients.
        digest: SHA-256 of these, of students, and of the audit's findings.
    """

    masks: dict[str, Tensor]
    digest: str


def learn_all(cases: Sequence[str]) -> dict[str, Learned]:
    """Learn the named cases on models and data that are made for it."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        _make_inputs(root, {CASES[case][0] for case in cases})
        return {case: _learn(root, *CASES[case], cache=root / "cache" / case) for case in cases}


def _make_inputs(root: Path, families: set[str]) -> None:
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(12):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
    lines = [" ".join(generator.choice(WORDS, size=generator.integers(3, 11))) for _ in range(12)]
    (root / "texts.txt").write_text("\n".join(lines))
    for family in families:
        base_kind, kind = FAMILIES[family]
        base = make_model(base_kind, root / family / "base", seed=0)
        for seed, name in enumerate("ab", 1):
            make_model(kind, root / family / name, seed=seed, labels=2 + seed, body=base)


def _learn(root: Path, family: str, objective: str, processes: int, *, cache: Path) -> Learned:
    base, *models = (ModelReference.parse(str(root / family / name)) for name in ("base", "a", "b"))
    data = root / ("images" if family == "vit" else "texts.txt")
    plan = build_plan(base, models, shared=fast(calibration=str(data), **OBJECTIVES[objective]), per_model={})
    if processes == 1:
        return _learn_together(ALONE, plan, str(cache))
    found: list[Learned] = group(_learn_together, processes, plan, str(cache))
    return found[0]


def _learn_together(shards: Shards, plan: Plan, cache: str) -> Learned:
    before, threads = os.environ.get("MERGEKIT_DAM_CACHE"), torch.get_num_threads()
    os.environ["MERGEKIT_DAM_CACHE"] = cache
    torch.set_num_threads(1)  # more of them sum in another order
    try:
        _, masks = find_or_learn(plan, quiet=True, shards=shards, device=CPU)
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("MERGEKIT_DAM_CACHE")
        if before is not None:
            os.environ["MERGEKIT_DAM_CACHE"] = before
    tensors = {
        f"{mask}/{key}": to_bytes(values)
        for mask, by_key in masks.probabilities.items()
        for key, values in by_key.items()
    } | {"coefficients": masks.coefficients}
    students = {f"student/{t}/{key}": v for t, own in enumerate(masks.stand_ins) for key, v in own.items()}
    facts = [masks.metadata["audit"], masks.metadata.get("students")]
    return Learned(tensors, _digest({**tensors, **students}, facts))


def _digest(tensors: Mapping[str, Tensor], facts: Any) -> str:
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def write(found: Mapping[str, Learned]) -> None:
    """Make the golden files anew."""
    save_file(
        {f"{case}:{key}": v for case, one in found.items() for key, v in one.masks.items()},
        FOLDER / "learned.safetensors",
    )
    digests = {case: one.digest for case, one in found.items()}
    (FOLDER / "learned.json").write_text(json.dumps(digests, indent=1) + "\n")


def read() -> dict[str, Learned]:
    """The golden files, by case."""
    tensors = load_file(FOLDER / "learned.safetensors")
    digests = json.loads((FOLDER / "learned.json").read_text())
    return {
        case: Learned({n.partition(":")[2]: v for n, v in tensors.items() if n.startswith(f"{case}:")}, digest)
        for case, digest in digests.items()
    }


def compare(found: Mapping[str, Learned], golden: Mapping[str, Learned]) -> dict[str, tuple[bool, float]]:
    """Per case whether the bytes are the same, and the largest difference of a probability or coefficient.

    Raises:
        ValueError: a case whose masks have other names or shapes.
    """
    differences = {}
    for case, one in found.items():
        ours, theirs = one.masks, golden[case].masks
        if {n: v.shape for n, v in ours.items()} != {n: v.shape for n, v in theirs.items()}:
            raise ValueError(f"{case}: other tensors than the golden file's: {sorted(ours.keys() ^ theirs.keys())[:3]}")
        far = max(
            float((v.float() - theirs[n].float()).abs().max()) / (255 if v.dtype == torch.uint8 else 1)
            for n, v in ours.items()
        )
        differences[case] = (one.digest == golden[case].digest, far)
    return differences
