"""`check` on models of the Hub: bytes are counted, and the plan is the one that a merge makes from the whole models."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import constants, snapshot_download
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

from mergekit_dam.cli.main import main
from mergekit_dam.errors import DamError
from mergekit_dam.io.hub_download import fetch
from mergekit_dam.recipe import open_recipe, preview
from tests.helpers.hub_server import HubServer
from tests.helpers.tiny_models import make_model

LARGE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}  # 1.1 MB each, headers of 3 kB


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """base, a classifier in one file, one in shards, and a LoRA."""
    root = tmp_path_factory.mktemp("large")
    base = make_model("BertModel", root / "base", **LARGE)
    make_model("BertForSequenceClassification", root / "one", seed=1, body=base, **LARGE)
    make_model("BertForSequenceClassification", root / "shards", seed=2, body=base, **LARGE)
    model = BertForSequenceClassification.from_pretrained(root / "shards")
    (root / "shards" / "model.safetensors").unlink()
    model.save_pretrained(root / "shards", max_shard_size="400KB")
    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(root / "lora")
    return {name: files(root / name) for name in ("base", "one", "shards", "lora")}


@pytest.fixture
def large_hub(hub: HubServer, large: dict[str, dict[str, bytes]]) -> Iterator[HubServer]:
    for name, content in large.items():
        hub.add(f"lab/{name}", content)
    yield hub


def recipe(folder: Path, texts: Path, *models: str) -> Path:
    entries = [{"model": name, "parameters": {"calibration": str(texts)}} for name in models]
    config = {"merge_method": "dam", "base_model": "lab/base", "models": entries, "parameters": {"num_samples": 8}}
    (folder / "dam.yml").write_text(yaml.safe_dump(config))
    return folder / "dam.yml"


def check(file: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["check", str(file), "--json", *options])


def test_no_weight_is_fetched_and_the_plan_is_that_of_the_merge(
    large_hub: HubServer, tmp_path: Path, texts: Path
) -> None:
    file = recipe(tmp_path, texts, "lab/one", "lab/shards")
    done = check(file, "--quiet")
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    weights = [(path, size) for path, size in large_hub.sent if ".safetensors" in path and ".json" not in path]
    shards = sum(name.endswith(".safetensors") for name in large_hub.repos["model", "lab/shards"].branches["main"])
    assert shards > 2 and len(weights) == shards + 2  # one request a file
    assert all(size <= 100_001 for _, size in weights)
    held = sum(len(c) for repo in large_hub.repos.values() for c in repo.branches["main"].values())
    assert large_hub.bytes_of("") < held / 3
    cache = Path(constants.HF_HUB_CACHE)
    assert not list(cache.rglob("*.safetensors")), "a later merge could take these for models"
    with preview(file, options=MergeOptions()) as looked:
        told = [(t.name, t.shape, t.dtype, t.base_source, t.sources) for t in looked.tensors]
    whole = open_recipe(file, options=MergeOptions()).plan
    assert told == [(t.name, t.shape, t.dtype, t.base_source, t.sources) for t in whole.tensors]
    facts = json.loads(done.stdout)
    assert {name: m["revision"] for name, m in facts["models"].items()} == {
        name: large_hub.repos["model", f"lab/{name}"].commit_id("main") for name in ("one", "shards")
    }


def test_a_lora_is_not_merged_to_be_looked_at(
    large_hub: HubServer, tmp_path: Path, texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = check(recipe(tmp_path, texts, "lab/one", "lab/shards+lab/lora"))
    assert done.exit_code == 0 and set(json.loads(done.stdout)["models"]) == {"one", "lora"}, done.stderr
    assert not list(cache.iterdir())


def test_what_is_in_the_cache_is_not_asked_for_again(
    large_hub: HubServer, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(tmp_path, texts, "lab/one", "lab/shards")
    for name in ("lab/base", "lab/one", "lab/shards"):
        snapshot_download(name)
    sent = large_hub.bytes_of(r"\.safetensors$")
    assert check(file).exit_code == 0 and large_hub.bytes_of(r"\.safetensors$") == sent
    calls = len(large_hub.calls)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert check(file).exit_code == 0 and len(large_hub.calls) == calls, "offline, the cache is enough"


def test_looking_first_hinders_no_merge(large_hub: HubServer, tmp_path: Path) -> None:
    fetch("lab/one", None, headers=tmp_path / "looked")
    whole, _ = fetch("lab/one", None)
    assert (whole / "model.safetensors").read_bytes() == large_hub.repos["model", "lab/one"].branches["main"][
        "model.safetensors"
    ]


@pytest.mark.parametrize(
    "header",
    [
        b"not json" + b" " * 8,
        b'{"t":{"dtype":"F32","shape":[4],"data_offsets":[0,9223372036854775807]}}',
        b'{"t":{"dtype":"F32","shape":[4],"data_offsets":[0,"16"]}}',
        b'{"t":{"dtype":"F32"}}',
    ],
)
def test_damaged_and_hostile_headers_are_refused_by_name(hub: HubServer, tmp_path: Path, header: bytes) -> None:
    content = struct.pack("<Q", len(header)) + header + b"\0" * 16
    hub.add("lab/bad", {"config.json": b"{}", "model.safetensors": content})
    with pytest.raises(DamError, match=r"model\.safetensors of model .*expected a complete safetensors file"):
        fetch("lab/bad", None, headers=tmp_path / "headers")


def test_gated_models_and_lost_answers(large_hub: HubServer, tmp_path: Path, texts: Path) -> None:
    file = recipe(tmp_path, texts, "lab/one", "lab/shards")
    large_hub.fail("GET", r"lab/one/resolve/.*\.safetensors", 503)
    large_hub.fail("GET", r"lab/base/resolve/.*\.safetensors", 0)
    assert check(file).exit_code == 0
    large_hub.repos["model", "lab/one"].gated = True
    done = check(file)
    assert done.exit_code == 3 and "Ask for access on its page" in done.stderr
