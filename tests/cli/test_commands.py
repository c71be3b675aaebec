"""`check`, `learn`, `merge`: stdout holds the result alone, nothing is read or learned without need."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.options import MergeOptions

from mergekit_dam.cli.check import _span, summary_of
from mergekit_dam.cli.main import main
from mergekit_dam.learn.estimate import Speed, estimate
from mergekit_dam.models.plan import Plan
from mergekit_dam.recipe import open_recipe, preview
from tests.conftest import FAST
from tests.helpers.tiny_models import make_model

SETTINGS = {**FAST, "scan_steps": 3}


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, list(map(str, arguments)))


def _recipe(folder: Path, base: Path, models: list[Path], data: Path | None, **parameters: Any) -> Path:
    own = {} if data is None else {"parameters": {"calibration": str(data)}}
    entries = [{"model": str(model), **own} for model in models]
    recipe = {"merge_method": "dam", "base_model": str(base), "models": entries, "dtype": "float32"}
    (folder / "dam.yml").write_text(yaml.safe_dump({**recipe, "parameters": {**SETTINGS, **parameters}}))
    return folder / "dam.yml"


@pytest.fixture
def recipe(tmp_path: Path, vit: Path, images: Path) -> Path:
    return _recipe(tmp_path, vit / "base", [vit / "a", vit / "b"], images)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mergekit_dam.models.checkpoint.Checkpoint.tensor", lambda self, name: pytest.fail(f"read {name}")
    )


def test_check_reads_no_weight_and_says_what_will_be_merged(recipe: Path, no_weights: None) -> None:
    done = _run("check", recipe, "--json", "--seed", 7)
    facts = json.loads(done.stdout)
    assert done.exit_code == 0 and facts["settings"]["seed"] == 7
    assert {name: (m["classes"], m["samples"]) for name, m in facts["models"].items()} == {"a": (3, 8), "b": (5, 8)}
    assert facts["estimate"]["seconds"][0] < facts["estimate"]["seconds"][1]
    first, _, rest = _run("check", recipe).stdout.partition("\n\n")
    assert yaml.safe_load(rest)["tensors"] == facts["tensors"]
    told = re.fullmatch(
        r"This recipe is fine: `dam` will merge 2 models of \S+ k parameters in (\S+) to (\S+) (seconds|minutes) and "
        r"\S+ MB of memory on this CPU; set by you, other than the default: (.*)\.",
        first,
    )
    assert told is not None and "\n" not in first, first
    assert float(told[1]) < float(told[2]) <= 3.1 * float(told[1])
    changed = dict(one.split(" ") for one in told[4].split(", "))
    given = {key: value for key, value in SETTINGS.items() if key != "constants"}
    given |= json.loads(Path(str(SETTINGS["constants"])).read_text())
    assert changed == {key: str(value) for key, value in given.items()}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [((0.6, 1.8), "0.6 to 1.8 seconds"), ((300, 900), "5 to 15 minutes"), ((3600, 10800), "1 to 3 hours")],
)
def test_times_are_told_in_one_unit(seconds: tuple[float, float], shown: str) -> None:
    assert _span(*seconds) == shown


def test_ready_masks_need_no_time(recipe: Path, tmp_path: Path, vit: Path) -> None:
    ready = _recipe(tmp_path, vit / "base", [vit / "a", vit / "b"], None, masks="ready.safetensors")
    ready.write_text(ready.read_text() + "  weight: 0.5\n")
    with preview(ready) as plan:
        told = summary_of(plan, estimate(plan, speed=Speed(1, 1, 1)), torch.device("cpu"))
    assert "with the masks of ready.safetensors; nothing is learned" in told and "weight 0.5 of a" in told


def test_check_looks_at_vocabularies_and_own_text(tmp_path: Path, texts: Path, no_weights: None) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base")
    models = [make_model("LlamaForCausalLM", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2)]
    file = models[1] / "tokenizer.json"
    file.write_text(file.read_text().replace('"movie"', '"cinema"'))
    done = _run("check", _recipe(tmp_path, base, models, None), "--json")
    assert "m2: its tokenizer differs from the base's in 2 entries" in done.stderr and "m1" not in done.stderr
    facts = json.loads(done.stdout)["models"]
    assert facts["m1"]["calibration"] == "its own text" and facts["m1"]["vocabulary"] == facts["m2"]["vocabulary"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"granularty": "row"}, "Did you mean 'granularity'?"),
        ({"device": "abacus"}, "accelerator of this machine"),
        ({"calibration": "missing.parquet"}, "no such file"),
    ],
)
def test_check_exits_with_3_on_the_first_fault(
    tmp_path: Path, vit: Path, change: dict[str, Any], told: str, images: Path
) -> None:
    data = None if "calibration" in change else images
    done = _run("check", _recipe(tmp_path, vit / "base", [vit / "a", vit / "b"], data, **change))
    assert done.exit_code == 3 and told in done.stderr and done.stdout == ""


def test_check_misses_a_head(tmp_path: Path, texts: Path) -> None:
    base = make_model("BertModel", tmp_path / "base")
    models = [make_model("BertModel", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2)]
    done = _run("check", _recipe(tmp_path, base, models, texts))
    assert done.exit_code == 3 and "expected a classification head" in done.stderr
    done = _run("check", _recipe(tmp_path, base, models, texts, head=str(tmp_path / "no.safetensors")))
    assert done.exit_code == 3 and "no such file" in done.stderr


def test_learn_then_merge_with_the_masks(recipe: Path, tmp_path: Path, vit: Path) -> None:
    done = _run("learn", recipe, tmp_path / "masks", "--json", "--quiet")
    found = json.loads(done.stdout)
    assert Path(found["masks"]) == tmp_path / "masks" / "dam_masks.safetensors" and done.exit_code == 0
    assert {p.name for p in (tmp_path / "masks").iterdir()} == {
        "dam_masks.safetensors",
        "triggers.safetensors",
        "metrics.jsonl",
        "run.json",
        "heads",
    }
    assert found["densities"].keys() == {"task_shared", "backdoor_detection"}
    ready = _recipe(tmp_path, vit / "base", [vit / "a", vit / "b"], None, masks=found["masks"])
    merged = _run("merge", ready, tmp_path / "out", "--json", "--quiet")
    assert merged.exit_code == 0, merged.output
    told = json.loads(merged.stdout)
    assert Path(told["masks"]).read_bytes() == Path(found["masks"]).read_bytes()
    assert Path(told["report"]).is_file() and told["suspects"] == found["suspects"]
    refused = _run("learn", ready, tmp_path / "again")
    assert refused.exit_code == 1 and "setting 'masks'" in refused.stderr


def test_masks_are_taken_again_unless_told_otherwise(
    recipe: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run("learn", recipe, tmp_path / "one", "--quiet").exit_code == 0
    kept = sorted(cache.rglob("*"))
    anew = _run("learn", recipe, tmp_path / "two", "--quiet", "--no-resume")
    assert anew.exit_code == 0 and sorted(cache.rglob("*")) == kept
    one, two = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("one", "two"))
    assert one["seconds"] != two["seconds"], "it was not learned anew"
    masks = [(tmp_path / n / "dam_masks.safetensors").read_bytes() for n in ("one", "two")]
    assert masks[0] == masks[1]

    def refuse(self: Any) -> None:
        raise RuntimeError("learned again")

    monkeypatch.setattr("mergekit_dam.learn.inversion_search.InversionSearch.run", refuse)
    assert _run("learn", recipe, tmp_path / "three", "--quiet").exit_code == 0
    other = _run("merge", recipe, tmp_path / "out", "--seed", 5, "--quiet")
    assert str(other.exception) == "learned again", "another seed needs other masks"


@pytest.mark.parametrize("command", ["learn", "merge"])
def test_a_dry_run_writes_nothing(command: str, recipe: Path, tmp_path: Path, cache: Path, no_weights: None) -> None:
    done = _run(command, recipe, tmp_path / "out", "--dry-run", "--json")
    assert done.exit_code == 0 and set(json.loads(done.stdout)["models"]) == {"a", "b"}
    assert not (tmp_path / "out").exists() and not list(cache.iterdir())


def test_merge_runs_other_methods_with_its_checks(tmp_path: Path, vit: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(vit / "base"),
        "dtype": "float32",
        "models": [{"model": str(vit / n), "parameters": {"weight": 0.3}} for n in ("a", "b")],
    }
    (tmp_path / "ta.yml").write_text(yaml.safe_dump(recipe))
    refused = _run("learn", tmp_path / "ta.yml", tmp_path / "out")
    assert refused.exit_code == 1 and "mergekit-dam merge" in refused.stderr and not (tmp_path / "out").exists()
    done = _run("merge", tmp_path / "ta.yml", tmp_path / "out", "--quiet", "--json")
    assert done.exit_code == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    told = json.loads(done.stdout)
    assert told.keys() == {"output", "seconds"} and not (tmp_path / "out" / "dam").exists()
    (tmp_path / "ta.yml").write_text(yaml.safe_dump({**recipe, "parameters": {"wieght": 0.3}}))
    misspelt = _run("merge", tmp_path / "ta.yml", tmp_path / "other")
    assert misspelt.exit_code == 1 and "Did you mean 'weight'?" in misspelt.stderr
    assert not (tmp_path / "other").exists()


def test_as_a_user_runs_it(recipe: Path, tmp_path: Path) -> None:
    program = "from mergekit_dam.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "merge", str(recipe), str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")
    assert "\x1b[3" not in done.stderr + done.stdout


@pytest.mark.parametrize("setting", ["steps", "batch_size", "scan_steps"])
def test_more_work_takes_longer_and_larger_masks_more_memory(recipe: Path, setting: str) -> None:
    def plan(**settings: Any) -> Plan:
        return open_recipe(recipe, options=MergeOptions(), **settings).plan

    speed = Speed(1e-3, 1e-3, 1e-9)
    less, more = (estimate(plan(**{setting: n}), speed=speed) for n in (50, 200))
    assert less.seconds is not None and more.seconds is not None and less.seconds < more.seconds
    assert less.seconds[1] <= 3 * less.seconds[0] and math.isfinite(more.seconds[1])
    element, row = (sum(estimate(plan(granularity=g)).memory_bytes.values()) for g in ("element", "row"))
    assert row < element
