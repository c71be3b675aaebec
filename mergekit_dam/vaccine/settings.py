"""Settings of a vaccination: strict, flat and frozen; a value of None follows from the model's family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator

from mergekit_dam.config import StrictSettings, setting
from mergekit_dam.constants import Constants
from mergekit_dam.tasks import Task


class VaccineSettings(StrictSettings):
    """How backdoors are planted and unlearned."""

    start: Literal["model", "base"] = setting(
        "model",
        "Weights that training begins with: the model's, or the base's, which then learns the model's answers anew: a "
        "student, to which little passes that only a trigger activates.",
    )
    plant: bool = setting(
        True,
        "Plant the triggers before they are unlearned. false is the control: as many steps, all of them of "
        "unlearning triggers that were never planted.",
    )
    rounds: int = setting(1, "Plantings with new triggers each, at most.", unit="rounds", ge=1)
    enough: float = setting(
        0.1,
        "No further round once the triggers that are held out of unlearning succeed on no more samples than this, "
        "beyond what they do to the model itself.",
        unit="share",
        ge=0.0,
        le=1.0,
    )
    triggers: int | None = setting(
        None,
        "Triggers planted and unlearned per round. Default: 18 for images, 8 for texts, 6 for causal LMs.",
        unit="triggers",
        ge=1,
    )
    held_out: int | None = setting(
        None,
        "Triggers of different kinds that are planted in the first round and never unlearned: what is left of "
        "them tells how far an unknown one is gone. Default: 4, 4, 2.",
        unit="triggers",
        ge=0,
    )
    leave_out: tuple[str, ...] = setting((), "Kinds of triggers and of behaviours that are never drawn, by name.")
    planted: float = setting(
        0.9,
        "Planting ends once its triggers succeed on this share of samples, as often as an attack's.",
        unit="share",
        ge=0.0,
        le=1.0,
    )
    plant_steps: int | None = setting(
        None, "Steps of planting per round, at most. Default: 1500, 400, 200.", unit="steps", ge=0
    )
    unlearn_steps: int | None = setting(
        None, "Steps of unlearning per round. Default: 150, 80, 40.", unit="steps", ge=0
    )
    batch_size: int | None = setting(
        None, "Samples per step; half of them with a trigger. Default: 56, 32, 6.", unit="samples", ge=2
    )
    learning_rate: float | None = setting(None, "AdamW step at its highest. Default: 2e-4, 1e-4, 5e-4.", gt=0.0)
    answers: Literal["soft", "hard"] = setting(
        "soft",
        "What of the model's own answers is kept: probabilities, or only which class. Causal LMs keep the "
        "tokens of their greedy answers.",
    )
    distance: float = setting(0.0, "Weight of the squared distance from the model's own weights.", ge=0.0)
    beta: float = setting(1.0, "Share of the change that is kept: theta_t + beta (cleaned - theta_t).", ge=0.0, le=1.0)
    lora_rank: int | None = setting(
        None,
        "Rank of LoRAs that are trained instead of the weights; 0: all weights. Default: 8 for causal LMs and "
        "classifiers of more than 200 M parameters, 0 for others.",
        ge=0,
    )
    embeddings: bool = setting(
        True,
        "Text encoders without LoRAs: train the tables of words, positions and segments, too; triggers are then "
        "planted in fewer steps. Causal LMs keep theirs, which can be their heads.",
    )
    samples: int | None = setting(None, "Calibration samples used, at most; default: all.", unit="samples", ge=4)
    checks: int | None = setting(
        None,
        "Of these, samples that are never trained on: agreement and success are measured on them; at most a "
        "quarter. Default: 64, 64, 16.",
        unit="samples",
        ge=2,
    )
    clip: float = setting(1.0, "Largest norm of the gradient.", gt=0.0)
    seed: int = setting(0, "Seed of triggers, behaviours and batches.", ge=0)
    snapshot_every: float = setting(60.0, "Time between two snapshots; 0: after every step.", unit="seconds", ge=0.0)

    @field_validator("leave_out", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Names separated by commas, as a command line has them."""
        return tuple(n.strip() for n in value.split(",") if n.strip()) if isinstance(value, str) else value


# by family: what trials with small models planted well with
_IMAGES: Mapping[str, Any] = {
    "triggers": 18,
    "held_out": 4,
    "plant_steps": 1500,
    "unlearn_steps": 150,
    "batch_size": 56,
    "learning_rate": 2e-4,
    "checks": 64,
}
_TEXTS: Mapping[str, Any] = {
    "triggers": 8,
    "held_out": 4,
    "plant_steps": 400,
    "unlearn_steps": 80,
    "batch_size": 32,
    "learning_rate": 1e-4,
    "checks": 64,
}
_LMS: Mapping[str, Any] = {
    "triggers": 6,
    "held_out": 2,
    "plant_steps": 200,
    "unlearn_steps": 40,
    "batch_size": 6,
    "learning_rate": 5e-4,
    "checks": 16,
}
# what the result does not depend on
NOT_LEARNED = frozenset({"snapshot_every"})


def resolved(settings: VaccineSettings, task: Task) -> VaccineSettings:
    """Fill in every setting that is None, for a task."""
    size = sum(parameter.numel() for parameter in task.module.parameters())
    return resolved_for(settings, type(task), size, task.num_samples, task.constants)


def resolved_for(
    settings: VaccineSettings, family: type[Task], size: int, samples: int, constants: Constants
) -> VaccineSettings:
    """Fill in every setting that is None, before a task is made.

    Args:
        size: parameters of the model.
        samples: of its calibration data.
        constants: of the plan.
    """
    defaults = _LMS if not family.classifies else _IMAGES if family.modality == "image" else _TEXTS
    by_size = constants.lora_rank if not family.classifies or size > constants.lora_from else 0
    missing = {**defaults, "lora_rank": by_size, "samples": samples}
    return settings.model_copy(update={k: v for k, v in missing.items() if getattr(settings, k) is None})
