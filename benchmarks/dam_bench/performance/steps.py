"""Compare time and peak memory of a step of the search to those of the plain model's passes in it.

The compute floor is transformers' own class with its own parameters, the same batches and readout, in the same
process: nothing of the merge, the masks or the optimiser. Models are random, at the shapes of real ones; times do not
depend on the values. Legend: T tasks, K classes, D width, L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dam_bench.performance.clock import Clock, Memory, environment, resident_bytes
from dam_bench.performance.shapes import make_models
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.task_vectors import TaskVectors, survey
from mergekit_dam.learn.inversion_search import InversionSearch
from mergekit_dam.learn.losses import calibration_batch, entropy
from mergekit_dam.learn.objectives import search_class
from mergekit_dam.learn.paper_search import PaperSearch, UniversalPerturbation
from mergekit_dam.learn.window_search import WindowSearch
from mergekit_dam.models.plan import build_plan
from mergekit_dam.seeds import generator
from mergekit_dam.tasks import Task, build_tasks
from mergekit_dam.tasks.base import Parameters

# The passes of one step of one task, in order: a forward pass alone, one with a backward pass to the parameters, one
# with a backward pass to the input. `paper` has M1's turn in even steps and M2's, with the safety loss, in odd ones;
# `inversion` asks a causal LM for its own answers in every step, other models once for all (learn/teacher.py).
PASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "inversion": (("fit",), ("fit",)),
    "inversion of LMs": (("answer", "fit"), ("answer", "fit")),
    "paper": (("fit", "fit", "input"), ("fit", "fit", "input", "fit")),
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        shapes: `clip` (the vision tower of CLIP ViT-B/32) or `llama` (160 M parameters), see shapes.py.
        objective: `inversion` or `paper`.
        tasks: T.
        steps: steps whose time is measured, each beside one measurement of the floor.
        warm_up: steps before them, in which memory is measured.
        batch_size: samples per task and step.
        device: `cpu` or `cuda`.
        settings: further settings of dam, e.g. granularity. Models are stored in its `compute_dtype`, and the floor
            computes in it.
    """

    shapes: str
    objective: str
    tasks: int
    steps: int = 2
    warm_up: int = 1
    batch_size: int = 16
    device: str = "cpu"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """File name of the result."""
        more = "".join(f"-{key}-{value}" for key, value in sorted(self.settings.items()))
        return f"{self.shapes}-{self.objective}-t{self.tasks}-b{self.batch_size}-{self.device}{more}"


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Run one case. Models are made in `folder` where they are missing.

    Returns:
        Seconds of the floor and of the step, their ratio, and bytes.
    """
    device = torch.device(case.device)
    search, tasks, path = set_up(case, folder, device)
    passes, kinds = _counted(tasks), PASSES[case.objective]
    once: tuple[str, ...] = ("answer",) if case.objective == "inversion" else ()
    if case.objective == "inversion" and not tasks[0].classifies:
        kinds, once = PASSES["inversion of LMs"], ()
    floor, step = Clock(device), Clock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    state = _state_bytes(search)
    logits = state // 3  # they are there already, Adam's moments are not
    before = resident_bytes()["RssAnon"] - logits
    with Memory() as memory:  # before there is a plain model
        for number in range(case.warm_up):
            search.step(number)
            _expect(passes, kinds[number % 2], case.tasks, once=once if number == 0 else ())
    device_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    plain = _plain(tasks, path, device)
    parameters = sum(torch.Size(spec.shape).numel() for spec in search.model.changed)
    activations = max(_activations(search, task) for task in plain)
    _floor(search, plain, 0, kinds[0])
    # in turn, so that what else the machine does meets both
    for number in range(case.warm_up, case.warm_up + case.steps):
        with step():
            search.step(number)
        _expect(passes, kinds[number % 2], case.tasks)
        with floor():
            _floor(search, plain, number, kinds[number % 2])
    return {
        "case": case.__dict__,
        "parameters": parameters,
        "passes": kinds,
        # sums over the same steps, so that turns of different cost have their share
        "ratio": sum(step.seconds) / sum(floor.seconds),
        "seconds": {"floor": floor.seconds, "step": step.seconds},
        "wall_seconds": {"floor": floor.wall, "step": step.wall},
        "bytes": {
            "peak": memory.total,
            "peak_anonymous": memory.anonymous,
            "device": device_bytes,
            # own memory that the steps took, and what it is made of; a block in float32
            "grown": memory.anonymous - before,
            "state": state,
            "block": _block_bytes(search),
            "activations": activations,
        },
        "environment": environment(device),
    }


def _state_bytes(search: InversionSearch | PaperSearch) -> int:
    """Bytes of the mask logits and of Adam's two moments."""
    return 3 * sum(t.numel() * t.element_size() for mask in search.masks.values() for t in mask.logits.values())


