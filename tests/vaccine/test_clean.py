"""`clean`: model directories that any method merges, what stands beside them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_dam import api
from mergekit_dam.api import clean
from mergekit_dam.cli.main import main
from mergekit_dam.errors import DamError
from mergekit_dam.models.load_merged import load_merged
from tests.helpers.constants import constants_file
from tests.helpers.tiny_models import make_model
from tests.vaccine.conftest import FEW, data_of

LM = {**FEW, "constants": constants_file(answer_tokens=4), "max_length": 24}


def _options(**settings: Any) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def _run(*arguments: object, rc: int = 0) -> str:
    done = CliRunner().invoke(main, ["clean", *map(str, arguments), "--quiet"])
    assert done.exit_code == rc, done.output
    return done.output


@pytest.fixture(scope="module")
def causal(folders: dict[str, Path]) -> Path:
    return folders["causal"]


@pytest.fixture(scope="module")
def cleaned(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cleaned causal LMs, by the command; the second is another fine-tune, in bfloat16."""
    root = tmp_path_factory.mktemp("cleaned")
    other = transformers.LlamaForCausalLM.from_pretrained(causal / "model", dtype=torch.bfloat16)
    other.save_pretrained(root / "other")
    for file in (causal / "model").glob("*token*"):
        shutil.copy(file, root / "other")
    _run(
        causal / "model",
        root / "other",
        "--base",
        causal / "base",
        "--data",
        data_of(causal),
        "-o",
        root / "out",
        *_options(**LM),
    )
    return root


def test_any_method_merges_what_clean_wrote(cleaned: Path, causal: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "ties",
        "base_model": str(causal / "base"),
        "dtype": "float32",
        "models": [
            {"model": str(cleaned / "out" / name), "parameters": {"weight": 0.5, "density": 0.5}}
            for name in ("model", "other")
        ],
    }
    config = MergeConfiguration.model_validate(recipe)
    run_merge(config, str(tmp_path), MergeOptions(quiet=True), config_source=yaml.safe_dump(recipe))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path) and isinstance(merged, transformers.LlamaForCausalLM)


@pytest.mark.parametrize("name", ["model", "other"])
def test_files_and_types_are_the_input_s(name: str, cleaned: Path, causal: Path) -> None:
    source = causal / "model" if name == "model" else cleaned / "other"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, cleaned / "out" / name))
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and before[n].shape == after[n].shape for n in before)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and not any("embed" in n or "lm_head" in n or "norm" in n for n in changed)
    kept = {file.name for file in source.iterdir()} - {"model.safetensors"}
    written = {file.name for file in (cleaned / "out" / name).iterdir()}
    assert written == kept | {"model.safetensors", "vaccine.json", "README.md"}
    assert all((source / n).read_bytes() == (cleaned / "out" / name / n).read_bytes() for n in kept)


def test_reports_say_what_was_planted_and_no_path(cleaned: Path, causal: Path) -> None:
    folder = cleaned / "out" / "model"
    facts, card = json.loads((folder / "vaccine.json").read_text()), (folder / "README.md").read_text()
    assert len(facts["planted"]) == FEW["triggers"] + FEW["held_out"]
    assert {"held_out", "unlearned", "agreement", "samples", "settings", "model", "seconds"} <= facts.keys()
    assert card.count("\n| `") == len(facts["planted"]) and "does not prove" in card
    for text in (json.dumps(facts), card):
        assert str(causal) not in text and str(cleaned) not in text


def test_a_finished_model_is_not_cleaned_again(cleaned: Path, causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (
        causal / "model",
        "--base",
        causal / "base",
        "--data",
        data_of(causal),
        "-o",
        cleaned / "out" / "model",
    )
    before = (cleaned / "out" / "model" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("mergekit_dam.vaccine.run.vaccinate", None)
        _run(*arguments, *_options(**LM))
    _run(*arguments, *_options(**LM), "--no-resume")
    assert (cleaned / "out" / "model" / "model.safetensors").read_bytes() == before
    _run(*arguments, *_options(**LM, seed=1))
    assert (cleaned / "out" / "model" / "model.safetensors").read_bytes() != before


def test_an_adapter_adds_what_the_whole_model_has(causal: Path, tmp_path: Path) -> None:
    whole, added = (
        clean(causal / "model", tmp_path / str(on), base=causal / "base", data=data_of(causal), adapter=on, **LM)
        for on in (False, True)
    )
    model = transformers.LlamaForCausalLM.from_pretrained(causal / "model")
    merged = peft.PeftModel.from_pretrained(model, added[0].folder).merge_and_unload().state_dict()
    for name, tensor in load_file(whole[0].folder / "model.safetensors").items():
        assert torch.allclose(merged[name], tensor, atol=1e-6)


@pytest.fixture
def lora(causal: Path, tmp_path: Path) -> Path:
    """An adapter that changes a few of the layers that cleaning changes."""
    base = transformers.LlamaForCausalLM.from_pretrained(causal / "base")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights=False
    )
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_a_lora_is_cleaned_into_a_model_or_a_lora(causal: Path, lora: Path, tmp_path: Path) -> None:
    model, base, data = f"{causal / 'base'}+{lora}", causal / "base", data_of(causal)
    whole, added = (
        clean(model, tmp_path / str(on), base=base, data=data, adapter=on, **LM)[0].folder for on in (False, True)
    )
    cleaned = load_file(whole / "model.safetensors")
    assert set(cleaned) == set(load_file(causal / "base" / "model.safetensors"))
    loaded = transformers.LlamaForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(loaded, added).merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in cleaned.items())


