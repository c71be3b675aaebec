"""`window: N`: learn masks of N positions of the blocks at a time, so that memory does not grow with depth.

When a window begins, all windows before it are merged. Files hold each task's hidden states after the merged windows,
of clean samples (z1) and of samples with recovered triggers (z1'). The masks and coefficients of the window's tensors
are fitted so that the merged window maps z1 and z1' to the states that model t's window makes of z1:
L_t = K_t |W (merged(z1) - own(z1))|^2 / |W (theta_0(z1) - own(z1))|^2, plus alpha K'_t times
|W (merged(z1') - own(z1))|^2 / |W (theta_0(z1') - own(z1))|^2.
The factors say in nats what there is to lose, so that losses count in every window as they do in the last: K_t =
KL(f_t(x) || f_0(x)), and K'_t = KL(f_t(x) || f_t(x + trigger)). Otherwise a task on which theta_0 is nearly right would
count as much as one that it has yet to learn.
States are compared as normalising layers read them. W weights them by their importance for model t's answers
(fisher.py). The window with the head is fitted to model t's answers, as in inversion_search.py. Then the window is
merged, and the next window begins. Fitting block by block is from ProDistill (arXiv 2502.12706), which fits to what
model t makes of its own states instead. Models that disagree early, on tokens that all their prompts share, cannot all
be followed there, and later windows would spend themselves on what is lost. The scan is that of inversion_search.py,
and a window of all positions is the same search. New triggers are recovered while masks are learned, here from the
merged windows followed by the suspect model's remaining blocks.

Embeddings have one mask entry per token: 152,000 rows of 4,096 would need 620 million entries for each of T + 1 masks.
A tensor that is used at two positions (tied embeddings) is learned at the first, and is fixed at the second.
Legend: T tasks, P masked tensors, B batch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.engine.module_weights import Weights, without_gradients
from mergekit_dam.engine.shards import WorkItem
from mergekit_dam.engine.snapshots import State
from mergekit_dam.learn.fisher import Importance, importance_of
from mergekit_dam.learn.fit import MaskFit
from mergekit_dam.learn.losses import calibration_batch, distillation, divergence, first_logits
from mergekit_dam.learn.masks import ProbabilityBytes
from mergekit_dam.learn.scanned_search import ScannedSearch
from mergekit_dam.learn.teacher import TeacherLogits, debias
from mergekit_dam.learn.trigger_pool import refresh_triggers
from mergekit_dam.learn.window_masks import WindowMasks
from mergekit_dam.learn.window_states import MERGED, OWN, TARGET, TaskStates, Window
from mergekit_dam.models.plan import TensorSpec
from mergekit_dam.scan.findings import Suspect
from mergekit_dam.tasks import Task

FOLDER = "windows"  # in the folder of the run


def windows_of(end: int, size: int) -> list[Window]:
    """Split positions 0..end-1 into windows of `size`; the last window may be smaller."""
    return [Window(n, first, min(first + size, end)) for n, first in enumerate(range(0, end, size))]


def positions_of(tasks: Sequence[Task], specs: Sequence[TensorSpec], end: int) -> dict[str, tuple[int, ...]]:
    """Map output names to the sorted positions that use the tensor; tensors with the same mask share positions.

    A tensor that no task uses, e.g. a pooler that no head reads, gets the position of the head.
    """
    by_mask: dict[str, set[int]] = {}
    for spec in specs:
        used = {position for task in tasks for position in task.positions.get(spec.name, ())}
        by_mask.setdefault(spec.mask_name, set()).update(used)
    return {spec.name: tuple(sorted(by_mask[spec.mask_name])) or (end - 1,) for spec in specs}


class WindowSearch(ScannedSearch):
    """The search described above; `model` is lazy, see `MergedModel`."""

    def set_up(self) -> None:
        super().set_up()
        chain = self.tasks[0].chain
        assert chain is not None and isinstance(self.config.window, int)
        self.windows = windows_of(chain.end, self.config.window)
        self._positions = positions_of(self.tasks, self.model.specs, chain.end)
        items = [item for item in self.schedule if item is not None]
        self._own_tasks = [item.task for item in items]
        self._written_tasks = [item.task for item in items if item.part == 0]  # whose files this process writes
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
        self._current: Window | None = None
        self.states: dict[int, TaskStates] = {}
        self._version = 0  # of the trigger pool, see `TaskStates.assign_triggers`
        self._refreshes = all(task.classifies for task in self.tasks)

    def begin_fit(self) -> None:
        """Do nothing: `open_window` makes masks and coefficients of each window."""

    def run(self) -> tuple[ProbabilityBytes, Tensor]:
        """Learn; return probabilities as bytes by mask and tensor, views of files, and the coefficients (T, P)."""
        phase, done = self.restore("scan")
        if phase == "scan":
            self.scan_if_needed(done)
            done = 0
        self.prepare_tasks()
        steps, count = max(1, self.config.steps), len(self.windows)
        if self._current is not None and done == steps:  # the snapshot has all of its steps
            self.close_window(self._current)
            done = 0
        finished = next((n for n in range(count) if not self.finished.has(n)), count)
        for number in self.progress(range(finished * steps + done, count * steps), "masks"):
            window, step = self.windows[number // steps], number % steps
            if self._current is None:
                self.open_window(window)
            if self._fit is not None and self.config.steps:
                if step and step % (self.config.refresh_every * count) == 0:
                    self._refresh(window, step)
                self.step(window, step)
                self.snapshot_if_due(_phase(window), step + 1)
            if step + 1 == steps:
                self.close_window(window)
        return self.finished.read_all(count), self.finished.read(self.model, range(count))[1]

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
                self.prepare_tasks()
                self.open_window(window, refresh=False)
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
        """Return the weights of the whole merge at the masks of all windows."""
        return self.model.weights(*self.finished.read(self.model, range(len(self.windows))))

    def prepare_tasks(self) -> None:
        """Compute each model's answers and the importance of its hidden states, which all windows need."""
        if self.states:
            return
        stops = [window.stop for window in self.windows[:-1]]
        self.importance: dict[int, dict[int, Importance]] = {}
        self.divergence: dict[tuple[int, str], float] = {}
        teachers: dict[int, list[Tensor]] = {}
        for index in self._own_tasks:
            task, own = self.tasks[index], self.model.frozen.own_weights(index)
            if stops:
                self.importance[index] = importance_of(task, own, stops, self.config.seed, self.progress)
            if task.classifies:
                self.answers[index] = TeacherLogits.compute(task, own)
            pools = [pool for suspect, pool in self.trigger_pool.items() if suspect.task == index]
            self.states[index] = TaskStates(task, pools, self.folder, self.config)
            self.states[index].assign_triggers(self._version)
            if stops:
                teachers[index] = first_logits(task, own)
                for stream in self.states[index].merged_streams[1:]:
                    perturbing = partial(self.states[index].perturb, stream)
                    self.divergence[index, stream] = divergence(task, own, teachers[index], perturbing)
            del own  # before theta_0 is read
        debias(self.answers, self.trigger_pool)
        base = self.model.frozen.base_weights() if teachers else {}
        for index, teacher in teachers.items():
            self.divergence[index, MERGED] = divergence(self.tasks[index], base, teacher)

    def open_window(self, window: Window, *, refresh: bool = True) -> None:
        """Begin a window: make its triggers, tensors, masks and targets.

        Args:
            refresh: whether to recover new triggers; False if a run resumes within this window.
        """
        if refresh and window.number > 0:
            self._refresh(window, 0)  # before masks are made: both would not fit the memory
        used = [
            name
            for name, positions in self._positions.items()
            if any(_is_in(position, window) for position in positions)
        ]
        owned = {name for name in used if _is_in(self._positions[name][0], window)}
        self.part = self.model.submodel(owned)
        before = self.model.submodel(set(used) - owned)
        earlier = [w.number for w in self.windows[: window.number]] if before.mask_names else []
        self.fixed = without_gradients(before.weights(*self.finished.read(before, earlier)))
        if self.part.mask_names:
            columns = 1 if self.config.constants.coefficients == "task" else len(self.part.mask_names)
            start = self.start[:, :1].repeat(1, columns)
            # one M2 per model unless the setting forbids it: hidden states are harder to fit together than answers
            self._fit = MaskFit(self.part, self.config, start, suspects=True, by_token=True)

        def own(index: int) -> Weights:
            return {**self.part.frozen.own_weights(index), **before.frozen.own_weights(index)}

        self._scale: dict[tuple[int, str], float] = {}
        self._own_weights: dict[int, Weights] = {}
        if self._has_head(window):
            self._own_weights = {index: own(index) for index in self._own_tasks if not self.tasks[index].classifies}
        else:
            for index in self._written_tasks:
                weights = own(index)
                for stream in (OWN, TARGET):
                    self.states[index].advance(stream, window, weights)
            self.shards.barrier()
            zeros_T1 = torch.zeros(len(self.tasks), 1, device=self.model.device)  # lambda = 0 gives theta_0
            base: dict[str, Tensor] = {}
            for part in (self.part, before):
                base |= without_gradients(part.weights({}, zeros_T1))
            for index in self._own_tasks:
                states = self.states[index]
                # a trigger moves states of theta_0, too, so each stream has its own scale
                for stream in states.merged_streams:
                    loss = states.base_loss(stream, window, base, self.importance[index][window.stop])
                    self._scale[index, stream] = loss
        self._current = window

    def _refresh(self, window: Window, step: int) -> None:
        """Recover new triggers from the merged windows followed by the remaining blocks of the suspect model.

        So triggers are found that still work through the merged windows. Samples with the new triggers are then run
        through the merged windows.
        """
        if not self.trigger_pool or not self._refreshes:
            return
        names = {name for name, positions in self._positions.items() if positions[0] < window.first}
        front = self.model.submodel(names)
        before = without_gradients(front.weights(*self.finished.read(front, range(window.number))))
        merged = dict(before)
        if step:
            merged |= without_gradients(self.part.weights(*self.finished.from_fit(self._fit, self.part)))
        base = self.model.frozen.base_weights()

        def mixed(suspect: Suspect) -> Mapping[str, Tensor]:
            return {**self.scanned(suspect, base), **merged}

        key, steps = ("window", window.number, step), self.config.constants.refresh_steps
        refresh_triggers(self.tasks, self.trigger_pool, self.shards, self.config, base, mixed, steps, *key)
        self._version += 1
        for states in self.states.values():
            states.assign_triggers(self._version)
        for index in self._written_tasks if window.first > 0 else ():
            for stream in self.states[index].merged_streams[1:]:
                self.states[index].advance(stream, Window(-1, 0, window.first), before)
        self.shards.barrier()

    def step(self, window: Window, step: int) -> None:
        """Take one step of a window's masks and coefficients."""
        assert self._fit is not None
        merged = self._fit.combined()
        weights = self.part.weights(merged, self._fit.coefficients)
        parts: dict[str, Tensor] = {}
        for item in self.schedule:
            if item is not None:
                self._backward(window, item, {**weights, **self.fixed}, step, parts)
        self._fit.update(merged, weights, step)
        losses = self.sum_losses(parts)
        density = {f"density/{name}": mask.density() for name, mask in self._fit.masks.items()}
        number = window.number * self.config.steps + step
        self.track_step(
            {"phase": "masks", "window": window.number + 1, "step": number, "loss": sum(losses.values())}
            | losses
            | density
        )

    def _backward(self, window: Window, item: WorkItem, weights: Weights, step: int, parts: dict[str, Tensor]) -> None:
        """Backpropagate one task's losses stream by stream, to hold only one stream's activations in memory."""
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
        if not self._has_head(window):
            total, count = states.loss(stream, window, weights, ours_B, self.importance[item.task][window.stop])
            if item.parts > 1:
                count = sum(states.lengths(TARGET, window.stop, rows_B))
            return self.divergence[item.task, stream] * total / (self._scale[item.task, stream] * count)
        inputs, whole = task.inputs(ours_B), task.inputs(rows_B)
        weight = task.num_answers(inputs) / task.num_answers(whole) if item.parts > 1 else 1.0
        if task.classifies:
            answers = self.answers[item.task](ours_B, inputs)
        else:
            with torch.no_grad():
                answers = states.through(OWN, window, self._own_weights[item.task], ours_B)
        return weight * distillation(states.through(stream, window, weights, ours_B), answers)

    def close_window(self, window: Window) -> None:
        """Run the samples through the merged window, and write its masks, which marks it as finished."""
        masks, coefficients = self.finished.from_fit(self._fit, self.part)
        if not self._has_head(window):
            merged = {**self.part.weights(masks, coefficients), **self.fixed}
            for index in self._written_tasks:
                # `_refresh` does it for triggered samples, with new triggers
                for stream in (MERGED,) if self._refreshes else self.states[index].merged_streams:
                    self.states[index].advance(stream, window, merged)
        self.shards.barrier()
        self.finished.write(window.number, self._fit)
        for index in self._written_tasks:
            self.states[index].remove(window.first)
        self._fit = self._current = None
        del self.part, self.fixed, self._own_weights
        if self.snapshots is not None and not self._has_head(
            window
        ):  # small; a resumed run then begins at the next window
            self.snapshots.write(self.state(_phase(self.windows[window.number + 1]), 0))

    def _has_head(self, window: Window) -> bool:
        """Whether the window contains the head."""
        return window.stop == self.windows[-1].stop


def _is_in(position: int, window: Window) -> bool:
    return window.first <= position < window.stop


def _phase(window: Window) -> str:
    return f"window {window.number}"
