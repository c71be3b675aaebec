"""What mergekit's table of architectures holds after registration."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import transformers
from mergekit.architecture import arch_info_for_config, json_definitions
from mergekit.common import ModelReference

from mergekit_dam.models.families import register_architectures
from tests.helpers.merging import (
    MIXED,
    OURS,
    tensors_of,
)
from tests.helpers.tiny_models import make_model

pytestmark = pytest.mark.usefixtures("registered")


def test_classes_of_one_family_share_one_architecture() -> None:
    for base_kind, kind, _ in MIXED:
        table = json_definitions.NAME_TO_ARCH
        assert table[base_kind][0] is table[kind][0]
    assert json_definitions.NAME_TO_ARCH["ViTModel"] != json_definitions.NAME_TO_ARCH["BertModel"]


@pytest.mark.parametrize("kind", OURS)
def test_definitions_list_at_least_what_mergekits_own_did(kind: str) -> None:
    own = json_definitions._load_all_architectures()[1].get(kind, [])
    config = getattr(transformers, kind).config_class(architectures=[kind])
    ours = arch_info_for_config(config)
    assert ours is not None
    by_spelling = {name: w for w in ours.all_weights(config) for name in (w.name, *(w.aliases or ()))}
    for weight in own[0].all_weights(config) if own else []:
        found = by_spelling[weight.name]
        # for these two mergekit lists the names of the classes with heads, and finds nothing in their files
        assert found.name == weight.name or kind in {"RobertaModel", "DistilBertModel"}
        assert found.vocabulary_axis == weight.vocabulary_axis
        assert all(by_spelling[alias] is found for alias in weight.aliases or ())


@pytest.mark.parametrize("kind", [k for k in OURS if not k.startswith(("ViT", "CLIPV", "CLIPF"))])
def test_vocabulary_axis_is_that_of_the_tokens(kind: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(make_model(kind, tmp_path / "m"))
    architecture = arch_info_for_config(config)
    assert architecture is not None
    marked = {w.name for w in architecture.all_weights(config) if w.vocabulary_axis is not None}
    shapes = {n: t.shape for n, t in tensors_of(tmp_path / "m").items()}
    vocabulary = config.get_text_config().vocab_size
    tokens = {n for n, s in shapes.items() if s and s[0] == vocabulary and "position" not in n}
    assert marked == tokens


def test_registration_is_idempotent() -> None:
    before = {kind: json_definitions.NAME_TO_ARCH[kind][0] for kind in OURS}
    register_architectures()
    assert all(json_definitions.NAME_TO_ARCH[kind][0] is entry for kind, entry in before.items())


def test_registration_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(json_definitions, "NAME_TO_ARCH")
    with pytest.warns(UserWarning, match="model families not registered"):
        register_architectures()


def test_registration_warns_about_broken_package_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_definitions, "NAME_TO_ARCH", {})
    monkeypatch.setattr("mergekit_dam.models.families.load_tensors", lambda name: json.loads("{"))
    with pytest.warns(UserWarning, match="model families not registered"):
        register_architectures()
    assert json_definitions.NAME_TO_ARCH == {}


def test_registration_is_silent_when_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_definitions, "NAME_TO_ARCH", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_architectures()
    assert set(OURS) == set(json_definitions.NAME_TO_ARCH)


def test_mergekit_reads_a_model_reference_of_ours(tmp_path: Path) -> None:
    """The definitions follow the files beside the config, however the config was read."""
    base = make_model("BertForMaskedLM", tmp_path / "base")
    config = ModelReference.parse(str(base)).config()
    architecture = arch_info_for_config(config)
    assert architecture is not None
    assert {w.name for w in architecture.all_weights(config)} == set(tensors_of(base))
