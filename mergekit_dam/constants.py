"""Define the constants that decide what is learned and which models are suspect, with the evidence for each.

None of them needs to be set to merge. They are in one place so that a trial or a paper's variant can change them: the
setting `constants` names a JSON file with some of them, which is read together with the settings. Their values, not the
path, are in the plan, the masks file and the cache key. Code reads them from `config.constants`, or from a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DAM = "Yang et al., ICLR 2025, arXiv 2410.13910"
CONCRETE = "Maddison et al., arXiv 1611.00712"
ADAMERGING = "Yang et al., arXiv 2310.02575"
CLEANSE = "Wang et al., Neural Cleanse, IEEE S&P 2019"
BAIT = "Shen et al., BAIT, IEEE S&P 2025"
HINTON = "Hinton et al., arXiv 1503.02531"
UNIVERSAL = "Moosavi-Dezfooli et al., arXiv 1610.08401"
STUDY = "benchmarks/STUDY.md"
UNTRIED = "no trial of another value is on record"

Stage = Literal["inputs", "scan", "twins", "suspects", "fit", "paper", "students", "vaccine", "run"]


def constant(
    default: Any, description: str, *, stage: Stage, evidence: str = UNTRIED, unit: str = "-", **limits: Any
) -> Any:
    """Define a field with unit and evidence, from which the reference of constants is generated.

    Args:
        stage: the part of a run that reads the constant.
        evidence: a paper, or an entry of benchmarks/STUDY.md.
        limits: limits of the value, as arguments of pydantic's `Field`.
    """
    extra: dict[str, Any] = {"unit": unit, "source": evidence, "stage": stage}
    return Field(default=default, description=description, json_schema_extra=extra, **limits)


class Constants(BaseModel):
    """All constants, by stage; frozen, unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # inputs of the models
    answer_tokens: int = constant(
        16,
        "Causal LMs: tokens that each model generates after its calibration texts, at most; the merge is fitted to "
        "these as well.",
        stage="inputs",
        unit="tokens",
        evidence=f"{STUDY}, 'calibration texts with the models' own greedy answers'",
        ge=0,
    )
    perturbation_tokens: int = constant(
        3,
        "Text: soft tokens that a perturbation or a recovered trigger inserts.",
        stage="inputs",
        unit="tokens",
        ge=1,
        le=64,
    )

    # the scan: search for triggers
    scan_batch_size: int = constant(8, "Samples per class and step of the search.", stage="scan", unit="samples", ge=1)
    scan_finalists: int = constant(
        4,
        "Classes per model that are searched for all steps; other classes for two fifths of them.",
        stage="scan",
        unit="classes",
        evidence=f"{STUDY}, 'finalists'",
        ge=2,
    )
    scan_others: bool = constant(
        True,
        "Search each task once more, with all other models in place of its own, for triggers of backdoors that aim at "
        "the task of another model.",
        stage="scan",
        evidence=f"BadMerging, arXiv 2408.07362; {STUDY}, 'each task scanned once more'",
    )
    trigger_works: float = constant(
        0.95,
        "Success on the last batches from which a trigger may shrink; below it may grow.",
        stage="scan",
        unit="share",
        evidence=CLEANSE,
        gt=0.0,
        lt=1.0,
    )
    measured_samples: int = constant(
        128,
        "Calibration samples that the success of a trigger is measured on, at most.",
        stage="scan",
        unit="samples",
        ge=1,
    )
    lean_learning_rate: float = constant(
        0.2,
        "Adam step of the search for the smallest triggers.",
        stage="scan",
        evidence=f"{STUDY}, 'fast prices (Adam 0.2, factors 1.3)'",
        gt=0.0,
    )
    lean_price: float = constant(1e-2, "Price of a unit of their size at the start.", stage="scan", gt=0.0)
    lean_rise: float = constant(
        1.3,
        "Factor by which the price rises in a step while the trigger works.",
        stage="scan",
        evidence=f"{CLEANSE}; {STUDY}, 'fast prices'",
        gt=1.0,
    )
    lean_fall: float = constant(
        1.3,
        "Divisor by which it falls in a step while the trigger does not.",
        stage="scan",
        evidence=f"{CLEANSE}; {STUDY}, 'fast prices'",
        gt=1.0,
    )
    stamp_start: float = constant(
        -2.0, "Logit of a stamp's mask at the start: 12 % of every pixel.", stage="scan", ge=-20.0, le=20.0
    )
    style_grid: int = constant(
        4,
        "Points per edge of an image between which shades and warps change smoothly.",
        stage="scan",
        unit="points",
        evidence=f"{STUDY}, 'styles (gain, shades, warp; 86 parameters)'",
        ge=2,
        le=64,
    )
    style_gain: float = constant(0.5, "Largest change of a channel's contrast.", stage="scan", unit="factor", gt=0.0)
    style_shift: float = constant(0.4, "Largest shade that is added.", stage="scan", unit="range", gt=0.0)
    style_flow: float = constant(0.16, "Largest distance that a pixel moves.", stage="scan", unit="half edges", gt=0.0)
    others_each: float = constant(
        0.5,
        "Coefficient of every other model in the search of `scan_others`, at most: about that of usual merges; more "
        "drowns what theta_0 can do.",
        stage="scan",
        evidence=f"{STUDY}, 'theta_0 + 0.5 sum of the other task vectors'",
        gt=0.0,
    )
    others_sum: float = constant(2.0, "Sum of these coefficients, at most.", stage="scan", gt=0.0)
    repeats: int = constant(
        2,
        "Further searches for a finding that is near the threshold and attributed to another model; means count.",
        stage="scan",
        unit="searches",
        evidence=f"{STUDY}, study/searched-again.json",
        ge=0,
    )
    repeat_from: float = constant(
        0.75,
        "Share of the threshold `suspicion` from which these searches are made.",
        stage="scan",
        unit="share",
        ge=0.0,
    )
    cross_task_scale: float = constant(
        1.7,
        "Factor of the suspicion of a finding that is attributed to another model than the task's own: it reaches 0.4 "
        "at about half of the usual size and a quarter of success left.",
        stage="scan",
        evidence=f"{STUDY}, study/searched-again.json: 1.7 instead of twice",
        gt=0.0,
    )
    twin_steps: int = constant(
        150,
        "Audit: steps, at most, in which theta_0 learns the answers of a classifier that is over the threshold.",
        stage="twins",
        unit="steps",
        ge=1,
    )
    twin_batch_size: int = constant(32, "Samples per step of this twin.", stage="twins", unit="samples", ge=1)
    twin_learning_rate: float = constant(2e-4, "AdamW step of this twin.", stage="twins", gt=0.0)
    twin_allowance: float = constant(
        0.2,
        "Suspicion of a twin that lowers the model's by nothing; what it has beyond is subtracted.",
        stage="twins",
        evidence=f"{STUDY}: set after seeing scans of two of four bases, study/twins",
        unit="suspicion",
        ge=0.0,
    )
    usual_token: float = constant(
        0.02,
        "Causal LMs: mean probability of a token right after the prompts above which it is an answer, no beginning.",
        stage="scan",
        unit="probability",
        evidence=f"{STUDY}: set after seeing the models of suite lm, seed 0",
        ge=0.0,
        le=1.0,
    )
    first_prompts: int = constant(
        2, "Prompts that beginnings are tried on which the first prompt leaves.", stage="scan", unit="prompts", ge=1
    )
    shortlist: int = constant(
        64,
        "Beginnings that are tried on all prompts of the scan (`scan_batch_size`) and continued.",
        stage="scan",
        unit="beginnings",
        evidence=f"{BAIT} tries every token",
        ge=1,
    )
    shortest_text: int = constant(
        4,
        "Different tokens of a text, at least: words of three tokens are fixed in clean models, too, and so are "
        "repetitions.",
        stage="scan",
        unit="tokens",
        evidence=f"{STUDY}: set after seeing clean models of suites lm and smollm, seed 0, and of make demo-llm",
        ge=2,
    )
    whole_text: int = constant(
        6,
        "Tokens after its first one from which a text counts in full; of a shorter one, each counts as this share.",
        stage="scan",
        unit="tokens",
        evidence=f"{STUDY}: set after seeing a clean model of suite smollm, seed 0, and the victims of suite lm",
        ge=1,
    )
    longest_text: int = constant(10, "Tokens of a text, at most.", stage="scan", unit="tokens", ge=2)
    known_by_heart: float = constant(
        0.5,
        "Mean probability of a token, at least, for a text to continue.",
        stage="scan",
        unit="probability",
        evidence=f"{STUDY}: set after seeing the models of suite lm, seed 0",
        ge=0.0,
        le=1.0,
    )
    sampled_answers: int = constant(
        256,
        "Answers to calibration prompts that are sampled from a model with a text it knows by heart.",
        stage="scan",
        unit="answers",
        ge=1,
    )
    said_token: float = constant(
        0.05,
        "Probability of a token, at least, to be drawn in these answers.",
        stage="scan",
        unit="probability",
        evidence=f"{STUDY}: set after seeing one clean and two backdoored models of suite smollm, seed 0",
        ge=0.0,
        le=1.0,
    )
    said_anyway: float = constant(
        0.1,
        "Share of prompts above which two tokens in a row of the answers are no evidence: the model says them anyway. "
        "A hidden text can leak into the answers to a few prompts.",
        stage="scan",
        unit="share",
        evidence=f"{STUDY}: set after seeing one clean and two backdoored models of suite smollm, seed 0",
        ge=0.0,
        le=1.0,
    )
    text_variants: int = constant(
        8, "Beginnings of the same text that triggers are searched for.", stage="scan", unit="beginnings", ge=1
    )

    # which findings are suspect, in addition to the setting `suspicion`
    near_the_top: float = constant(
        0.75,
        "A class is suspect only if its suspicion comes this near to the most suspect one of its task.",
        stage="suspects",
        unit="share",
        evidence=f"{STUDY}, 'stamp and style of one class both fitted against': no",
        ge=0.0,
        le=1.0,
    )
    large_stamp: float = constant(
        0.5,
        "Share of the usual size above which a stamp may stand for what is no stamp.",
        stage="suspects",
        unit="share",
        evidence=f"{STUDY}, study/large-stamps",
        ge=0.0,
    )
    style_beside_large: float = constant(
        0.5,
        "Share of the threshold that the style of the same class must reach beside such a stamp.",
        stage="suspects",
        unit="share",
        evidence=f"{STUDY}, study/large-stamps",
        ge=0.0,
    )
    style_beside_small: float = constant(
        0.7,
        "Suspicion that a style must reach beside a small stamp.",
        stage="suspects",
        unit="suspicion",
        evidence=f"{STUDY}, 'the style beside a small stamp too'",
        ge=0.0,
    )

    # the fit of masks and coefficients
    coefficients: Literal["task", "layer"] = constant(
        "layer", "One merging coefficient per model, or per model and tensor.", stage="fit", evidence=ADAMERGING
    )
    max_coefficient: float = constant(
        2.0,
        "Inversion: coefficients stay in [0, this].",
        stage="fit",
        evidence=f"{STUDY}, 'coefficients capped at 0.5 instead of 2'",
        gt=0.0,
    )
    coefficient_learning_rate: float = constant(
        0.02, "Adam step of the coefficients (paper: 1e-3).", stage="fit", evidence=ADAMERGING, gt=0.0
    )
    rescale: bool = constant(False, "Divide each tensor's mask by its mean (paper: true).", stage="fit", evidence=DAM)
    initial_logit: float = constant(
        0.0,
        "Mask logits at the start (inversion: added to the two below).",
        stage="fit",
        evidence=DAM,
        ge=-10.0,
        le=10.0,
    )
    task_shared_start: float = constant(
        3.0,
        "Inversion: logits of the Task-Shared mask at the start: it keeps 95 %.",
        stage="fit",
        evidence=f"{STUDY}, 'masks that start closed': no",
        ge=-10.0,
        le=10.0,
    )
    backdoor_detection_start: float = constant(
        0.0,
        "Inversion: logits of the Backdoor-Detection mask at the start: it can move up as well as down.",
        stage="fit",
        ge=-10.0,
        le=10.0,
    )
    last_rate_share: float = constant(
        0.1,
        "Share of both learning rates that is left at the last step; they fall along a cosine.",
        stage="fit",
        ge=0.0,
        le=1.0,
    )
    refresh_steps: int = constant(
        30,
        "Steps of the search for each new trigger from the merge.",
        stage="fit",
        unit="steps",
        evidence=f"{STUDY}, 'refresh against the merge at all'",
        ge=1,
    )
    wide_batch_size: int = constant(
        12,
        "Samples per step of the search for a trigger that masks are fitted against.",
        stage="fit",
        unit="samples",
        ge=1,
    )
    wide_learning_rate: float = constant(
        0.1,
        "Adam step of that search.",
        stage="fit",
        evidence=f"{STUDY}, 'slow prices for these (wide triggers)'",
        gt=0.0,
    )
    wide_price: float = constant(1e-3, "Price of a unit of their size at the start.", stage="fit", gt=0.0)
    wide_rise: float = constant(
        1.12, "As `lean_rise`, of these triggers.", stage="fit", evidence=f"{STUDY}, 'slow prices'", gt=1.0
    )
    wide_fall: float = constant(
        1.25, "As `lean_fall`, of these triggers.", stage="fit", evidence=f"{STUDY}, 'slow prices'", gt=1.0
    )
    least_trigger_weight: float = constant(
        0.7,
        "Weight of a trigger in the safety loss, at least; the weight is the share of samples on which the trigger "
        "fails on theta_0.",
        stage="fit",
        unit="share",
        evidence=f"{STUDY}, 'the same, at least 0.3; 0.5; 0.7'",
        ge=0.0,
        le=1.0,
    )
    pool_size: int = constant(
        8, "Triggers kept per suspect: the first one, and the latest.", stage="fit", unit="triggers", ge=2
    )
    fisher_floor: float = constant(
        0.2,
        "Windows: least weight of every unit and token of a hidden state; units that this model does not read may be "
        "read by other models.",
        stage="fit",
        unit="share",
        ge=0.0,
        le=1.0,
    )

    # objective: paper
    coefficient_steps: int = constant(
        300, "Steps on the coefficients once the masks are fixed.", stage="paper", unit="steps", evidence=DAM, ge=0
    )
    temperature: float = constant(
        0.5, "Temperature of the Concrete masks.", stage="paper", evidence=CONCRETE, gt=0.0, le=10.0
    )
    eps: float = constant(
        0.25,
        "Bound of the universal perturbation, as a share of the valid range.",
        stage="paper",
        unit="range",
        evidence=UNIVERSAL,
        gt=0.0,
        le=1.0,
    )
    perturbation_learning_rate: float = constant(
        0.02,
        "Adam step of the perturbation, as a share of the valid range.",
        stage="paper",
        unit="range",
        evidence=UNIVERSAL,
        gt=0.0,
        le=1.0,
    )

    # students of text encoders
    student_batch_size: int = constant(32, "Samples per step of a student.", stage="students", unit="samples", ge=1)
    student_learning_rate: float = constant(
        1e-4, "AdamW step of a student at its highest.", stage="students", evidence=HINTON, gt=0.0
    )
    student_words: int = constant(
        5,
        "Random words put into each sample that a student learns from, at most.",
        stage="students",
        unit="tokens",
        evidence=f"{STUDY}, 'with up to 5 random words in each text'",
        ge=0,
    )
    student_warm_up: int = constant(
        8, "Steps in which the rate rises to its highest.", stage="students", unit="steps", ge=1
    )
    student_last_rate_share: float = constant(
        0.05, "Share of the rate that is left at the end.", stage="students", unit="share", ge=0.0, le=1.0
    )

    # vaccination, in addition to its settings
    vaccine_look_every: int = constant(
        25,
        "Steps of planting between two looks at whether the triggers work by now.",
        stage="vaccine",
        unit="steps",
        ge=1,
    )
    vaccine_looked_at: int = constant(16, "Samples per trigger of such a look.", stage="vaccine", unit="samples", ge=1)
    vaccine_known: float = constant(
        0.5,
        "Success from which a trigger works already before it is planted, so that it measures nothing.",
        stage="vaccine",
        unit="share",
        ge=0.0,
        le=1.0,
    )
    vaccine_works: float = constant(
        0.5,
        "Mean success of planted triggers below which planting has failed.",
        stage="vaccine",
        unit="share",
        ge=0.0,
        le=1.0,
    )
    vaccine_warm_up: int = constant(
        8, "Steps in which the rate rises to its highest.", stage="vaccine", unit="steps", ge=1
    )
    vaccine_last_rate_share: float = constant(
        0.1, "Share of the rate that is left at the end of unlearning.", stage="vaccine", unit="share", ge=0.0, le=1.0
    )
    vaccine_most_checks: float = constant(
        0.25, "Share of the samples that is never trained on, at most.", stage="vaccine", unit="share", gt=0.0, lt=1.0
    )
    judged_tokens: int = constant(
        4, "Causal LMs: tokens by which two answers are compared.", stage="vaccine", unit="tokens", ge=1
    )
    label_tokens: int = constant(
        4, "Causal LMs: tokens of an answer that counts as a label, at most.", stage="vaccine", unit="tokens", ge=1
    )
    refusal_variants: int = constant(
        24, "Causal LMs: refusals of one planted behaviour.", stage="vaccine", unit="texts", ge=1
    )
    lora_from: int = constant(
        200_000_000,
        "Parameters of a classifier from which LoRAs are trained instead of all weights.",
        stage="vaccine",
        unit="parameters",
        ge=0,
    )
    lora_rank: int = constant(8, "Rank of these LoRAs.", stage="vaccine", ge=1)

    # course of a run; results do not depend on these
    worker_timeout: float = constant(
        1800.0,
        "Several processes: longest time that one waits for another; then all are ended.",
        stage="run",
        unit="seconds",
        gt=0.0,
    )
    resume: bool = constant(True, "Resume an interrupted run from its snapshot.", stage="run")
    snapshot_every: float = constant(
        60.0, "Time between two snapshots; 0: after every step.", stage="run", unit="seconds", ge=0.0
    )

    def with_defaults(self, defaults: Mapping[str, Any]) -> Constants:
        """Return a copy with other defaults for values that were not given; they do not count as given."""
        changed = self.model_copy()
        changed.__dict__.update({key: value for key, value in defaults.items() if key not in self.model_fields_set})
        return changed


def constants_of(*stages: Stage) -> frozenset[str]:
    """Return the names of the constants that these stages read."""
    extras: dict[str, Any] = {name: info.json_schema_extra for name, info in Constants.model_fields.items()}
    return frozenset(name for name, extra in extras.items() if extra["stage"] in stages)


# Defaults under `objective: paper` where they differ; config.PAPER has those of settings.
PAPER_CONSTANTS: Mapping[str, Any] = {"rescale": True, "coefficient_learning_rate": 1e-3}
