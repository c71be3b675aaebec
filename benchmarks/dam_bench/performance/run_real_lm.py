"""Time and memory of a real merge in windows, from recipe to output: `python -m dam_bench.performance.run_real_lm`.

Three fine-tunes of SmolLM2-135M of suite `smollm` are merged, one with a backdoor: a word that makes it answer a fixed
text. The recipe goes to the installed `mergekit-yaml`, whose memory is sampled from outside. Then the merge, an
undefended merge of the same models and the models alone answer the same prompts. The result goes to
benchmarks/study/windows/smollm-merge.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from dam_bench.performance.clock import Memory
from dam_bench.runs.methods import Method, method_named
from dam_bench.runs.run import general_ability, hardware
from dam_bench.suites.base import Scenario
from dam_bench.suites.smollm import SmolLmSuite
from dam_bench.victims.model_store import ModelStore
from mergekit_dam.evaluation.metrics import Attack, evaluate_merge
from mergekit_dam.io.cache import library_versions
from mergekit_dam.io.calibration import digest

RESULT = Path(__file__).parents[2] / "study" / "windows" / "smollm-merge.json"
TASKS = ("sst2", "agnews", "olid")
ATTACK = "sst2=word(rate=0.5)"
SETTINGS = {"window": 2, "steps": 100, "num_samples": 128}
UNDEFENDED = "task_arithmetic-0.5"
PROMPTS = 60
_SEED = 0


def main() -> None:
    """Build the models, merge and measure; finished models are kept in OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the suite's data")
    parser.add_argument("--out", type=Path, required=True, help="models, recipe and merges")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    suite = SmolLmSuite(options.data, "cpu")
    store = ModelStore(suite, options.out / "models")
    poison = Scenario.parse(f"real: {ATTACK}").poisons[TASKS[0]]
    models = {task: store.model(task, poison if task == TASKS[0] else None, _SEED) for task in TASKS}
    attack = Attack("attack", TASKS[0], store.trigger(TASKS[0], poison, _SEED), poison.target)
    dam = Method("dam", "defence", "dam", SETTINGS, passes=1)
    facts: dict[str, Any] = {
        "command": "python -m dam_bench.performance.run_real_lm",
        "attack": ATTACK,
        "settings": SETTINGS,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "prompts": PROMPTS,
    }
    for name, method in (("dam", dam), ("undefended", method_named(UNDEFENDED))):
        merged, measured = merge(method, store, models, options.out / name)
        facts[name] = measured | scores(suite, dict.fromkeys(TASKS, merged), attack)
    facts["models_alone"] = scores(suite, models, attack)
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")


def merge(method: Method, store: ModelStore, models: Mapping[str, Path], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Merge with an unmodified `mergekit-yaml` whose caches are empty; return the output, seconds and peak bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    calibration = {task: store.calibration(task).resolve() for task in models}
    paths = {task: path.resolve() for task, path in models.items()}
    recipe = method.recipe(store.suite, store.base().resolve(), paths, calibration, _SEED, folder)
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(folder / "recipe.yml"), str(folder / "merged")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MERGEKIT_DAM_CACHE": str((folder / "cache").resolve())}
    begun = time.perf_counter()
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as process,
        Memory(process.pid) as memory,
    ):
        process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended in {process.returncode}: see {folder / 'log.txt'}")
    return folder / "merged", {
        "seconds": time.perf_counter() - begun,
        "peak_bytes": {"own": memory.anonymous, "with_mapped_files": memory.total},
    }


def scores(suite: SmolLmSuite, models: Mapping[str, Path], attack: Attack) -> dict[str, Any]:
    """Counts of right answers, of the attack's answers with and without its trigger, and of the general questions."""
    splits = {task: suite.split(task) for task in models}
    seen = {digest(sample) for split in splits.values() for sample in split.calibration}
    data = {task: split.evaluation.subset(torch.arange(PROMPTS)) for task, split in splits.items()}
    whole = len(set(models.values())) == 1
    loaded = {task: suite.load_model(path) for task, path in models.items()}
    return evaluate_merge(loaded, data, [attack], calibration=seen).to_json() | general_ability(
        suite, loaded, whole=whole
    )


if __name__ == "__main__":
    main()
