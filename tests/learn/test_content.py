"""What is learned depends on content, position and seed: never on how folders, tasks or data are called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch
from mergekit.common import ModelReference
from safetensors.torch import save_file

from mergekit_dam.artifact.masks_file import LearnedMasks
from mergekit_dam.artifact.triggers_file import load_triggers
from mergekit_dam.learn import run
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.models.plan import Plan, build_plan
from tests.conftest import FAST
from tests.helpers.tiny_models import make_model

SETTINGS = {"inversion": {"suspicion": 0.0, "refresh_every": 2}, "paper": {"objective": "paper"}}
Learned = tuple[Path, LearnedMasks]


def _plan(folders: list[Path], data: Path, objective: str = "inversion", **per_model: object) -> Plan:
    base, *models = (ModelReference.parse(str(folder)) for folder in folders)
    shared = {**FAST, "num_samples": 6, "calibration": str(data), **SETTINGS[objective]}
    return build_plan(base, models, shared=shared, per_model={models[0]: per_model})


def _learned(folders: list[Path], data: Path, objective: str = "inversion", **per_model: object) -> Learned:
    return find_or_learn(_plan(folders, data, objective, **per_model), quiet=True)


def _copied(folders: list[Path], names: list[str], root: Path) -> list[Path]:
    return [Path(shutil.copytree(source, root / name)) for source, name in zip(folders, names, strict=True)]


def _assert_equal(first: LearnedMasks, again: LearnedMasks) -> None:
    assert first.coefficients.equal(again.coefficients)
    for mask, by_key in first.probabilities.items():
        assert all(values.equal(again.probabilities[mask][key]) for key, values in by_key.items()), mask


@pytest.mark.parametrize("objective", SETTINGS)
def test_renamed_and_moved_folders_give_the_same_masks(
    objective: str, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [vit / name for name in ("base", "a", "b")]
    new = _copied(old, ["theta", "b", "c"], tmp_path / "x")
    _, first = _learned(old, images, objective)
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path / "cache"))
    _, again = _learned(new, Path(shutil.copytree(images, tmp_path / "pictures")), objective)
    _assert_equal(first, again)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_renamed_folders_are_found_in_the_cache(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = request.getfixturevalue(family)
    data = Path(request.getfixturevalue("images" if family == "vit" else "texts"))
    old = [root / name for name in (("base", "a", "b") if family == "vit" else ("base", "m1", "m2"))]
    names = old[2].name, "other"  # the first model takes the second one's name
    folder, first = _learned(old, data)
    moved = tmp_path / f"moved{data.suffix}"
    (shutil.copytree if data.is_dir() else shutil.copy)(data, moved)
    monkeypatch.setattr(run, "optimise", _interrupt)  # nothing is learned any more
    found, again = _learned(_copied(old, ["theta", *names], tmp_path), moved)
    assert found == folder
    _assert_equal(first, again)
    assert [model["name"] for model in again.metadata["models"]] == list(names)
    assert again.metadata["base"]["model"] == str(tmp_path / "theta")
    assert [one["model"] for one in again.metadata["audit"]] == [
        names[[old[1].name, old[2].name].index(one["model"])] for one in first.metadata["audit"]
    ]
    assert {one["model"] for one in again.metadata["remaining"]} <= set(names)
    assert set(again.metadata.get("students", names)) == set(names)
    assert {one.facts["task"] for one in load_triggers(folder / "triggers.safetensors")} <= set(names)
    assert set(json.loads((folder / "run.json").read_text())["revisions"]) == {"base", *names}
    heads = {file.name: file.read_bytes() for file in (folder / "heads").iterdir()}
    assert set(heads) == {f"{name}{end}" for name in names for end in (".json", ".safetensors")}
    keys = {key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {f"loss/perf/{name}" for name in names} == {key for key in keys if key.startswith("loss/perf/")}
    _learned(old, data)
    assert {f"{new}{end}" for new in (old[1].name, old[2].name) for end in (".json", ".safetensors")} == {
        file.name for file in (folder / "heads").iterdir()
    }
    renamed = (folder / "heads" / f"{old[1].name}.safetensors").read_bytes()
    assert renamed == heads[f"{names[0]}.safetensors"]
    configs = (folder / "heads" / f"{old[1].name}.json").read_bytes(), heads[f"{names[0]}.json"]
    now, before = ({k: v for k, v in json.loads(one).items() if k != "_name_or_path"} for one in configs)
    assert now == before


def test_a_run_that_was_killed_while_it_renamed_loses_no_head(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are swapped; the kill comes just before the masks are saved, and leaves a learning run's folder."""
    old = [vit / name for name in ("base", "a", "b")]
    folder, _ = _learned(old, images)
    heads = {file.name: file.read_bytes() for file in (folder / "heads").iterdir()}
    (folder / "run" / "snapshot").mkdir(parents=True)
    swapped = _copied(old, ["theta", "b", "a"], tmp_path)
    monkeypatch.setattr(run, "optimise", _interrupt)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mergekit_dam.artifact.relabel.save", _interrupt)
        _learned(swapped, images)
    _learned(swapped, images)
    assert not (folder / "run").exists()
    other = {"a": "b", "b": "a"}
    for name, content in heads.items():
        stem, _, ending = name.partition(".")
        moved = (folder / "heads" / f"{other[stem]}.{ending}").read_bytes()
        assert moved == content or ending == "json"
        assert ending != "json" or json.loads(moved)["id2label"] == json.loads(content)["id2label"]
    assert len(heads) == 4 == len(list((folder / "heads").iterdir()))


