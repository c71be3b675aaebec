"""Bad input: one line with what was expected, what came and the cure, before anything is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.errors import DamError
from tests.conftest import FAST, Merge
from tests.helpers.constants import constants_file
from tests.helpers.tiny_models import edit, make_model


@pytest.fixture(autouse=True)
def nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_dam.learn.paper_search.PaperSearch.run", lambda self: pytest.fail("learning began"))


def _table(path: Path, **columns: Any) -> str:
    Dataset.from_dict(columns).to_parquet(path)
    return str(path)


TEXT_CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no calibration": (lambda p: {}, "expected unlabelled text data, got none"),
    "missing file": (lambda p: {"calibration": str(p / "no.parquet")}, "no such file"),
    "empty file": (lambda p: {"calibration": str((p / "e.txt", (p / "e.txt").touch())[0])}, "at least one sample"),
    "blank texts": (lambda p: {"calibration": _table(p / "b.parquet", text=[" ", ""])}, "not blank"),
    "label column": (
        lambda p: {"calibration": _table(p / "l.parquet", text=["a", "b"], label=[0, 1]), "column": "label"},
        "Labels never reach the search",
    ),
    "unknown column": (
        lambda p: {"calibration": _table(p / "u.parquet", text=["a", "b"]), "column": "texts"},
        "Did you mean 'text'",
    ),
    "two columns": (
        lambda p: {"calibration": _table(p / "t.parquet", one=["a", "b"], two=["c", "d"])},
        "exactly one with texts",
    ),
    "unknown value": (lambda p: {"calibration": "x", "granularity": "rows"}, "'element' or 'row'"),
    "out of range": (lambda p: {"calibration": "x", "suspicion": 2.0}, "less than or equal to 1"),
    "a constant out of range": (
        lambda p: _constants(constants_file(eps=2.0)),
        "less than or equal to 1",
    ),
    "an unknown constant": (
        lambda p: _constants(constants_file(epss=2.0)),
        "Did you mean 'eps'",
    ),
    "a setting among constants": (
        lambda p: _constants(constants_file(alpha=2.0)),
        "is a setting",
    ),
    "constants not there": (lambda p: _constants(str(p / "no.json")), "no such file"),
    "constants that are no object": (
        lambda p: _constants(_written(p / "x.json", "[1]")),
        "a list",
    ),
    "constants too deep": (
        lambda p: _constants(_written(p / "x.json", "[" * 50000)),
        "JSON file",
    ),
    "a constant as a setting": (lambda p: {"calibration": "x", "pool_size": 2}, "name that with `constants`"),
    "a setting that is gone": (lambda p: {"calibration": "x", "patience": 2}, "It is gone"),
    "masks not there": (lambda p: {"calibration": "x", "masks": str(p / MASKS_FILE)}, "no such file"),
    "a strange device": (lambda p: {"calibration": str(_lines(p)), "device": "abacus"}, "accelerator of this machine"),
}


def _constants(file: str) -> dict[str, Any]:
    return {"calibration": "x", "constants": file}


def _constants(file: str) -> dict[str, Any]:
    return {"calibration": "x", "constants": file}


def _written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def _lines(path: Path) -> Path:
    (path / "t.txt").write_text("a movie\nthe film\n")
    return path / "t.txt"


@pytest.mark.parametrize("case", TEXT_CASES)
def test_settings_and_data(case: str, merge: Merge, bert: Path, tmp_path: Path) -> None:
    make, message = TEXT_CASES[case]
    with pytest.raises(DamError) as caught:
        merge(bert / "base", [bert / "m1", bert / "m2"], parameters={**FAST, **make(tmp_path)})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


def test_fewer_than_two_models(merge: Merge, bert: Path) -> None:
    with pytest.raises(DamError, match="at least two besides base_model, got 1"):
        merge(bert / "base", [bert / "m1"], parameters=FAST)


def test_no_base(merge: Merge, bert: Path, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = {"merge_method": "dam", "models": [{"model": str(bert / m)} for m in ("m1", "m2")]}
    with pytest.raises(DamError, match="base_model: expected the model that all others"):
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), MergeOptions(quiet=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float, merge: Merge, tmp_path: Path, texts: Path) -> None:
    base = make_model("BertModel", tmp_path / "base")
    models = [make_model("BertForSequenceClassification", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2)]
    edit(models[1], bert__pooler__dense__bias=torch.full((16,), bad))
    with pytest.raises(DamError, match=r"bert.pooler.dense.bias of model m2: expected finite weights, got 16 of 16"):
        merge(base, models, parameters={**FAST, "calibration": str(texts)})


def test_other_shapes_and_vocabularies(merge: Merge, bert: Path, tmp_path: Path, texts: Path) -> None:
    other = make_model("BertForSequenceClassification", tmp_path / "wide")
    edit(other, bert__embeddings__word_embeddings__weight=torch.zeros(44, 16))
    with pytest.raises(DamError, match="Vocabularies differ"):
        merge(bert / "base", [bert / "m1", other], parameters={**FAST, "calibration": str(texts)})


def test_models_equal_to_the_base(merge: Merge, tmp_path: Path) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base")
    twins = [make_model("LlamaForCausalLM", tmp_path / f"t{i}") for i in (1, 2)]
    with pytest.raises(DamError, match="models equal to the base in every tensor"):
        merge(base, twins, parameters=FAST)


def test_heads_of_other_sizes_name_the_cure(merge: Merge, tmp_path: Path, images: Path) -> None:
    base = make_model("ViTForImageClassification", tmp_path / "base", labels=7)
    models = [make_model("ViTForImageClassification", tmp_path / f"m{i}", seed=i, labels=3) for i in (1, 2)]
    with pytest.raises(DamError, match="override_architecture"):
        merge(base, models, parameters={**FAST, "calibration": str(images)})


def test_pickle_is_never_loaded(merge: Merge, bert: Path, tmp_path: Path, texts: Path) -> None:
    model = make_model("BertForSequenceClassification", tmp_path / "pickled", body=bert / "base")
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(DamError, match="Pickle can run code and is never loaded"):
        merge(bert / "base", [bert / "m1", model], parameters={**FAST, "calibration": str(texts)})
