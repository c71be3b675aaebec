"""Peak memory per process of learning steps against parameters, tasks and processes:
`python -m dam_bench.performance.run_memory`.

Random Llamas of 5 to 18 M parameters in float32 on the CPU (gloo). Counted is anonymous memory above what the process
held before: masks, Adam's moments, merged weights, gradients, activations. Pages of the mapped model files are not
counted, since the system can drop them. Beside it stands what docs/scaling.md's arithmetic says without activations.
The result goes to benchmarks/memory.json and, as a plot, to docs/pictures/memory.png.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mergekit.common import ModelReference
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import start_processes

from dam_bench.performance.clock import Memory, environment, resident_bytes
from dam_bench.performance.scaling import Job, device_bytes
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.shards import Shards
from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.tasks import Task, build_tasks

RESULT = Path(__file__).parents[2] / "memory.json"
FIGURE = Path(__file__).parents[3] / "docs" / "pictures" / "memory.png"
CPU = torch.device("cpu")
STEPS = 2
_MMAP_THRESHOLD, _FREED_AT_ONCE = -3, 1 << 17  # glibc's option of that name; bytes


@dataclass(frozen=True)
class Case:
    """One measurement: layers of the model, tasks, processes, and settings.

    With a window the whole of learning is measured, from the models' answers to the last window, else single steps.
    """

    layers: int = 8
    tasks: int = 2
    processes: int = 1
    window: int | str = "all"
    width: int = 256


CASES = [
    Case(layers=4),
    Case(),
    Case(layers=16),
    Case(tasks=4),
    Case(tasks=8),
    Case(processes=2),
    Case(processes=4),
    *(Case(layers=layers, window=2, width=768) for layers in (4, 8, 16, 32)),
    *(Case(window=window) for window in (1, 2, 4)),
    Case(tasks=4, window=2),
    Case(tasks=8, window=2),
    Case(processes=2, window=2),
]


def config(layers: int, width: int) -> Any:
    return transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def make_models(root: Path, case: Case) -> list[Path]:
    """theta_0 and its fine-tunes, at random."""
    paths = [root / f"{case.layers}-{case.width}" / name for name in ("base", *(f"m{t}" for t in range(case.tasks)))]
    for number, path in enumerate(paths):
        if path.is_dir():
            continue
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config(case.layers, case.width))
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * number * torch.randn_like(parameter))
        model.save_pretrained(path)
    return paths


def measure(rank: int, case: Case, paths: list[Path], folder: str) -> None:
    """One process of one case: its figures go to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # what is freed goes back to the system, or the heap would keep it, and what is held later would not be counted
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _FREED_AT_ONCE)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=case.processes,
        timeout=timedelta(seconds=300),
    )
    shards = Shards(init_device_mesh("cpu", (case.processes,))) if case.processes > 1 else Shards()
    base, *models = (ModelReference.parse(str(path)) for path in paths[: case.tasks + 1])
    shared = {
        "max_length": 8,
        "num_samples": 4,
        "batch_size": 4,
        "window": case.window,
        "steps": STEPS,
    }
    plan = build_plan(base, models, shared=shared, per_model={})
    vectors, tasks = TaskVectors(plan), build_tasks(plan, CPU)
    for task in tasks:
        task.inputs(torch.arange(1))  # has it sample its own text, which is no part of a step
    changed = survey(vectors, shards).changed
    dist.barrier()
    before = resident_bytes()["RssAnon"]
    with Memory() as memory:
        model = MergedModel(
            vectors,
            changed,
            CPU,
            shards=shards,
            lazy=case.window != "all",
        )
        begun = time.perf_counter()
        _learn(model, tasks, plan)
        seconds = (time.perf_counter() - begun) / STEPS
    parameters = sum(torch.Size(spec.shape).numel() for spec in changed)
    found = {"bytes": memory.anonymous - before, "seconds": seconds, "parameters": parameters}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _learn(model: MergedModel, tasks: list[Task], plan: Plan) -> None:
    """Steps on the whole model, or all windows; nothing is scanned."""
    start = torch.tensor([one.settings.weight for one in plan.models])
    options: dict[str, Any] = {"track": lambda record: None, "progress": lambda steps, title: steps}
    if plan.config.window != "all":
        windows = WindowSearch(model, tasks, plan.config, start, **options)
        windows.scan_if_needed = lambda done: None  # type: ignore[method-assign]
        windows.run()
        return
    search = InversionSearch(model, tasks, plan.config, start, **options)
    for step in range(STEPS):
        search.step(step)