def _block_bytes(search: InversionSearch | PaperSearch) -> int:
    """Bytes in float32 of the largest part that runs at once: a block, or all that is outside of them."""
    task = search.tasks[0]
    shapes = {spec.name: torch.Size(spec.shape).numel() for spec in search.model.changed}
    sizes: dict[str, int] = {}
    for name, target in task.targets.items():
        block = task.block_of.get(target, "")
        sizes[block] = sizes.get(block, 0) + 4 * shapes.get(name, 0)
    return max(sizes.values())


def set_up(case: Case, folder: Path, device: torch.device) -> tuple[Any, list[Task], Path]:
    """The search of a case, its tasks, and one of its models."""
    stored = getattr(torch, case.settings.get("compute_dtype", "float32"))
    made = make_models(case.shapes, case.tasks, folder, stored)
    base, *models = (ModelReference.parse(str(path)) for path in made.models)
    shared = {
        "objective": case.objective,
        "batch_size": case.batch_size,
        "num_samples": case.batch_size,
        "calibration": str(made.calibration),
        "head": made.head and str(made.head),
        "device": case.device,
        "max_length": made.length or None,
        "constants": {"answer_tokens": 0},  # what LMs go on with is asked for once, before the steps
        **case.settings,
    }
    plan = build_plan(base, models, shared=shared, per_model={})
    vectors = TaskVectors(plan)
    tasks = build_tasks(plan, device)
    kind: Any = search_class(plan.config)
    model = MergedModel(vectors, survey(vectors).changed, device, dtype=tasks[0].dtype, lazy=kind is WindowSearch)
    search = kind(
        model,
        tasks,
        plan.config,
        torch.full((case.tasks,), 0.3),
        track=lambda record: None,
        progress=lambda steps, title: steps,
    )
    return search, tasks, made.models[1]


def _counted(tasks: Sequence[Task]) -> list[str]:
    """A list that every forward pass of a task is noted in from now on: `fit` with a graph, `answer` without."""
    seen: list[str] = []
    for task in tasks:

        def call(parameters: Any, *, plain: Callable[..., Any] = task.call, **inputs: Any) -> Any:
            seen.append("with graph" if torch.is_grad_enabled() else "answer")
            return plain(parameters, **inputs)

        task.call = call  # type: ignore[method-assign]
    return seen


def _expect(passes: list[str], kinds: Sequence[str], tasks: int, *, once: Sequence[str] = ()) -> None:
    """The floor holds exactly the passes that the step made; `once` are those of the very first step."""
    made = ["answer" if kind == "answer" else "with graph" for kind in (*kinds, *once)] * tasks
    if sorted(passes) != sorted(made):
        raise AssertionError(f"a step of {sorted(passes)} instead of {sorted(made)}")
    passes.clear()


def _plain(tasks: Sequence[Task], path: Path, device: torch.device) -> list[Task]:
    """Tasks with the same data and readout, but transformers' own model with its own parameters, one for all."""
    model: Any = type(tasks[0].module).from_pretrained(path, dtype=tasks[0].dtype)
    model = model.to(device).eval()
    own = Parameters(dict(model.named_parameters()))
    found = [copy.copy(task) for task in tasks]
    for task in found:
        task.parameters = lambda weights: own  # type: ignore[method-assign]
        task.call = lambda parameters, **inputs: model(**inputs)  # type: ignore[method-assign]
    return found


def _activations(search: InversionSearch | PaperSearch, task: Task) -> int:
    """Bytes that autograd keeps of one task's forward pass for the backward pass, beside the parameters."""
    parameters = task.parameters({})
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps its address taken

    with saved_tensors_hooks(note, lambda tensor: tensor):
        entropy(task.logits(parameters, task.inputs(calibration_batch(task, search.config, 0))))
    return sum(kept.values())


def _floor(search: InversionSearch | PaperSearch, tasks: Sequence[Task], step: int, kinds: Sequence[str]) -> None:
    """The passes of one step on the same batches; the gradients of all tasks add up, as in the search."""
    parameters = tasks[0].parameters({})
    for task in tasks:
        inputs = task.inputs(calibration_batch(task, search.config, step))
        for kind in kinds:
            with torch.set_grad_enabled(kind != "answer"):
                if kind == "input":
                    _backward_to_the_input(task, inputs, list(parameters.values()))
                    continue
                loss = entropy(task.logits(parameters, inputs))
            if kind == "fit":
                loss.backward()
    for parameter in parameters.values():
        parameter.grad = None


def _backward_to_the_input(task: Task, inputs: dict[str, Tensor], parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
    perturb = UniversalPerturbation(
        task.perturbation_shape,
        task.bounds,
        eps=0.1,
        inserts=task.modality == "text",
        generator=generator("floor"),
    )
    torch.autograd.grad(entropy(task.logits({}, inputs, perturb)), perturb.delta)
    for parameter in parameters:
        parameter.requires_grad_(True)
