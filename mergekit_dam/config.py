"""Settings of the merge method `dam`: strict, flat, scalar, each with unit, default and source.

mergekit passes only scalars under `parameters:` safely (lists become layer gradients, nested mappings are
refused), so nothing here is nested. `DamConfig` holds what is shared by all models, `ModelSettings` what may
differ per model; a value under the shared `parameters:` is the fallback of a per-model one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from mergekit_dam.errors import DamError, did_you_mean

DAM = "Yang et al., ICLR 2025, arXiv 2410.13910"
CONCRETE = "Maddison et al., arXiv 1611.00712"
ADAMERGING = "Yang et al., arXiv 2310.02575"
CLEANSE = "Wang et al., Neural Cleanse, IEEE S&P 2019"
HINTON = "Hinton et al., arXiv 1503.02531"
UNIVERSAL = "Moosavi-Dezfooli et al., arXiv 1610.08401"
Settings = TypeVar("Settings", bound="StrictSettings")


class StrictSettings(BaseModel):
    """Frozen, and no name is taken that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def setting(default: Any, description: str, *, unit: str = "-", source: str = "-", **limits: Any) -> Any:
    """A field with its unit and source, from which the settings reference is generated."""
    extra: dict[str, Any] = {"unit": unit, "source": source}
    return Field(default=default, description=description, json_schema_extra=extra, **limits)


