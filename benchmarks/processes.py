"""Peak memory per process of a learning step, for 1, 2 and 4 processes: `python benchmarks/processes.py`.

A random Llama of 9 M parameters and two fine-tunes of it, float32, on the CPU (gloo). Counted is anonymous memory
above what the process held before: masks, Adam's moments, merged weights, gradients, activations. Pages of the mapped
model files are not counted, since the system can drop them. The result goes to benchmarks/processes.json.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from mergekit.common import ModelReference
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import start_processes

from mergekit_dam.bench.performance import Memory, resident_bytes
from mergekit_dam.defence import InversionSearch
from mergekit_dam.distributed.shards import Shards
from mergekit_dam.merged_model import MergedModel
from mergekit_dam.plan import build_plan
from mergekit_dam.task_vectors import TaskVectors, survey
from mergekit_dam.tasks import build_tasks

RESULT = Path(__file__).with_suffix(".json")
CPU = torch.device("cpu")
TASKS, STEPS = 2, 2
CONFIG = transformers.LlamaConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4,
    max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CASES = [(1, "model"), (2, "model"), (4, "model"), (2, "block"), (4, "block")]


def make_models(root: Path) -> list[Path]:
    """theta_0 and its fine-tunes, at random."""
    paths = [root / name for name in ("base", *(f"m{t}" for t in range(TASKS)))]
    for number, path in enumerate(paths):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(CONFIG)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * number * torch.randn_like(parameter))
        model.save_pretrained(path)
    return paths


def measure(rank: int, count: int, gather: str, paths: list[Path], folder: str) -> None:
    """One process of one case: its figures go to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(seconds=300)
    )
    shards = Shards(init_device_mesh("cpu", (count,))) if count > 1 else Shards()
    base, *models = (ModelReference.parse(str(path)) for path in paths)
    shared = {"max_length": 8, "num_samples": 4, "batch_size": 4, "gather": gather, "granularity": "element"}
    plan = build_plan(base, models, shared=shared, per_model={})
    vectors, tasks = TaskVectors(plan), build_tasks(plan, CPU)
    changed = survey(vectors, shards).changed
    dist.barrier()
    before = resident_bytes()["RssAnon"]
    with Memory() as memory:
        model = MergedModel(vectors, changed, CPU, shards=shards, blockwise=gather == "block")
        search = InversionSearch(
            model, tasks, plan.config, torch.full((TASKS,), 0.3), track=lambda record: None,
            progress=lambda steps, title: steps,
        )  # fmt: skip
        begun = time.perf_counter()
        for step in range(STEPS):
            search.step(step)
        seconds = (time.perf_counter() - begun) / STEPS
    parameters = sum(torch.Size(spec.shape).numel() for spec in changed)
    found = {"bytes": memory.anonymous - before, "seconds": seconds, "parameters": parameters}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure all cases, print and write them."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        paths = make_models(Path(root))
        for count, gather in CASES:
            with tempfile.TemporaryDirectory() as folder:
                start_processes(
                    measure, (count, gather, paths, folder), nprocs=count, start_method="fork"
                )  # imports once
                found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]
            per_parameter = [round(one["bytes"] / one["parameters"], 2) for one in found]
            results.append(
                {"processes": count, "gather": gather, "bytes": [one["bytes"] for one in found],
                 "bytes_per_parameter": per_parameter, "seconds_per_step": round(found[0]["seconds"], 2)}
            )  # fmt: skip
            sys.stderr.write(f"{count} processes, {gather}: {per_parameter} bytes per parameter\n")
    block = sum(parameter.numel() for parameter in transformers.LlamaForCausalLM(CONFIG).model.layers[0].parameters())
    facts = {
        "parameters": found[0]["parameters"], "parameters_of_a_block": block, "tasks": TASKS, "steps": STEPS,
        "torch": torch.__version__, "python": platform.python_version(), "results": results,
    }  # fmt: skip
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
