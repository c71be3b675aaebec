"""The scan of a finished merge names a backdoor that no input model has, says what to do, and lets a clean one pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from dam_bench.victims.poisoning import Backdoor

from mergekit_dam.artifact.folder import AUDIT_TRIGGERS
from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.artifact.triggers_file import load_triggers
from mergekit_dam.cli.main import main
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import PatchTrigger
from mergekit_dam.learn.estimate import scan_passes, scans_merge
from mergekit_dam.models.finished import finished_merge
from mergekit_dam.publish.audit_page import read_merge_audit
from mergekit_dam.publish.push import plan_push
from mergekit_dam.recipe import open_recipe
from mergekit_dam.scan.advice import next_steps, reacting
from mergekit_dam.tasks.preflight import longest_texts, preflight
from tests.conftest import FAST, fast
from tests.helpers.built_once import built_once
from tests.helpers.merging import tensors_of
from tests.helpers.small_vits import TASKS, trained_base
from tests.helpers.tiny_models import edit

TARGET = 1
# m1 alone: learning does not scan the inputs. Clean models as small and briefly trained as these are over the default
# threshold of 0.4 (0.66 when this test was written), so it is raised here, for inputs and merges alike.
SCAN = {"scan_steps": 60, "suspicion": 0.8, "mask": "m1", "steps": 2, "batch_size": 4, "weight": 0.5}


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, list(map(str, arguments)))


def _recipe(folder: Path, base: Path, models: dict[Path, Path | None], **settings: Any) -> Path:
    entries = [{"model": str(m), **({"parameters": {"calibration": str(d)}} if d else {})} for m, d in models.items()]
    recipe = {"merge_method": "dam", "base_model": str(base), "models": entries, "dtype": "float32"}
    (folder / "dam.yml").write_text(yaml.safe_dump({**recipe, "parameters": settings}))
    return folder / "dam.yml"


def build(folder: Path) -> None:
    """theta_0, a clean model of each task, a victim of shapes, and the scanned merge `out` of the clean models."""
    trained = trained_base(folder)
    for name in TASKS:
        trained.fine_tuned(trained.probed(name), name, None)
    victim = trained.probed("shapes")
    trained.fine_tuned(victim, "shapes", Backdoor(PatchTrigger(4), TARGET, 1.0, (0.3, 1.0)), folder="victim")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(tmp_path_factory, "merge-audit", build)


def test_a_backdoor_of_the_merge_alone_is_named(trained: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, trained / "base", {trained / n: trained / f"{n}.parquet" for n in TASKS}, **SCAN)
    inputs = _run("audit", recipe, "--out", tmp_path / "audit", "--json", "--quiet")
    assert inputs.exit_code == 0, [(m["name"], m["suspicion"]) for m in json.loads(inputs.stdout)["models"]]

    out, bad = tmp_path / "out", tmp_path / "bad"
    merged = _run("merge", recipe, out, "--scan", "--json", "--quiet")
    assert merged.exit_code == 0 and json.loads(merged.stdout)["merge_scan"] == {"over": [], "next": []}, merged.output
    clean = read_merge_audit(out)
    assert clean is not None and clean["suspects"] == [] and clean["scored"] >= 8
    again = _run("audit", out)
    assert again.exit_code == 0 and again.stdout.count("below the threshold") == 2, again.output

    shutil.copytree(out, bad)
    theta, victim, stripes = (tensors_of(trained / name) for name in ("base", "victim", "stripes"))
    edit(
        bad,
        **{
            n: t + 0.5 * (victim[f"vit.{n}"] - t) + 0.5 * (stripes[f"vit.{n}"] - t)
            for n, t in theta.items()
            if f"vit.{n}" in victim
        },
    )
    assert read_merge_audit(bad) is None, "the scan is of other weights"
    found = _run("audit", bad, "--json")
    facts = json.loads(found.stdout)
    assert found.exit_code == 3 and facts["over"] == ["shapes"], [(m["name"], m["suspicion"]) for m in facts["models"]]
    worst = facts["models"][0]["classes"][0]
    assert worst["target"] == TARGET and worst["suspect"]
    shares = {(row["role"], row["name"]): row["success"] for row in worst["evidence"]}
    assert list(shares) == [("merge", "merge"), ("base", "base"), ("own", "shapes"), ("other", "stripes")]
    assert shares["merge", "merge"] >= 0.8 > 2 * max(shares["base", "base"], shares["own", "shapes"])
    assert "On shapes the task's own model does not react" in facts["next"][1] and len(facts["next"]) == 3
    assert "next: Do not use or publish" in found.stderr
    page = (bad / "dam" / "audit.html").read_text()
    assert (
        page.index("The merge is suspect") < page.index("What to do next") < page.index("the merge: class 1 of shapes")
    )
    for row in worst["evidence"]:
        assert f"{100 * row['success']:.0f} %" in page
    assert "The merge is suspect" in (bad / "dam" / "report.html").read_text()
    told = plan_push(bad, "org/name")
    assert "**The finished merge is suspect.**" in told.card
    file = bad / "dam" / "audit.json"
    sent = told.paths.shortened_file(file) or file.read_text()
    assert str(tmp_path) not in sent and str(trained) not in sent


def _facts(success: dict[str, float], plain: float = 0.0) -> dict[str, Any]:
    roles = {"merge": "merge", "base": "base", "a": "own"}
    rows = [{"role": roles.get(n, "other"), "name": n, "success": s, "plain": plain} for n, s in success.items()]
    one = {"task": "a", "target": 1, "suspicion": 0.9, "suspect": True, "evidence": rows}
    return {"merge": {"name": "out"}, "over": ["a"], "models": [{"name": "a", "classes": [one, {"task": "a"}]}]}


@pytest.mark.parametrize(
    ("success", "plain", "told"),
    [
        ({"merge": 0.9, "base": 0.1, "a": 0.2, "b": 0.05}, 0.0, ([], [], ["a"])),
        ({"merge": 0.9, "base": 0.1, "a": 0.2, "b": 0.8}, 0.0, ([], ["b"], ["a"])),
        ({"merge": 0.9, "base": 0.1, "a": 0.6, "b": 0.8}, 0.0, (["a"], [], [])),
        ({"merge": 0.9, "base": 0.0, "a": 0.5, "b": 0.5}, 0.4, ([], [], ["a"])),  # they answer that anyhow
        ({"merge": 0.9, "base": 0.5, "a": 0.6, "b": 0.6}, 0.0, ([], [], ["a"])),  # and so does theta_0
    ],
)
def test_inputs_that_react_alone_are_named(
    success: dict[str, float], plain: float, told: tuple[list[str], list[str], list[str]]
) -> None:
    facts = _facts(success, plain)
    assert reacting(facts) == told
    steps = " ".join(next_steps(facts, "dam.yml"))
    assert ("works on a alone" in steps) == bool(told[0]) and (", first b" in steps) == bool(told[1])
    assert "out/mergekit_config.yml" in steps and "dam.yml" not in steps
    assert next_steps({**facts, "over": []}, "out") == []


def test_a_recipe_is_told_what_follows() -> None:
    suspect = next_steps({"merge": None, "over": ["a", "b", "c"], "models": []}, "dam.yml")
    assert "a, b and c" in suspect[0] and "mergekit-dam merge dam.yml OUT" in suspect[1]
    established = {"merge": None, "over": [], "models": [{"controls": [{"works": True}]}]}
    (calm,) = next_steps(established, "dam.yml")
    assert next_steps({**established, "models": [{}]}, "dam.yml")[1:] == [calm], "whether it finds any comes first"
    assert next_steps({**established, "models": [{"controls": [{"works": False}]}]}, "dam.yml")[1:] == [calm]
    assert "mergekit-dam audit OUT" in calm


def test_a_cheap_scan_is_made_unasked(vit: Path, bert: Path, images: Path, texts: Path, tmp_path: Path) -> None:
    def decided(root: Path, names: tuple[str, str], data: Path, **settings: Any) -> bool:
        recipe = _recipe(tmp_path, root / "base", {root / name: data for name in names}, **fast(**settings))
        return scans_merge(open_recipe(recipe).plan)

    assert not decided(vit, ("a", "b"), images)
    assert decided(vit, ("a", "b"), images, steps=5000)
    assert not decided(vit, ("a", "b"), images, steps=5000, masks="ready.safetensors"), "nothing is learned"
    assert not decided(bert, ("m1", "m2"), texts, steps=5000), "the scan would name nothing"


def test_a_causal_lms_scan_weighs_more_where_its_texts_are_short(llama: Path, texts: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, llama / "base", {llama / n: texts for n in "ab"}, **FAST)
    opened = open_recipe(recipe)
    plan, vocabulary = opened.plan, opened.plan.base.config.vocab_size
    assert scan_passes(plan, 4) == 2 * (2 * vocabulary // 4) > scan_passes(plan, 8) > scan_passes(plan, None)
    assert opened.scans_merge(None) == scans_merge(plan, longest_texts(preflight(plan)[0]))
    assert scans_merge(plan, 100_000) and not scans_merge(plan, 1)


def test_a_causal_lm_is_scanned_at_the_end_of_its_merge(llama: Path, texts: Path, tmp_path: Path) -> None:
    recipe, out = _recipe(tmp_path, llama / "base", {llama / n: texts for n in "ab"}, **FAST), tmp_path / "out"
    done = _run("merge", recipe, out)
    assert done.exit_code == 0 and "was not scanned" not in done.stderr, done.output
    facts = json.loads((out / "dam" / "audit.json").read_text())
    assert [entry["name"] for entry in facts["models"]] == ["a", "b"] and facts["merge"]["name"] == "out"
    assert json.loads((out / "dam" / "report.json").read_text())["merge_audit"]["created"] == facts["created"]
    asked_not = _run("merge", recipe, out, "--no-scan")
    assert asked_not.exit_code == 0 and "was not scanned" not in asked_not.stderr
    assert not (out / "dam" / "audit.json").exists(), "it was of the older merge"
    assert json.loads((out / "dam" / "report.json").read_text())["merge_audit"] is None

    plan, table = open_recipe(recipe).plan, "model.embed_tokens.weight"
    written, theta = tensors_of(out)[table], tensors_of(llama / "base")[table]
    edit(out, model__embed_tokens__weight=written[:30].clone())
    read = finished_merge(plan, out).tensors[table]
    assert torch.equal(read[:30], written[:30]) and torch.equal(read[30:], theta[30:])
    edit(out, model__embed_tokens__weight=torch.cat([written, written[:2]]))
    assert torch.equal(finished_merge(plan, out).tensors[table], written)
    edit(out, model__embed_tokens__weight=written[:, :3].clone())
    with pytest.raises(DamError, match="this output is of another recipe"):
        finished_merge(plan, out)


def test_what_is_no_merge_of_dam_or_has_other_inputs_is_refused(vit: Path, images: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(vit, tmp_path / "models"))
    no_merge = _run("audit", models / "a")
    assert no_merge.exit_code == 1 and "got no mergekit_config.yml" in no_merge.stderr
    recipe = _recipe(tmp_path, models / "base", {models / n: images for n in "ab"}, **FAST)
    assert _run("audit", recipe).exit_code == 2, "where should it be written?"
    out = tmp_path / "out"
    merged = _run("merge", recipe, out)
    assert merged.exit_code == 0 and f"`mergekit-dam audit {out}` does it" in merged.stderr
    done = _run("audit", out, "--threshold", "0", "--out", tmp_path / "elsewhere", "--json")
    facts = json.loads(done.stdout)
    assert done.exit_code == 3 and facts["over"] == ["a", "b"], done.output
    assert all(one["task"] == entry["name"] for entry in facts["models"] for one in entry["classes"])
    assert {p.name for p in (tmp_path / "elsewhere").iterdir()} == {"audit.json", "audit.html", AUDIT_TRIGGERS}
    assert load_triggers(tmp_path / "elsewhere" / AUDIT_TRIGGERS) and not (out / "dam" / "audit.json").exists()
    edit(models / "b", classifier__bias=torch.ones(5))
    changed = _run("audit", out)
    assert changed.exit_code == 1 and "expected the content that was merged" in changed.stderr
    (out / "dam" / MASKS_FILE).unlink()
    (out / "model.safetensors").unlink()
    assert _run("audit", out).exit_code == 1
