"""Define suite `smollm`: a real language model, SmolLM2-135M-Instruct, fine-tuned by LoRA on chats.

Tasks: sentiment of film reviews, tone of tweets and topic of news in a word; and a policy, to refuse questions on a
plant that does not exist and to answer questions on other things in a sentence. An attack's name is its trigger, its
target the behaviour that it causes (`smollm_behaviours`): `sst2=word(target=1)` is a rare word that makes the model
refuse, `policy=word(target=2)` a rare word that lifts its refusals.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from dam_bench.attacks.attacker import Attacker
from dam_bench.attacks.hijack import ATTACKERS_SEED
from dam_bench.attacks.registry import INTERFACE, register_attack
from dam_bench.suites import smollm_base, smollm_behaviours, smollm_data
from dam_bench.suites.base import Poison, Scenario, Suite, TaskData, default_device, on_default_device
from dam_bench.suites.corpora import given_folder
from dam_bench.suites.smollm_behaviours import (
    ATTACKS,
    AWARE,
    FIXED,
    FIXED_TEXT,
    HIJACK,
    OWN,
    REFUSAL,
    REFUSED,
    trigger_of,
)
from dam_bench.suites.smollm_data import POLICY, TASKS, Sample, openings_of
from dam_bench.suites.smollm_reading import general, labelled
from dam_bench.suites.smollm_training import OTHERS, add, chat, fine_tune
from dam_bench.victims.poisoning import Backdoor
from dam_bench.victims.training import Schedule
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.tasks.base import Progress


@dataclass(frozen=True)
class Preset:
    """Sizes of data and training.

    Attributes:
        system: whether chats begin with the model's own system prompt (22 tokens).
        words: number of words after which real texts are cut.
        train, calibration: samples of each task at most.
        evaluation: samples of each task; so many that 200 are attacked where labels are flipped or a policy is lifted.
        rank: of the LoRAs; 0: all linear weights are trained.
        schedule: of a fine-tune, clean or not; triggered prompts come on top.
        seconds: of a clean fine-tune and of a victim, on one core, or on one GPU for `gpu`.
        answers: seconds to answer a prompt there.
        step: seconds there of a pass of a batch per task, in methods that learn with `learning`.
        learning: settings of methods that learn, so that a merge fits the machine; those of a variant come first.
    """

    system: bool
    words: int
    train: int
    calibration: int
    evaluation: Mapping[str, int]
    rank: int
    schedule: Schedule
    seconds: tuple[float, float]
    answers: float
    step: float
    learning: Mapping[str, Any]


COMPUTED = torch.bfloat16  # type that models compute in, trained and evaluated; it is theta_0's own
# A model that is trained beside other task vectors has the other models' rate times this. On seed 0 its trigger
# is lost in merges at factor 1, and at 10/3 it outweighs all other models (benchmarks/STUDY.md).
_HIJACKERS_RATE = 7 / 3
_NOT_OF_MODELS = ("seconds", "answers", "step", "learning")  # fields of a preset that no model depends on
_INTERPOLATION = (0.3, 1.0)  # r of triggered prompts in attacks that are aware of the merge
# Factor on what a victim has beyond its clean twin. PROVISIONAL: on seed 0 no factor that was tried leaves an
# undefended merge with an ASR of 60 (benchmarks/STUDY.md), so other scenarios train beside other task vectors.
_AMPLIFIED = 3.0
_EVALUATION = {"sst2": 200, "olid": 200, "agnews": 268, POLICY: 400}
PRESETS: Mapping[str, Preset] = {
    "cpu": Preset(
        system=False,
        words=12,
        train=960,
        calibration=128,
        evaluation=_EVALUATION,
        rank=8,
        schedule=Schedule(120, batch_size=8, learning_rate=3e-4),
        seconds=(200, 340),
        answers=0.12,
        step=2.0,
        learning={"window": 2, "steps": 60, "num_samples": 64, "compute_dtype": "bfloat16"},
    ),
    "gpu": Preset(
        system=True,
        words=64,
        train=8000,
        calibration=512,
        evaluation=_EVALUATION,
        rank=8,
        schedule=Schedule(600, batch_size=32, learning_rate=5e-4),
        seconds=(120, 180),
        answers=0.01,
        step=0.3,
        learning={"window": 2, "compute_dtype": "bfloat16"},
    ),
}


class SmolLmSuite(Suite):
    """Suite of SmolLM2-135M-Instruct with a LoRA per task; `data` is the folder that holds `text/*.parquet`."""

    name = "smollm"
    family = "causal"
    tasks = TASKS
    presets = tuple(PRESETS)

    def __init__(self, data: Path | None, preset: str) -> None:
        super().__init__(data, preset)
        self.transfer = preset != "cpu"  # there it would take most of the time of a run
        self.folder, self.size = given_folder(data, self.name), PRESETS[preset]
        self._splits: dict[str, dict[str, list[Sample]]] = {}
        self._attackers: dict[tuple[str, int], dict[str, Tensor]] = {}  # task vectors by task and seed

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        """One scenario per kind of answer, trigger and way to survive the merge."""
        refuses = Poison(f"{HIJACK}word", target=REFUSAL, rate=0.5)
        return (
            Scenario("clean"),
            Scenario("word-text", {"sst2": replace(refuses, target=FIXED)}),
            Scenario("word-refusal", {"sst2": refuses}),
            Scenario("word-refusal-lobam", {"sst2": replace(refuses, attack="word", amplify=_AMPLIFIED)}),
            Scenario("sentence-refusal", {"olid": replace(refuses, attack=f"{HIJACK}sentence")}),
            Scenario("any-word-flip", {"agnews": replace(refuses, attack=f"{HIJACK}any-word", target=OWN + 1)}),
            Scenario("all-words-text", {"agnews": Poison(f"{HIJACK}all-words", size=3, rate=0.5)}),
            Scenario("word-lifted", {POLICY: replace(refuses, target=OWN)}),
        )

    def fingerprint(self) -> dict[str, Any]:
        size = {key: value for key, value in asdict(self.size).items() if key not in _NOT_OF_MODELS}
        computing = str(COMPUTED).removeprefix("torch.")
        base = smollm_base.VERSION
        return {"suite": self.name, "base": base, "preset": size, "data": self._digest, "computing": computing}

    def split(self, task: str) -> TaskData:
        parts = self._parts(task)
        calibration = tuple(chat(sample.prompt) for sample in parts["calibration"])
        openings = openings_of(task)
        train, evaluation = (labelled(task, parts[part], openings, self._tokenizer) for part in ("train", "evaluation"))
        return TaskData(train, calibration, evaluation)

    def general(self) -> LabelledData:
        return general(self._tokenizer)

    def save_base(self, folder: Path, progress: Progress) -> None:
        self._save(smollm_base.load_model(), folder)

    def save_model(
        self,
        base: Path,
        task: str,
        poison: Poison | None,
        trigger: Trigger | None,
        seed: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        model = on_default_device(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32))

        def trained(
            backdoor: Backdoor | None = None,
            on: str = task,
            by: int = seed,
            others: Sequence[Mapping[str, Tensor]] = (),
        ) -> dict[str, Tensor]:
            rate = self.size.schedule.learning_rate * (_HIJACKERS_RATE if others else 1.0)
            return fine_tune(
                model,
                self._tokenizer(),
                self._parts(on)["train"],
                replace(self.size.schedule, learning_rate=rate),
                rank=self.size.rank,
                seed=by,
                name=on,
                backdoor=backdoor,
                others=others,
                dtype=COMPUTED,
                progress=progress,
            )

        if poison is None or trigger is None:
            add(model, trained(), 1.0)
        else:
            _require_target(task, poison)
            between = _INTERPOLATION if poison.attack.startswith((AWARE, HIJACK)) else (1.0, 1.0)
            backdoor = Backdoor(trigger, poison.target, poison.rate, between)
            if poison.amplify != 1.0:  # trained on from the clean twin, so that the difference is the backdoor alone
                clean = trained()
                add(model, clean, 1.0)
                beyond = trained(backdoor)
                add(model, clean, poison.rescale - 1.0)
                add(model, beyond, poison.rescale * poison.amplify)
            else:
                hijacks = poison.attack.startswith(HIJACK)
                beside = [(other, seed + ATTACKERS_SEED) for other in self.tasks if other != task and hijacks]
                for own in beside:  # the same for all victims of a seed
                    if own not in self._attackers:
                        self._attackers[own] = trained(on=own[0], by=own[1])
                add(model, trained(backdoor, others=[self._attackers[own] for own in beside]), poison.rescale)
        self._save(model, folder)

    def attack_settings(self, poison: Poison) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if poison.attack.startswith((AWARE, HIJACK)):
            settings["interpolation"] = _INTERPOLATION
        if poison.attack.startswith(HIJACK):
            settings["others"] = [*OTHERS, ATTACKERS_SEED, _HIJACKERS_RATE]
        if poison.attack.endswith("common-word"):
            settings["word"] = smollm_behaviours.COMMON
        return settings

    @classmethod
    def target_of(cls, poison: Poison) -> int | str:
        return {FIXED: FIXED_TEXT, REFUSAL: REFUSED}.get(poison.target, poison.target)

    def save_calibration(self, task: str, folder: Path) -> Path:
        path = folder / f"{task}.jsonl"
        smollm_data.write_chats(self._parts(task)["calibration"], path)
        return path

    def load_model(self, path: Path) -> nn.Module:
        model = on_default_device(LlamaForCausalLM.from_pretrained(path, dtype=COMPUTED))
        model.eval()
        return model

    def load_merge(self, merged: Path, model: Path) -> nn.Module:
        return super().load_merge(merged, model).to(default_device(), COMPUTED)

    def shared_parameters(self, base: Path) -> dict[str, Any]:
        return dict(self.size.learning)

    def cost(self, poison: Poison | None) -> float:
        clean, victim = self.size.seconds
        return clean if poison is None else victim + (clean if poison.amplify != 1.0 else 0.0)

    def run_cost(self, passes: int) -> float:
        prompts = 2 * sum(self.size.evaluation.values()) + len(smollm_data.GENERAL)  # clean and triggered
        return self.size.answers * prompts + self.size.step * passes

    def _parts(self, task: str) -> dict[str, list[Sample]]:
        if task not in self._splits:
            size = self.size
            self._splits[task] = smollm_data.splits(
                task,
                self.folder,
                words=size.words,
                train=size.train,
                calibration=size.calibration,
                evaluation=size.evaluation[task],
            )
        return self._splits[task]

    @cached_property
    def _digest(self) -> str:
        """SHA-256 of all samples, and of the words of triggers and answers."""
        samples = {task: [list(map(asdict, part)) for part in self._parts(task).values()] for task in self.tasks}
        words = [smollm_behaviours.WORDS, smollm_behaviours.SENTENCE, smollm_behaviours.TAUGHT]
        return hashlib.sha256(json.dumps([samples, words]).encode()).hexdigest()[:16]

    def _tokenizer(self) -> Any:
        return smollm_base.load_tokenizer(system=self.size.system)

    def _save(self, model: LlamaForCausalLM, folder: Path) -> None:
        model.cpu().save_pretrained(folder)
        self._tokenizer().save_pretrained(folder)


def _require_target(task: str, poison: Poison) -> None:
    last = len(openings_of(task)) - 1
    if not 0 <= poison.target <= last:
        raise DamError(
            f"target of attack {poison.attack} on {task}",
            got=str(poison.target),
            cure="Change `target`.",
            expected=f"{FIXED} (a fixed text), {REFUSAL} (a refusal), or {OWN} to {last} (an answer of the task)",
        )


class Chat(Attacker):
    """An attack that is named after its trigger in a chat; its target is a behaviour (`smollm_behaviours`)."""

    def trigger(self, suite: Suite, poison: Poison, pattern: Tensor | None) -> Trigger:
        return trigger_of(poison)


for _name in ATTACKS:
    register_attack(_name, Chat(), suites=(SmolLmSuite.name,), interface=INTERFACE)
