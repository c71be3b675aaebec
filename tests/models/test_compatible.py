"""What cannot be merged is refused from headers and configs, in one line that names the cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError
from mergekit_dam.models.compatible import differing_entries
from mergekit_dam.models.parameter_names import meta_model
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.plugin.planner import plan_of
from mergekit_dam.tasks import build_tasks, family_of
from mergekit_dam.tasks.preflight import preflight
from tests.helpers.merging import Tensors, rewrite
from tests.helpers.tiny_models import WORDS, make_model

pytestmark = pytest.mark.usefixtures("registered")
KIND = "LlamaForCausalLM"
ROWS = len(WORDS) + 4


def _models(root: Path, **extra: Any) -> list[Path]:
    base = make_model(KIND, root / "base", **extra)
    return [base, *(make_model(KIND, root / name, seed=i + 1, body=base, **extra) for i, name in enumerate("ab"))]


def _plan(paths: list[Path], **shared: Any) -> Plan:
    refs = [ModelReference.parse(str(path)) for path in paths]
    return build_plan(refs[0], refs[1:], shared=shared, per_model={})


def _int8(tensors: Tensors) -> Tensors:
    return {n: (t * 50).to(torch.int8) if n.endswith("proj.weight") else t for n, t in tensors.items()}


def _fp8(tensors: Tensors) -> Tensors:
    return {n: t.to(torch.float8_e4m3fn) if n.endswith("proj.weight") else t for n, t in tensors.items()}


def _without_norm(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if n != "model.norm.weight"}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_int8, "quantised"),
        (_fp8, "quantised"),
        (lambda tensors: dict.fromkeys(tensors, torch.zeros(0)) | {}, "empty"),
        (_without_norm, "model.norm.weight"),
        (lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()}, "_orig_mod."),
    ],
)
def test_weights_that_cannot_be_added(
    change: Callable[[Tensors], Tensors], said: str, which: int, tmp_path: Path
) -> None:
    paths = _models(tmp_path)
    rewrite(paths[which], lambda tensors: {n: t.clone() for n, t in change(tensors).items()})
    with pytest.raises(DamError, match=said):
        _plan(paths)


def test_another_size_is_named_as_such(tmp_path: Path) -> None:
    paths = _models(tmp_path)
    deeper = make_model(KIND, tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(DamError, match="2 layers, got 4 layers") as found:
        _plan([paths[0], deeper, paths[2]])
    assert "slices" not in str(found.value)
    wider = make_model(KIND, tmp_path / "wider", hidden_size=32)
    with pytest.raises(DamError) as found:
        _plan([paths[0], wider, paths[2]])
    assert "Vocabularies" not in str(found.value)


def test_entries_of_the_config_that_differ(tmp_path: Path, texts: Path) -> None:
    paths = _models(tmp_path)
    rewrite(paths[1], lambda tensors: tensors, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    plan = _plan(paths, calibration=str(texts))
    assert [entry.split()[0] for entry in differing_entries(plan.base.config, plan.models[0].config)] == [
        "rope_parameters"
    ]
    assert not differing_entries(plan.base.config, plan.models[1].config)
    assert any("rope" in warning for warning in preflight(plan)[1])


def test_a_head_of_its_own_beside_a_tied_one(tmp_path: Path) -> None:
    paths = _models(tmp_path, tie_word_embeddings=True)
    rewrite(paths[1], lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}, tie_word_embeddings=False)
    with pytest.raises(DamError, match="tie_word_embeddings"):
        _plan(paths)


def test_old_buffers_in_the_base_are_left_out(tmp_path: Path) -> None:
    paths = _models(tmp_path)
    rewrite(paths[0], lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)})
    assert not any("inv_freq" in spec.name for spec in _plan(paths).tensors)


@pytest.mark.parametrize("entry", [{"attn_implementation": "flash_attention_2"}, {"pad_token_id": -1}])
def test_entries_that_change_no_weight_stop_nothing(entry: dict[str, Any], tmp_path: Path, texts: Path) -> None:
    paths = _models(tmp_path)
    for path in paths:
        rewrite(path, lambda tensors: tensors, **entry)
    plan = _plan(paths, calibration=str(texts), constants={"answer_tokens": 0})
    task = build_tasks(plan, torch.device("cpu"))[0]
    with torch.no_grad():
        assert task.logits(task.own_weights(), task.inputs(torch.arange(4))).isfinite().all()
    meta_model(plan.base.config, torch.device("cpu"))


def test_a_class_that_transformers_lacks_is_refused_with_the_plan(tmp_path: Path) -> None:
    paths = _models(tmp_path)
    rewrite(paths[1], lambda tensors: tensors, architectures=["MineForCausalLM"])
    with pytest.raises(DamError, match="MineForCausalLM"):
        _plan(paths)


def test_models_of_another_kind_than_the_base(tmp_path: Path) -> None:
    paths = _models(tmp_path)
    plan = _plan(paths)
    plan.models[0].config.architectures = ["LlamaForSequenceClassification"]
    with pytest.raises(DamError, match="causal LM"):
        family_of(plan)
    plan.models[0].config.architectures = ["MambaForCausalLM"]
    with pytest.raises(DamError, match="key-value cache"):
        family_of(plan)


def test_a_token_without_a_row(tmp_path: Path, texts: Path) -> None:
    paths = _models(tmp_path)
    file = paths[1] / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["[NEW]"] = 40
    file.write_text(json.dumps(content))
    data = tmp_path / "new.txt"
    data.write_text("".join(f"{line} [NEW]\n" for line in texts.read_text().splitlines()).replace("[NEW]", "qqq"))
    content["model"]["vocab"]["qqq"] = 41
    file.write_text(json.dumps(content))
    with pytest.raises(DamError, match="calibration text 1 of a"):
        preflight(_plan(paths, calibration=str(data)))


def _config(paths: list[Path], **tokenizer: Any) -> MergeConfiguration:
    models = [{"model": str(path)} for path in paths[1:]]
    return MergeConfiguration(merge_method="dam", base_model=str(paths[0]), models=models, **tokenizer)


def _rename_a_token(paths: list[Path]) -> dict[str, Any]:
    file = paths[1] / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["another"] = content["model"]["vocab"].pop(max(content["model"]["vocab"]))
    file.write_text(json.dumps(content))
    return {"tokenizer_source": "base"}


def _leave_a_gap(paths: list[Path]) -> dict[str, Any]:
    for path in paths:
        content = json.loads((path / "tokenizer.json").read_text())
        content["model"]["vocab"]["late"] = 39
        (path / "tokenizer.json").write_text(json.dumps(content))
    return {"tokenizer": {"source": "union"}}


def _give_a_source(paths: list[Path]) -> dict[str, Any]:
    return {"tokenizer": {"source": "base", "tokens": {"red": {"source": str(paths[1]), "force": True}}}}


@pytest.mark.parametrize("change", [_rename_a_token, _leave_a_gap, _give_a_source])
def test_a_tokenizer_setting_that_moves_rows(change: Callable[[list[Path]], dict[str, Any]], tmp_path: Path) -> None:
    paths = _models(tmp_path)
    assert plan_of(_config(paths, tokenizer_source="base"), MergeOptions()).tensors
    with pytest.raises(DamError, match="setting tokenizer"):
        plan_of(_config(paths, **change(paths)), MergeOptions())


def test_slices_and_modules_are_models_too(tmp_path: Path, texts: Path) -> None:
    base, *models = map(str, _models(tmp_path))
    own = {"calibration": str(texts)}
    entries = [{"model": model, "parameters": own} for model in models]
    sources = [{"model": base, "layer_range": [0, 2]}, *({**entry, "layer_range": [0, 2]} for entry in entries)]
    for form in (
        {"slices": [{"sources": sources}]},
        {"modules": {"default": {"models": entries}}},
        {"modules": {"default": {"slices": [{"sources": sources}]}}},
    ):
        config = MergeConfiguration(merge_method="dam", base_model=base, **form)
        plan = plan_of(config, MergeOptions())
        assert [model.settings.calibration for model in plan.models] == [str(texts)] * 2
