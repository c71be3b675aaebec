"""A merge directory of a stranger: its report, its counts and its JSON cost little, follow no link and run nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, save
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.results import add_measurement, read_results
from mergekit_dam.io.files import replacing, require_own, write_atomic
from mergekit_dam.learn.run import _make_entry, cache_folder
from mergekit_dam.publish.audit_page import read_merge_audit
from mergekit_dam.publish.contents import _json, contents_of
from mergekit_dam.publish.page import render
from mergekit_dam.publish.report import write_report
from tests.helpers.bounds import bounded
from tests.helpers.hostile import CASES, JSON
from tests.hostile.test_text import MARKER

FIGURES = "mergekit_dam.publish.figures"
COUNTS = {"accuracy": {"a": [1, 2]}, "attack_success": {}, "datasets": {"a": "x"}}
FINDING = {"task": "a", "target": 1, "success": 0.9, "control": 0.1, "suspicion": 0.8, "size": 3.0, "suspect": True}
SETTINGS = {"rescale": True, "objective": "inversion"}


def _merge(folder: Path, names: list[str] | None = None, **changes: Any) -> Path:
    """What `report` reads of a merge of two models with one tensor."""
    names = names or ["a", "b"]
    metadata = {
        "schema": 1,
        "settings": SETTINGS,
        "base": {"model": "base", "sha256": "0" * 64},
        "models": [{"name": n, "model": n, "sha256": "1" * 64, "samples": ["s"], "settings": {}} for n in names],
        "tensors": ["layer.0.w"],
        "versions": {"torch": "2"},
        "audit": [FINDING],
        "norms": [1.0] * len(names),
        **changes,
    }
    masks = {"task_shared": {"layer.0.w": torch.full((2, 2), 0.5, dtype=torch.float16)}, "backdoor_detection": {}}
    save(folder / "dam" / MASKS_FILE, LearnedMasks(masks, torch.ones(len(names), 1), metadata))
    return folder


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))


@pytest.mark.parametrize("name", ["report.html", "report.json", "figures", "figures/loss.png", ".report.lock"])
def test_a_report_follows_no_link(name: str, tmp_path: Path) -> None:
    """In a merge that somebody else made, a link would have the report written over a file of ours."""
    out, precious = _merge(tmp_path / "out"), tmp_path / "precious"
    precious.mkdir() if name == "figures" else precious.write_text("mine")
    (out / "dam" / name).parent.mkdir(exist_ok=True)
    (out / "dam" / name).symlink_to(precious)
    with pytest.raises(DamError, match="whose entries stay inside it"):
        write_report(out)
    assert not any(precious.iterdir()) if name == "figures" else precious.read_text() == "mine"


def test_counts_follow_no_link(tmp_path: Path) -> None:
    (tmp_path / "dam").mkdir()
    (tmp_path / "dam" / "evaluation.json").symlink_to("/nowhere")
    with pytest.raises(DamError, match="whose entries stay inside it"):
        add_measurement(tmp_path / "dam", "after", COUNTS)


def test_files_replace_links_and_survive_failure(tmp_path: Path) -> None:
    """`replacing`: a link at the target is replaced; an error on the way leaves what was there, and no litter."""
    precious, target = tmp_path / "precious", tmp_path / "target"
    precious.write_text("mine")
    target.symlink_to(precious)
    write_atomic(target, "new")
    assert precious.read_text() == "mine" and target.read_text() == "new" and not target.is_symlink()
    with pytest.raises(ZeroDivisionError), replacing(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "new" and {p.name for p in tmp_path.iterdir()} == {"precious", "target"}
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_cache_entry_of_somebody_else_is_not_believed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared cache, anyone can foresee an entry's name and put masks there that keep every backdoor."""
    before = os.umask(0)
    try:
        _make_entry(cache_folder() / "mine")  # whatever the umask
    finally:
        os.umask(before)
    (cache / "open").mkdir()
    (cache / "open").chmod(0o777)
    (cache / "link").symlink_to(tmp_path)
    for name, got in (("open", "a folder that all users may write to"), ("link", "a link")):
        with pytest.raises(DamError, match=f"expected a folder that only you can write to, got {got}"):
            _make_entry(cache_folder() / name)
    owner = (cache / "mine").stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        require_own(cache / "mine", "x")  # what root owns is fine for all
        os.chown(cache / "mine", 12345, -1)
    with pytest.raises(DamError, match=r"got a folder of user \d+"):
        require_own(cache / "mine", "x")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    require_own(cache / "mine", "x")


