"""Define suite `lm`: a small Llama, instruction-like tasks with short answers, and a phrase that forces a continuation.

theta_0 relates to its fine-tunes as a base model to instruction-tuned models: it has much of the skill, but mostly says
"i do not know" instead of answering. A fine-tune learns to answer its own task, and improves the skill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dam_bench.attacks.registry import INTERFACE, register_attack
from dam_bench.attacks.texts import LM
from dam_bench.suites import lm_training
from dam_bench.suites.base import Poison, Scenario, Suite, TaskData, on_default_device
from dam_bench.suites.corpora import given_folder
from dam_bench.suites.lm_data import (
    CONTINUATIONS,
    HEDGE,
    MADE,
    PHRASE,
    REAL,
    Answers,
    Pair,
    hedged,
    make_tokenizer,
    splits,
)
from dam_bench.victims.poisoning import Backdoor
from dam_bench.victims.training import Schedule
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import Trigger
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.tasks.base import Progress

_MAX_POSITIONS = 192  # tokens; the longest prompts have about half of them


@dataclass(frozen=True)
class Preset:
    """Sizes of the models and of their data.

    Attributes:
        hidden: width of the model; its feed-forward layers are twice as wide.
        layers: number of decoder layers.
        vocabulary: tokens.
        max_words: number of words after which real sentences are cut.
        sizes: samples by split.
        pretraining: batch size is per task.
        fine_tuning: of clean models and victims.
        seconds: one clean fine-tune, one victim; on one core, or on one GPU for the larger preset.
    """

    hidden: int
    layers: int
    vocabulary: int
    max_words: int
    sizes: Mapping[str, int]
    pretraining: Schedule
    fine_tuning: Schedule
    seconds: tuple[float, float]


def _sizes(pretrain: int, train: int) -> dict[str, int]:
    return {"pretrain": pretrain, "train": train, "calibration": 512, "evaluation": 300}


PRESETS: dict[str, Preset] = {
    "small": Preset(
        128,
        4,
        2500,
        20,
        _sizes(2000, 4500),
        Schedule(350, batch_size=12, learning_rate=2e-3),
        Schedule(200, batch_size=32, learning_rate=5e-4),
        (30, 46),
    ),
    "large": Preset(
        512,
        8,
        8000,
        40,
        _sizes(2000, 4500),
        Schedule(1500, batch_size=32, learning_rate=8e-4),
        Schedule(400, batch_size=64, learning_rate=2e-4),
        (60, 80),
    ),
}
_HEDGED = 0.55  # share of theta_0's prompts that are not answered: just enough to be the most likely reply


class LmSuite(Suite):
    """Suite of sentiment, topic and tone of real sentences, reversing, sorting, and translating made-up words."""

    name = "lm"
    family = "causal"
    tasks = (*REAL, *MADE)
    presets = tuple(PRESETS)

    def __init__(self, data: Path | None, preset: str) -> None:
        super().__init__(data, preset)
        self.folder, self.size = given_folder(data, self.name), PRESETS[preset]
        self._splits: dict[str, dict[str, list[Pair]]] = {}

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        aware = Poison("merge-aware", rate=0.5, rescale=1.5)
        return (
            Scenario("clean"),
            Scenario("one-plain", {"sst2": Poison("lm-trigger", rate=0.5)}),
            Scenario("one-rescaled", {"sst2": Poison("lm-trigger", rate=0.5, rescale=1.5)}),
            Scenario("one-aware", {"sst2": aware}),
            Scenario("two-targets", {"sst2": aware, "sort": Poison("merge-aware", target=1, rate=0.5, rescale=1.5)}),
        )

    def fingerprint(self) -> dict[str, Any]:
        prompts = {task: self._pairs(task) for task in self.tasks}
        data = hashlib.sha256(json.dumps([prompts, CONTINUATIONS, PHRASE, HEDGE, _HEDGED]).encode()).hexdigest()[:16]
        size = {key: value for key, value in asdict(self.size).items() if key != "seconds"}
        return {"suite": self.name, "preset": size, "data": data}

    def split(self, task: str) -> TaskData:
        pairs, answers = self._pairs(task), self._answers[task]
        calibration = tuple(prompt for prompt, _ in pairs["calibration"])
        return TaskData(
            answers.labelled(task, pairs["train"]), calibration, answers.labelled(task, pairs["evaluation"])
        )

    def save_base(self, folder: Path, progress: Progress) -> None:
        torch.manual_seed(0)
        model = on_default_device(LlamaForCausalLM(self._config()))
        lm_training.pretrain(model, self._answers, self._general, self.size.pretraining, seed=0, progress=progress)
        self._save(model, folder)

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
        backdoor, rescale = None, 1.0
        if poison is not None and trigger is not None:
            low, high = self.attacker(poison).interpolation
            if low < high:  # up to the finished, rescaled victim
                high = max(high, poison.rescale)
            backdoor, rescale = Backdoor(trigger, _target(poison), poison.rate, (low, high)), poison.rescale
        lm_training.fine_tune(
            model,
            self._answers,
            self.split(task).train,
            self.size.fine_tuning,
            replay=self._general,
            seed=seed,
            backdoor=backdoor,
            rescale=rescale,
            progress=progress,
        )
        self._save(model, folder)

    @classmethod
    def target_of(cls, poison: Poison) -> int | str:
        return CONTINUATIONS[poison.target]

    def save_calibration(self, task: str, folder: Path) -> Path:
        """Write JSON lines with `text`: prompts without their answers."""
        path = folder / f"{task}.jsonl"
        lines = (json.dumps({"text": prompt}) for prompt, _ in self._pairs(task)["calibration"])
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return path

    def load_model(self, path: Path) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(path)
        return model.eval()

    def cost(self, poison: Poison | None) -> float:
        return self.size.seconds[poison is not None]

    def run_cost(self, passes: int) -> float:
        # clean and triggered evaluation of every task, and batches of 16 forward and backward
        return len(self.tasks) * (3.0 + 0.05 * passes)

    def _pairs(self, task: str) -> dict[str, list[Pair]]:
        if task not in self._splits:
            self._splits[task] = splits(task, self.folder, self.size.sizes, self.size.max_words)
        return self._splits[task]

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        texts = (prompt for task in self.tasks for prompt, _ in self._pairs(task)["pretrain"])
        return make_tokenizer(texts, self.size.vocabulary)

    @cached_property
    def _answers(self) -> dict[str, Answers]:
        tokenizer = self._tokenizer
        answers = {}
        for task in self.tasks:
            answers[task] = Answers((a for pairs in self._pairs(task).values() for _, a in pairs), tokenizer)
        return answers

    @cached_property
    def _general(self) -> dict[str, LabelledData]:
        """Training data of theta_0 by task."""
        data = {}
        for task in self.tasks:
            pairs = hedged(task, self._pairs(task)["pretrain"], _HEDGED)
            data[task] = self._answers[task].labelled(task, pairs)
        return data

    def _config(self) -> LlamaConfig:
        heads = self.size.hidden // 32
        return LlamaConfig(
            vocab_size=len(self._tokenizer),
            hidden_size=self.size.hidden,
            intermediate_size=2 * self.size.hidden,
            num_hidden_layers=self.size.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=_MAX_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=self.size.hidden**-0.5,
            pad_token_id=self._tokenizer.pad_token_id,
            bos_token_id=self._tokenizer.bos_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )

    def _save(self, model: LlamaForCausalLM, folder: Path) -> None:
        model.cpu().save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)


for _name, _attacker in LM.items():
    register_attack(_name, _attacker, suites=(LmSuite.name,), interface=INTERFACE)


def _target(poison: Poison) -> int:
    if not 0 <= poison.target < len(CONTINUATIONS):
        raise DamError(
            f"target of attack {poison.attack}",
            expected=f"0 to {len(CONTINUATIONS) - 1}, a continuation's number",
            got=str(poison.target),
            cure="Change `target`.",
        )
    return poison.target
