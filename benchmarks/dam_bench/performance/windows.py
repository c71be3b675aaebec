"""Compare the time of a step in a window to the time of the plain passes through the window's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dam_bench.performance.clock import Clock, Memory, environment, resident_bytes
from dam_bench.performance.steps import Case, set_up
from mergekit_dam.learn.losses import calibration_batch
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.learn.window_states import MERGED


def measure_window(case: Case, folder: Path) -> dict[str, Any]:
    """Steps of the second window of a case; what stands before it is merged as it starts.

    The floor is the same loss on the same batches with model 1's own tensors of the window as leaves: nothing of the
    merge, the masks or the optimiser.

    Returns:
        Seconds of the floor and of the step, their ratio, and bytes, as `steps.measure` gives them.
    """
    device = torch.device(case.device)
    search, tasks, _ = set_up(case, folder, device)
    assert isinstance(search, WindowSearch)
    search.prepare_tasks()
    first, window, *_ = search.windows
    search.open_window(first)
    search.close_window(first)
    before = resident_bytes()["RssAnon"]
    floor, step = Clock(device), Clock(device)
    with Memory() as memory:
        search.open_window(window)
        for number in range(case.warm_up):
            search.step(window, number)
    own = {**search.part.frozen.own_weights(0), **search.fixed}
    leaves = {name: tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for name, tensor in own.items()}
    for number in range(case.warm_up, case.warm_up + case.steps):
        with step():
            search.step(window, number)
        with floor():
            for index, task in enumerate(tasks):
                rows_B = calibration_batch(task, search.config, number)
                states, importance = search.states[index], search.importance[index][window.stop]
                states.loss(MERGED, window, leaves, rows_B, importance)[0].backward()
            for leaf in leaves.values():
                leaf.grad = None
    return {
        "case": case.__dict__,
        "parameters": sum(leaf.numel() for leaf in leaves.values()),
        "passes": ["fit"],
        "ratio": sum(step.seconds) / sum(floor.seconds),
        "seconds": {"floor": floor.seconds, "step": step.seconds},
        "wall_seconds": {"floor": floor.wall, "step": step.wall},
        "bytes": {
            "peak": memory.total,
            "peak_anonymous": memory.anonymous,
            "grown": memory.anonymous - before,
            "device": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        },
        "environment": environment(device),
    }
