"""A scan is done once: what `audit` scanned `merge` takes, if inputs and settings are equal, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.common import ModelReference

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.artifact.scan_file import NOT_SCANNED, StoredScan
from mergekit_dam.cli.main import main
from mergekit_dam.config import DamConfig
from mergekit_dam.constants import Constants
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.scan import classifiers
from mergekit_dam.scan.scanner import scan
from mergekit_dam.tasks import build_tasks
from mergekit_dam.tasks.content import digests_of
from tests.conftest import FAST
from tests.helpers.tiny_models import make_model

SETTINGS = {**FAST, "scan_steps": 3, "suspicion": 0.0}
CPU = torch.device("cpu")


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of searches for triggers of classes, as they are asked for; fits search as well, but not in scan/."""
    steps: list[int] = []
    run = classifiers.Inversion.run

    class Counted(classifiers.Inversion):
        def run(self, count: int) -> Any:
            steps.append(count)
            return run(self, count)

    monkeypatch.setattr(classifiers, "Inversion", Counted)
    return steps


@pytest.fixture
def recipe(tmp_path: Path, vit: Path, images: Path) -> Callable[..., Path]:
    def write(folder: Path = vit, **settings: Any) -> Path:
        models = [{"model": str(folder / n), "parameters": {"calibration": str(images)}} for n in ("a", "b")]
        content = {"merge_method": "dam", "base_model": str(folder / "base"), "models": models, "dtype": "float32"}
        (tmp_path / "dam.yml").write_text(yaml.safe_dump({**content, "parameters": {**SETTINGS, **settings}}))
        return tmp_path / "dam.yml"

    return write


def _run(*arguments: Any) -> Any:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code in (0, 3), done.output
    return done


def test_what_audit_scanned_merge_takes_bit_for_bit(
    recipe: Callable[..., Path],
    tmp_path: Path,
    scans: list[int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _run("merge", recipe(), tmp_path / "alone", "--no-report")
    assert scans
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path / "other"))
    scans.clear()
    _run("audit", recipe(), "--out", tmp_path / "audit", "--threshold", 0.3)
    assert scans
    scans.clear()
    caplog.clear()
    _run("merge", recipe(), tmp_path / "after", "--no-report")
    assert not scans and sum("not scanned again" in r.getMessage() for r in caplog.records) == 2
    alone, after = (tmp_path / name / "dam" / MASKS_FILE for name in ("alone", "after"))
    assert alone.read_bytes() == after.read_bytes()
    audited = json.loads((tmp_path / "audit" / "audit.json").read_text())
    seconds = json.loads((tmp_path / "after" / "dam" / "run.json").read_text())["seconds"]
    assert 0 < seconds["scan"] <= audited["seconds"] + 0.1, "the learning's times are those of the audit's scan"
    _run("audit", recipe(), "--out", tmp_path / "again", "--threshold", 2)  # over which nothing is compared with a twin
    assert not scans


def _plan(root: Path, data: Path, names: tuple[str, ...] = ("a", "b"), **settings: Any) -> Plan:
    base, *models = (ModelReference.parse(str(root / name)) for name in ("base", *names))
    return build_plan(base, models, shared={**SETTINGS, "calibration": str(data), **settings}, per_model={})


def _files(plan: Plan) -> list[Path]:
    tasks = build_tasks(plan, CPU)
    return StoredScan(plan, tasks, digests_of(plan), {}).files


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"steps": 2, "alpha": 2.0, "detection": "shared", "weight": 0.5}, True),
        ({"seed": 1}, False),
        ({"scan_steps": 4}, False),
        ({"num_samples": 7}, False),
        ({"constants": {"pool_size": 4, "resume": False, "near_the_top": 0.5}}, True),
        ({"constants": {"trigger_works": 0.9}}, False),
    ],
)
def test_other_settings_of_the_scan_are_another_scan(
    settings: dict[str, Any], same: bool, vit: Path, images: Path
) -> None:
    before, after = (_files(_plan(vit, images, **more)) for more in ({}, settings))
    assert [one == other for one, other in zip(before, after, strict=True)] == [same, same]


def test_a_scan_is_known_by_content_and_not_by_place(vit: Path, images: Path, tmp_path: Path) -> None:
    before, moved = _files(_plan(vit, images)), Path(shutil.copytree(vit, tmp_path / "moved"))
    moved_images = Path(shutil.copytree(images, tmp_path / "pictures"))
    assert _files(_plan(moved, moved_images)) == before
    (moved / "a").rename(moved / "renamed")
    assert _files(_plan(moved, moved_images, ("renamed", "b"))) == before
    (moved_images / "0.png").unlink()
    assert _files(_plan(moved, moved_images, ("renamed", "b"))) != before
    weights = moved / "b" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert _files(_plan(moved, images, ("renamed", "b"))) != before


