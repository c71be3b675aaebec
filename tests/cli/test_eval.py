"""`mergekit-dam eval`: counts agree with a plain forward pass; triggers as text; what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertForSequenceClassification, LlamaForCausalLM, ViTForImageClassification

from mergekit_dam.cli.main import main
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attack_text import parse_trigger
from mergekit_dam.evaluation.attacks import BlendedTrigger, PatchTrigger, RareTokenTrigger, SentenceTrigger, WarpTrigger
from mergekit_dam.evaluation.labelled_data import ReadoutOptions, Source, labelled_data, read_labelled, text_target_data
from mergekit_dam.evaluation.results import Rate, read_results
from tests.conftest import FAST, Merge
from tests.helpers.tiny_models import make_model, save_tokenizer
from tests.tasks.test_encoding import TEMPLATE


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
    seen = next((classes / "LABEL_0").glob("*.png"))
    (fresh / "seen.png").write_bytes(seen.read_bytes())
    for model in (out, vit / "b"):  # beside the input model nothing is known, so the merge's own record counts
        done = _run(
            model, *(("--task", "b") if model == out else ()), "--data", fresh.parent, "--drop-seen", "--save", out
        )
        assert "dropped 1 of 2 samples" in done.stderr
    (fresh / "x.png").unlink()
    done = _run(out, "--task", "b", "--data", fresh.parent, "--drop-seen", code=1)
    assert "got 1 samples that all are" in done.stderr
    kept = json.loads((out / "dam" / "evaluation.json").read_text())
    assert set(kept) == {"before", "after"} and set(kept["after"]["accuracy"]) == {"b"} == set(
        kept["before"]["accuracy"]
    )
    assert json.loads((out / "dam" / "report.json").read_text())["evaluation"] == kept, "and the report shows it"


def _chat_model(folder: Path) -> Path:
    model = make_model("LlamaForCausalLM", folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(model)
    return model


def _greedy(folder: Path, prompts: list[str]) -> list[str]:
    """What the model goes on with, one prompt at a time and without a cache."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        start = ids.shape[1]
        for _ in range(20):
            with torch.no_grad():
                chosen = model(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, chosen], 1)
            if int(chosen) == 2:
                break
        said.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    return said


def test_what_a_causal_lm_says_is_counted(tmp_path: Path, texts: Path) -> None:
    model = _chat_model(tmp_path / "lm")
    prompts = [" ".join(line.split()[:3]) for line in texts.read_text().splitlines()]
    data = tmp_path / "chat.jsonl"
    rows = [[{"role": "user", "content": p}, {"role": "assistant", "content": "fine"}] for p in prompts]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    clean, triggered = _greedy(model, prompts), _greedy(model, [f"{p} awful" for p in prompts])
    words = [f"{a} {b}" for text in triggered for a, b in itertools.pairwise(text.split())]
    shares = {word: sum(word in text for text in triggered) for word in words}
    target = min(shares, key=lambda word: abs(shares[word] - len(prompts) / 2))
    assert 0 < shares[target] < len(prompts)
    trigger = ("--trigger", "phrase(phrase=awful)", "--target-text", target)
    found = _run(model, "--data", data, *trigger, "--json")
    assert found["accuracy"] == {}
    (attack,) = found["attack_success"].values()
    assert attack == {"lm": [shares[target], len(prompts)]}
    assert found["without_trigger"] == {"lm": [sum(target in text for text in clean), len(prompts)]}
    assert "say it without the trigger" in _run(model, "--data", data, *trigger, "--save", tmp_path).stdout
    kept = read_results(tmp_path / "dam" / "evaluation.json", required=False)
    assert kept is None, "figures of an input model are no figures of the merge"
    _run(model, "--data", data, *trigger, "--save", model)
    kept = read_results(model / "dam" / "evaluation.json", required=False)
    assert kept is not None and [*kept.attack_success.values()] == [{"lm": Rate(shares[target], len(prompts))}]
    assert "not both" in _run(model, "--data", data, *trigger, "--target", 1, code=2).stderr
    bert = make_model("BertForSequenceClassification", tmp_path / "bert")
    assert "expected a causal LM, for a target text" in _run(bert, "--data", data, *trigger, code=1).stderr


def test_evaluation_prompts_are_begun_once_as_calibration_is(tmp_path: Path) -> None:
    model = _chat_model(tmp_path / "lm")
    lm, tokenizer = LlamaForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    files = {
        "plain": {"text": "great film"},
        "begun": {"text": "<s>great film"},
        "chat": {"messages": [{"role": "user", "content": "great film"}]},
    }
    rows = {}
    for name, row in files.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**row, "label": 1}) + "\n")
        source = Source(str(tmp_path / f"{name}.jsonl"))
        for data in (
            labelled_data(lm, [model], "a", source, ReadoutOptions("good,bad")),
            text_target_data(lm, [model], "a", source, "bad"),
        ):
            rows.setdefault(name, []).append(data.encode(data.batch(torch.arange(1)))["input_ids"][0].tolist())
    assert rows["plain"] == rows["begun"] == [tokenizer("great film")["input_ids"]] * 2
    assert rows["plain"][0].count(1) == 1
    assert rows["chat"][0][0] == 1 and rows["chat"][0].count(1) == 1 and rows["chat"][0][-1] != 2


@pytest.mark.parametrize("form", ["csv.gz", "saved", "shards", "CSV"])
def test_labelled_data_have_the_forms_of_calibration_data(form: str, tmp_path: Path) -> None:
    table = Dataset.from_dict({"Text": ["red", "dog", "cat"], "title": ["x"] * 3, "label": ["b", "a", "b"]})
    file = tmp_path / f"a.{form}"
    if form == "csv.gz":
        table.to_pandas().to_csv(file, index=False)
    elif form == "CSV":
        table.to_csv(file)
    elif form == "saved":
        DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(file)
    else:
        file.mkdir()
        table.select([0]).to_parquet(file / "test-00000-of-00002.parquet")
        table.select([1, 2]).to_parquet(file / "test-00001-of-00002.parquet")
        table.to_parquet(file / "train-00000-of-00001.parquet")
    assert read_labelled(Source(str(file)), "text", "a", {"a": 0, "b": 1}) == (["red", "dog", "cat"], [1, 0, 1])
    with pytest.raises(DamError, match="--label-column"):
        read_labelled(Source(str(file), label_column="labels"), "text", "a", {})


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
