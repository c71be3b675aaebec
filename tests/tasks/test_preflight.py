"""What `check` sees of models: tokenizers, classes and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mergekit_dam.errors import DamError
from mergekit_dam.recipe import preview
from mergekit_dam.tasks.encoding import encoded
from mergekit_dam.tasks.preflight import preflight
from tests.helpers.tiny_models import make_model, save_tokenizer


def _three(root: Path, kind: str) -> dict[str, Any]:
    base = make_model(kind, root / "base")
    for seed, name in enumerate("ab"):
        make_model(kind, root / name, seed=seed + 1, body=base)
    models = [{"model": str(root / name)} for name in "ab"]
    return {"merge_method": "dam", "base_model": str(base), "models": models}


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_models_that_sample_their_own_text_need_no_tokenizer(tmp_path: Path) -> None:
    recipe = _three(tmp_path, "LlamaForCausalLM")
    for file in tmp_path.glob("*/tokenizer*"):
        file.unlink()
    with preview(recipe) as plan:
        assert [entry["vocabulary"] for entry in preflight(plan)[0].values()] == [None, None]


@pytest.mark.parametrize("classes", [["LlamaForSequenceClassification"], None])
def test_classes_that_mergekit_cannot_merge_are_refused(tmp_path: Path, classes: list[str] | None) -> None:
    recipe = _three(tmp_path, "LlamaForCausalLM")
    _edit(tmp_path / "a", architectures=classes)
    with pytest.raises(DamError, match="class"), preview(recipe):
        pass


def test_other_names_for_the_rows_of_a_merged_head_are_told(tmp_path: Path, texts: Path) -> None:
    recipe = _three(tmp_path, "BertForSequenceClassification") | {"parameters": {"calibration": str(texts)}}
    for name, labels in {"base": ["no", "yes", "so"], "a": ["no", "yes", "so"], "b": ["yes", "no", "so"]}.items():
        _edit(tmp_path / name, id2label=dict(enumerate(labels)), label2id={v: i for i, v in enumerate(labels)})
    with preview(recipe) as plan:
        (told,) = [line for line in preflight(plan)[1] if "id2label" in line]
    assert told.startswith("b: its classes are yes, no, so, the base's are no, yes, so")


def test_a_text_with_its_first_token_is_begun_once(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    plain, template = encoded(tokenizer, ["red dog", "<s>red dog"], 16, "a")
    assert plain == template and plain[0] == 1