def test_the_scan_of_a_causal_lm_outlives_another_model_beside_it(texts: Path, tmp_path: Path) -> None:
    """And the scan of an image model does not, since it reads the others; nor one at another place in the recipe."""
    for i, name in enumerate(("base", "m1", "m2", "m3")):
        make_model("LlamaForCausalLM", tmp_path / name, seed=i, body=tmp_path / "base" if i else None)
    first, second = _files(_plan(tmp_path, texts, ("m1", "m2")))
    other = _files(_plan(tmp_path, texts, ("m1", "m3")))
    assert other[0] == first and other[1] != second
    assert not {first, second} & set(_files(_plan(tmp_path, texts, ("m2", "m1"))))


def test_the_scans_of_image_models_depend_on_each_other(vit: Path, images: Path, tmp_path: Path) -> None:
    make_model("ViTForImageClassification", tmp_path / "c", seed=3, labels=4, body=vit / "base")
    before = _files(_plan(vit, images))
    after = _files(_plan(vit, images, ("a", str(tmp_path / "c"))))
    assert not set(before) & set(after)


def test_a_scan_goes_on_after_the_models_that_were_scanned(
    recipe: Callable[..., Path], tmp_path: Path, scans: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run("audit", recipe(), "--out", tmp_path / "whole")
    expected, steps = (tmp_path / "whole" / "triggers.safetensors").read_bytes(), list(scans)
    _, second = sorted((cache / "scans").iterdir(), key=lambda file: file.stem[-1])
    second.unlink()
    scans.clear()
    _run("audit", recipe(), "--out", tmp_path / "audit")
    assert 0 < len(scans) < len(steps)
    assert (tmp_path / "audit" / "triggers.safetensors").read_bytes() == expected


def test_a_scan_that_was_cut_short_is_not_taken(
    recipe: Callable[..., Path], tmp_path: Path, scans: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "mergekit_dam.scan.scanner.scan_cross_task", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        done = CliRunner().invoke(main, ["audit", str(recipe()), "--out", str(tmp_path / "audit")])
        assert done.exit_code not in (0, 3)
    assert scans and not list((cache / "scans").glob("*"))
    scans.clear()
    _run("audit", recipe(), "--out", tmp_path / "audit")
    assert scans


class _Guarded:
    """Settings of which some must not be read."""

    def __init__(self, config: DamConfig | Constants) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        assert name not in NOT_SCANNED, f"a scan reads {name}, which is not in its key"
        value = getattr(self._config, name)
        return _Guarded(value) if name == "constants" else value


@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
def test_a_scan_reads_no_setting_that_its_key_lacks(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    names = ("a", "b") if family == "vit" else ("m1", "m2")
    if family == "llama":
        for i, name in enumerate(("base", *names)):
            make_model("LlamaForCausalLM", tmp_path / name, seed=i, body=tmp_path / "base" if i else None)
    root = tmp_path if family == "llama" else request.getfixturevalue(family)
    plan = _plan(root, request.getfixturevalue("images" if family == "vit" else "texts"), names)
    guarded: Any = replace(plan, config=_Guarded(plan.config))  # type: ignore[arg-type]
    tasks = build_tasks(guarded, CPU)
    vectors = TaskVectors(plan)
    base = {spec.name: vectors.base(spec.name) for spec in plan.tensors}
    findings = scan(tasks, base, guarded.config, [0])
    stored = StoredScan(plan, tasks, digests_of(plan), {})
    stored.keep(0, findings, 1.5)
    again = StoredScan(plan, tasks, digests_of(plan), {"scan": 2.0})
    assert again.take(1) is None
    kept = again.take(0)
    assert kept is not None and again.seconds == {"scan": 3.5}
    assert [one.to_json(tasks) for one in kept] == [one.to_json(tasks) for one in findings]
    for one, other in zip(findings, kept, strict=True):
        assert all(p.equal(q) for p, q in zip(one.trigger.parameters, other.trigger.parameters, strict=True))
    content = bytearray(stored.files[0].read_bytes())
    content[-3] ^= 1
    stored.files[0].write_bytes(content)
    assert again.take(0) is None or not findings, "a damaged scan"
    scan([tasks[1]] * 2, base, guarded.config, [1], again)
    assert again.take(1) is not None, "kept as soon as it was done"


def test_masks_tell_what_is_left_of_each_suspect(recipe: Callable[..., Path], tmp_path: Path) -> None:
    _run("learn", recipe(), tmp_path / "masks", "--quiet")
    metadata = load(tmp_path / "masks" / MASKS_FILE).metadata
    suspects = [one for one in metadata["audit"] if one["suspect"]]
    assert suspects and [(one["model"], one["target"], one["kind"]) for one in metadata["remaining"]] == [
        (one["model"], one["target"], one["kind"]) for one in suspects
    ]
    for before, one in zip(suspects, metadata["remaining"], strict=True):
        assert all(0 <= one[key] <= 1 for key in ("before", "after", "plain", "control"))
        if before["model"] == before["task"]:
            assert one["before"] == pytest.approx(before["success"], abs=1e-4), "measured as the scan measured it"
