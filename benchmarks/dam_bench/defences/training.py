"""Train a merge, or masks on it, on the input models' own answers to unlabelled samples. T models.

Legend: B batch, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dam_bench.defences.base import Defence, DefenceInputs
from mergekit_dam import seeds
from mergekit_dam.config import setting
from mergekit_dam.engine.module_weights import Weights
from mergekit_dam.errors import DamError
from mergekit_dam.tasks import Target, Task, generates
from mergekit_dam.tasks.bounds import Perturb

_AT_ONCE = 64  # samples of a pass without gradients
_LORA_SCALE = 2.0  # alpha over rank


class Lesson:
    """The unlabelled samples of one task with its input model's own answers, which stand in for labels.

    Args:
        task: of the input model.

    Attributes:
        rows: indices of the samples that have an answer.
        answers: class, or tokens of the greedy answer, by index.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        rows = torch.arange(task.num_samples)
        self.answers: list[Target]
        if generates(task):
            self.answers = list(task.answers(rows))
        else:
            own = task.own_weights()
            with torch.no_grad():
                parts = [task.logits(own, task.inputs(part)).argmax(-1) for part in rows.split(_AT_ONCE)]
            self.answers = [int(answer) for answer in torch.cat(parts)]
        self.rows = torch.tensor([row for row in rows.tolist() if self.answers[row] != ()], dtype=torch.long)
        if not len(self.rows):
            raise DamError(
                f"calibration of {task.name}",
                expected="samples that the model answers",
                got="none",
                cure="Causal LMs need prompts, and the constant answer_tokens above 0.",
            )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the indices (B,) of a batch, with replacement."""
        return self.rows[torch.randint(len(self.rows), (count,), generator=generator)]

    def targets(self, rows: Tensor) -> list[Target]:
        """The model's own answers to these samples."""
        return [self.answers[row] for row in rows.tolist()]

    def loss(self, weights: Weights, rows: Tensor, perturb: Perturb | None = None) -> Tensor:
        """Mean cross-entropy of the own answers, in nats (of causal LMs the mean over an answer's tokens)."""
        return self.task.reach(weights, self.task.prompts(rows), self.targets(rows), perturb)[0].mean()


class Trained(ABC):
    """Weights of a merge as a function of what an optimiser trains.

    Attributes:
        start: the merge's tensors before training, by output name.
        parameters: what is trained, leaves that require gradients.
    """

    start: dict[str, Tensor]
    parameters: list[nn.Parameter]

    @abstractmethod
    def weights(self, scale: float = 1.0) -> dict[str, Tensor]:
        """All tensors by output name: start + scale (trained - start), differentiable."""

    def project(self) -> None:  # noqa: B027 - most parameters have no box
        """Bring the parameters back into their box, after a step."""

    @torch.no_grad()
    def result(self, scale: float = 1.0) -> dict[str, Tensor]:
        """The trained tensors, without gradients."""
        return {name: tensor.detach() for name, tensor in self.weights(scale).items() if tensor.is_floating_point()}


class TrainedWeights(Trained):
    """Tensors that are trained themselves, or by a low-rank change of each matrix (LoRA, arXiv 2106.09685).

    Args:
        start: the merge's tensors by output name, float32.
        names: of those that may change.
        rank: R; 0 trains the tensors.
        generator: of the factors A (R, in); the factors B (out, R) begin at zero.
    """

    def __init__(self, start: dict[str, Tensor], names: Iterable[str], rank: int, generator: torch.Generator) -> None:
        self.start, self._whole, self._factors = start, {}, {}
        for name in sorted(names):
            tensor = start[name]
            if not rank:
                self._whole[name] = nn.Parameter(tensor.clone())
            elif tensor.ndim == 2:
                drawn = torch.empty(rank, tensor.shape[1]).uniform_(-1, 1, generator=generator)
                a = nn.Parameter((drawn * tensor.shape[1] ** -0.5).to(tensor.device))
                self._factors[name] = a, nn.Parameter(tensor.new_zeros(tensor.shape[0], rank))
        self.parameters = [*self._whole.values(), *(p for pair in self._factors.values() for p in pair)]

    def weights(self, scale: float = 1.0) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = dict(self._whole)
        if scale != 1.0:
            changed = {name: self.start[name].lerp(tensor, scale) for name, tensor in changed.items()}
        low = {n: self.start[n] + scale * _LORA_SCALE * (b @ a) for n, (a, b) in self._factors.items()}
        return {**self.start, **changed, **low}


Loss = Callable[[Lesson, Tensor, int], Tensor]  # lesson, rows of the batch, step -> loss


class Tuned(Defence):
    """A defence that trains the merge for some steps of AdamW, with a batch of every task in each.

    The rate warms up over the first tenth of the steps, then falls by a cosine; gradients are clipped to norm 1.
    """

    steps: int = setting(..., "Steps of training.", unit="steps", ge=0)
    batch_size: int = setting(..., "Samples per task and step.", unit="samples", ge=1)
    learning_rate: float = setting(..., "AdamW step at its highest.", gt=0)
    lora_rank: int = setting(0, "Rank of LoRAs on the matrices that are trained; 0: all weights.", ge=0)

    def loss_of(self, trained: Trained, lessons: Sequence[Lesson], seed: int) -> Loss:
        """Prepare the training, and return its loss: by default that of the own answers, plain fine-tuning."""
        return lambda lesson, rows, step: lesson.loss(trained.weights(), rows)

    def trainable(self, given: DefenceInputs) -> Trained:
        """Choose what is trained: the bodies without their tables of words, by default."""
        names = set.union(*(set(task.body) for task in given.tasks))
        generator = seeds.generator(given.seed, "defence", "lora")
        return TrainedWeights(given.start_weights(), names, self.lora_rank, generator)

    def tuned(self, given: DefenceInputs) -> Trained:
        """Train, and return what was trained."""
        lessons, trained = [Lesson(task) for task in given.tasks], self.trainable(given)
        loss = self.loss_of(trained, lessons, given.seed)
        generator = seeds.generator(given.seed, "defence", "batches")
        optimiser = torch.optim.AdamW(trained.parameters, lr=self.learning_rate, weight_decay=0.0)
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, self.learning_rate, max(2, self.steps), pct_start=0.1, cycle_momentum=False
        )
        for step in range(self.steps):
            for lesson in lessons:
                (loss(lesson, lesson.draw(self.batch_size, generator), step) / len(lessons)).backward()
            nn.utils.clip_grad_norm_(trained.parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            rate.step()
            trained.project()
        return trained

    def changed_weights(self, given: DefenceInputs) -> Mapping[str, Tensor]:
        return self.tuned(given).result()

    @property
    def passes(self) -> int:
        return 2 * self.steps