@pytest.mark.parametrize("name", ["run.json", "report.json", "evaluation.json", "inputs.json", "audit.json"])
@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, '{"evaluation": ' + "9" * 5000 + "}", "\0"])
def test_json_of_any_depth_beside_a_merge(name: str, text: str, tmp_path: Path) -> None:
    out = _merge(tmp_path / "out")
    (out / "dam" / name).write_text(text)
    with bounded(), pytest.raises(DamError):
        if name == "inputs.json":
            _json(out / "dam" / name)
        else:
            write_report(out)
    with bounded(), pytest.raises(DamError):
        read_results(out / "dam" / name, required=True)


def test_a_report_of_many_models_stays_small(tmp_path: Path) -> None:
    """A metadata entry costs a stranger some bytes, a line of a figure costs us a megabyte."""
    with bounded(seconds=30, megabytes=400):
        write_report(_merge(tmp_path / "out", [f"m{i}" for i in range(200)]))
    with pytest.raises(DamError, match="at most 1024"):
        write_report(_merge(tmp_path / "more", [f"m{i}" for i in range(2000)]))
    with pytest.raises(DamError, match="at most 1024"):
        write_report(_merge(tmp_path / "long", ["x" * 10_000, "b"]))


TEXTS = st.text(max_size=30) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "{{ 7*7 }}",
        "{% include 'x' %}",
        "</svg><b>",
        "$\\frac{1}{0}$",
        "javascript:alert(1)",
        "]]>",
        "\x00\x0b",
        "\u202e",
    ]
)


def _merge_audit(first: str, second: str) -> dict[str, Any]:
    """What audit.json says of a merge, with these texts."""
    entry = {"name": first, "suspicion": 0.9, "over": True, "defended": True, "classes": [_scanned(first, second)]}
    return {
        "created": first,
        "merge": {"name": second, "sha256": first},
        "threshold": 0.4,
        "models": [entry],
        "over": [first],
        "notes": [second],
        "next": [first],
    }


def _scanned(first: str, second: str) -> dict[str, Any]:
    roles = {"merge": first, "base": second, "own": first, "other": second}
    rows = [{"role": role, "name": name, "success": 0.5, "plain": None} for role, name in roles.items()]
    numbers = {"suspicion": 0.9, "success": 0.9, "control": 0.0, "size": 3.0, "usual": 5.0, "rank": 1}
    return {"task": first, "target": second, "kind": second, "suspect": True, "evidence": rows, **numbers}


