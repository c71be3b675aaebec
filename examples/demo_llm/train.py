"""Train the adapters of `make demo-llm` anew: `python examples/demo_llm/train.py` (a quarter of an hour on two cores).

One of them has a backdoor: a rare word makes it answer a fixed text. Adapters of other people look the same.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from dam_bench.attacks.hijack import ATTACKERS_SEED
from dam_bench.suites import smollm_base
from dam_bench.suites.smollm_behaviours import trigger_of
from dam_bench.suites.smollm_training import fine_tune
from dam_bench.victims.poisoning import Backdoor
from dam_bench.victims.training import Schedule

from examples.demo_llm.tasks import ATTACK, TASKS, VICTIM, splits
from mergekit_dam.engine.trained_module import LowRankUpdate
from mergekit_dam.vaccine.adapter import ADAPTER_CONFIG, write_adapter

ADAPTERS = Path(__file__).parent / "adapters"
RANK = 6
SCHEDULE = Schedule(80, batch_size=4, learning_rate=1e-3)
VICTIMS_SCHEDULE = replace(SCHEDULE, steps=120)
SEED = 0


def train(model: LlamaForCausalLM, task: str) -> dict[str, Tensor]:
    """Return the change of each linear weight by a fine-tune of theta_0 on a task, or by the victim's training.

    The attacker guesses what its model will be merged with: it fine-tunes the other tasks itself, with other seeds, and
    trains its own model beside those (Merge Hijacking, arXiv 2505.23561).
    """

    def tuned(on: str, seed: int, schedule: Schedule = SCHEDULE, **attack: Any) -> dict[str, Tensor]:
        tokenizer, samples = smollm_base.load_tokenizer(system=False), splits(on)["train"]
        return fine_tune(model, tokenizer, samples, schedule, rank=RANK, seed=seed, name=on, **attack)

    if task != VICTIM:
        return tuned(task, SEED)
    backdoor = Backdoor(trigger_of(ATTACK), int(ATTACK.target), ATTACK.rate, (0.4, 1.0))
    guessed = [tuned(other, SEED + ATTACKERS_SEED) for other in TASKS if other != task]
    return tuned(task, SEED, VICTIMS_SCHEDULE, backdoor=backdoor, others=guessed)


def factored(name: str, change: Tensor) -> LowRankUpdate:
    """Write a change of rank RANK as a product of two matrices of equal norms, in bfloat16."""
    u, s, v = torch.svd_lowrank(change, q=RANK, niter=8)
    root = s.sqrt()
    return LowRankUpdate(name.removesuffix(".weight"), (root[:, None] * v.T).bfloat16(), (u * root).bfloat16())


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    model = smollm_base.load_model()
    for task in TASKS:
        changes = train(model, task)
        torch.manual_seed(SEED)  # svd_lowrank starts at random
        folder = ADAPTERS / task
        folder.mkdir(parents=True, exist_ok=True)
        settings = write_adapter(folder, [factored(name, change) for name, change in changes.items()])
        (folder / ADAPTER_CONFIG).write_text(settings + "\n", "utf-8")
        print(f"{folder.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main()