def test_merges_of_the_same_models_under_other_names_do_not_meet(vit: Path, images: Path, tmp_path: Path) -> None:
    """One merge copies from the cache while the other, which begins just then, wants to rename the models there."""
    old = [vit / name for name in ("base", "a", "b")]
    new = _copied(old, ["theta", "c", "d"], tmp_path)
    folder, _ = _learned(old, images)
    other = Thread(target=lambda: _learned(new, images))
    seen: list[set[str]] = []

    def copy(artefact: Path) -> None:
        other.start()
        other.join(timeout=2.0)
        assert other.is_alive()
        seen.append({file.stem for file in (artefact / "heads").iterdir()})

    find_or_learn(_plan(old, images), quiet=True, copy=copy)
    other.join()
    assert seen == [{"a", "b"}]
    assert {file.stem for file in (folder / "heads").iterdir()} == {"c", "d"}


def test_an_interrupted_run_goes_on_under_other_names(
    bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [bert / name for name in ("base", "m1", "m2")]
    _, whole = _learned(old, texts)
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "save", _interrupt)
        _learned(old, texts)
    _, again = _learned(_copied(old, ["theta", "m2", "x"], tmp_path), texts)
    _assert_equal(whole, again)


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _other_head(model: Path, head: Path) -> None:
    save_file({"weight": torch.ones(3, 16)}, head)


def _other_pixels(model: Path, head: Path) -> None:
    file = model / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": 16}))


def _other_config(model: Path, head: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))


@pytest.mark.parametrize("change", [_other_head, _other_pixels, _other_config])
def test_other_content_under_the_same_name_is_learned_anew(
    change: Callable[[Path, Path], None], vit: Path, images: Path, tmp_path: Path
) -> None:
    models = [make_model("ViTModel", tmp_path / name, seed=i, body=vit / "base") for i, name in enumerate("ab", 1)]
    head, other = tmp_path / "head.safetensors", tmp_path / "other.safetensors"
    for file in (head, other):
        save_file({"weight": torch.eye(3, 16)}, file)
    folders = [vit / "base", *models]

    def place() -> Path:
        base, *refs = (ModelReference.parse(str(folder)) for folder in folders)
        shared = {**FAST, "steps": 0, "scan_steps": 2, "num_samples": 4, "calibration": str(images)}
        heads = {refs[0]: {"head": str(head)}, refs[1]: {"head": str(other)}}
        return find_or_learn(build_plan(base, refs, shared=shared, per_model=heads), quiet=True)[0]

    before = place()
    assert place() == before
    change(models[0], head)
    assert place() != before
