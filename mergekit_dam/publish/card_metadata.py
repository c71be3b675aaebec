"""The YAML at the head of a model card: mergekit's fields, those of the Hub for merges, and measured results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mergekit_dam.evaluation.results import Measured, Rate
from mergekit_dam.publish.contents import Publication

PIPELINES = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "CLIPModel": "zero-shot-image-classification",
    "ViTModel": "image-feature-extraction",
    "CLIPVisionModel": "image-feature-extraction",
    "CLIPVisionModelWithProjection": "image-feature-extraction",
    "BertModel": "feature-extraction",
    "RobertaModel": "feature-extraction",
    "DistilBertModel": "feature-extraction",
}


@dataclass(frozen=True)
class Provenance:
    """What is known about the inputs beyond the recipe.

    Attributes:
        hub_ids: reference part (model or LoRA path) -> its id, for those that the Hub has.
        licence: identifier for the card, or None.
        datasets: calibration data sets that the Hub has.
    """

    hub_ids: Mapping[str, str]
    licence: str | None
    datasets: Sequence[str] = ()


def front_matter(name: str, publication: Publication, provenance: Provenance, measured: Measured | None) -> str:
    """YAML without its fences; PyYAML quotes whatever needs it."""
    tags = ["mergekit", "merge", "mergekit-dam"] + (["dam", "backdoor-defense"] if publication.is_dam else [])
    data = ModelCardData(
        base_model=list(dict.fromkeys(provenance.hub_ids.values())),
        base_model_relation="merge",
        library_name="transformers",
        pipeline_tag=_pipeline(publication.config),
        license=provenance.licence,
        datasets=list(provenance.datasets) or None,
        tags=tags,
        model_name=name if measured else None,
        eval_results=_eval_results(publication, measured) if measured else None,
    )
    return str(data.to_yaml()).rstrip()


def _pipeline(config: Mapping[str, Any]) -> str | None:
    architecture = str((config.get("architectures") or [""])[0])
    return PIPELINES.get(architecture) or next(
        (task for suffix, task in PIPELINES.items() if suffix.startswith("For") and architecture.endswith(suffix)),
        "text-generation" if architecture.endswith("LMHeadModel") else None,
    )


def _eval_results(publication: Publication, measured: Measured) -> list[EvalResult]:
    pipeline = _pipeline(publication.config)

    def result(task: str, metric: str, title: str, rate: Rate) -> EvalResult:
        data = measured.datasets.get(task, task)
        return EvalResult(
            task_type=pipeline if pipeline and "classification" in pipeline else "other", task_name=task,
            dataset_type=data, dataset_name=data, metric_type=metric, metric_name=title,
            metric_value=round(rate.percent, 2), metric_args={"hits": rate.hits, "total": rate.total},
        )  # fmt: skip

    benchmarks = [
        EvalResult(
            task_type=pipeline or "other", task_name=task, dataset_type=task, dataset_name=task,
            metric_type=metric.partition(" ")[0], metric_name=metric, metric_value=value,
            metric_args={"standard_error": error, "samples": one.samples, "measured_by": one.by},
        )
        for task, one in measured.harness.items()
        for metric, (value, error) in one.metrics.items()
    ]  # fmt: skip
    attacks = [
        result(t, "attack_success_rate", f"attack success rate (%), {attack}", rate)
        for attack, rates in measured.attack_success.items()
        for t, rate in rates.items()
    ]
    clean = [result(t, "accuracy", "clean accuracy (%)", rate) for t, rate in measured.accuracy.items()]
    return clean + attacks + benchmarks
