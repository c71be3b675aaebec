"""Models, LoRAs and data by Hub id: from a Hub on localhost, at a revision, from the cache, and refused with a cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from transformers import BertModel

from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.io.calibration import load_calibration
from mergekit_dam.io.hub_download import LocalReference, fetch, localise
from mergekit_dam.models.plan import model_input
from tests.helpers.hub_server import HubServer
from tests.helpers.merging import tensors_of
from tests.helpers.tiny_models import make_model


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """base, two fine-tunes, and a LoRA whose weights are not zero."""
    root = tmp_path_factory.mktemp("berts")
    base = make_model("BertModel", root / "base")
    for seed, name in enumerate("ab", start=1):
        make_model("BertModel", root / name, seed=seed, body=base)
    lora = get_peft_model(
        BertModel.from_pretrained(base), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    )
    lora.save_pretrained(root / "lora")
    return {name: files(root / name) for name in ("base", "a", "b", "lora")}


@pytest.fixture
def models(hub: HubServer, berts: dict[str, dict[str, bytes]]) -> HubServer:
    for name, content in berts.items():
        hub.add(f"lab/{name}", content)
    old = hub.repos["model", "lab/a"]
    old.branches["v1"] = dict(berts["b"])  # the tag v1 of a is another model than its main branch
    return hub


def recipe(*models: str, **more: Any) -> MergeConfiguration:
    entries = [{"model": name, "parameters": {"weight": 0.5}} for name in models]
    config = {"merge_method": "task_arithmetic", "base_model": "lab/base", "models": entries, **more}
    return MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(config)))


def merge(config: MergeConfiguration, out: Path) -> Path:
    inputs = localise(config, MergeOptions(quiet=True), lora_cache=out.parent / "lora")
    run_merge(inputs.config, str(out), inputs.options, config_source="x")
    return out


def test_a_revision_and_a_lora_are_what_is_merged(
    models: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: None
) -> None:
    config = recipe("lab/a@v1", "lab/base+lab/lora")
    inputs = localise(config, MergeOptions(), lora_cache=tmp_path / "lora")
    assert inputs.commits == {
        name: models.repos["model", name.partition("@")[0]].commit_id(name.partition("@")[2] or "main")
        for name in ("lab/base", "lab/a@v1", "lab/lora")
    }
    assert [str(m.model) for m in inputs.config.models or []] == ["lab/a@v1", "lab/base+lab/lora"]
    assert str(config) == str(recipe("lab/a@v1", "lab/base+lab/lora")), "the recipe itself was changed"
    online = tensors_of(merge(config, tmp_path / "online"))
    base, a, b = (fetch(f"lab/{n}", None)[0] for n in ("base", "a", "b"))
    query = next(n for n in online if n.endswith("0.attention.self.query.weight"))
    key = query.replace("query", "key")
    theta, of_a, of_b = tensors_of(base), tensors_of(a), tensors_of(b)
    assert (online[key] - (theta[key] + 0.5 * (of_b[key] - theta[key]))).abs().max() < 1e-6  # v1 holds b
    assert not (online[key] - (theta[key] + 0.5 * (of_a[key] - theta[key]))).abs().max() < 1e-6
    without = theta[query] + 0.5 * (of_b[query] - theta[query])
    assert (online[query] - without).abs().max() > 1e-3, "the LoRA had no effect"
    calls = len(models.calls)
    offline(monkeypatch)
    assert all((x == online[n]).all() for n, x in tensors_of(merge(config, tmp_path / "offline")).items())
    assert len(models.calls) == calls, "the cache was there, and the Hub was asked all the same"
    card = (tmp_path / "offline" / "README.md").read_text()
    assert "lab/base" in card and str(tmp_path) not in card


def test_a_branch_that_moves_is_merged_anew(models: HubServer, tmp_path: Path, registered: None) -> None:
    first = tensors_of(merge(recipe("lab/base+lab/lora", "lab/b"), tmp_path / "first"))
    models.repos["model", "lab/base"].branches["main"] = dict(models.repos["model", "lab/a"].branches["main"])
    second = tensors_of(merge(recipe("lab/base+lab/lora", "lab/b"), tmp_path / "second"))
    assert any((first[name] != second[name]).any() for name in first)


def test_a_download_that_breaks_off_is_taken_up_again(models: HubServer) -> None:
    models.fail("GET", "lab/a/resolve/.*model.safetensors", 0)
    models.fail("GET", "lab/a/resolve/.*config.json", 503)
    folder, _ = fetch("lab/a", None)
    assert (folder / "model.safetensors").read_bytes() == models.repos["model", "lab/a"].branches["main"][
        "model.safetensors"
    ]


def test_only_what_a_merge_needs_is_fetched(models: HubServer) -> None:
    repo = models.repos["model", "lab/a"]
    repo.branches["main"] |= {"dam/dam_masks.safetensors": b"x", "dam/heads/t.json": b"{}", "pytorch_model.bin": b"x"}
    folder, _ = fetch("lab/a", None)
    assert not {"dam/dam_masks.safetensors", "dam/heads/t.json", "pytorch_model.bin"} & set(files(folder))
    folder, _ = fetch("lab/a", None, everything=True)
    assert {"dam/dam_masks.safetensors", "dam/heads/t.json"} & set(files(folder)) == {"dam/heads/t.json"}


def refuse(config: MergeConfiguration, tmp_path: Path) -> str:
    with pytest.raises(DamError) as caught:
        localise(config, MergeOptions(), lora_cache=tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_name_the_cure(models: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.repos["model", "lab/a"].gated = True
    assert "Ask for access on its page" in refuse(recipe("lab/a", "lab/b"), tmp_path)
    assert "Check the id" in refuse(recipe("lab/missing", "lab/b"), tmp_path)
    assert "a branch, a tag or a commit" in refuse(recipe("lab/b@v9", "lab/base"), tmp_path)
    assert "BASE+ADAPTER" in refuse(recipe("lab/lora", "lab/b"), tmp_path)
    assert "an adapter that peft saved" in refuse(recipe("lab/base+lab/b", "lab/b"), tmp_path)
    assert "relative ones start at the working directory" in refuse(recipe("x/y/z", "lab/b"), tmp_path)
    models.add("lab/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert "Pickle can run code" in refuse(recipe("lab/pickled", "lab/b"), tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "The token was refused" in refuse(recipe("lab/a", "lab/b"), tmp_path)
    offline(monkeypatch)
    assert "hf download" in refuse(recipe("lab/never", "lab/b"), tmp_path)


def test_a_plain_mergekit_run_gets_the_same_cure(models: HubServer) -> None:
    models.repos["model", "lab/a"].gated = True
    with pytest.raises(DamError, match="Ask for access"):
        model_input("a", ModelReference.parse("lab/a"), ModelSettings(), MergeOptions())


def test_relative_paths_become_absolute_and_slices_are_seen(
    models: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model("BertModel", Path("here"))
    source = {"sources": [{"model": "lab/a", "layer_range": [0, 2]}, {"model": "./here", "layer_range": [0, 2]}]}
    config = MergeConfiguration.model_validate(
        {"merge_method": "linear", "slices": [source], "parameters": {"weight": 1.0}, "tokenizer": {"source": "lab/b"}}
    )
    found = localise(config, MergeOptions(), lora_cache=tmp_path).config
    paths = [s.model.local_path() for s in (found.slices or [])[0].sources]
    assert paths[1] == str(tmp_path / "here") and Path(paths[0], "model.safetensors").is_file()
    assert found.tokenizer is not None and isinstance(found.tokenizer.source, LocalReference)


def test_data_by_id_and_revision(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parquet(*rows: str) -> bytes:
        datasets.Dataset.from_dict({"text": list(rows)}).to_parquet(tmp_path / "x.parquet")
        return (tmp_path / "x.parquet").read_bytes()

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data")
    repo = hub.add("lab/data", {"data/train.parquet": parquet("new one", "new two")}, kind="dataset")
    repo.branches["v1"] = {"data/train.parquet": parquet("old one", "old two")}

    def load(name: str) -> set[Any]:
        settings = ModelSettings(calibration=name)
        return set(load_calibration(settings, "text", num_samples=2, seed=0, task="t").samples)

    assert load("lab/data") == {"new one", "new two"}
    assert load("lab/data@v1") == {"old one", "old two"}
    with pytest.raises(DamError, match=r"calibration of t .*Check the id"):
        load("lab/missing")
    with pytest.raises(DamError, match="a branch, a tag or a commit"):
        load("lab/data@v9")
    repo.gated = True
    with pytest.raises(DamError, match="Ask for access on its page"):
        load("lab/data")
