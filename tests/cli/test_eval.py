"""`mergekit-dam eval`: counts agree with a plain forward pass; triggers as text; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, BertForSequenceClassification, ViTForImageClassification

from mergekit_dam.cli.main import main
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attack_text import parse_trigger
from mergekit_dam.evaluation.attacks import BlendedTrigger, PatchTrigger, RareTokenTrigger, SentenceTrigger, WarpTrigger
from tests.conftest import FAST, Merge
from tests.helpers.tiny_models import make_model, save_tokenizer


def _run(*arguments: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(main, ["eval", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if code == 0 and "--json" in arguments else done


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The images in one folder per class name."""
    folder = tmp_path_factory.mktemp("classes")
    for i, file in enumerate(sorted(images.glob("*.png"))):
        target = folder / f"LABEL_{i % 3}"
        target.mkdir(exist_ok=True)
        (target / file.name).write_bytes(file.read_bytes())
    return folder


def _predicted(model: Path, pictures: list[Image.Image], patch: bool) -> torch.Tensor:
    pixels = torch.stack([torch.from_numpy(np.asarray(p).copy()).float() / 255 for p in pictures])
    pixels = pixels.permute(0, 3, 1, 2)
    if patch:
        pixels[..., :2, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    with torch.no_grad():
        logits = ViTForImageClassification.from_pretrained(model).eval()(pixel_values=(pixels - 0.5) / 0.5).logits
    return logits.argmax(-1)


def test_counts_of_an_image_model(vit: Path, classes: Path) -> None:
    files = sorted(classes.glob("*/*.png"))
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    pictures = [Image.open(file).convert("RGB") for file in files]
    clean, triggered = (_predicted(vit / "a", pictures, patch) for patch in (False, True))
    target = int(triggered.mode().values)
    name = "patch(size=2,corner=top-left)"
    found = _run(vit / "a", "--data", classes, "--trigger", name, "--target", target, "--json")
    assert found["accuracy"] == {"a": [int((clean == labels).sum()), 12]}
    others = labels != target
    hits = int((triggered[others] == target).sum())
    assert found["attack_success"] == {f"{name} -> {target}": {"a": [hits, int(others.sum())]}}
    assert hits > 0


def test_counts_of_a_text_model_with_named_labels(tmp_path: Path, texts: Path) -> None:
    model = make_model("BertForSequenceClassification", tmp_path / "m")
    lines = texts.read_text().splitlines()
    data = tmp_path / "labelled.parquet"
    Dataset.from_dict({"text": lines, "answer": [f"LABEL_{i % 3}" for i in range(len(lines))]}).to_parquet(data)
    found = _run(model, "--data", data, "--label-column", "answer", "--json")
    encoded = AutoTokenizer.from_pretrained(model)(lines, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = BertForSequenceClassification.from_pretrained(model).eval()(**encoded).logits
    hits = sum(int(k) == i % 3 for i, k in enumerate(logits.argmax(-1)))
    assert found["accuracy"] == {"m": [hits, len(lines)]}
    done = _run(model, "--data", data, code=1)
    assert "expected one of the columns text, answer" in done.stderr


def test_causal_lms_answer_with_words_and_clip_with_prompts(tmp_path: Path, texts: Path, classes: Path) -> None:
    lines = texts.read_text().splitlines()
    data = tmp_path / "labelled.jsonl"
    Dataset.from_dict({"text": lines, "label": [i % 2 for i in range(len(lines))]}).to_json(data)
    lm = make_model("LlamaForCausalLM", tmp_path / "lm")
    found = _run(lm, "--data", data, "--classes", "good,bad", "--json")
    assert found["accuracy"]["lm"][1] == len(lines)
    assert "differ in their first token" in _run(lm, "--data", data, "--classes", "good,good plot", code=1).stderr
    assert "Give --classes" in _run(lm, "--data", data, code=1).stderr
    clip = make_model("CLIPModel", tmp_path / "clip")
    save_tokenizer(clip)
    found = _run(clip, "--data", classes, "--classes", "LABEL_0,LABEL_1,LABEL_2", "--json")
    assert found["accuracy"]["clip"][1] == 12


def test_a_merge_is_read_with_a_tasks_head_and_kept_from_its_calibration_data(
    vit: Path, images: Path, classes: Path, merge: Merge, tmp_path: Path
) -> None:
    models = [{"model": str(vit / n), "parameters": {"calibration": str(images)}} for n in ("a", "b")]
    out = merge(vit / "base", models, parameters={**FAST, "scan_steps": 2})
    done = _run(out, "--task", "a", "--data", classes, code=1)
    assert "samples in both" in done.stderr
    fresh = tmp_path / "fresh" / "LABEL_0"
    fresh.mkdir(parents=True)
    Image.new("RGB", (16, 16), (200, 30, 30)).save(fresh / "x.png")
    assert _run(out, "--task", "b", "--data", fresh.parent, "--save", out, "--json")["accuracy"]["b"][1] == 1
    _run(vit / "b", "--data", fresh.parent, "--save", out)
    kept = json.loads((out / "dam" / "evaluation.json").read_text())
    assert set(kept) == {"before", "after"} and set(kept["after"]["accuracy"]) == {"b"} == set(
        kept["before"]["accuracy"]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("patch", PatchTrigger()),
        ("patch(size=5, corner=top-left)", PatchTrigger(size=5, corner="top-left")),
        ("warp(strength=0.5)", WarpTrigger(strength=0.5)),
        ('sentence(sentence="Buy, now.")', SentenceTrigger("Buy, now.")),
        ("words(words=cf mn,count=2)", RareTokenTrigger(("cf", "mn"), 2)),
        ("blended(opacity=0.25,seed=3)", BlendedTrigger(opacity=0.25, seed=3)),
    ],
)
def test_triggers_as_text(text: str, expected: object) -> None:
    assert vars(parse_trigger(text)) == vars(expected)


@pytest.mark.parametrize("text", ["pach", "patch(sise=3)", "patch(size=big)", "patch(corner=middle)", "phrase", "a(b"])
def test_wrong_triggers(text: str) -> None:
    with pytest.raises(DamError, match="trigger"):
        parse_trigger(text)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.text(max_size=40))
def test_any_text_is_a_trigger_or_one_line_of_error(text: str) -> None:
    try:
        parse_trigger(text)
    except DamError as error:
        assert "\n" not in str(error)


def test_a_pictures_pixels_are_the_pattern(tmp_path: Path) -> None:
    Image.new("RGB", (2, 3), (255, 0, 51)).save(tmp_path / "t.png")
    trigger = parse_trigger(f"patch(image={tmp_path / 't.png'},margin=1)")
    assert isinstance(trigger, PatchTrigger) and trigger.pattern().shape == (3, 3, 2) and trigger.margin == 1
    torch.testing.assert_close(trigger.pattern()[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_a_trigger_needs_a_target(vit: Path, classes: Path) -> None:
    assert "expected both or neither" in _run(vit / "a", "--data", classes, "--trigger", "patch", code=1).stderr
