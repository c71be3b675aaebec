"""Fixtures: small real models on disk, calibration data, and mergekit's own entry point in this process."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():  # before Triton is imported: kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import transformers
import yaml
from PIL import Image

from tests.helpers.constants import in_a_file
from tests.helpers.hub import hub, merged, merged_copy, push_plan  # noqa: F401 (fixtures for all)
from tests.helpers.lm_suite import lm_data, lm_suite  # noqa: F401 (likewise)
from tests.helpers.tiny_models import WORDS, make_model

transformers.logging.set_verbosity_error()
_FAST = {
    "steps": 3,
    "batch_size": 4,
    "num_samples": 8,
    "max_length": 12,
    "scan_steps": 4,
    "detection": "model",
    "student_steps": 2,
    # constants
    "coefficient_steps": 2,
    "refresh_steps": 2,
    "student_batch_size": 4,
}


def fast(**more: Any) -> dict[str, Any]:
    """Settings of a recipe that is learned in no time; constants among `more` go to the file that it names."""
    return in_a_file({**_FAST, **more})


FAST = fast()
# The modules that take longest, in this order, go first: then no worker is left alone with one of them at the end.
LONGEST = (
    "engine/test_shards.py",
    "faults/test_faults.py",
    "integration/test_examples.py",
    "learn/test_inversion_search.py",
    "plugin/test_autoload.py",
    "integration/test_chain.py",
    "learn/test_resume.py",
    "merging/test_triton.py",
    "scan/test_classifiers.py",
    "learn/test_windows.py",
    "bench/test_vision.py",
    "vaccine/test_vaccine.py",
    "engine/test_processes.py",
    "integration/test_notebook.py",
    "learn/test_golden_masks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    rank = {root / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def _stay_here(event: str, arguments: tuple[Any, ...]) -> None:
    """Tests talk to servers of their own on this machine at most."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments
        host = address[0] if isinstance(address, tuple) else None  # a path: a socket of this machine
        if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0"):
            raise RuntimeError(f"tests must not use the network: {event} {host}")


sys.addaudithook(_stay_here)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fixtures that several tests share use no cache of the user, nor of another worker."""
    os.environ["MERGEKIT_DAM_CACHE"] = str(tmp_path_factory.mktemp("session-cache"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(folder))
    return folder


@pytest.fixture
def registered() -> None:
    """Our model families are in mergekit's table, whether or not the autoload hook put them there."""
    from mergekit_dam.models.families import register_architectures

    register_architectures()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    rng = random.Random(0)
    file.write_text("\n".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 10))) for _ in range(12)))
    return file


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (headless) and two fine-tunes `a`, `b` with heads of different size."""
    root = tmp_path_factory.mktemp("vit")
    base = make_model("ViTModel", root / "base", seed=0)
    make_model("ViTForImageClassification", root / "a", seed=1, labels=3, body=base)
    make_model("ViTForImageClassification", root / "b", seed=2, labels=5, body=base)
    return root


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """base and two fine-tunes `a`, `b` whose table of words is their head as well."""
    base = make_model("LlamaForCausalLM", tmp_path / "base", seed=0, tie_word_embeddings=True)
    for i, name in enumerate("ab"):
        make_model("LlamaForCausalLM", tmp_path / name, seed=i + 1, body=base, tie_word_embeddings=True)
    return tmp_path


Merge = Callable[..., Path]


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    """Run mergekit's `run_merge` on a recipe built from a base, models and parameters; returns the output."""

    def run(
        base: Any, models: list[Any], *, out: str = "out", options: dict[str, Any] | None = None, **recipe: Any
    ) -> Path:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        config = {"merge_method": "dam", "base_model": base if isinstance(base, dict) else str(base), **recipe}
        config["models"] = [m if isinstance(m, dict) else {"model": str(m)} for m in models]
        source = yaml.safe_dump(config)
        parsed = MergeConfiguration.model_validate(yaml.safe_load(source))
        run_merge(parsed, str(tmp_path / out), MergeOptions(quiet=True, **(options or {})), config_source=source)
        return tmp_path / out

    return run


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """theta_0 of a small BERT and two classifiers on it: base, m1, m2."""
    root = tmp_path_factory.mktemp("bert")
    base = make_model("BertModel", root / "base")
    for i in (1, 2):
        make_model("BertForSequenceClassification", root / f"m{i}", seed=i, body=base)
    return root
