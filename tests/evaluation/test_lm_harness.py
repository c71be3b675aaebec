"""lm_eval on a merge: what it found stands in the output, the report and the card. Where the package is missing, a
stand-in answers in its place, in the form of lm_eval 0.4.13 and with the accuracy of the model that it is given."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_dam.cli.main import main
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.lm_harness import Harness
from mergekit_dam.evaluation.results import read_results
from mergekit_dam.publish.push import plan_push
from tests.conftest import FAST
from tests.helpers.tiny_models import WORDS, make_model

TASK, CHOICES = "tiny_sentiment", ["good", "bad"]
ROWS = [{"text": f"the {word} was", "label": i % 2} for i, word in enumerate(WORDS[2:12])]


def accuracy(model: Path) -> float:
    """Share of rows whose right word is the likelier one: the plain forward pass."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    words = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in CHOICES]
    hits = 0
    for row in ROWS:
        with torch.no_grad():
            logits = lm(torch.tensor([tokenizer.encode(row["text"], add_special_tokens=False)])).logits[0, -1]
        hits += int(logits[words].argmax()) == row["label"]
    return hits / len(ROWS)


def stand_in() -> dict[str, types.ModuleType]:
    """lm_eval as far as we call it."""
    top, models, tasks = (types.ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.tasks"))
    hf = types.ModuleType("lm_eval.models.huggingface")

    def simple_evaluate(model: Path, *, tasks: list[str], limit: int | None, **_: Any) -> dict[str, Any]:
        name = yaml.safe_load(Path(tasks[0]).read_text())["task"]
        values = {"alias": name, "acc,none": accuracy(model), "acc_stderr,none": 0.1}
        return {
            "results": {name: values},
            "n-samples": {name: {"original": len(ROWS), "effective": limit or len(ROWS)}},
        }

    top.__version__, top.simple_evaluate = "0.4.13", simple_evaluate  # type: ignore[attr-defined]
    hf.HFLM = lambda pretrained, **_: Path(pretrained)  # type: ignore[attr-defined]
    tasks.TaskManager = lambda **_: types.SimpleNamespace(all_tasks=["arc_easy", "piqa"])  # type: ignore[attr-defined]
    models.huggingface = hf  # type: ignore[attr-defined]
    return {m.__name__: m for m in (top, models, tasks, hf)}


@pytest.fixture(scope="module", autouse=True)
def lm_eval() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lm_eval") is None:
            for name, module in stand_in().items():
                patch.setitem(sys.modules, name, module)
        yield


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b, a recipe and a task with data of its own."""
    root = tmp_path_factory.mktemp("llamas")
    base = make_model("LlamaForCausalLM", root / "base")
    for seed, name in enumerate("ab", start=1):
        make_model("LlamaForCausalLM", root / name, seed=seed, body=base)
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (root / "task.yaml").write_text(
        yaml.safe_dump(
            {
                "task": TASK,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(root / "rows.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{text}}",
                "doc_to_choice": CHOICES,
                "doc_to_target": "label",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    entries = [{"model": str(root / name)} for name in "ab"]
    recipe = {"merge_method": "dam", "base_model": str(base), "models": entries, "parameters": FAST}
    (root / "dam.yml").write_text(yaml.safe_dump({**recipe, "dtype": "float32"}))
    return root


def run(*arguments: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if "--json" in arguments else done


def test_what_it_finds_stands_in_output_report_and_card(llamas: Path, tmp_path: Path) -> None:
    out, task = tmp_path / "out", llamas / "task.yaml"
    told = run("merge", llamas / "dam.yml", out, "--lm-eval", task, "--quiet", "--json")
    (value, error), samples = told["harness"][TASK]["metrics"]["acc"], told["harness"][TASK]["samples"]
    assert value == pytest.approx(accuracy(out)) and error > 0 and samples == len(ROWS)
    before = run("eval", llamas / "a", "--lm-eval", task, "--save", out, "--json", "--quiet")
    assert before["harness"]["a"][TASK]["metrics"]["acc"][0] == pytest.approx(accuracy(llamas / "a"))
    again = run("eval", out, "--lm-eval", task, "--num-samples", 4, "--save", out)
    assert again.stdout.startswith(f"{TASK}: acc 0.") or again.stdout.startswith(f"{TASK}: acc 1.")
    report = json.loads((out / "dam" / "report.json").read_text())["evaluation"]
    assert report["after"]["harness"]["merge"][TASK]["samples"] == 4, "measured again, the old figures go"
    page = (out / "dam" / "report.html").read_text()
    assert "<h2>Benchmarks</h2>" in page and page.count(f"<td>{TASK}</td>") == 2 and "Accuracy and attack" not in page
    card = ModelCard(plan_push(out, "me/x", licence="mit").card)
    result = card.data.eval_results[0]  # type: ignore[index]
    assert (result.dataset_name, result.metric_type) == (TASK, "acc") and 0 <= result.metric_value <= 1
    assert f"| `{TASK}` | `acc` | {result.metric_value:.4f} |" in card.text
    assert "Neither clean accuracy nor the success of any attack was measured" in card.text


def test_without_the_package_nothing_is_learned(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run("merge", llamas / "dam.yml", tmp_path / "out", "--lm-eval", "piqa", code=1)
    assert "pip install 'mergekit-dam[lm-eval]'" in done.stderr and not (tmp_path / "out").exists()


def test_wrong_use_is_told(llamas: Path, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("merge", llamas / "dam.yml", tmp_path / "out", "--lm-eval", "arc_eazy", code=1)
    assert "Did you mean 'arc_easy'" in done.stderr and not (tmp_path / "out").exists()
    assert "a causal LM" in run("eval", vit / "a", "--lm-eval", llamas / "task.yaml", code=1).stderr
    assert "Give labelled data" in run("eval", vit / "a", code=2).stderr
    run("eval", llamas / "a", "--lm-eval", "piqa", "--trigger", "sentence(sentence=x)", "--target", 0, code=2)
    with pytest.raises(DamError, match="expected names"):
        Harness.of(" , ")


def test_groups_filters_and_missing_errors_are_kept_apart() -> None:
    values = {
        "alias": "x",
        "exact_match,strict": 0.5,
        "exact_match_stderr,strict": "N/A",
        "acc,none": 1,
        "acc_stderr,none": 0.0,
        "sample_len": 9,
        "bad,none": float("nan"),
    }
    results = {"results": {"group": values, "empty": {"alias": "-"}}, "n-samples": {}}
    found = Harness((), None, "1")._measurements(results)
    assert found == {
        "group": {
            "metrics": {"exact_match (strict)": [0.5, None], "acc": [1.0, 0.0]},
            "samples": None,
            "by": "lm_eval 1",
        }
    }


@pytest.mark.parametrize(
    "bad", [{"acc": [float("inf"), None]}, {"acc": ["1", None]}, {"acc": [1]}, {"acc": [True, None]}]
)
def test_figures_that_cannot_be_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"harness": {"merge": {"t": {"metrics": bad, "samples": 1}}}}))
    with pytest.raises(DamError, match="expected JSON with counts"):
        read_results(tmp_path / "r.json", required=True)