def computed(case: Case, parameters: int) -> float:
    """Bytes of one process by scaling.py; frozen models are mapped files."""
    block = sum(p.numel() for p in transformers.LlamaForCausalLM(config(1, case.width)).model.layers[0].parameters())
    share = min(case.window, case.layers) * block / parameters if isinstance(case.window, int) else 1.0
    masks = 2 if case.window == "all" else case.tasks + 1  # in windows each model has an M2
    job = Job(parameters, case.tasks, stored=4, masks=masks, window=share)
    parts = device_bytes(job, case.processes)
    parts["frozen models"] = 0.0
    return sum(parts.values())


def run(case: Case, paths: list[Path]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        # not forked: what the parent has allocated would be counted as it is touched
        start_processes(measure, (case, paths, folder), nprocs=case.processes, start_method="spawn")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(case.processes)]
    parameters = found[0]["parameters"]
    return {
        **asdict(case),
        "parameters": parameters,
        "bytes": [one["bytes"] for one in found],
        "computed_bytes": computed(case, parameters),
        "bytes_per_parameter": round(max(one["bytes"] for one in found) / parameters, 2),
        "computed_bytes_per_parameter": round(computed(case, parameters) / parameters, 2),
        "seconds_per_step": round(found[0]["seconds"], 2),
    }


def plot(results: list[dict[str, Any]]) -> Figure:
    """Bytes per parameter against what three panels vary, and bytes against depth in windows; crosses are computed."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    axes = figure.subplots(1, 4)
    whole = [r for r in results if r["window"] == "all"]
    standard = asdict(Case())
    panels = {"layers": "parameters (millions)", "tasks": "tasks", "processes": "processes"}
    for panel, (varied, label) in zip(axes, panels.items(), strict=False):
        same = {k: v for k, v in standard.items() if k != varied}
        kept = sorted((r for r in whole if all(r[k] == v for k, v in same.items())), key=_size)
        x = [r["parameters"] / 1e6 if varied == "layers" else r[varied] for r in kept]
        panel.plot(x, [r["bytes_per_parameter"] for r in kept], "o-", label="measured")
        panel.plot(x, [r["computed_bytes_per_parameter"] for r in kept], "kx")
        panel.set_xlabel(label)
        panel.set_ylim(0, 1.1 * max(r["bytes_per_parameter"] for r in whole))
    axes[0].set_ylabel("peak bytes per parameter")
    axes[2].plot([], [], "kx", label="computed")
    axes[2].legend()
    deep = sorted((r for r in results if r["window"] == 2 and r["width"] != standard["width"]), key=_size)
    axes[3].plot([r["layers"] for r in deep], [max(r["bytes"]) / 1e9 for r in deep], "o-", label="window: 2")
    axes[3].plot([r["layers"] for r in deep], [r["computed_bytes"] / 1e9 for r in deep], "kx")
    axes[3].set(xlabel="blocks", ylabel="peak GB", ylim=(0, 1.3 * max(max(r["bytes"]) for r in deep) / 1e9))
    axes[3].legend()
    return figure


def _size(result: dict[str, Any]) -> tuple[int, int, int]:
    return result["parameters"], result["tasks"], result["processes"]


def main() -> None:
    """Measure all cases, print and write them."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for case in CASES:
            results.append(run(case, make_models(Path(root), case)))
            sys.stderr.write(f"{results[-1]}\n")
    facts = {
        "command": "python -m dam_bench.performance.run_memory",
        "environment": environment(CPU),
        "steps": STEPS,
        "results": results,
    }
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    figure = plot(results)
    FigureCanvasAgg(figure)
    figure.savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
