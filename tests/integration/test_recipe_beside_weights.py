"""What mergekit copies or writes beside the weights: tokenizers, chat templates, preprocessing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.api import merge
from mergekit_dam.errors import DamError
from mergekit_dam.recipe import preview


def _linear(root: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in ("a", "b")]
    base = {"model": str(root / "base"), "override_architecture": "ViTModel"}
    return {"merge_method": "task_arithmetic", "base_model": base, "models": models, **more}


def test_image_models_merge_without_a_word_about_tokenizers(
    vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        out = merge(_linear(vit), tmp_path / "out")
    assert not caplog.records and (out / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("template", ["nosuch", "{{ messages", "{% for m in messages %}{{ m.content }}"])
def test_a_chat_template_that_is_none_is_refused_at_once(vit: Path, tmp_path: Path, template: str) -> None:
    recipe = _linear(vit, chat_template=template)
    with pytest.raises(DamError, match=r"chat_template: expected auto, a Jinja template, or one of .*chatml"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with (
        pytest.raises(DamError, match="chat_template"),
        preview({**recipe, "merge_method": "dam", "models": [{"model": m["model"]} for m in recipe["models"]]}),
    ):
        pass