def _at_home(value: Any) -> Any:
    """No shell expands ~ in a recipe."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


class ModelSettings(StrictSettings):
    """Settings of one fine-tuned model."""

    _expanded = field_validator("calibration", "classes", "head", mode="before")(_at_home)

    calibration: str | None = setting(
        None,
        "Unlabelled data: a parquet, jsonl, json, csv or txt file, a folder of shards or images, what `save_to_disk` "
        "wrote, or a Hub dataset id (`id@revision`); texts, chats or images (see the page on data). A causal LM "
        "without it samples its own text.",
    )
    split: str = setting("train", "Split to read where the data has several.")
    column: str | None = setting(
        None,
        "Column with the image, text or chat; default: the only one there is, else the first known name "
        "(`messages`, `prompt`, `instruction`, `text`, `image`, ...: see the page on data).",
    )
    classes: str | None = setting(
        None, "CLIP: class names for the zero-shot head, separated by commas, or a file with one per line."
    )
    head: str | None = setting(
        None, "A safetensors file with `weight` (K, D) and optional `bias` (K,), for a model without a head."
    )
    weight: float = setting(0.3, "Initial merging coefficient.", source=DAM, ge=0.0, le=2.0)


class DamConfig(StrictSettings):
    """Settings shared by all models of one merge."""

    _expanded = field_validator("masks", "zero_shot_model", mode="before")(_at_home)

    objective: Literal["inversion", "paper"] = setting(
        "inversion", "What masks are fitted to: recovered triggers and the models' own answers, or the paper's losses."
    )
    mask: Literal["dual", "m1", "m2"] = setting(
        "dual", "Masks in use: Task-Shared (m1), Backdoor-Detection (m2), or both.", source=DAM
    )
    detection: Literal["auto", "model", "shared"] = setting(
        "auto",
        "Inversion: one Backdoor-Detection mask per model, so that one can be cut without the others; one for "
        "all, which takes less memory and time (so with `rescale`); or per model only where the scan finds a suspect, "
        "and in windows.",
    )
    granularity: Literal["element", "row"] = setting("element", "What one mask entry covers.", source=DAM)
    coefficients: Literal["task", "layer"] = setting(
        "layer", "One merging coefficient per model, or per model and tensor.", source=ADAMERGING
    )
    steps: int = setting(300, "Mask steps (paper: M1 and M2 take turns).", unit="steps", source=DAM, ge=0)
    coefficient_steps: int = setting(
        300, "Paper: steps on the coefficients once the masks are fixed.", unit="steps", source=DAM, ge=0
    )
    max_coefficient: float = setting(2.0, "Inversion: coefficients stay in [0, this].", gt=0.0)
    scan_steps: int = setting(100, "Inversion: steps of the search for triggers.", unit="steps", source=CLEANSE, ge=2)
    scan_batch_size: int = setting(8, "Inversion: samples per class and step of that search.", unit="samples", ge=1)
    scan_finalists: int = setting(
        4,
        "Inversion: classes per model that are searched to the end; the others end at two fifths.",
        unit="classes",
        ge=2,
    )
    scan_others: bool = setting(
        True,
        "Inversion: search each task once more, with all other models in place of its own, for triggers of "
        "backdoors that aim at the task of another model.",
    )
    suspicion: float = setting(
        0.4,
        "Inversion: a class is suspect if its trigger works on so many more samples of f_t than of theta_0, with "
        "half of what it lacks of the usual size added.",
        unit="share",
        ge=0.0,
        le=1.0,
    )
    student_steps: int = setting(
        80,
        "Text encoders, inversion: steps in which theta_0 is taught each model's own answers; these students are "
        "merged instead of the models. 0: merge the models, undefended.",
        unit="steps",
        source=HINTON,
        ge=0,
    )
    student_batch_size: int = setting(32, "Text encoders: samples per step of a student.", unit="samples", ge=1)
    student_learning_rate: float = setting(1e-4, "Text encoders: AdamW step of a student at its highest.", gt=0.0)
    student_words: int = setting(
        5, "Text encoders: random words put into each sample that a student learns from, at most.", unit="tokens", ge=0
    )
    clean: Literal["auto"] | bool = setting(
        "auto",
        "Vaccinate models before they are merged: plant backdoors of our own and unlearn them, as "
        "`mergekit-dam clean` does. auto: where the benchmark says that it helps.",
    )
    window: Literal["auto", "all"] | Annotated[int, Field(ge=1)] = setting(
        "auto",
        "Inversion: positions of the model (its embeddings, each block, its head) whose masks are learned at a "
        "time. all: the whole model at once, with new triggers from the merge as it learns; a number: less memory, "
        "whatever the depth, and each model is read once. auto: all.",
        unit="positions",
    )
    refresh_every: int = setting(20, "Inversion: mask steps between new triggers from the merge.", unit="steps", ge=1)
    refresh_steps: int = setting(30, "Inversion: steps of the search for each of these.", unit="steps", ge=1)
    batch_size: int = setting(8, "Samples per task and step (paper: 16).", unit="samples", source=DAM, ge=1)
    num_samples: int = setting(512, "Calibration samples taken per task.", unit="samples", ge=2)
    max_length: int = setting(128, "Text is cut after this length.", unit="tokens", ge=4)
    answer_tokens: int = setting(
        16,
        "Causal LMs: tokens that each model goes on with after its calibration texts, at most; the merge is fitted "
        "to these as well.",
        unit="tokens",
        ge=0,
    )
    temperature: float = setting(0.5, "Temperature of the Concrete masks.", source=CONCRETE, gt=0.0, le=10.0)
    initial_logit: float = setting(
        0.0, "Mask logits at the start (inversion: added to 3 for M1, 0 for M2).", source=DAM, ge=-10.0, le=10.0
    )
    rescale: bool = setting(False, "Divide each tensor's mask by its mean (paper: true).", source=DAM)
    mask_learning_rate: float = setting(
        0.2, "Adam step of the mask logits (paper: 0.01; its own 1e-3 goes with 1000 steps).", source=DAM, gt=0.0
    )
    coefficient_learning_rate: float = setting(
        0.02, "Adam step of the coefficients (paper: 1e-3).", source=ADAMERGING, gt=0.0
    )
    alpha: float = setting(1.5, "Weight of the safety loss against the task loss (paper: 0.1).", source=DAM, ge=0.0)
    eps: float = setting(
        0.25,
        "Bound of the universal perturbation, as a share of the valid range.",
        unit="range",
        source=UNIVERSAL,
        gt=0.0,
        le=1.0,
    )
    perturbation_learning_rate: float = setting(
        0.02,
        "Adam step of the perturbation, as a share of the valid range.",
        unit="range",
        source=UNIVERSAL,
        gt=0.0,
        le=1.0,
    )
    perturbation_tokens: int = setting(
        3, "Text: soft tokens that the perturbation inserts.", unit="tokens", ge=1, le=64
    )
    zero_shot_model: str | None = setting(None, "A full CLIP whose text tower makes the heads of CLIP vision models.")
    num_processes: int | None = setting(
        None,
        "Processes to learn with; default: one per accelerator of this machine, one on the CPU.",
        unit="processes",
        ge=1,
    )
    worker_timeout: float = setting(
        1800.0, "Several processes: longest wait of one for another before all are ended.", unit="seconds", gt=0.0
    )
    gather: Literal["model", "block"] = setting(
        "model",
        "Several processes: what of the merged weights and of their gradients is whole at a time. `block` sends them "
        "once more per pass; objective inversion.",
    )
    resume: bool = setting(True, "Go on from the snapshot of a run that was cut short.")
    snapshot_every: float = setting(60.0, "Time between two snapshots; 0: after every step.", unit="seconds", ge=0.0)
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "What the merged model computes in while masks are learned. Masks, merging and losses stay in float32; "
        "bfloat16 suits accelerators and halves merged weights and activations.",
    )
    gradient_checkpointing: bool = setting(
        False,
        "Keep only the input of each block and run it again in the backward pass: less memory for long texts or "
        "large batches, a third more computing.",
    )
    device: str = setting("auto", "`auto` (accelerate picks), `cpu`, or `cuda`.")
    seed: int = setting(0, "Seed of masks, batches and sampled text.", ge=0)
    masks: str | None = setting(None, "A ready dam_masks.safetensors: apply it and learn nothing.")

    @model_validator(mode="after")
    def _defaults_of_the_objective(self) -> Self:
        """The paper's own values where none are given; they do not count as given."""
        if self.objective == "paper":
            self.__dict__.update({k: v for k, v in PAPER.items() if k not in self.model_fields_set})
        return self


