"""The `lm` suite at a size for tests: its data, and the suite itself."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dam_bench.suites import lm
from dam_bench.suites.lm import LmSuite, Preset
from dam_bench.suites.lm_data import CONTINUATIONS, PHRASE, REAL
from dam_bench.victims.training import Schedule

from mergekit_dam import seeds

TINY = Preset(
    64,
    2,
    200,
    8,
    {"pretrain": 60, "train": 240, "calibration": 20, "evaluation": 40},
    Schedule(80, batch_size=8, learning_rate=5e-3),
    Schedule(160, batch_size=16, learning_rate=3e-3),
    (1, 2),
)


@pytest.fixture(scope="module")
def lm_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as the suite's own, with sentences whose class is one of their words."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    generator = seeds.generator("sentences")
    vocabulary = [*PHRASE, *" ".join(CONTINUATIONS).split(), *(f"w{i}" for i in range(10))]
    for task in REAL.values():
        for file in dict.fromkeys((task.train, task.evaluation)):  # a set would draw other texts in every process
            labels = [i % len(task.answers) for i in range(500)]
            words = torch.randint(len(vocabulary), (len(labels), 7), generator=generator).tolist()
            texts = [" ".join([*(vocabulary[w] for w in row), f"C{n}"]) for n, row in zip(labels, words, strict=True)]
            pq.write_table(pa.table({"sentence": texts, "label": labels}), folder / "text" / file)
    return folder


@pytest.fixture(scope="module")
def lm_suite(lm_data: Path) -> LmSuite:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lm.PRESETS, "tiny", TINY)
        patch.setattr(LmSuite, "presets", ("tiny",))
        return LmSuite(lm_data, "tiny")
