"""Checks before learning that read no weight: classes, data, preprocessing, vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_dam.engine.device import device_of
from mergekit_dam.errors import DamError
from mergekit_dam.io.calibration import load_calibration
from mergekit_dam.io.files import is_readable_file
from mergekit_dam.io.images import Preprocessing
from mergekit_dam.models.compatible import differing_entries
from mergekit_dam.models.families import CAUSAL_CLASSES
from mergekit_dam.models.plan import ModelInput, Plan, revision_of
from mergekit_dam.tasks import family_of
from mergekit_dam.tasks.encoding import encoded
from mergekit_dam.tasks.readout import class_names, has_tokenizer, require_rows, tokenizer_of

_HEADS = ("ForImageClassification", "ForSequenceClassification", *CAUSAL_CLASSES)


def preflight(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Check heads, data, preprocessing and tokenizers; return facts per model, and warnings.

    Raises:
        DamError: the first fault that learning would meet in heads, data, preprocessing or tokenizers.
    """
    family = family_of(plan)
    image = family.modality == "image"
    warnings: list[str] = []
    facts = {}
    # a causal LM that samples its own text needs no tokenizer, so one without is no fault
    optional = not family.classifies
    vocabulary = None if image else _vocabulary(plan.base, plan, optional=optional)
    warnings += renamed_classes(plan)
    for position, model in enumerate(plan.models):
        require_readout(model, plan.config.zero_shot_model)
        entry: dict[str, Any] = {
            "model": str(model.ref),
            "revision": revision_of(model),
            "class": _class_name(model),
            "classes": _num_classes(model) if family.classifies else None,
        }
        if not family.classifies and model.settings.calibration is None:
            entry["calibration"], entry["samples"] = "its own text", plan.config.num_samples
        else:
            data = load_calibration(
                model.settings,
                family.modality,
                num_samples=plan.config.num_samples,
                seed=plan.config.seed,
                task=model.name,
                position=position,
            )
            entry["calibration"], entry["samples"] = model.settings.calibration, len(data.samples)
            if not image:
                tokenizer = tokenizer_of((model.path, plan.base.path), model.name)
                found = encoded(tokenizer, data.samples, plan.config.max_length, model.name)
                entry["tokens"] = round(sum(map(len, found)) / max(1, len(found)))
                require_rows(found, int(model.config.get_text_config().vocab_size), tokenizer, model.name)
            if len(set(data.digests)) < len(data.digests):
                warnings.append(f"{model.name}: {len(data.digests) - len(set(data.digests))} samples are there twice")
        if image:
            size = getattr(model.config, "vision_config", model.config).image_size
            Preprocessing.read((model.path, plan.base.path), size)
        else:
            own = _vocabulary(model, plan, optional=optional and model.settings.calibration is None)
            entry["vocabulary"] = None if own is None else len(own)
            if vocabulary is not None and own is not None and own != vocabulary:
                differing = len(own.items() ^ vocabulary.items())
                warnings.append(f"{model.name}: its tokenizer differs from the base's in {differing} entries")
        if entries := differing_entries(plan.base.config, model.config):
            warnings.append(
                f"{model.name}: the output gets the base's config.json, which differs in " + ", ".join(entries)
            )
        facts[model.name] = entry
    if plan.config.device not in ("auto", "cpu"):
        device_of(plan.config.device)
    return facts, warnings


def longest_texts(facts: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Return the largest of the models' mean numbers of tokens per text, from the facts of `preflight`.

    None if some model has none: images, and texts that a causal LM samples, which have full length.
    """
    lengths = [entry["tokens"] for entry in facts.values() if "tokens" in entry]
    return max(lengths) if len(lengths) == len(facts) else None


def require_readout(model: ModelInput, zero_shot_model: str | None) -> None:
    """Refuse a model whose output nothing turns into classes."""
    settings, kind = model.settings, _class_name(model)
    if settings.head is not None and not is_readable_file(Path(settings.head), f"head of {model.name}"):
        raise DamError(
            f"head of {model.name} ({settings.head})",
            expected="a safetensors file",
            got="no such file",
            cure="Correct the path.",
        )
    zero_shot = settings.classes is not None and (kind == "CLIPModel" or zero_shot_model is not None)
    if not kind.endswith(_HEADS) and settings.head is None and not zero_shot:
        raise DamError(
            f"model {model.name}",
            expected="a classification head, `head:`, or for CLIP `classes:`",
            got=kind,
            cure="Give the fine-tuned model with its head; only the base may be without one.",
        )


def _class_name(model: ModelInput) -> str:
    return str((model.config.architectures or ["unknown"])[0])


def _num_classes(model: ModelInput) -> int:
    if model.settings.classes is not None:
        return len(class_names(model.settings.classes, model.name))
    return int(model.config.num_labels or 0)


def _vocabulary(model: ModelInput, plan: Plan, *, optional: bool) -> dict[str, int] | None:
    folders = [model.path, plan.base.path, *(other.path for other in plan.models if model is plan.base)]
    if optional and not has_tokenizer(folders):
        return None
    return dict(tokenizer_of(folders, model.name).get_vocab())


def renamed_classes(plan: Plan) -> list[str]:
    """Warn of models whose class names differ from the base's where heads are merged row by row."""
    merged = {spec.name.split(".")[0] for spec in plan.tensors} & {"classifier", "score"}
    if not merged:
        return []
    names = dict(plan.base.config.id2label or {})
    return [
        f"{model.name}: its classes are {', '.join(map(str, own.values()))}, the base's are "
        f"{', '.join(map(str, names.values()))} (id2label), but their heads are merged row by row. If the labels "
        f"differ in more than their spelling, take the base without its head: base_model: {{model: {plan.base.ref}, "
        "override_architecture: <class without head>}"
        for model in plan.models
        if (own := dict(model.config.id2label or {})) != names
        and not any(all(str(v).startswith("LABEL_") for v in one.values()) for one in (own, names))
    ]
