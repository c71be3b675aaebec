"""Cards from hostile names: whatever a model, task or recipe is called, it stays text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mergekit_dam.evaluation.results import Rate, Results
from mergekit_dam.publish.card import model_card
from mergekit_dam.publish.contents import Publication
from mergekit_dam.publish.markdown import block, code, table
from mergekit_dam.publish.provenance import Provenance

HOSTILE = (
    "[x](javascript:alert(1)) <img src=x onerror=alert(1)> `` | ``` ![y](http://evil.example) \n\n# Heading\n---\n"
)
RENDER = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")
foreign = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [HOSTILE, "`", "\\", "\\|", "a|b", "``a`", "<b>", "\u202e", "- x", "```\n# x"]
)


def kinds(markdown: str) -> list[str]:
    """All tokens of the rendered text, inner ones too."""
    found = []
    for token in RENDER.parse(markdown):
        found += [token.type, *(child.type for child in token.children or [])]
    return found


@given(foreign)
def test_a_code_span_is_one_code_span(text: str) -> None:
    assert kinds(f"before {code(text)} after") == [
        "paragraph_open",
        "inline",
        "text",
        "code_inline",
        "text",
        "paragraph_close",
    ]


@given(foreign, foreign)
def test_a_table_keeps_its_cells(first: str, second: str) -> None:
    found = kinds(table(["a", "b"], [[code(first), code(second)]]))
    assert found.count("td_open") == 2 and found.count("code_inline") == 2
    assert not {"link_open", "html_inline", "html_block", "image", "heading_open"} & set(found)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.just(HOSTILE))
def test_a_block_is_one_block(text: str) -> None:
    assert kinds(block(text, "yaml")) == ["fence"]


def publication(folder: Path, name: str, *, audit: list[dict[str, object]], **masks: object) -> Publication:
    recipe = {"merge_method": "dam", "base_model": "lab/base", "models": [{"model": {"model": {"path": name}}}]}
    metadata = {
        "settings": {"objective": "inversion", "suspicion": 0.4},
        "seed": 0,
        "densities": {name: 0.5},
        "models": [{"name": name, "sha256": name, "samples": ["a"]}],
        "versions": {name: name},
        "audit": audit,
        **masks,
    }
    return Publication(
        folder=folder,
        config={"architectures": ["ViTModel"]},
        recipe_text=yaml.safe_dump(recipe),
        recipe=recipe,
        masks=metadata,
        num_tensors=1,
        num_parameters=2,
    )


@pytest.mark.parametrize("name", [HOSTILE, "a: b\n- c", "'\"", "{{ x }}", "--- \nlicense: mit"])
def test_a_hostile_name_changes_neither_front_matter_nor_text(tmp_path: Path, name: str) -> None:
    finding = {"task": name, "target": name, "success": 1, "control": 0, "suspicion": 1, "suspect": True}
    measured = Results({name: Rate(1, 2)}, {name: {name: Rate(1, 2)}}, {name: name}, name)
    found = publication(tmp_path, name, audit=[finding])
    text = model_card("merge", found, Provenance({"lab/base": "lab/base"}, name, [name]), measured)
    data = ModelCard(text).data
    assert data.base_model == ["lab/base"] and data.license == name and data.datasets == [name]
    assert set(data.to_dict()) == {
        "base_model",
        "base_model_relation",
        "library_name",
        "pipeline_tag",
        "license",
        "datasets",
        "tags",
        "model-index",
    }
    tokens = RENDER.parse(ModelCard(text).text)
    links = [c.attrs["href"] for t in tokens for c in t.children or [] if c.type == "link_open"]
    assert {str(link).split("/")[2] for link in links} == {"github.com", "arxiv.org", "huggingface.co"}
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert headings == ["`merge`", "Models merged", "Defence against backdoors", "What was measured", "Configuration"]
    assert not {"html_inline", "html_block", "image"} & set(kinds(ModelCard(text).text))


def test_the_scan_is_told_as_it_was(tmp_path: Path) -> None:
    def card(audit: list[dict[str, object]], **masks: object) -> str:
        return model_card("m", publication(tmp_path, "x", audit=audit, **masks), Provenance({}, None), None)

    finding = {"task": "x", "target": 1, "success": 0.9, "control": 0.1, "suspicion": 0.8}
    assert "1 are suspect" in card([finding | {"suspect": True}]) and "| 0.90 | 0.10 | 0.80 |" in card(
        [finding | {"suspect": True}]
    )
    assert "found none that is suspect" in card([finding | {"suspect": False}])
    assert "found no target that it could score" in card([])
    assert "No scan for triggers was made" in card([finding], settings={"objective": "paper"})
    told = card([], students={"x": 0.9712})
    assert "A student of each model was merged" in told and "| `x` | 0.971 |" in told and "could score" not in told
    of_suspect = card([finding | {"suspect": True}], students={"x": 0.9712})
    assert (
        "a student of each suspect model" in of_suspect
        and "fitted against" not in of_suspect
        and "1 are suspect" in of_suspect
        and "0.971" in of_suspect
    )
    assert "was not scanned as a model of its own" in card([])
    measured = {"agreement": {"after": 0.9062}, "held_out": {"planted": 0.97, "unlearned": None}}
    cleaned = card([], vaccinated={HOSTILE: measured})
    assert "were vaccinated before they were merged" in cleaned and "| 90.6 % | 97.0 % | - |" in cleaned
    assert "vaccinated" not in told and not {"html_inline", "image"} & set(kinds(ModelCard(cleaned).text))
    for text in (card([]), card([finding]), told, cleaned):
        assert "does not prove" in text and "Nothing: neither clean accuracy" in text


def test_a_suspect_merge_is_told_in_its_card(tmp_path: Path) -> None:
    def card(over: list[str], name: str = "x") -> str:
        rows = [
            {"role": role, "name": name, "success": success, "plain": 0.1}
            for role, success in (("merge", 0.97), ("base", 0.02), ("own", 0.055), ("other", 0.31))
        ]
        one = {"task": name, "target": name, "suspicion": 0.91, "evidence": rows}
        facts = {"threshold": 0.4, "over": over, "notes": [name], "scored": 8, "suspects": [one] if over else []}
        found = replace(publication(tmp_path, "x", audit=[]), merge_audit=facts)
        return model_card("m", found, Provenance({}, None), None)

    suspect = card(["x"])
    assert "**The finished merge is suspect.**" in suspect and "0.91 | 97.0 % | 2.0 % | 5.5 % |" in suspect
    calm = card([])
    assert "8 targets were scored, and none is suspect" in calm and "is suspect.**" not in calm
    hostile = set(kinds(ModelCard(card([HOSTILE], HOSTILE)).text))
    assert not {"html_inline", "html_block", "image"} & hostile
