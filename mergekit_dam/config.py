"""Define the settings of the merge method `dam`: flat scalars, each with unit, default and source.

Of values under `parameters:` mergekit passes only scalars unchanged (lists become layer gradients, nested mappings are
refused), so no setting is nested. `DamConfig` holds settings that all models share, `ModelSettings` settings per model;
a value under the shared `parameters:` is the fallback of a setting per model. Numbers that nobody needs to set to merge
are constants (constants.py); the setting `constants` names a file that overrides them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from mergekit_dam.constants import CLEANSE, DAM, HINTON, PAPER_CONSTANTS, Constants, constants_of
from mergekit_dam.errors import DamError, did_you_mean, first_line
from mergekit_dam.registry import OBJECTIVES

Settings = TypeVar("Settings", bound=BaseModel)
_REFERENCE = "See the settings reference, docs/settings.md."
_LARGEST = 1 << 16  # bytes of a file of constants


class StrictSettings(BaseModel):
    """Frozen settings that refuse unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def setting(default: Any, description: str, *, unit: str = "-", source: str = "-", **limits: Any) -> Any:
    """Define a field with unit and source, from which the settings reference is generated."""
    extra: dict[str, Any] = {"unit": unit, "source": source}
    return Field(default=default, description=description, json_schema_extra=extra, **limits)


