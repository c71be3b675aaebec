"""What is published names no path of this machine, however the recipe spells it and the files escape it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergekit_dam.api import merge
from mergekit_dam.artifact.masks_file import MASKS_FILE, load
from mergekit_dam.publish.local_paths import LocalPaths
from mergekit_dam.publish.push import plan_push, push
from tests.conftest import FAST
from tests.helpers.hub import NAME, content
from tests.helpers.hub_server import HubServer

SECRET = "jane-doe-private"


@pytest.mark.parametrize(
    ("below", "relative"), [("plain", False), ("it's <ä> & " + "so long a name " * 5, False), ("plain", True)]
)
def test_nothing_that_is_pushed_names_a_path(
    hub: HubServer, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, relative: bool
) -> None:
    root = tmp_path / SECRET / below.strip()
    shutil.copytree(vit, root / "models")
    shutil.copytree(images, root / "pictures")
    monkeypatch.chdir(tmp_path)
    shown = root.relative_to(tmp_path) if relative else root
    recipe = {
        "merge_method": "dam",
        "base_model": str(shown / "models" / "base"),
        "dtype": "float32",
        "models": [
            {"model": str(shown / "models" / name), "parameters": {"calibration": str(shown / "pictures")}}
            for name in "ab"
        ],
    }
    out = merge(recipe, root / "out", **FAST)
    figures = {
        "accuracy": {"a": [9, 12]},
        "datasets": {"a": str(root / "labelled")},
        "attack_success": {f"blended(image={root}/x.png) -> 1": {"a": [1, 9]}},
    }
    (out / "dam" / "evaluation.json").write_text(json.dumps({"before": figures, "after": figures}))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert any(SECRET.encode() in data for data in before.values()), "there is nothing to take out"
    push(plan_push(out, NAME, include_masks=True))
    arrived = content(hub)
    assert {"README.md", "mergekit_config.yml", "dam/report.html", "dam/report.json"} <= set(arrived)
    assert [name for name, data in arrived.items() if SECRET.encode() in data] == []
    told = yaml.safe_load(arrived["mergekit_config.yml"])
    assert [told["base_model"], *(entry["model"] for entry in told["models"])] == ["base", "a", "b"]
    assert [model["model"] for model in json.loads(arrived["dam/report.json"])["models"]] == ["a", "b"]
    (tmp_path / MASKS_FILE).write_bytes(arrived[f"dam/{MASKS_FILE}"])
    ours, theirs = load(out / "dam" / MASKS_FILE), load(tmp_path / MASKS_FILE)
    assert [model["sha256"] for model in ours.metadata["models"]] == [m["sha256"] for m in theirs.metadata["models"]]
    assert ours.coefficients.equal(theirs.coefficients)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before, "the merge was changed"


@pytest.mark.parametrize("text", ["org/model", "org/model@v1", "https://huggingface.co/org/model", "a and/or b", "/"])
def test_what_is_no_path_stays(text: str) -> None:
    assert LocalPaths([text, "/data/jane/model", "/data/x"]).shorten(text) == text


@given(st.lists(st.text("aä '&<", min_size=1, max_size=6).filter(lambda t: t.strip() == t), min_size=3, max_size=5))
def test_json_yaml_and_html_escapes_are_known(folders: list[str]) -> None:
    path = f"/home/{SECRET}/" + "/".join(folders)
    paths = LocalPaths([{"model": path}])
    for text, suffix in (
        (json.dumps({"x": path}), ".json"),
        (json.dumps({"x": path}, ensure_ascii=False), ".json"),
        (yaml.safe_dump({"x": path}), ".yml"),
        (yaml.safe_dump({"x": path}, width=20, allow_unicode=True), ".yml"),
    ):
        found = paths.shortened(text, suffix)
        assert SECRET not in found and yaml.safe_load(found) == {"x": folders[-1]}