@pytest.mark.parametrize(
    ("changes", "said"), [({"use_dora": True}, "one with use_dora"), ({"bias": "all"}, "one with biases")]
)
def test_a_lora_that_is_no_product_gives_no_lora(
    changes: dict[str, Any], said: str, causal: Path, lora: Path, tmp_path: Path
) -> None:
    base, settings = causal / "base", json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(DamError, match=said):
        clean(f"{base}+{lora}", tmp_path / "out", base=base, data=data_of(causal), adapter=True, **LM)


def test_a_recipe_says_what_is_cleaned(vit: Path, images: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "dam",
        "base_model": str(vit / "base"),
        "parameters": {"calibration": str(images), "seed": 3},
        "models": [{"model": str(vit / name)} for name in "ab"],
    }
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(recipe))
    found = json.loads(_run(tmp_path / "dam.yml", "-o", tmp_path / "out", *_options(**FEW), "--json"))
    assert [one["name"] for one in found] == ["a", "b"] and {one["settings"]["seed"] for one in found} == {3}
    for one in found:
        assert isinstance(load_merged(one["output"]), transformers.ViTForImageClassification)


def test_a_sharded_model_stays_sharded(causal: Path, tmp_path: Path) -> None:
    shutil.copytree(causal / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    names = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    for half, name in zip(halves, names, strict=True):
        save_file(half, tmp_path / "model" / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: name for half, name in zip(halves, names, strict=True) for n in half}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (found,) = clean(tmp_path / "model", tmp_path / "out", base=causal / "base", data=data_of(causal), **LM)
    assert sorted(file.name for file in found.folder.glob("*.safetensors")) == names
    (whole,) = clean(causal / "model", tmp_path / "whole", base=causal / "base", data=data_of(causal), **LM)
    one, other = (transformers.LlamaForCausalLM.from_pretrained(c.folder).state_dict() for c in (found, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_check_tells_the_time_and_writes_nothing(causal: Path, tmp_path: Path) -> None:
    arguments = (causal / "model", "--base", causal / "base", "--data", data_of(causal), "-o", tmp_path / "out")
    facts = json.loads(_run(*arguments, *_options(**LM), "--check", "--json"))
    assert facts["seconds"] > 0 and facts["models"][0]["name"] == "model" and not (tmp_path / "out").exists()
    told = CliRunner().invoke(main, ["clean", *map(str, arguments), *_options(**LM), "--check"])
    assert told.exit_code == 0 and "about" in told.stdout
    assert _run(*arguments, *_options(**LM), "--check") == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out": "model"}, "got model model"),
        ({"out": "base"}, "got the base"),
        ({"out": "full"}, "or one that `clean` wrote"),
        ({"out": "file"}, "got a file"),
        ({"data": None}, "unlabelled inputs"),
        ({"data": "missing.txt"}, "no such file"),
        ({"data": ["data.txt", "data.txt"]}, "in the order of the models"),
        ({"models": "missing"}, "expected a directory or a Hub id"),
        ({"models": "state-space"}, "other methods"),
        ({"base": None}, "fine-tuned from"),
        ({"base": "model"}, "a fine-tuned model and the base"),
        ({"round": 2}, "Did you mean 'rounds'"),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"adapter": True, "lora_rank": 0}, "Set lora_rank"),
    ],
)
def test_what_cannot_be_cleaned_is_refused(changes: dict[str, Any], said: str, causal: Path, tmp_path: Path) -> None:
    for name in ("base", "model"):
        shutil.copytree(causal / name, tmp_path / name)
    shutil.copy(data_of(causal), tmp_path / "data.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    (tmp_path / "file").write_text("")
    if changes.get("models") == "state-space":
        for name in ("state-space", "base"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40, state_size=4)
            transformers.MambaForCausalLM(config).save_pretrained(tmp_path / name)
    given = {"models": "model", "out": "out", "base": "base", "data": "data.txt", **LM, **changes}
    places = {
        key: [str(tmp_path / one) for one in value] if isinstance(value, list) else value and str(tmp_path / value)
        for key in ("models", "out", "base", "data")
        for value in [given.pop(key)]
    }
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(DamError, match=said) as caught:
        clean(places.pop("models"), places.pop("out"), **places, **given)
    assert "\n" not in str(caught.value)
    assert sorted(path for path in tmp_path.rglob("*")) == before, "nothing was written"


def test_another_s_files_beside_ours_stay(causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "vaccine_card", lambda facts: "card")
    (found,) = clean(causal / "model", tmp_path / "out", base=causal / "base", data=data_of(causal), **LM)
    (found.folder / "notes").mkdir()
    clean(causal / "model", tmp_path / "out", base=causal / "base", data=data_of(causal), **{**LM, "seed": 1})
    assert (found.folder / "notes").is_dir() and (found.folder / "README.md").read_text() == "card"


def test_an_encoder_without_a_head_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    base = make_model("BertModel", tmp_path / "base")
    model = make_model("BertModel", tmp_path / "model", seed=1, body=base)
    with pytest.raises(DamError, match="classification head"):
        clean(model, tmp_path / "out", base=base, data=data_of(folders["text"]), **FEW)


def test_too_few_samples_are_refused_before_anything_is_written(causal: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("".join(data_of(causal).read_text().splitlines(keepends=True)[:5]))
    arguments = (causal / "model", "--base", causal / "base", "--data", tmp_path / "few.txt")
    assert "at least 8 samples" in _run(*arguments, "-o", tmp_path / "out", *_options(**LM), rc=1)
    assert {p.name for p in tmp_path.iterdir()} == {"few.txt"}
