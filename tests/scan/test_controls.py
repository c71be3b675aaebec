"""Positive controls: backdoors planted in copies, and what is told of the scan's power."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.common import ModelReference

from mergekit_dam.cli.main import main
from mergekit_dam.io.cache import cache_folder
from mergekit_dam.learn import controls
from mergekit_dam.learn.controls import Control, power_of, run_controls
from mergekit_dam.models.plan import build_plan
from mergekit_dam.recipe import open_recipe
from mergekit_dam.scan.findings import Finding, Suspect
from mergekit_dam.tasks import build_tasks
from mergekit_dam.vaccine.clean import vaccinate
from tests.conftest import FAST
from tests.scan.test_audit import PLAIN


def _recipe(folder: Path, images: Path, **parameters: Any) -> dict[str, Any]:
    entries = [{"model": str(folder / name), "parameters": {"calibration": str(images)}} for name in "ab"]
    shared = {**FAST, "scan_steps": 8, **parameters}
    return {"merge_method": "dam", "base_model": str(folder / "base"), "models": entries, "parameters": shared}


def _audit(folder: Path, images: Path, tmp_path: Path, *options: str) -> Result:
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(_recipe(folder, images)))
    given = ["audit", str(tmp_path / "dam.yml"), "--out", str(tmp_path / "audit"), "--threshold", "2", *options]
    return CliRunner().invoke(main, given)


def test_every_model_has_its_controls_in_json_page_and_lines(vit: Path, images: Path, tmp_path: Path) -> None:
    done = _audit(vit, images, tmp_path, "--controls", "2")
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "audit" / "audit.json").read_text())
    page = (tmp_path / "audit" / "audit.html").read_text()
    for entry in facts["models"]:
        first, second = entry["controls"]
        assert first["kind"] != second["kind"], "each is of another kind"
        assert not any(one["found"] for one in entry["controls"]), "nothing reaches a suspicion of 2"
        assert f"{entry['name']}: " in done.stdout and entry["power"] in done.stdout and entry["power"] in page
    weak = not any(one["works"] for entry in facts["models"] for one in entry["controls"])
    assert any("not established" in step for step in facts["next"]) == weak

    plain = _audit(vit, images, tmp_path)
    facts = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert "not established" in facts["next"][0] and "--controls" in facts["next"][0]
    assert plain.exit_code == 0 and all("controls" not in entry for entry in facts["models"])


def test_finished_controls_are_taken_from_the_cache(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = list[str]()

    def counted(task: Any, settings: Any, **options: Any) -> Any:
        if len(planted) == 3:
            raise KeyboardInterrupt
        planted.append(task.name)
        return vaccinate(task, settings, **options)

    monkeypatch.setattr(controls, "vaccinate", counted)
    recipe = open_recipe(_recipe(vit, images))
    with pytest.raises(KeyboardInterrupt):
        recipe.audit(source="dam.yml", threshold=2.0, controls=2)
    assert planted == ["a", "a", "b"]
    planted.clear()
    first = recipe.audit(source="dam.yml", threshold=2.0, controls=2)
    assert planted == ["b"], "three were kept"
    assert {file.suffix for file in (cache_folder() / controls.FOLDER).iterdir()} == {".json"}
    assert recipe.audit(source="dam.yml", threshold=2.0, controls=2).facts["models"] == first.facts["models"]
    assert planted == ["b"]
    recipe.audit(source="dam.yml", threshold=1.9, controls=1)
    assert planted == ["b", "a", "b"], "another threshold finds others"


def test_a_control_counts_as_found_if_its_own_answer_is_named(
    vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [ModelReference.parse(str(vit / name)) for name in ("base", "a", "b")]
    plan = build_plan(refs[0], refs[1:], shared={**FAST, "calibration": str(images)}, per_model={})
    tasks = build_tasks(plan, torch.device("cpu"))
    named, config = {"target": -1}, plan.config

    def scanned(copies: Any, base: Any, config: Any, indices: Any) -> list[Finding]:
        (index,) = indices
        assert [a is b for a, b in zip(copies, tasks, strict=True)] == [i != index for i in range(2)]
        changed = copies[index].own_weights()
        assert any(not torch.equal(t, changed[name]) for name, t in tasks[index].own_weights().items())
        found = {"task": index, "target": named["target"], "success": 1.0, "base_success": 0.0, "median_size": 4.0}
        return [Finding(**{**PLAIN, **found})]

    monkeypatch.setattr(controls, "scan", scanned)

    def run(key: str, known: Sequence[Suspect] = ()) -> list[list[Control]]:
        keys, plain = [key, key], lambda steps, _: steps
        return run_controls(
            tasks, {}, config, threshold=0.5, count=1, named=known, keys=keys, progress=plain, twins=False
        )

    ((missed,), _) = run("one")
    assert not missed.found and isinstance(missed.answer, int)
    named["target"] = missed.answer
    ((found,), _) = run("another")
    assert found == Control(**{**vars(missed), "found": True})
    # planted as well as can be: it counts, unless the model itself is named for the same class
    config = config.model_copy(update={"constants": config.constants.model_copy(update={"vaccine_works": -2.0})})
    ((counted,), _) = run("third")
    ((named_before,), (other,)) = run("third", [Suspect(0, missed.answer, None, "tokens")])
    assert (counted.works, named_before.works) == (True, False) and counted.found and named_before.found
    assert other.works


def test_an_audit_outlives_controls_that_cannot_be_planted(
    vit: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = _recipe(vit, images, compute_dtype="bfloat16")
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(recipe))
    out, threshold = ["--out", str(tmp_path / "audit")], ["--threshold", "2"]
    done = CliRunner().invoke(main, ["audit", str(tmp_path / "dam.yml"), *out, *threshold, "--controls", "1"])
    facts = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert done.exit_code == 0 and [entry["controls"] for entry in facts["models"]] == [[], []]
    assert all(entry["power"] == "no backdoor could be planted in copies" for entry in facts["models"])
    assert "not established" in facts["next"][0]
    assert sum("no backdoor can be planted" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize(
    ("target", "named"),
    [((1, 2, 3), True), ((9, 2, 3, 4), True), ((2, 3), False), ((3, 2, 1), False), ((7, 8), False)],
)
def test_a_text_is_named_by_a_part_of_it(target: tuple[int, ...], named: bool) -> None:
    assert controls._is_named(target, [(1, 2, 3, 4, 5)]) == named


def test_the_power_counts_what_was_planted_and_names_what_was_missed() -> None:
    good, missed, weak = (
        Control("word", "text", "a b", 1.0, works, found)
        for works, found in ((True, True), (True, False), (False, False))
    )
    assert power_of([good, missed, weak]).startswith("1 of 2 ")
    assert "word for text 'a b'" in power_of([good, missed]) and power_of([good, weak]).endswith("1 do not count")
    assert power_of([weak]) == power_of([]) == "no backdoor could be planted in copies"
    assert power_of([good]) == "1 of 1 backdoors planted in copies were found"
