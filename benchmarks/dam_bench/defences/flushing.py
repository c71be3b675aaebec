"""Defend by planting and unlearning backdoors of our own in the merge (BackFlush, arXiv 2605.12529).

Auxiliary backdoors are injected into the suspect model and then unlearned, and a backdoor that nobody knows goes with
them. The paper does so with one language model; here it is the merge, with every task's samples, and for all families.
Triggers, wrong behaviours and losses are those of `mergekit-dam clean`; unlearning is fine-tuning on the own answers,
not the paper's rotation of embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dam_bench.defences.training import Lesson, Loss, Trained, Tuned
from mergekit_dam import seeds
from mergekit_dam.config import setting
from mergekit_dam.vaccine.clean import drawn_triggers
from mergekit_dam.vaccine.settings import VaccineSettings, resolved
from mergekit_dam.vaccine.training import Lessons


class Flushing(Tuned):
    """Plants triggers in the merge for the first steps, and unlearns them in the others."""

    plant_steps: int = setting(..., "The first steps, in which triggers are planted.", unit="steps", ge=0)
    triggers: int = setting(..., "Triggers per task.", ge=1)

    def loss_of(self, trained: Trained, lessons: Sequence[Lesson], seed: int) -> Loss:
        asked = VaccineSettings(triggers=self.triggers, held_out=0, batch_size=max(2, self.batch_size), seed=seed)
        whole, planted = {}, {}
        for lesson in lessons:
            task = lesson.task
            settings = resolved(asked, task)
            whole[task.name] = Lessons(task, settings, task.own_weights())
            planted[task.name] = drawn_triggers(task, settings, whole[task.name], 1)
        generator = seeds.generator(seed, "defence", "flushing")

        def loss(lesson: Lesson, rows: Tensor, step: int) -> Tensor:
            name = lesson.task.name
            return whole[name].loss(
                trained.weights(), planted[name], wrong=step < self.plant_steps, generator=generator
            )

        return loss
