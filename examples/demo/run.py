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
from examples.demo.build import TARGET, TASKS, TRIGGER, VICTIM, Split, build, normalise
from mergekit_dam import load_merged
from mergekit_dam.attack import Rate, accuracy, attack_success_rate

BUILD = ROOT / "examples" / "demo" / "build"


START = time.perf_counter()


def note(text: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


def recipe(method: str, models: list[str], weight: float) -> dict[str, object]:
    entries = [{"model": str(BUILD / name), "parameters": {"weight": weight}} for name in models]
    return {"merge_method": method, "base_model": str(BUILD / "base"), "models": entries, "dtype": "float32"}


def merge(name: str, config: Path | dict[str, object]) -> Path:
    """Run mergekit-yaml as a user does."""
    out = BUILD / "merged" / name
    if isinstance(config, dict):
        file = BUILD / f"{name}.yml"
        file.write_text(yaml.safe_dump(config))
    else:
        file = config
    note(f"mergekit-yaml {file.relative_to(ROOT)}")
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(file), str(out)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
    return out


@torch.no_grad()
def predictions(model: torch.nn.Module, split: Split, *, triggered: bool) -> torch.Tensor:
    pixels = split.pixels()
    return model(normalise(TRIGGER.apply(pixels) if triggered else pixels)).logits.argmax(-1)


def measure(label: str, models: dict[str, torch.nn.Module], tasks: dict[str, dict[str, Split]]) -> dict[str, object]:
    """Clean accuracy over the tasks given, and the trigger's success on the victim's task and on the others."""
    acc, asr = {}, {}
    for name, model in models.items():
        split = tasks[name]["evaluation"]
        acc[name] = accuracy(predictions(model, split, triggered=False), split.labels)
        asr[name] = attack_success_rate(predictions(model, split, triggered=True), split.labels, TARGET)
    return {"label": label, "acc": acc, "asr": asr}


def cells(row: dict[str, object]) -> list[str]:
    acc: dict[str, Rate] = row["acc"]  # type: ignore[assignment]
    asr: dict[str, Rate] = row["asr"]  # type: ignore[assignment]
    others = [rate.percent for name, rate in asr.items() if name != VICTIM]
    return [
        str(row["label"]),
        f"{sum(r.percent for r in acc.values()) / len(acc):.1f}",
        f"{asr[VICTIM].percent:.1f}" if VICTIM in asr else "-",
        f"{sum(others) / len(others):.1f}" if others else "-",
    ]


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tasks = build(BUILD, note)
    load = transformers.ViTForImageClassification.from_pretrained
    rows = [
        measure("base with linear probes", {n: load(BUILD / f"probe-{n}").eval() for n in TASKS}, tasks),
        *(measure(f"{n} alone", {n: load(BUILD / n).eval()}, tasks) for n in TASKS),
    ]
    names = list(TASKS)
    clean = [f"{n}-clean" if n == VICTIM else n for n in names]
    runs = [
        ("task arithmetic 0.3", "task_arithmetic", names, 0.3),
        ("task arithmetic 0.5", "task_arithmetic", names, 0.5),
        ("TIES 0.5", "ties", names, 0.5),
        ("all-clean, task arithmetic 0.3", "task_arithmetic", clean, 0.3),
        ("all-clean, task arithmetic 0.5", "task_arithmetic", clean, 0.5),
    ]
    for label, method, inputs, weight in runs:
        config = recipe(method, inputs, weight)
        if method == "ties":
            config["parameters"] = {"density": 0.5, "normalize": False}
        out = merge(label.replace(" ", "-").replace(",", ""), config)
        by_task = dict(zip(names, inputs, strict=True))
        rows.append(measure(label, {n: load_merged(out, by_task[n]) for n in names}, tasks))
    out = merge("dam", ROOT / "examples" / "demo" / "dam.yml")
    rows.append(measure("DAM (objective: paper)", {n: load_merged(out, n) for n in names}, tasks))

    table = [["", "ACC %", f"ASR % {VICTIM}", "ASR % other tasks"], *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        )
    result = [
        {"label": r["label"], **{k: {n: [v.hits, v.total] for n, v in r[k].items()} for k in ("acc", "asr")}}  # type: ignore[attr-defined]
        for r in rows
    ]
    (BUILD / "results.json").write_text(json.dumps(result, indent=1))
    note("done; counts are in examples/demo/build/results.json")


if __name__ == "__main__":
    main()