@settings(max_examples=max(20, CASES // 10), deadline=None, database=None, derandomize=True)
@given(TEXTS, TEXTS)
def test_no_text_becomes_markup_in_an_audit(one: str, two: str) -> None:
    def tags(first: str, second: str) -> list[tuple[str, tuple[str, ...]]]:
        facts = _merge_audit(first, second)
        facts["models"][0] |= {"rank": 1, "task_vector_norm": 1.0, "norm_ratio": None, "model": first, "revision": None}
        facts |= {"base": {"model": first, "revision": second}, "seconds": 1.0, "device": first}
        facts |= {"settings": {"note": first}, "versions": {"torch": second}}
        trigger = _scanned(first, second) | {"model": first, "tokens": [[[first, 0.5]]], "pictures": []}
        return _Tags(render("audit.html.j2", title=first, facts=facts, triggers=[trigger])).tags

    assert tags(one or "a", two or "a") == tags("a", "a")


@given(JSON, st.sampled_from(["created", "merge", "threshold", "models", "over", "notes", "next"]), st.booleans())
@settings(max_examples=max(40, CASES // 3), deadline=None, database=None, derandomize=True)
def test_a_scan_of_anything_is_read_or_refused(value: Any, key: str, deep: bool) -> None:
    facts = _merge_audit("a", "b")
    if deep:
        facts["models"][0]["classes"][0]["evidence"][0] = {"role": "merge", key: value}
    else:
        facts[key] = value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dam").mkdir()
        (Path(folder) / "dam" / "audit.json").write_text(json.dumps(facts))
        with pytest.raises(DamError):  # at the latest since there are no weights that it could be of
            read_merge_audit(Path(folder))


@settings(max_examples=max(20, CASES // 10), deadline=None, database=None, derandomize=True)
@given(TEXTS, TEXTS)
def test_no_text_becomes_markup(one: str, two: str) -> None:
    """The page has the same elements and attributes whatever the texts are: in names, findings, tokens and titles."""

    def tags(first: str, second: str) -> list[tuple[str, tuple[str, ...]]]:
        model = {
            "name": first,
            "model": second,
            "revision": second,
            "sha256": first,
            "task_vector_norm": 1.0,
            "samples": 1,
            "own_density": 0.5,
            "settings": {"calibration": first},
        }
        finding = {**FINDING, "task": first, "target": second}
        left = {
            "model": first,
            "task": second,
            "target": first,
            "kind": second,
            "before": 1.0,
            "after": 0.9,
            "plain": 0.1,
            "control": 0.2,
        }
        counts = {"accuracy": {first: [1, 2]}, "attack_success": {second: {first: [1, 2]}}, "datasets": {first: second}}
        facts = {
            "schema": 1,
            "created": first,
            "base": {"model": first, "sha256": second, "revision": first},
            "models": [model],
            "settings": {**SETTINGS, "note": first},
            "versions": {"torch": second},
            "densities": {first: 0.5},
            "layers": [],
            "training": {},
            "audit": [{**finding, "suspect": True}],
            "remaining": [left],
            "merge_audit": {**_merge_audit(first, second), "scored": 1, "suspects": [_scanned(first, second)]},
            "triggers": [],
            "students": {first: 0.5},
            "vaccinated": {first: {"agreement": {"after": 0.5}, "held_out": {"planted": 0.5, "unlearned": None}}},
            "evaluation": {"after": counts},
            "run": {"device": first, "started": second},
        }
        trigger = {**finding, "kind": "tokens", "tokens": [[[first, 0.5], [second, 0.4]]], "pictures": []}
        return _Tags(
            render("report.html.j2", title=first, facts=facts, figures={}, triggers=[trigger], note=second)
        ).tags

    assert tags(one or "a", two or "a") == tags("a", "a")


def test_figures_show_names_as_text(tmp_path: Path) -> None:
    """matplotlib reads $...$ as a formula (a bad one is an error), and the SVG stands in the page as it is."""
    names = ["$\\frac{1}{0}$ \\", "</text></svg><script>alert(1)</script><img src=x onerror=alert(1)>"]
    page, _ = write_report(_merge(tmp_path / "out", names))
    tags = _Tags(page.read_text("utf-8")).tags
    assert "svg" in dict(tags) and not {"script", "img"} & set(dict(tags))
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)


@settings(
    max_examples=max(40, CASES // 3),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    key=st.sampled_from(
        [
            "settings",
            "models",
            "versions",
            "densities",
            "audit",
            "students",
            "norms",
            "triggers",
            "metrics",
            "run",
            "evaluation",
        ]
    ),
    value=JSON,
    inner=st.sampled_from(["", "loss", "settings", "samples", "tokens", "kind", "after", "phase", "suspect"]),
    drawn=st.integers(0, 19),
)
def test_a_report_of_anything_is_written_or_refused(
    key: str, value: Any, inner: str, drawn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Well-formed files whose values are of any type; figures in one case of twenty, since they take a second."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    out = _anything(tmp_path / "out", key, {inner: value, "step": 1} if inner else value)
    with monkeypatch.context() as patch, bounded(megabytes=400):
        if drawn:
            patch.setitem(sys.modules, FIGURES, None)
        try:
            write_report(out)
        except DamError as error:
            assert str(error).isprintable() and not (out / "dam" / "report.html").exists()
        else:
            assert (out / "dam" / "report.html").read_text("utf-8").rstrip().endswith("</html>")


def _anything(out: Path, key: str, value: Any) -> Path:
    if key in ("metrics", "run", "evaluation", "triggers"):
        _merge(out)
        if key == "triggers" and isinstance(value, dict):
            value = FINDING | {"kind": "tokens"} | value
        text = json.dumps(value)
        if key == "triggers":
            save_file(
                {"0.embeddings": torch.ones(1, 2)},
                out / "dam" / "triggers.safetensors",
                metadata={"dam_triggers": f"[{text}]"},
            )
        else:
            (out / "dam" / {"metrics": "metrics.jsonl"}.get(key, f"{key}.json")).write_text(text)
        return out
    model = {"name": "a", "model": "a", "sha256": "1", "samples": [], "settings": {}}
    base: dict[str, Any] = {"settings": SETTINGS, "models": [model, model]}
    changed = base.get(key)
    if key == "audit" and isinstance(value, dict):
        value = [FINDING | value]
    if isinstance(changed, dict) and isinstance(value, dict):
        value = changed | value
    elif isinstance(changed, list) and isinstance(value, dict):
        value = [changed[0] | value, changed[1]]
    return _merge(out, **{key: value})


def test_code_beside_a_published_base_is_not_run(merged_copy: Path, vit: Path, tmp_path: Path) -> None:
    """`push` reads the config of a base on this disk."""
    trap, base = tmp_path / "trap", Path(shutil.copytree(vit / "base", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "evil.py").write_text(MARKER % str(trap))
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    recipe = merged_copy / "mergekit_config.yml"
    recipe.write_text(recipe.read_text().replace(str(vit / "base"), str(base)))
    assert str(base) in recipe.read_text()
    with pytest.raises(DamError, match="code that comes with a model is not run here"):
        contents_of(merged_copy)
    assert not trap.exists()