def expand_home(value: Any) -> Any:
    """Expand a leading ~ of a text, which no shell expands in a recipe; return any other value unchanged."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


class ModelSettings(StrictSettings):
    """Settings of one fine-tuned model."""

    _expanded = field_validator("calibration", "classes", "head", mode="before")(expand_home)

    calibration: str | None = setting(
        None,
        "Unlabelled data: a parquet, jsonl, json, csv or txt file, a folder of shards or images, what `save_to_disk` "
        "wrote, or a Hub dataset id (`id@revision`); texts, chats or images (see the page on data). A causal LM "
        "without it samples its own text.",
    )
    split: str = setting("train", "Split to read where the data has several.")
    column: str | None = setting(
        None,
        "Column with the image, text or chat; default: the only column, else the first known name "
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

    _expanded = field_validator("masks", "zero_shot_model", mode="before")(expand_home)

    objective: str = setting(
        "inversion",
        "What masks are fitted to: recovered triggers and the models' own answers (`inversion`), the paper's losses "
        "(`paper`), or an objective of a plugin.",
    )
    mask: Literal["dual", "m1", "m2"] = setting(
        "dual", "Masks in use: Task-Shared (m1), Backdoor-Detection (m2), or both.", source=DAM
    )
    detection: Literal["auto", "model", "shared"] = setting(
        "auto",
        "Inversion: model: a Backdoor-Detection mask per model, so that one model can be cut alone; shared: one mask "
        "for all, which takes less memory and time (always with `rescale`); auto: per model where masks are "
        "fitted against a suspect, and in windows.",
    )
    granularity: Literal["element", "row"] = setting("element", "What one mask entry covers.", source=DAM)
    steps: int = setting(300, "Mask steps (paper: M1 and M2 take turns).", unit="steps", source=DAM, ge=0)
    scan_steps: int = setting(100, "Inversion: steps of the search for triggers.", unit="steps", source=CLEANSE, ge=2)
    suspicion: float = setting(
        0.4,
        "Inversion: a class is suspect from this value on. Suspicion is the trigger's success on f_t minus that on "
        "theta_0, plus half of the share by which the trigger is below the median size.",
        unit="share",
        ge=0.0,
        le=1.0,
    )
    student_steps: int = setting(
        80,
        "Inversion: steps to train a student, from theta_0 on a model's answers, which is merged in the model's place: "
        "of each text encoder, and of causal LMs that the scan makes suspect, or of all with `clean: true`. 0: merge "
        "the models themselves.",
        unit="steps",
        source=HINTON,
        ge=0,
    )
    clean: bool = setting(
        False,
        "Vaccinate models before they are merged: plant backdoors and unlearn them, as `mergekit-dam clean` does. "
        "Causal LMs are replaced by students instead (`student_steps`), and not scanned.",
    )
    window: Literal["auto", "all"] | Annotated[int, Field(ge=1)] = setting(
        "auto",
        "Inversion: positions of the model (its embeddings, each block, its head) whose masks are learned at a "
        "time. all: the whole model at once, with new triggers from the merge as it learns; a number: less memory, "
        "whatever the depth, and each model is read once. auto: the largest of all, 4, 2 and 1 that fits the free "
        "memory.",
        unit="positions",
    )
    refresh_every: int = setting(20, "Inversion: mask steps between new triggers from the merge.", unit="steps", ge=1)
    batch_size: int = setting(8, "Samples per task and step (paper: 16).", unit="samples", source=DAM, ge=1)
    num_samples: int = setting(512, "Calibration samples taken per task.", unit="samples", ge=2)
    max_length: int = setting(128, "Text is cut after this length.", unit="tokens", ge=4)
    mask_learning_rate: float = setting(
        0.2, "Adam step of the mask logits (paper: 0.01; its own 1e-3 goes with 1000 steps).", source=DAM, gt=0.0
    )
    alpha: float = setting(1.5, "Weight of the safety loss against the task loss (paper: 0.1).", source=DAM, ge=0.0)
    zero_shot_model: str | None = setting(None, "A full CLIP whose text tower makes the heads of CLIP vision models.")
    num_processes: int | None = setting(
        None,
        "Processes to learn with; default: one per accelerator of this machine, one on the CPU.",
        unit="processes",
        ge=1,
    )
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Type that the merged model computes in while masks are learned. Masks, merging and losses stay in float32; "
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
    constants: Constants = setting(
        Constants(), "A JSON file with an object of constants and their values (see the table of constants)."
    )

    @field_validator("constants", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """Read the file's values, so that cache keys depend on them and not on the path."""
        if isinstance(value, str):
            return read_constants(value)
        return parse_constants(value, "constants") if isinstance(value, Mapping) else value

    @field_validator("objective")
    @classmethod
    def _known(cls, value: str) -> str:
        """Refuse an objective that is not registered."""
        if value not in OBJECTIVES:
            raise ValueError(f"one of {', '.join(OBJECTIVES.names())}")
        return value

    @model_validator(mode="after")
    def _defaults_of_the_objective(self) -> Self:
        """Use the paper's values for settings that were not given; they do not count as given."""
        if self.objective == "paper":
            self.__dict__.update({k: v for k, v in PAPER.items() if k not in self.model_fields_set})
            self.__dict__["constants"] = self.constants.with_defaults(PAPER_CONSTANTS)
        return self

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings and constants that the user gave."""
        return frozenset(self.model_fields_set - {"constants"} | self.constants.model_fields_set)

    def named(self, *, without: Collection[str] = ()) -> dict[str, Any]:
        """Return settings and constants in one mapping, as in the files of a merge."""
        values = {**self.model_dump(exclude={"constants"}), **self.constants.model_dump()}
        return {name: value for name, value in values.items() if name not in without}


# Defaults of settings under `objective: paper` where they differ; constants.PAPER_CONSTANTS has those of constants.
PAPER: Mapping[str, Any] = {"batch_size": 16, "mask_learning_rate": 0.01, "alpha": 0.1}
_A_CONSTANT = "It is a constant now: put it in a JSON file and name that with `constants`."
# Names that are no settings any more, and the cure.
REMOVED: Mapping[str, str] = {
    "offload": "It is gone: set window to 2 or 1, which needs less memory and reads each model once, or leave it out, "
    "and the largest window that fits is taken.",
    "gather": "It is gone: set window to 2 or 1, which needs less memory in any number of processes.",
    "rehash": "It is gone: remove it; `mergekit-dam merge --no-resume` reads all content again.",
    "tracker": "It is gone: remove it; out/dam/metrics.jsonl has the records, one JSON object per line.",
    "patience": "It is gone: remove it, and set steps lower where fewer are enough.",
    **dict.fromkeys(Constants.model_fields, _A_CONSTANT),
}
# All names that a recipe may use, shared ones first.
KNOWN = (*DamConfig.model_fields, *ModelSettings.model_fields)
# Settings that do not affect the learned masks: left out of the cache key and of the check of given masks.
NOT_LEARNED = frozenset(
    {
        "masks",
        "device",
        "num_processes",
        "gradient_checkpointing",
        *constants_of("run"),
    }
)


def parse(settings: type[Settings], values: Mapping[str, Any], *, where: str) -> Settings:
    """Validate values and refuse unknown names; None means "not given".

    Raises:
        DamError: an unknown key (with "did you mean") or a value of the wrong type or range.
    """
    given = {key: value for key, value in values.items() if value is not None}
    for key in sorted(set(given) - set(settings.model_fields)):
        raise DamError(
            f"setting {key!r} in {where}",
            expected=f"a setting of {where}",
            got="an unknown one",
            cure=REMOVED.get(key) or did_you_mean(key, settings.model_fields) or _REFERENCE,
        )
    try:
        return settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, DamError):  # a validator of this package raised it, with more detail
            raise cause from error
        key = str(first["loc"][0])
        raise DamError(
            f"{'constant' if settings is Constants else 'setting'} {key!r} in {where}",
            expected=_expected(first),
            got=repr(first["input"]),
            cure=str(settings.model_fields[key].description),
        ) from error


def read_constants(path: str) -> Constants:
    """Read constants from a JSON file.

    Raises:
        DamError: no such file, no JSON object, a name that is no constant, or a value of the wrong type or range.
    """
    file = Path(path).expanduser()
    where = f"constants {path}"
    try:
        if not file.is_file():  # reading a device or a pipe might never end
            raise FileNotFoundError("no such file")
        with file.open("rb") as opened:
            text = opened.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        values = json.loads(text.decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise DamError(
            where,
            expected='a JSON file with an object in it, such as {"eps": 0.1}',
            got=first_line(error),
            cure="Correct the path or the file, or leave `constants` out.",
        ) from error
    return parse_constants(values, where)


def parse_constants(values: Mapping[str, Any], where: str) -> Constants:
    """Validate constants.

    Raises:
        DamError: as for `parse`; or a setting among them, which belongs into the recipe.
    """
    for key in sorted(str(key) for key in values):
        if key in KNOWN or key not in Constants.model_fields:
            raise DamError(
                f"{key!r} in {where}",
                expected="a constant",
                got="a setting" if key in KNOWN else "an unknown name",
                cure=f"Write it under `parameters:` of the recipe: {key} is a setting."
                if key in KNOWN
                else did_you_mean(key, Constants.model_fields) or "docs/settings.md has a table of constants.",
            )
    return parse(Constants, values, where=where)


def _expected(error: Any) -> str:
    """Return the end of pydantic's message, which names the type or the range."""
    message = str(error["msg"])
    return message.removeprefix("Value error, ").removeprefix("Input should be ").split(", unable")[0]


