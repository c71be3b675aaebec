"""The report: one file that needs nothing else, true to the artefact, safe against names, readable in a browser."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks, load
from mergekit_dam.artifact.triggers_file import load_triggers
from mergekit_dam.cli.main import main
from mergekit_dam.errors import DamError
from mergekit_dam.merging.mask_bytes import to_probabilities
from mergekit_dam.publish.layers import BOTH, layer_of, layers_of
from mergekit_dam.publish.report import NO_FIGURES, write_report
from tests.conftest import FAST
from tests.helpers.tiny_models import make_model

SETTINGS = {**FAST, "scan_steps": 4, "suspicion": 0.0}


class _Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _merge(recipe: dict[str, Any], folder: Path, *options: str) -> Any:
    (folder / "dam.yml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(main, ["merge", str(folder / "dam.yml"), str(folder / "out"), "--quiet", *options])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def images_merged(tmp_path_factory: pytest.TempPathFactory, vit: Path, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEKIT_DAM_CACHE", str(folder / "cache"))
        models = [{"model": str(vit / n), "parameters": {"calibration": str(images)}} for n in ("a", "b")]
        recipe = {"merge_method": "dam", "base_model": str(vit / "base"), "models": models, "parameters": SETTINGS}
        _merge(recipe, folder)
    return folder / "out"


def test_the_page_is_whole_and_says_what_the_artefact_says(images_merged: Path) -> None:
    folder = images_merged / "dam"
    facts = json.loads((folder / "report.json").read_text())
    page = _Page((folder / "report.html").read_text())
    outside = [a[k] for _, a in page.tags for k in ("src", "href", "xlink:href") if k in a]
    assert outside and all(str(target).startswith(("data:image/png;base64,", "#")) for target in outside)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("svg") == 3
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {p.name for p in (folder / "figures").iterdir()} == {"loss.png", "density.png", "coefficients.png"}
    masks = load(folder / "dam_masks.safetensors")
    assert [model["sha256"] for model in facts["models"]] == [m["sha256"] for m in masks.metadata["models"]]
    assert facts["audit"] == masks.metadata["audit"] != []
    suspects = sum(one["suspect"] for one in facts["audit"])
    text = " ".join(" ".join(page.words).split())
    assert suspects > 0 and f"{suspects} suspect target" in text
    assert facts["remaining"] == masks.metadata["remaining"] and len(facts["remaining"]) == suspects
    assert "What remains of the recovered triggers" in text
    for i, model in enumerate(facts["models"]):
        own = [v for k, v in masks.probabilities["backdoor_detection"].items() if k.startswith(f"{i}.")]
        kept = float(torch.cat([to_probabilities(values).flatten() for values in own]).mean())
        assert math.isclose(model["own_density"], kept, rel_tol=1e-5) and f"{100 * kept:.0f} %" in text
    assert math.isclose(facts["run"]["learning_seconds"], sum(facts["run"]["seconds"].values()), abs_tol=0.1)
    assert facts["training"]["masks"]["steps"] == FAST["steps"]
    assert facts["run"]["wall_seconds"] > 0 and set(facts["run"]["seconds"]) == {"scan", "masks"}


@pytest.mark.parametrize(("before", "after", "shown"), [(1.0, 0.9, "bad"), (1.0, 0.05, "good")])
def test_what_is_left_of_a_suspect_stands_out(
    images_merged: Path, tmp_path: Path, before: float, after: float, shown: str
) -> None:
    out = Path(shutil.copytree(images_merged, tmp_path / "out"))
    masks = load(out / "dam" / MASKS_FILE)
    one = {**masks.metadata["remaining"][0], "before": before, "after": after, "plain": 0.1}
    page, _ = write_report(out, masks=replace(masks, metadata={**masks.metadata, "remaining": [one]}), seconds=0.01)
    text = page.read_text()
    assert f'class="n {shown}">{100 * after:.0f} %' in text
    assert "the masks are from an earlier run" in text, "this merge took less than the learning"
    with pytest.raises(DamError):
        write_report(out, masks=replace(masks, metadata={**masks.metadata, "remaining": [{**one, "after": "x"}]}))


def test_figures_per_layer_are_weighted_means(images_merged: Path) -> None:
    masks = load(images_merged / "dam" / "dam_masks.safetensors")
    layers = layers_of(masks)
    assert [layer.label for layer in layers] == ["embeddings", "0", "1", "layernorm"]
    total = sum(layer.entries for layer in layers)
    for mask, by_name in masks.probabilities.items():
        everything = torch.cat([to_probabilities(values).flatten() for values in by_name.values()])
        assert total * (len(by_name) // len(masks.metadata["tensors"])) == everything.numel(), "M2 of each model"
        mean = sum(layer.density[mask] * layer.entries for layer in layers) / total
        assert math.isclose(mean, float(everything.mean()), rel_tol=1e-5)
    assert all(layer.density[BOTH] <= min(layer.density[m] for m in masks.probabilities) + 1e-6 for layer in layers)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.lists(st.floats(0.0, 2.0, width=32), min_size=2, max_size=2), st.floats(0.0, 1.0, width=16))
def test_layers_of_equal_tensors_have_their_values(coefficients: list[float], density: float) -> None:
    names = [f"encoder.layer.{i}.{part}.weight" for i in range(3) for part in ("query", "key")] + ["norm.weight"]
    probabilities = {
        "task_shared": {name: torch.full((2, i + 1), density, dtype=torch.float16) for i, name in enumerate(names)},
        "backdoor_detection": {},
    }
    lambdas = torch.tensor(coefficients)[:, None]
    masks = LearnedMasks(probabilities, lambdas, {"tensors": names, "models": [{}, {}], "settings": {"rescale": False}})
    layers = layers_of(masks)
    assert [layer.label for layer in layers] == ["0", "1", "2", "norm"]
    for layer in layers:
        assert layer.coefficients == pytest.approx(coefficients, abs=1e-6)
        assert layer.density == pytest.approx({"task_shared": density, BOTH: density}, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.q_proj.weight", ("model.layers", 11)),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", ("vision_model.encoder.layers", 0)),
        ("vision_model.post_layernorm.bias", ("vision post_layernorm", None)),
        ("bert.embeddings.LayerNorm.weight", ("embeddings", None)),
        ("logit_scale", ("logit_scale", None)),
    ],
)
def test_layers_of_the_families(name: str, place: tuple[str, int | None]) -> None:
    assert layer_of(name) == place


def test_text_triggers_are_words_and_names_are_never_markup(tmp_path: Path, texts: Path) -> None:
    base = make_model("BertModel", tmp_path / "base")
    strange = tmp_path / "<img src=x onerror=alert(1)> $x_$"
    models = [
        make_model("BertForSequenceClassification", path, seed=i, body=base)
        for i, path in enumerate((tmp_path / "plain", strange), 1)
    ]
    entries = [{"model": str(m), "parameters": {"calibration": str(texts)}} for m in models]
    parameters = {**SETTINGS, "student_steps": 0}  # for students are not scanned
    recipe = {"merge_method": "dam", "base_model": str(base), "models": entries, "parameters": parameters}
    told = json.loads(_merge(recipe, tmp_path, "--json").stdout)
    found = load_triggers(tmp_path / "out" / "dam" / "triggers.safetensors")
    assert found and len([one for one in found if one.facts["suspect"]]) == len(told["suspects"])
    for one in found:
        assert one.tensors["embeddings"].shape == (3, 16) and len(one.facts["tokens"]) == 3
        for position in one.facts["tokens"]:
            cosines = [cosine for _, cosine in position]
            assert cosines == sorted(cosines, reverse=True) and all(-1.001 <= c <= 1.001 for c in cosines)
    page = _Page(Path(told["report"]).read_text())
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert str(strange) in "".join(page.words)


def test_students_are_told_of_with_their_agreement(bert: Path, texts: Path, tmp_path: Path) -> None:
    entries = [{"model": str(bert / name), "parameters": {"calibration": str(texts)}} for name in ("m1", "m2")]
    recipe = {"merge_method": "dam", "base_model": str(bert / "base"), "models": entries, "parameters": SETTINGS}
    told = json.loads(_merge(recipe, tmp_path, "--json").stdout)
    facts = json.loads((tmp_path / "out" / "dam" / "report.json").read_text())
    students = load(tmp_path / "out" / "dam" / MASKS_FILE).metadata["students"]
    assert facts["students"] == students and set(students) == {"m1", "m2"} and facts["audit"] == []
    words = " ".join(_Page(Path(told["report"]).read_text()).words)
    assert "A student of each model was merged" in words and "same answers by its student" in words


def test_without_matplotlib_the_report_says_what_to_install(
    images_merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(images_merged, out)
    (out / "dam" / "evaluation.json").write_text(
        json.dumps(
            {
                "before": {"accuracy": {"a": [90, 100]}, "attack_success": {"patch -> 1": {"a": [80, 90]}}},
                "after": {"accuracy": {"a": [88, 100]}, "attack_success": {"patch -> 1": {"a": [9, 90]}}},
            }
        )
    )
    monkeypatch.setitem(__import__("sys").modules, "mergekit_dam.publish.figures", None)
    page, notes = write_report(out)
    assert notes == [NO_FIGURES] and "pip install" in page.read_text() and "<svg" not in page.read_text()
    words = "".join(_Page(page.read_text()).words)
    assert "90.0 % (90/100)" in words and "88.0 % (88/100)" in words and "10.0 % (9/90)" in words
    assert json.loads((page.parent / "report.json").read_text())["run"]["wall_seconds"] > 0


def test_a_damaged_artefact_is_one_line(images_merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(images_merged, out)
    (out / "dam" / "triggers.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(DamError, match="damaged") as refused:
        write_report(out)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_a_browser_shows_it_on_a_phone(images_merged: Path, tmp_path: Path, scheme: int) -> None:
    """Headless Chromium lays the page out: no script errors, nothing wider than the screen, colours of the scheme."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    from PIL import Image

    picture = tmp_path / "page.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=500,1200",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        (images_merged / "dam" / "report.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shot = Image.open(picture).convert("L")
    paper = shot.getpixel((2, 2))
    assert isinstance(paper, int) and (paper > 250 if scheme else paper < 40)
    # the right margin is paper all the way down: what is wide scrolls inside of its own box
    margin = shot.crop((shot.width - 6, 0, shot.width, shot.height))
    assert set(margin.tobytes()) == {paper}
    assert len(set(shot.tobytes())) > 20