# Defaults of `objective: paper` where they differ.
PAPER: Mapping[str, Any] = {
    "batch_size": 16,
    "rescale": True,
    "mask_learning_rate": 0.01,
    "coefficient_learning_rate": 1e-3,
    "alpha": 0.1,
}
# Settings of earlier versions, and what to do instead.
REMOVED: Mapping[str, str] = {
    "offload": "It is gone: set window to 2 or 1, which needs less memory and reads each model once, or leave it out, "
    "and the largest window that fits is taken.",
    "rehash": "It is gone: remove it; `mergekit-dam merge --no-resume` reads all content again.",
    "tracker": "It is gone: remove it; out/dam/metrics.jsonl has the records, one JSON object per line.",
    "patience": "It is gone: remove it, and set steps lower where fewer are enough.",
}
# All names that a recipe may use, shared ones first.
KNOWN = (*DamConfig.model_fields, *ModelSettings.model_fields)
# What the learned masks do not depend on: left out of the cache key and of the check of ready masks.
NOT_LEARNED = frozenset(
    {
        "masks",
        "device",
        "num_processes",
        "worker_timeout",
        "gather",
        "resume",
        "snapshot_every",
        "gradient_checkpointing",
    }
)


def parse(settings: type[Settings], values: Mapping[str, Any], *, where: str) -> Settings:
    """Validate values strictly; None means "not given".

    Raises:
        DamError: an unknown key (with "did you mean") or a value of the wrong type or range.
    """
    given = {key: value for key, value in values.items() if value is not None}
    for key in sorted(set(given) - set(settings.model_fields)):
        raise DamError(
            f"setting {key!r} in {where}",
            expected=f"a setting of {where}",
            got="an unknown one",
            cure=did_you_mean(key, settings.model_fields) or "See the settings reference in the README.",
        )
    try:
        return settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise DamError(
            f"setting {key!r} in {where}",
            expected=_expected(first),
            got=repr(first["input"]),
            cure=str(settings.model_fields[key].description),
        ) from error


def _expected(error: Any) -> str:
    """The tail of pydantic's message, which names the type or the range."""
    message = str(error["msg"])
    return message.removeprefix("Input should be ").split(", unable")[0]


def unknown_setting(keys: Iterable[Any], where: str, known: Iterable[str], method: str) -> None:
    """Refuse the first of these names, which are no settings of this merge method.

    Raises:
        DamError: with the nearest known name; a setting of another method has none.
    """
    for key in sorted(str(key) for key in keys):
        raise DamError(
            f"setting {key!r} in {where}",
            expected=f"a setting of {method}",
            got="an unknown one",
            cure=unknown_cure(key, known),
        )


def unknown_cure(key: str, known: Iterable[str] = KNOWN) -> str:
    """What to do about a name that is no setting of the method in use."""
    from mergekit.merge_methods.registry import registered_methods

    if key in REMOVED:
        return REMOVED[key]
    known = list(known)
    others = [m.spec.name for m in registered_methods() if any(p.name == key for p in m.spec.parameters)]
    if others:
        return f"It is a setting of another method ({', '.join(others[:2])}): remove it."
    few = f"Known: {', '.join(known)}." if 0 < len(known) < 12 else "See the settings reference in the README."
    return did_you_mean(key, known) or few


def unknown_keys(keys: Iterable[str]) -> list[str]:
    """Keys that are neither a shared nor a per-model setting, sorted."""
    return sorted(set(keys) - set(KNOWN))