def unknown_setting(keys: Iterable[Any], where: str, known: Iterable[str], method: str) -> None:
    """Refuse the first of these names, none of which is a setting of the merge method.

    Raises:
        DamError: with the nearest known name, or with the method that has this setting.
    """
    for key in sorted(str(key) for key in keys):
        raise DamError(
            f"setting {key!r} in {where}",
            expected=f"a setting of {method}",
            got="an unknown one",
            cure=unknown_cure(key, known),
        )


def unknown_cure(key: str, known: Iterable[str] = KNOWN) -> str:
    """Return the cure for a name that is no setting of the merge method."""
    from mergekit.merge_methods.registry import registered_methods

    known = tuple(known)
    if known == KNOWN and key in REMOVED:  # e.g. `rescale` is a setting of other methods
        return REMOVED[key]
    methods = [m.spec.name for m in registered_methods() if any(p.name == key for p in m.spec.parameters)]
    if methods:
        return f"It is a setting of another method ({', '.join(methods[:2])}): remove it."
    listed = f"Known: {', '.join(known)}." if 0 < len(known) < 12 else _REFERENCE
    return did_you_mean(key, known) or listed


def unknown_keys(keys: Iterable[str]) -> list[str]:
    """Return the keys that are neither a shared nor a per-model setting, sorted."""
    return sorted(set(keys) - set(KNOWN))
