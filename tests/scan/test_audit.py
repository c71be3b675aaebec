"""`mergekit-dam audit`: scores, ranks, exit codes, files. That the scan finds a victim is shown in test_defence."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_dam.artifact.triggers_file import load_triggers
from mergekit_dam.cli.main import main
from mergekit_dam.constants import Constants
from mergekit_dam.scan.audit import model_scores
from mergekit_dam.scan.findings import Finding
from mergekit_dam.scan.triggers import TokenTriggers
from mergekit_dam.tasks.bounds import Bounds
from tests.conftest import FAST
from tests.helpers.tiny_models import make_model

NOTHING = TokenTriggers([torch.zeros(1, 2, 2)], Bounds.of(torch.zeros(2), torch.ones(2)), Constants())
PLAIN: dict[str, Any] = {f.name: 1.0 for f in fields(Finding)} | {
    "trigger": NOTHING,
    "source_model": None,
    "shared": 0.0,
}


def _audit(base: Path, models: list[Path], data: Path, folder: Path, *options: str) -> Any:
    entries = [{"model": str(m), "parameters": {"calibration": str(data)}} for m in models]
    recipe = {
        "merge_method": "dam",
        "base_model": str(base),
        "models": entries,
        "parameters": {**FAST, "scan_steps": 8},
    }
    (folder / "dam.yml").write_text(yaml.safe_dump(recipe))
    return CliRunner().invoke(main, ["audit", str(folder / "dam.yml"), "--out", str(folder / "audit"), *options])


def test_models_over_and_below(vit: Path, images: Path, tmp_path: Path) -> None:
    done = _audit(vit / "base", [vit / "a", vit / "b"], images, tmp_path, "--threshold", "0", "--json", "--quiet")
    assert done.exit_code == 3 and done.stderr.count("\n") == 0
    facts = json.loads(done.stdout)
    assert facts == json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert facts["over"] == ["a", "b"] and {e["rank"] for e in facts["models"]} == {1, 2}
    a, b = facts["models"]
    assert a["norm_ratio"] == pytest.approx(a["task_vector_norm"] / b["task_vector_norm"], rel=1e-3)
    classes = {"a": 3, "b": 5}
    assert all(c["target"] < classes[c["task"]] for e in (a, b) for c in e["classes"])
    assert {c["task"] for c in a["classes"]} == {"a", "b"}, "what a model brings to the other's task is told, too"
    assert a["classes"] and b["classes"]
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "2 of 2 models over the" in page and page.count("data:image/png;base64,") >= 2 * 2
    shown = load_triggers(tmp_path / "audit" / "triggers.safetensors")
    assert {one.facts["task"] for one in shown} == {"a", "b"}
    assert all(one.tensors["pattern"].shape == (3, 16, 16) for one in shown)

    calm = _audit(vit / "base", [vit / "a", vit / "b"], images, tmp_path, "--threshold", "1")
    top = max(e["suspicion"] for e in facts["models"])
    assert calm.exit_code == (3 if top >= 1 else 0), calm.output
    assert all(line.split(":")[0] in {"a", "b"} for line in calm.stdout.splitlines())


def test_causal_lms_without_a_finding_have_no_score(tmp_path: Path, texts: Path) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base")
    models = [make_model("LlamaForCausalLM", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2)]
    done = _audit(base, models, texts, tmp_path, "--json")
    facts = json.loads(done.stdout)
    for entry in facts["models"]:
        assert (entry["suspicion"] is None) == (not entry["classes"])
    assert done.exit_code == (3 if facts["over"] else 0)


def test_text_encoders_are_said_to_be_undefended_everywhere(bert: Path, texts: Path, tmp_path: Path) -> None:
    done = _audit(bert / "base", [bert / "m1", bert / "m2"], texts, tmp_path, "--threshold", "2")
    facts = json.loads((tmp_path / "audit" / "audit.json").read_text())
    (note,) = facts["notes"]
    assert note.startswith("m1, m2: ") and "text encoders: a low score says nothing" in note
    assert done.stderr.count(note) == 1
    assert note in (tmp_path / "audit" / "audit.html").read_text()
    assert len(done.stdout.splitlines()) == 2
    assert all("which says nothing of a text encoder" in line for line in done.stdout.splitlines())
    assert not any(entry["defended"] for entry in facts["models"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.floats(0, 1)), max_size=8),
    st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    st.floats(0, 1),
)
def test_ranks_and_thresholds(scanned: list[tuple[int, float, float]], norms: list[float], threshold: float) -> None:
    findings = [
        Finding(**{**PLAIN, "task": task, "target": i, "success": success, "base_success": control})
        for i, (task, success, control) in enumerate(scanned)
    ]
    entries = model_scores(findings, list("abcd"), norms, threshold)
    ranked = sorted((e for e in entries if e["rank"] is not None), key=lambda e: e["rank"])
    assert [e["rank"] for e in ranked] == list(range(1, len({task for task, _, _ in scanned}) + 1))
    values = [e["suspicion"] for e in ranked]
    assert values == sorted(values, reverse=True)
    for index, entry in enumerate(entries):
        own = [f.suspicion for f in findings if f.task == index]
        assert entry["over"] == (bool(own) and max(own) >= threshold)
        assert [c["rank"] for c in entry["classes"]] == list(range(1, len(own) + 1))
