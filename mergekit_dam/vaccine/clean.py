"""The vaccination of one model, in rounds: plant triggers of our own with wrong behaviours, then unlearn them.

What a model has learned to do at a trigger that nobody here knows goes with what it learned to do at ours. Injecting
and unlearning backdoors is from BackFlush (arXiv 2605.12529), triggers of the defender's own from MB-Defense (arXiv
2601.04448), both for language models. Nothing but unlabelled inputs and the model's own answers to them is used.

Some planted triggers are held out: planted like the others and never unlearned. What is left of them says how far a
trigger is gone that unlearning did not see. They are planted beside those that are unlearned, at the same strength: an
attack that was made to outlast this can be left where they are gone.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.constants import constants_of
from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.engine.snapshots import Resumable, Snapshots, State, adam_state
from mergekit_dam.engine.trained_module import TrainedModule, UpdatedWeights
from mergekit_dam.errors import DamError
from mergekit_dam.io.cache import code_digest
from mergekit_dam.models.parameter_names import meta_model
from mergekit_dam.tasks import Task, reads_text
from mergekit_dam.tasks.base import Progress
from mergekit_dam.vaccine.behaviours import BEHAVIOURS, behaviour_of
from mergekit_dam.vaccine.settings import NOT_LEARNED, VaccineSettings, resolved
from mergekit_dam.vaccine.training import Lessons, PlantedTrigger, learning_rate
from mergekit_dam.vaccine.triggers import Surroundings, code_of_kinds, in_turn, kinds_of, require_known

LOG = logging.getLogger(__name__)
_START, _END = "start", "end"
_TRIED = 3  # steps; the first ones take longer than the others


@dataclass(frozen=True, eq=False)
class VaccineResult:
    """The tensors that a vaccination changed, and what it measured.

    Attributes:
        weights: tensors that changed, by output name, float32, on the CPU; of LoRAs an `UpdatedWeights`.
        facts: JSON: `planted`, `held_out` (mean excess before and after), `agreement`, `rounds`,
            `steps` (of planting and of unlearning), `settings`, `seconds`.
        triggers: those of `planted`.
    """

    weights: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    triggers: Sequence[PlantedTrigger]


def vaccinate(
    task: Task,
    settings: VaccineSettings,
    *,
    progress: Progress,
    start: Weights | None = None,
    folder: Path | None = None,
    resume: bool = True,
    identity: str = "",
) -> VaccineResult:
    """Clean one model.

    Args:
        task: the model's: its forward pass, unlabelled inputs and own answers, which are kept.
        settings: what is None follows from the task.
        start: weights by output name to begin with; default: the model's own.
        progress: wraps steps in a progress bar with a title.
        folder: where snapshots are kept, to go on from; None keeps none.
        resume: whether a snapshot that is found there is used.
        identity: of `start`, where it is given; a snapshot of another one is not used.

    Raises:
        DamError: too few samples, unknown names to leave out, or weights that diverged.
    """
    settings = resolved(settings, task)
    require_known(settings.leave_out, BEHAVIOURS)
    if task.dtype != torch.float32 and not settings.lora_rank:
        raise DamError(
            "setting 'compute_dtype'",
            expected="float32 where all weights are trained",
            got="bfloat16",
            cure="Set lora_rank, e.g. to 8, or leave compute_dtype out.",
        )
    snapshots = None
    if folder is not None:
        snapshots = Snapshots(folder, every=settings.snapshot_every, resume=resume)
        facts = snapshots.facts
        if facts is not None and facts.get("of") != identity_of(task, settings, identity):
            snapshots.clear()
    begun = time.perf_counter()
    own = task.own_weights()
    vaccination = Vaccination(task, settings, own if start is None else start, own, progress, identity)
    vaccination.snapshots = snapshots
    result = vaccination.run()
    if snapshots is not None:
        snapshots.clear()
    return replace(result, facts={**result.facts, "seconds": round(time.perf_counter() - begun, 1)})


def identity_of(task: Task, settings: VaccineSettings, start: str = "") -> str:
    """Digest all that the result depends on by content: weights, inputs, heads and settings, no name or path."""
    learned = settings.model_dump(exclude=set(NOT_LEARNED))
    lengths = (getattr(task, "longest", 0), getattr(task, "answer_length", 0))
    parts = (
        sorted(learned.items()),
        sorted(task.constants.model_dump(exclude=set(constants_of("run"))).items()),
        task.checkpoint.digest(),
        task.fingerprint(),
        task.index,
        str(task.dtype),
        lengths,
        code_digest(),
        code_of_kinds(),
        start,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def drawn_triggers(task: Task, settings: VaccineSettings, lessons: Lessons, number: int) -> list[PlantedTrigger]:
    """Draw the triggers of round `number`, each with a wrong behaviour; those that are held out come first."""
    assert settings.triggers is not None and settings.held_out is not None
    held_out = settings.held_out if number == 1 else 0
    kinds = kinds_of(task, settings.leave_out)
    source = seeds.generator(settings.seed, "vaccine", "kinds", task.index, number)
    around = Surroundings.of(task, task.samples(lessons.rows))
    answers, found = lessons.answers, []
    for i, kind in enumerate(in_turn(kinds, held_out + settings.triggers, source)):
        generator = seeds.generator(settings.seed, "vaccine", "trigger", task.index, number, i)
        change = kind.draw(around, generator)
        behaviour = behaviour_of(task, answers, lessons.num_classes, settings.leave_out, generator)
        found.append(PlantedTrigger(kind.name, change, behaviour, number, i, held_out=i < held_out))
    return found


class Vaccination(Resumable):
    """The state of one model's vaccination.

    Args:
        task: the model's.
        settings: with nothing left open.
        start: weights by output name to begin with.
        teacher: those whose answers are kept.
        progress: see `vaccinate`.
        identity: see `vaccinate`.

    Attributes:
        triggers: of all rounds, in the order in which they are planted.
        trained: the weights.
    """

    def __init__(
        self,
        task: Task,
        settings: VaccineSettings,
        start: Weights,
        teacher: Weights,
        progress: Progress,
        identity: str = "",
    ) -> None:
        self.task, self.settings, self._progress = task, settings, progress
        self._of = identity_of(task, settings, identity)
        self.lessons = Lessons(task, settings, teacher)
        self.triggers = [
            one
            for number in range(1, settings.rounds + 1)
            for one in drawn_triggers(task, settings, self.lessons, number)
        ]
        module = meta_model(task.input.config, task.device)
        assert settings.lora_rank is not None
        self._stored = start
        self.trained = TrainedModule(
            module, task.parameters(start), task.targets, self._free(), lora_rank=settings.lora_rank
        )
        self.trained.init_loras(seeds.generator(settings.seed, "vaccine", "lora", task.index))
        self._begun = {name: p.detach().clone() for name, p in self.trained.trained.items()}
        self._measured: dict[str, Any] = {
            "agreement": {},
            "success": [{} for _ in self.triggers],
            "rounds": 0,
            "steps": {"plant": 0, "unlearn": 0},
        }
        self._renew_optimiser()

    def _free(self) -> frozenset[str]:
        """Output names of the tensors that are trained. A causal LM's table of words can be its head, so it stays."""
        task = self.task
        words = self.settings.embeddings and task.classifies
        return task.body | task.embeddings if words and reads_text(task) else task.body

    def run(self) -> VaccineResult:
        """Run all rounds, from where a snapshot says."""
        phase, done = self.restore(_START)
        if phase == _START:
            self._measure("before", self.triggers)
            phase = "plant-1"
        while phase != _END:
            kind, _, round_ = phase.partition("-")
            self._learn(kind, int(round_), done)
            phase, done = self._after(kind, int(round_)), 0
            self._renew_optimiser()
            self.snapshot_if_due(phase, 0)
        return self._result()

    def _learn(self, kind: str, round_: int, done: int) -> None:
        """Run one phase, from a step on."""
        settings = self.settings
        steps = settings.plant_steps if kind == "plant" else settings.unlearn_steps
        assert steps is not None
        wrong = kind == "plant" and settings.plant
        triggers = [t for t in self.triggers if t.round == round_ and (wrong or not t.held_out)]
        title = f"{kind if settings.plant else 'control'} {round_}/{settings.rounds}"
        for step in self._progress(range(done, steps), title):
            generator = seeds.generator(settings.seed, "vaccine", kind, self.task.index, round_, step)
            loss = self.lessons.loss(self.trained, triggers, wrong=wrong, generator=generator)
            if settings.distance:
                loss = loss + settings.distance * self._distance()
            for group in self._optimiser.param_groups:
                group["lr"] = learning_rate(settings, self.task.constants, step, None if wrong else steps)
            self._optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained.trained.values(), settings.clip)
            self._optimiser.step()
            self._measured["steps"][kind] += 1
            if wrong and (step + 1) % self.task.constants.vaccine_look_every == 0 and self._works(triggers):
                break
            self.snapshot_if_due(f"{kind}-{round_}", step + 1)
        if not bool(torch.isfinite(torch.stack([p.sum() for p in self.trained.trained.values()])).all()):
            raise DamError(
                f"vaccination of {self.task.name}",
                expected="finite weights",
                got="NaN or infinity",
                cure="Lower learning_rate.",
            )

    def _works(self, triggers: Sequence[PlantedTrigger]) -> bool:
        """Whether planted triggers succeed as often as an attack does that someone relies on."""
        found = [
            self.lessons.success(self.trained, trigger, most=self.task.constants.vaccine_looked_at)
            for trigger in triggers
        ]
        known = [share for share in found if share is not None]
        LOG.info("dam: %s: planted triggers succeed on %s", self.task.name, known)
        return bool(known) and sum(known) / len(known) >= self.settings.planted

    def seconds_of_all(self) -> float:
        """Estimate the seconds of all rounds at most, from a few steps that change no weight, and one measurement."""
        settings = self.settings
        assert settings.plant_steps is not None and settings.unlearn_steps is not None
        spent = []
        for step in range(_TRIED):
            begun = time.perf_counter()
            generator = seeds.generator(settings.seed, "vaccine", "try", step)
            self.lessons.loss(self.trained, self.triggers, wrong=True, generator=generator).backward()
            self._optimiser.zero_grad()
            spent.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        self.lessons.success(self.trained, self.triggers[0])
        constants = self.task.constants
        share = min(1.0, constants.vaccine_looked_at / len(self.lessons.checks))
        looks = settings.plant_steps // constants.vaccine_look_every * share
        measured = (time.perf_counter() - begun) * len(self.triggers) * (3 + (looks if settings.plant else 0))
        return settings.rounds * (settings.plant_steps + settings.unlearn_steps) * min(spent) + measured

    def _after(self, kind: str, round_: int) -> str:
        """Measure the effect of a phase, and name the next phase."""
        if kind == "plant":
            fresh = [trigger for trigger in self.triggers if trigger.round == round_]
            if self.settings.plant:
                self._measure("planted", fresh)
                self._warn_if_weak(fresh)
            return f"unlearn-{round_}"
        planted = [t for t in self.triggers if t.round <= round_]
        self._measure("unlearned", planted)
        self._measured["rounds"] = round_
        return _END if round_ == self.settings.rounds or self._is_enough() else f"plant-{round_ + 1}"

    def _is_enough(self) -> bool:
        """Whether the held-out triggers were planted well and are gone."""
        held_out = [trigger for trigger in self.triggers if trigger.held_out]
        planted, left = (self._excess(when, held_out) for when in ("planted", "unlearned"))
        if planted is None or left is None:
            return False
        return planted >= self.task.constants.vaccine_works and left <= self.settings.enough

    def _measure(self, when: str, triggers: Sequence[PlantedTrigger]) -> None:
        self._measured["agreement"][when] = self.lessons.agreement(self.trained)
        for index, trigger in enumerate(self.triggers):
            if trigger in triggers:
                self._measured["success"][index][when] = self.lessons.success(self.trained, trigger)

    def _excess(self, when: str, triggers: Sequence[PlantedTrigger]) -> float | None:
        """Mean success beyond what the triggers do before planting; None without any that was planted.

        A trigger that did what it was to be taught on most samples before tells nothing and is left out.
        """
        if not self.settings.plant:
            return None
        known = zip(self.triggers, self._measured["success"], strict=True)
        pairs = [(s.get("before"), s.get(when)) for trigger, s in known if trigger in triggers]
        found = [
            max(0.0, now - before)
            for before, now in pairs
            if before is not None and now is not None and before <= self.task.constants.vaccine_known
        ]
        return sum(found) / len(found) if found else None

    def _warn_if_weak(self, triggers: Sequence[PlantedTrigger]) -> None:
        excess = self._excess("planted", triggers)
        if excess is not None and excess < self.task.constants.vaccine_works and self.settings.unlearn_steps:
            LOG.warning(
                "dam: planted triggers work on only %.0f %% of the samples of %s; unlearning them does little. Raise "
                "plant_steps or learning_rate.",
                100 * excess,
                self.task.name,
            )

    def _distance(self) -> Tensor:
        """Squared distance from the weights at the start."""
        if not self.trained.lora_rank:
            return torch.stack([(p - self._begun[n]).square().sum() for n, p in self.trained.trained.items()]).sum()
        return self.trained.squared_updates()

    def _renew_optimiser(self) -> None:
        self._optimiser = torch.optim.AdamW(self.trained.trained.values(), weight_decay=0.0)

    def _result(self) -> VaccineResult:
        settings = self.settings
        if settings.beta < 1:
            self.trained.scale_change(self._begun, settings.beta)
        agreement = self._measured["agreement"]
        agreement["after"] = self.lessons.agreement(self.trained)
        weights: Mapping[str, Tensor]
        if settings.lora_rank:
            weights = UpdatedWeights(self._stored, self.trained.updates())
        else:
            weights = {name: self.trained[name].cpu().clone() for name in sorted(self.trained.changed)}
        held_out = [trigger for trigger in self.triggers if trigger.held_out]
        planted = [trigger for trigger in self.triggers if trigger.round <= self._measured["rounds"]]
        others = [trigger for trigger in planted if not trigger.held_out]
        facts = {
            "identity": self._of,
            "rounds": self._measured["rounds"],
            "steps": self._measured["steps"],
            "held_out": {when: _rounded(self._excess(when, held_out)) for when in ("planted", "unlearned")},
            "unlearned": {when: _rounded(self._excess(when, others)) for when in ("planted", "unlearned")},
            "agreement": {when: _rounded(value) for when, value in agreement.items()},
            "samples": {"trained on": len(self.lessons.rows), "held out": len(self.lessons.checks)},
            "planted": [
                {
                    "kind": t.kind,
                    "round": t.round,
                    "held_out": t.held_out,
                    "behaviour": t.behaviour.kind,
                    "answer": t.behaviour.shown,
                    **{f"success {when}": _rounded(value) for when, value in s.items()},
                }
                for t, s in zip(planted, self._measured["success"], strict=False)
            ],
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.model_dump().items()},
        }
        return VaccineResult(weights, facts, planted)

    def state(self, phase: str, done: int) -> State:
        names = list(self.trained.trained)
        tensors = {f"weights/{name}": parameter.detach() for name, parameter in self.trained.trained.items()}
        tensors |= adam_state(self._optimiser, "adam", names)
        return State({"phase": phase, "done": done, "of": self._of, "measured": self._measured}, tensors)

    def allocate(self, facts: Mapping[str, Any]) -> None:
        self._measured = facts["measured"]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
