"""`window: N`: masks are learned for N positions of the blocks at a time, so that memory does not grow with depth.

Per window, with everything before it merged already, each task's clean samples have come as far as the merge takes them
(z1), so have samples with recovered triggers (z1'), and clean samples as far as model t takes them (z2). The masks and
coefficients of the window's tensors are fitted so that the merged window makes of z1 and of z1' what model t's makes of
z2: L_t = |W (merged(z1) - own(z2))|^2 / |W (theta_0(z1) - own(z2))|^2 + alpha times the same for z1'. W weighs
hidden states by what they count for model t's answers (fisher.py). The window that ends in the head is fitted to the
answers themselves, as the whole model is where it is learned at once. Then the window is merged, and the next begins.
Matching block by block, each branch on its own inputs, is ProDistill's (arXiv 2502.12706); a window of all positions is
inversion_search.py, of which the scan is. As there, triggers are recovered anew while masks are learned: from the merge
so far with the rest of the model that is suspect.

Tables of words have one mask entry per token: 152,000 rows of 4,096 would have 620 million for each of T + 1 masks.
A tensor that is used in two places (tied embeddings) is learned where it is used first, and stays so at the second.
Legend: T tasks, P masked tensors, B batch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.engine.module_weights import Weights, without_gradients
from mergekit_dam.engine.shards import WorkItem
from mergekit_dam.engine.snapshots import State
from mergekit_dam.learn.fisher import Importance, importance_of
from mergekit_dam.learn.fit import MaskFit
from mergekit_dam.learn.losses import calibration_batch, distillation
from mergekit_dam.learn.masks import Whole
from mergekit_dam.learn.scanned_search import ScannedSearch
from mergekit_dam.learn.teacher import TeacherLogits, debias
from mergekit_dam.learn.trigger_pool import refresh_triggers
from mergekit_dam.learn.window_masks import WindowMasks
from mergekit_dam.learn.window_states import MERGED, OWN, TaskStates, Window
from mergekit_dam.models.plan import TensorSpec
from mergekit_dam.scan.findings import Suspect
from mergekit_dam.tasks import Task

FOLDER = "windows"  # of the run


def windows_of(end: int, size: int) -> list[Window]:
    """Positions 0..end-1 in windows of `size`; the last one may be smaller."""
    return [Window(n, first, min(first + size, end)) for n, first in enumerate(range(0, end, size))]


def places_of(tasks: Sequence[Task], specs: Sequence[TensorSpec], end: int) -> dict[str, tuple[int, ...]]:
    """Output name -> positions where a tensor is used, the first one first; tensors with one mask go together.

    What no task uses, e.g. a pooler that no head reads, is put with the head.
    """
    by_mask: dict[str, set[int]] = {}
    for spec in specs:
        used = {place for task in tasks for place in task.positions.get(spec.name, ())}
        by_mask.setdefault(spec.mask_name, set()).update(used)
    return {spec.name: tuple(sorted(by_mask[spec.mask_name])) or (end - 1,) for spec in specs}


class WindowSearch(ScannedSearch):
    """The search described above; `model` is lazy, see `MergedModel`."""

    def set_up(self) -> None:
        super().set_up()
        chain = self.tasks[0].chain
        assert chain is not None and isinstance(self.config.window, int)
        self.windows = windows_of(chain.end, self.config.window)
        self._places = places_of(self.tasks, self.model.specs, chain.end)
        items = [item for item in self.schedule if item is not None]
        self._mine = [item.task for item in items]
        self._written = [item.task for item in items if item.part == 0]  # whose files we write
        first = self.shards.rank == 0
        if self.snapshots is None:
            if first:
                self._temporary = tempfile.TemporaryDirectory()
            folder = Path(self.shards.all_gather_dict({"folder": self._temporary.name} if first else {})["folder"])
        else:
            folder = self.snapshots.folder / FOLDER
        if first:
            if not self.config.constants.resume:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        self.shards.barrier()
        self.folder = folder
        self.finished = WindowMasks(folder, self.shards, len(self.tasks), self.config)
        self._fit: MaskFit | None = None
        self._opened: Window | None = None
        self.states: dict[int, TaskStates] = {}
        self._version = 0  # of the triggers, see `TaskStates.deal`

    def begin_fit(self) -> None:
        """Nothing: each window begins its own."""

    def run(self) -> tuple[Whole, Tensor]:
        """Learn. Returns probabilities as bytes by mask and tensor, views of files, and the coefficients (T, P)."""
        phase, done = self.restore("scan")
        if phase == "scan":
            self.scan_if_wanted(done)
            done = 0
        self.prepare()
        steps, count = max(1, self.config.steps), len(self.windows)
        if self._opened is not None and done == steps:  # all of its steps are in the snapshot
            self.close(self._opened)
            done = 0
        finished = next((n for n in range(count) if not self.finished.has(n)), count)
        for number in self.progress(range(finished * steps + done, count * steps), "masks"):
            window, step = self.windows[number // steps], number % steps
            if self._opened is None:
                self.open(window)
            if self._fit is not None and self.config.steps:
                if step and step % (self.config.refresh_every * count) == 0:
                    self._refresh(window, step)
                self.step(window, step)
                self.snapshot_if_due(_phase(window), step + 1)
            if step + 1 == steps:
                self.close(window)
        return self.finished.all(count), self.finished.of(self.model, range(count))[1]

    def restore(self, first: str) -> tuple[str, int]:
        facts = self.snapshots.facts if self.snapshots is not None else None
        if self.snapshots is None or facts is None:
            return first, 0
        self.allocate(facts)
        self.snapshots.read(State(facts, self.triggers_of_state()))
        self._version = facts["version"]
        for window in self.windows:
            if _phase(window) == facts["phase"]:
                if self.finished.has(window.number) or not facts["is_fitted"]:
                    return _phase(window), 0
                self.prepare()
                self.open(window, refresh=False)
                assert self._fit is not None
                self.snapshots.read(self._fit.state(facts))
        return str(facts["phase"]), int(facts["done"])

    def state(self, phase: str, done: int) -> State:
        facts = self.facts_of_state(phase, done) | {"is_fitted": self._fit is not None, "version": self._version}
        state = State(facts) if self._fit is None else self._fit.state(facts)
        state.tensors |= self.triggers_of_state()
        return state

    def allocate(self, facts: Mapping[str, Any]) -> None:
        self.allocate_triggers(facts)

    def facts_of_masks(self) -> dict[str, Any]:
        return self.finished.facts(len(self.windows))

    def merged_weights(self) -> Weights:
        """The whole merge by the masks of all windows."""
        return self.model.weights(*self.finished.of(self.model, range(len(self.windows))))

    def prepare(self) -> None:
        """What all windows need: each model's answers, and how hidden states count for them."""
        if self.states:
            return
        stops = [window.stop for window in self.windows[:-1]]
        self.importance: dict[int, dict[int, Importance]] = {}
        for index in self._mine:
            task, own = self.tasks[index], self.model.frozen.own_weights(index)
            self.importance[index] = importance_of(task, own, stops, self.config.seed) if stops else {}
            if task.classifies:
                self.answers[index] = TeacherLogits.made(task, own)
            pools = [pool for suspect, pool in self.trigger_pool.items() if suspect.task == index]
            self.states[index] = TaskStates(task, pools, self.folder, self.config)
            self.states[index].deal(self._version)
        debias(self.answers, self.trigger_pool)

    def open(self, window: Window, *, refresh: bool = True) -> None:
        """Begin a window: its triggers, tensors, masks and targets.

        Args:
            refresh: whether triggers are new, or those with which a run goes on within this window.
        """
        if refresh and window.number > 0:
            self._refresh(window, 0)  # before there are masks: it needs a whole model
        used = [name for name, places in self._places.items() if any(_is_in(place, window) for place in places)]
        owned = {name for name in used if _is_in(self._places[name][0], window)}
        self.part = self.model.submodel(owned)
        before = self.model.submodel(set(used) - owned)
        earlier = [w.number for w in self.windows[: window.number]] if before.mask_names else []
        self.fixed = without_gradients(before.weights(*self.finished.of(before, earlier)))
        if self.part.mask_names:
            columns = 1 if self.config.constants.coefficients == "task" else len(self.part.mask_names)
            start = self.start[:, :1].repeat(1, columns)
            # one M2 per model where the setting leaves it open: hidden states are harder to fit together than answers
            self._fit = MaskFit(self.part, self.config, start, suspects=True, by_token=True)

        def own(index: int) -> Weights:
            return {**self.part.frozen.own_weights(index), **before.frozen.own_weights(index)}

        self._scale: dict[int, float] = {}
        self._own: dict[int, Weights] = {}
        if self._ends(window):
            self._own = {index: own(index) for index in self._mine if not self.tasks[index].classifies}
        else:
            for index in self._written:
                self.states[index].advance(OWN, window, own(index))
            self.shards.barrier()
            nothing = torch.zeros(len(self.tasks), 1, device=self.model.device)  # lambda = 0 leaves theta_0
            base: dict[str, Tensor] = {}
            for part in (self.part, before):
                base |= without_gradients(part.weights({}, nothing))
            for index in self._mine:
                self._scale[index] = self.states[index].left_by(window, base, self.importance[index][window.stop])
        self._opened = window

    def _refresh(self, window: Window, step: int) -> None:
        """New triggers, from what the merge so far makes of the samples and model t's own rest of that.

        What gets through the windows that are merged is found so. Samples with the new triggers are taken to the
        window's edge.
        """
        if not self.trigger_pool:
            return
        names = {name for name, places in self._places.items() if places[0] < window.first}
        front = self.model.submodel(names)
        edge = without_gradients(front.weights(*self.finished.of(front, range(window.number))))
        merged = dict(edge)
        if step:
            merged |= without_gradients(self.part.weights(*self.finished.pending(self._fit, self.part)))
        base = self.model.frozen.base_weights()

        def mixed(suspect: Suspect) -> Mapping[str, Tensor]:
            return {**self.scanned(suspect, base), **merged}

        key, steps = ("window", window.number, step), self.config.constants.refresh_steps
        refresh_triggers(self.tasks, self.trigger_pool, self.shards, self.config, base, mixed, steps, *key)
        self._version += 1
        for states in self.states.values():
            states.deal(self._version)
        for index in self._written if window.first > 0 else ():
            for stream in self.states[index].merged_streams[1:]:
                self.states[index].advance(stream, Window(-1, 0, window.first), edge)
        self.shards.barrier()

    def step(self, window: Window, step: int) -> None:
        """One step of a window's masks and coefficients."""
        assert self._fit is not None
        merged = self._fit.combined()
        weights = self.part.weights(merged, self._fit.coefficients)
        parts: dict[str, Tensor] = {}
        for item in self.schedule:
            if item is not None:
                self._backward(window, item, {**weights, **self.fixed}, step, parts)
        self._fit.update(merged, weights, step)
        losses = self.summed(parts)
        density = {f"density/{name}": mask.density() for name, mask in self._fit.masks.items()}
        number = window.number * self.config.steps + step
        self.track_step(
            {"phase": "masks", "window": window.number + 1, "step": number, "loss": sum(losses.values())}
            | losses
            | density
        )

    def _backward(self, window: Window, item: WorkItem, weights: Weights, step: int, parts: dict[str, Tensor]) -> None:
        """One task's losses, each with its backward pass, so that one stream's activations live at a time."""
        states, task = self.states[item.task], self.tasks[item.task]
        rows_B = calibration_batch(task, self.config, step)
        for stream in states.merged_streams:
            loss = self._loss(window, item, stream, weights, rows_B) * states.weight(stream, rows_B)
            name = f"loss/{'perf' if stream == MERGED else 'safe'}/{task.name}"
            parts[name] = parts[name] + loss.detach() if name in parts else loss.detach()
            if loss.requires_grad:
                loss.backward()

    def _loss(self, window: Window, item: WorkItem, stream: str, weights: Weights, rows_B: Tensor) -> Tensor:
        """This item's part of the mean over the batch."""
        states, task, ours_B = self.states[item.task], self.tasks[item.task], item.of(rows_B)
        if not self._ends(window):
            total, count = states.loss(stream, window, weights, ours_B, self.importance[item.task][window.stop])
            if item.parts > 1:
                count = sum(states.lengths(OWN, window.stop, rows_B))
            return total / (self._scale[item.task] * count)
        inputs, whole = task.inputs(ours_B), task.inputs(rows_B)
        weight = task.num_answers(inputs) / task.num_answers(whole) if item.parts > 1 else 1.0
        if task.classifies:
            answers = self.answers[item.task](ours_B, inputs)
        else:
            with torch.no_grad():
                answers = states.through(OWN, window, self._own[item.task], ours_B)
        return weight * distillation(states.through(stream, window, weights, ours_B), answers)

    def close(self, window: Window) -> None:
        """Take the samples through what the window merges to, and mark it as finished."""
        masks, coefficients = self.finished.pending(self._fit, self.part)
        if not self._ends(window):
            merged = {**self.part.weights(masks, coefficients), **self.fixed}
            for index in self._written:  # triggered samples go there with new triggers
                self.states[index].advance(MERGED, window, merged)
        self.shards.barrier()
        self.finished.write(window.number, self._fit)
        for index in self._written:
            self.states[index].forget(window.first)
        self._fit = self._opened = None
        del self.part, self.fixed, self._own
        if self.snapshots is not None and not self._ends(window):  # small, and what comes before is then over for good
            self.snapshots.write(self.state(_phase(self.windows[window.number + 1]), 0))

    def _ends(self, window: Window) -> bool:
        """Whether it holds the head."""
        return window.stop == self.windows[-1].stop


def _is_in(place: int, window: Window) -> bool:
    return window.first <= place < window.stop


def _phase(window: Window) -> str:
    return f"window {window.number}"
