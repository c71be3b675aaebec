"""What a merge says, by our command and by mergekit's own: each thing once, and no traceback where all is well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_dam.cli.main import main
from tests.conftest import Merge, fast
from tests.helpers.tiny_models import make_model

SETTINGS = fast(objective="paper", steps=1, coefficient_steps=1)


def _copies(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "Failed to copy tokenizer" in r.getMessage()]


def test_image_models_have_no_tokenizer_to_be_missed(
    vit: Path, images: Path, merge: Merge, caplog: pytest.LogCaptureFixture
) -> None:
    models = [{"model": str(vit / name), "parameters": {"calibration": str(images)}} for name in "ab"]
    merge(vit / "base", models, parameters=SETTINGS)
    assert _copies(caplog) == []
    weights = [{"model": str(vit / name), "parameters": {"weight": 0.3}} for name in "ab"]
    merge(vit / "base", weights, merge_method="task_arithmetic", dtype="float32", out="other")
    assert len(_copies(caplog)) == 1, "what mergekit says of other merges is its own business"


def test_a_tokenizer_that_is_there_but_broken_is_reported(
    bert: Path,
    texts: Path,
    merge: Merge,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*arguments: Any, **keywords: Any) -> None:
        raise OSError("it broke")

    monkeypatch.setattr("mergekit.merge._copy_tokenizer", broken)
    models = [{"model": str(bert / name), "parameters": {"calibration": str(texts)}} for name in ("m1", "m2")]
    merge(bert / "base", models, parameters=SETTINGS)
    assert len(_copies(caplog)) == 1


@pytest.fixture
def renamed(tmp_path: Path, texts: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A base with a head, and two models of which one has the same classes in another order."""
    base = make_model("BertForSequenceClassification", tmp_path / "base")
    for i, name in enumerate("ab", 1):
        make_model("BertForSequenceClassification", tmp_path / name, seed=i, body=base)
    for name, labels in (("base", ["no", "yes", "so"]), ("a", ["no", "yes", "so"]), ("b", ["yes", "no", "so"])):
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text())
        labels = labels[: len(config.get("id2label", labels))]
        own = {"id2label": {str(i): v for i, v in enumerate(labels)}, "label2id": {v: i for i, v in enumerate(labels)}}
        file.write_text(json.dumps(config | own))
    shutil.copy(texts, tmp_path / "texts.txt")
    return base, [
        {"model": str(tmp_path / name), "parameters": {"calibration": str(tmp_path / "texts.txt")}} for name in "ab"
    ]


@pytest.mark.parametrize("command", ["check", "learn", "merge", "mergekit-yaml"])
def test_classes_in_another_order_are_told_once(
    command: str,
    renamed: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    merge: Merge,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, models = renamed
    if command == "mergekit-yaml":
        merge(base, models, parameters=SETTINGS)
        told = [record.getMessage() for record in caplog.records]
    else:
        recipe = {"merge_method": "dam", "base_model": str(base), "models": models, "parameters": SETTINGS}
        (tmp_path / "dam.yml").write_text(yaml.safe_dump(recipe))
        out = () if command == "check" else (str(tmp_path / "out"),)
        done = CliRunner().invoke(main, [command, str(tmp_path / "dam.yml"), *out, "--quiet"])
        assert done.exit_code == 0, done.output
        told = [*done.stderr.splitlines(), *(record.getMessage() for record in caplog.records)]
    assert len([line for line in told if "b: its classes are yes, no" in line]) == 1, told
    assert not any("a: its classes are" in line for line in told)
