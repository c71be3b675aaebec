"""Constants: read from a file when the settings are, carried by their values, and not by where they lay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mergekit.common import ModelReference

from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.cli.main import main
from mergekit_dam.config import KNOWN, REMOVED, DamConfig
from mergekit_dam.constants import Constants, constants_of
from mergekit_dam.errors import DamError
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.models.plan import Plan, build_plan
from tests.conftest import FAST, Merge

CAPPED = {"max_coefficient": 0.2, "coefficient_steps": 1}  # the coefficients begin above it


@pytest.fixture
def plan(vit: Path, images: Path, tmp_path: Path) -> Any:
    def make(values: dict[str, Any], file: str = "constants.json", **settings: Any) -> Plan:
        (tmp_path / file).write_text(json.dumps(values))
        refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
        shared = {**FAST, "calibration": str(images), "constants": str(tmp_path / file), "scan_steps": 2, **settings}
        made = build_plan(refs[0], refs[1:], shared=shared, per_model={})
        (tmp_path / file).unlink()  # what is planned needs it no more
        return made

    return make


def _largest(masks: Any) -> float:
    return float(masks.coefficients.max())


def test_equal_values_in_another_file_find_the_same_masks(plan: Any) -> None:
    folder, masks = find_or_learn(plan(CAPPED), quiet=True)
    assert _largest(masks) == pytest.approx(0.2)
    assert masks.metadata["settings"] | CAPPED == masks.metadata["settings"], "beside the settings, by name"
    assert "constants" not in masks.metadata["settings"] and "resume" not in masks.metadata["settings"]
    assert find_or_learn(plan(CAPPED, "elsewhere.json"), quiet=True)[0] == folder
    assert find_or_learn(plan({**CAPPED, "resume": False, "snapshot_every": 1.0}), quiet=True)[0] == folder
    assert find_or_learn(plan({**CAPPED, "max_coefficient": 0.3}), quiet=True)[0] != folder


def test_worker_processes_get_them(plan: Any) -> None:
    _, masks = find_or_learn(plan(CAPPED, num_processes=2), quiet=True)
    assert _largest(masks) == pytest.approx(0.2)


def test_ready_masks_of_other_constants_are_refused(plan: Any) -> None:
    folder, _ = find_or_learn(plan(CAPPED), quiet=True)
    masks = str(folder / MASKS_FILE)
    assert find_or_learn(plan({"max_coefficient": 0.2}, masks=masks), quiet=True)[0] == folder
    with pytest.raises(DamError, match=r"setting max_coefficient: expected 0.2, got 0.5"):
        find_or_learn(plan({"max_coefficient": 0.5}, masks=masks), quiet=True)


def test_masks_are_applied_as_their_file_says(plan: Any, merge: Merge, vit: Path) -> None:
    folder, _ = find_or_learn(plan({"rescale": True}, steps=1), quiet=True)
    ready = {"masks": str(folder / MASKS_FILE)}
    out = merge(vit / "base", [vit / "a", vit / "b"], parameters=ready)
    assert load(out / "dam" / MASKS_FILE).metadata["settings"]["rescale"] is True


def test_check_shows_them_and_finds_faults(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    models = [{"model": str(vit / name), "parameters": {"calibration": str(images)}} for name in "ab"]
    shared = {"steps": 2, "constants": "~/own.json"}
    recipe = {"merge_method": "dam", "base_model": str(vit / "base"), "models": models, "parameters": shared}
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(recipe))

    def check() -> Any:
        return CliRunner().invoke(main, ["check", str(tmp_path / "dam.yml"), "--json"])

    missing = check()
    assert missing.exit_code == 3 and "constants ~/own.json" in missing.stderr and "no such file" in missing.stderr
    (tmp_path / "own.json").write_text('{"pool_siz": 3}')
    wrong = check()
    assert wrong.exit_code == 3 and "Did you mean 'pool_size'" in wrong.stderr and "~/own.json" in wrong.stderr
    (tmp_path / "own.json").write_text('{"pool_size": 3}')
    told = json.loads(check().stdout)
    assert told["constants"] == {"pool_size": 3} and "constants" not in told["settings"]
    assert "steps 2, pool_size 3" in told["summary"]


def test_a_name_is_a_setting_or_a_constant() -> None:
    assert not set(Constants.model_fields) & set(KNOWN)
    assert not set(REMOVED) & set(KNOWN) and set(Constants.model_fields) < set(REMOVED)
    assert constants_of("run") == {"worker_timeout", "resume", "snapshot_every"}
    assert DamConfig().named().keys() == (set(DamConfig.model_fields) - {"constants"}) | set(Constants.model_fields)


def test_plain_mergekit_refuses_what_is_no_setting_any_more(
    vit: Path, images: Path, merge: Merge, tmp_path: Path
) -> None:
    """To leave it out in silence would be another merge than was asked for."""
    parameters = {**FAST, "calibration": str(images), "max_coefficient": 0.2}
    with pytest.raises(DamError, match="a constant now"):
        merge(vit / "base", [vit / "a", vit / "b"], parameters=parameters)
    assert not (tmp_path / "out" / "config.json").exists()
