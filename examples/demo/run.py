"""`make demo`: build the models, merge them with the real mergekit-yaml, and print ACC and ASR of each way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from examples.demo.build import ATTACK, CLASSES, VICTIM, build
from mergekit_dam import load_merged
from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.evaluation.metrics import Scores, calibration_digests, evaluate_merge

BUILD = ROOT / "examples" / "demo" / "build"
START = time.perf_counter()


def note(text: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


def recipe(method: str, models: list[str], weight: float) -> dict[str, object]:
    entries = [{"model": str(BUILD / name), "parameters": {"weight": weight}} for name in models]
    config = {"merge_method": method, "base_model": str(BUILD / "base"), "models": entries, "dtype": "float32"}
    return config | ({"parameters": {"density": 0.5, "normalize": False}} if method == "ties" else {})


def merge(name: str, file: Path) -> Path:
    """Run mergekit-yaml as a user does."""
    out = BUILD / "merged" / name
    note(f"mergekit-yaml {file.relative_to(ROOT)}")
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(file), str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = BUILD / f"{name}.log"
    with log.open("w") as output:
        failed = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False
        ).returncode
    if failed:
        sys.exit(f"mergekit-yaml failed; see {log}")
    return out


def cells(label: str, scores: Scores) -> list[str]:
    success = scores.attack_success[ATTACK.name]
    return [
        label,
        f"{scores.mean_accuracy:.1f}",
        f"{success[VICTIM].percent:.1f}" if VICTIM in success else "-",
        f"{scores.transfer(ATTACK.name, VICTIM):.1f}" if set(success) - {VICTIM} else "-",
    ]


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = build(BUILD, note)
    load = transformers.ViTForImageClassification.from_pretrained
    rows: dict[str, Scores] = {}

    def measure(label: str, models: dict[str, torch.nn.Module], calibration: frozenset[str] = frozenset()) -> None:
        rows[label] = evaluate_merge(models, data, [ATTACK], calibration=calibration)

    measure("base with linear probes", {n: load(BUILD / f"probe-{n}").eval() for n in CLASSES})
    clean = {n: f"{n}-clean" if n == VICTIM else n for n in CLASSES}
    measure("fine-tunes, all clean", {n: load(BUILD / clean[n]).eval() for n in CLASSES})
    measure("fine-tunes, digits backdoored", {n: load(BUILD / n).eval() for n in CLASSES})
    for prefix, inputs in (("", {n: n for n in CLASSES}), ("all-clean ", clean)):
        for method, weight in (("task_arithmetic", 0.3), ("task_arithmetic", 0.5), ("ties", 0.5)):
            label = f"{prefix}{method} {weight}"
            file = BUILD / f"{label.replace(' ', '-')}.yml"
            file.write_text(yaml.safe_dump(recipe(method, list(inputs.values()), weight)))
            out = merge(file.stem, file)
            measure(label, {n: load_merged(out, inputs[n]) for n in CLASSES})
    out = merge("dam", ROOT / "examples" / "demo" / "dam.yml")
    seen = calibration_digests(out / "dam" / MASKS_FILE)
    measure("dam", {n: load_merged(out, n) for n in CLASSES}, seen)

    table = [["", "ACC %", f"ASR % {VICTIM}", "ASR % others"], *(cells(label, row) for label, row in rows.items())]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        label, *figures = zip(line, widths, strict=True)
        print("  ".join([label[0].ljust(label[1]), *(cell.rjust(width) for cell, width in figures)]))
    (BUILD / "results.json").write_text(json.dumps({label: row.to_json() for label, row in rows.items()}, indent=1))
    note("done; counts are in examples/demo/build/results.json")


if __name__ == "__main__":
    main()
