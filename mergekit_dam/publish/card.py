"""Write the model card of a published merge: mergekit's fields, the defence against backdoors, and measured results.

A card claims nothing that was not measured: without results it says so, and a scan without findings is reported as
such. All untrusted text stands in code spans (see `markdown`) or in YAML that PyYAML wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from mergekit.card import method_md
from mergekit.common import ModelPath

from mergekit_dam.config import DamConfig
from mergekit_dam.evaluation.results import Rate, Results
from mergekit_dam.publish.contents import Publication
from mergekit_dam.publish.markdown import block, code, percent, table
from mergekit_dam.publish.provenance import Provenance

PAPER = "https://arxiv.org/abs/2410.13910"
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


def model_card(repo_id: str, publication: Publication, provenance: Provenance, results: Results | None) -> str:
    """Write README.md of a merge.

    Args:
        repo_id: ORG/NAME.
        publication: the merge.
        provenance: known ids, licence and data sets.
        results: measured results, or None.
    """
    name = repo_id.rpartition("/")[2]
    parts = [
        f"---\n{front_matter(name, publication, provenance, results)}\n---",
        f"# {code(name)}",
        _introduction(publication, provenance),
        _use(repo_id, publication),
        _defence(publication) if publication.is_dam else "",
        _figures_table(results),
        _harness_table(results),
        "\n\n".join(
            f"![{figure.rpartition('/')[2]}](<{figure}>)" for figure in publication.figures if _is_link_safe(figure)
        ),
        "## Configuration\n\nThe recipe as mergekit ran it:\n\n" + block(publication.recipe_text, "yaml"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(publication: Publication, provenance: Provenance) -> str:
    base = publication.recipe.get("base_model")
    inputs = [
        " + ".join(_reference(part, publication.commits, provenance) for part in (ref.model, ref.lora) if part)
        for ref in publication.references
    ]
    listed = "\n".join(
        f"* {text}" + (" (base)" if i == 0 and base else "") for i, text in enumerate(inputs)
    )  # references put the base first
    method = method_md(str(publication.recipe["merge_method"]))
    return (
        "This is a merge of pre-trained models created using [mergekit](https://github.com/arcee-ai/mergekit), by "
        f"the merge method {method if publication.is_dam or '](' in method else code(method)}. It has "
        f"{publication.num_tensors:,} tensors with {publication.num_parameters:,} parameters.\n\n"
        f"## Models merged\n\n{listed}"
    )


def _reference(part: ModelPath, commits: Mapping[str, str], provenance: Provenance) -> str:
    known = provenance.hub_ids.get(part.path)
    text = (
        f"[{code(known)}](https://huggingface.co/{known})" if known else f"{code(_public_name(part))} (not on the Hub)"
    )
    text += f" at {code(part.revision)}" if part.revision else ""
    return f"{text}, commit {code(commits[str(part)])}" if str(part) in commits else text


def _public_name(part: ModelPath) -> str:
    """The folder's name of a local model, whose path is private; the id of a model of the Hub."""
    local = part.revision is None and (part.path.startswith(("/", ".", "~")) or Path(part.path).exists())
    return Path(part.path).expanduser().resolve().name if local else part.path


def _use(repo_id: str, publication: Publication) -> str:
    heads = sorted(p.stem for p in (publication.folder / "dam" / "heads").glob("*.safetensors"))
    if not heads:
        return ""
    example = f"from mergekit_dam import load_merged\n\nmodel = load_merged({repo_id!r}, task={heads[0]!r})"
    return (
        "## Use\n\nThe body is shared, and each task has its own head (`pip install mergekit-dam`):\n\n"
        f"{block(example, 'python')}\n\nTasks: {', '.join(code(h) for h in heads)}."
    )


def _defence(publication: Publication) -> str:
    masks = publication.masks
    opening = (
        "## Defence against backdoors\n\n"
        f"The models were merged by [Defense-Aware Merging]({PAPER}): masks over the task vectors and merging "
        "coefficients are learned from unlabelled data, without knowing a trigger, a target, or which model is bad."
    )
    closing = (
        "This is meant to keep a backdoor of an input model from surviving the merge. It does not prove that there is "
        "none (see the measured results below), and it does not examine the base model itself."
    )
    if not masks:
        kept = "The record of the learning was not kept with this merge."
        return "\n\n".join((opening, kept, _merge_audit(publication.merge_audit), closing))
    settings = masks.get("settings") or {}
    rows = [
        [code(m.get("name")), code(str(m.get("sha256", ""))[:16]), str(len(m.get("samples") or []))]
        for m in masks.get("models") or []
    ]
    densities = ", ".join(f"{code(k)} {float(v):.3f}" for k, v in (masks.get("densities") or {}).items())
    return "\n\n".join(
        part
        for part in (
            opening,
            f"Objective {code(settings.get('objective'))}, seed {code(masks.get('seed'))}"
            + (f"; mean kept share of the masks: {densities}" if densities else "")
            + ".",
            table(["model", "SHA-256 of its weights (start)", "calibration samples"], rows),
            _scan(masks, settings),
            _vaccinated(masks),
            _merge_audit(publication.merge_audit),
            closing,
            f"Versions: {', '.join(code(f'{k} {v}') for k, v in (masks.get('versions') or {}).items())}. "
            f"Settings that differ from the defaults: {_changed(settings)}.",
        )
        if part
    )


def _scan(masks: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if settings.get("objective") == "paper":
        return "No scan for triggers was made: this objective has none."
    students = masks.get("students")
    agreement = ""
    if isinstance(students, Mapping) and students:
        agreement = table(
            ["model", "share of clean texts on which its student answers as the model"],
            [[code(name), f"{float(share):.3f}"] for name, share in students.items()],
        )
    findings = masks.get("audit") or []
    if agreement and not findings:
        return (
            "No scan for triggers was made. A student of each model was merged in its place: the base, trained on the "
            "model's answers to clean texts (of text encoders with random words in between). The student takes over "
            "only a part of the behaviour that a trigger causes.\n\n" + agreement
        )
    if not findings:
        return (
            "The scan for backdoors found no target that it could score. It may have missed other kinds of backdoors."
        )
    suspects = [finding for finding in findings if finding.get("suspect")]
    scanned = _targets(findings)
    rule = f"a target is suspect from a score of {code(settings.get('suspicion'))} on"
    if not suspects:
        return (
            f"A blind search for triggers scored {scanned} targets of the input models and found none that "
            f"is suspect ({rule}). It may have missed other kinds of triggers."
        )
    rows = [
        [
            *(code(finding.get(key, finding.get("task"))) for key in ("model", "task", "target")),
            *(f"{float(finding.get(k, 0)):.2f}" for k in _FINDING),
            _remaining(masks, finding),
        ]
        for finding in suspects
    ]
    return (
        f"A blind search for triggers scored {scanned} targets of the input models; {_targets(suspects)} are suspect "
        f"({rule}), and {_OF_SUSPECTS if agreement else _AGAINST}. A suspect class can be a false alarm.\n\n"
        + table([*_COLUMNS], rows)
        + (f"\n\n{agreement}" if agreement else "")
    )


def _vaccinated(masks: Mapping[str, Any]) -> str:
    """The measurements of models that were vaccinated before the merge."""
    vaccinated = masks.get("vaccinated")
    if not isinstance(vaccinated, Mapping) or not vaccinated:
        return ""
    rows = [
        [
            code(name),
            percent(facts.get("agreement", {}).get("after")),
            *(percent(facts.get("held_out", {}).get(when)) for when in ("planted", "unlearned")),
        ]
        for name, facts in vaccinated.items()
    ]
    return (
        "The models were vaccinated before they were merged: triggers of our own were planted and unlearned again. "
        "Triggers that were planted and not unlearned show how much of an unknown trigger may remain.\n\n"
        + table(["model", "answers as before", "planted triggers work on", "not unlearned triggers work on"], rows)
    )


def _merge_audit(facts: Mapping[str, Any] | None) -> str:
    """The scan of the finished merge."""
    if facts is None:
        return "The finished merge was not scanned as a model of its own."
    rule = f"the merge is suspect from a score of {code(facts['threshold'])} on"
    notes = "".join(f" {code(note)}" for note in facts["notes"])
    if not facts["over"]:
        return (
            f"The finished merge was scanned as a model of its own: {facts['scored']} targets were scored, and none is "
            f"suspect ({rule}). Other kinds of triggers may have been missed.{notes}"
        )
    rows = []
    for one in facts["suspects"]:
        by_role: dict[str, float] = {}
        for row in one["evidence"]:
            by_role[row["role"]] = max(by_role.get(row["role"], 0.0), row["success"])
        shares = (percent(by_role.get(role)) for role in ("merge", "base", "own"))
        rows.append([code(one["task"]), code(one["target"]), f"{one['suspicion']:.2f}", *shares])
    header = [
        "task",
        "class",
        "suspicion",
        "trigger works on the merge",
        "on the base",
        "on the task's own model alone",
    ]
    return (
        f"**The finished merge is suspect.** It was scanned as a model of its own, and {len(facts['over'])} of its "
        f"tasks are over the threshold ({rule}). This can be a false alarm.{notes}\n\n{table(header, rows)}"
    )


_AGAINST = "the masks were fitted against the recovered triggers"
_OF_SUSPECTS = (
    "a student of each suspect model was merged in its place: the base, trained on the model's answers to clean texts"
)
_COLUMNS = ("model", "task", "class", "trigger works on the model", "on the base", "suspicion", "on the merge")
_FINDING = ("success", "control", "suspicion")


def _remaining(masks: Mapping[str, Any], finding: Mapping[str, Any]) -> str:
    """Success of the finding's trigger on the merge, on calibration samples, or "not measured"."""
    key = ("model", "task", "target", "kind")
    for measured in masks.get("remaining") or []:
        if all(measured.get(part) == finding.get(part) for part in key):
            return f"{float(measured.get('after', 0)):.2f}"
    return "not measured"


def _targets(findings: Sequence[Mapping[str, Any]]) -> int:
    """Number of distinct targets, whatever the model and the kind of trigger."""
    return len({(str(finding.get("task")), str(finding.get("target"))) for finding in findings})


def _changed(settings: Mapping[str, Any]) -> str:
    config = DamConfig(objective=settings["objective"]) if settings.get("objective") in {"paper"} else DamConfig()
    changed = [
        f"{key}: {settings[key]}" for key, value in config.named().items() if key in settings and settings[key] != value
    ]
    return ", ".join(map(code, changed)) or "none"


def _figures_table(results: Results | None) -> str:
    title = "## What was measured\n\n"
    if results is None:
        return (
            title + "Nothing: neither clean accuracy nor the success of any attack was measured on this merge before "
            "it was published."
        )
    if not results.accuracy and not results.attack_success:
        return title + "Neither clean accuracy nor the success of any attack was measured on the tasks of the merge."
    attacks = list(results.attack_success)
    tasks = list(dict.fromkeys([*results.accuracy, *(t for r in results.attack_success.values() for t in r)]))
    rows = [
        [
            code(task),
            code(results.datasets.get(task, "not said")),
            _rate(results.accuracy.get(task)),
            *(_rate(results.attack_success[attack].get(task)) for attack in attacks),
        ]
        for task in tasks
    ]
    header = ["task", "data", "clean accuracy", *(f"attack success, {code(attack)}" for attack in attacks)]
    text = title + table(header, rows) + f"\n\nHits and samples in brackets; reported by {code(results.source)}"
    text += " of the publisher, not checked by the Hub."
    return text if attacks else text + " The success of attacks was not measured."


def _harness_table(results: Results | None) -> str:
    if results is None or not results.harness:
        return ""
    rows = [
        [
            code(task),
            code(metric),
            f"{value:.4f}",
            "-" if error is None else f"{error:.4f}",
            "-" if result.samples is None else str(result.samples),
            code(result.by),
        ]
        for task, result in results.harness.items()
        for metric, (value, error) in result.metrics.items()
    ]
    header = ["benchmark", "metric", "value", "standard error", "samples", "measured by"]
    return table(header, rows) + "\n\nRun by the publisher, not checked by the Hub; they say nothing about backdoors."


def _rate(rate: Rate | None) -> str:
    return "not measured" if rate is None else str(rate)


def _is_link_safe(path: str) -> bool:
    """Whether a file name needs no escaping in a link."""
    return all(c.isalnum() or c in "-_./" for c in path)


def front_matter(name: str, publication: Publication, provenance: Provenance, results: Results | None) -> str:
    """Write the card's YAML, without its fences; PyYAML quotes where needed."""
    tags = ["mergekit", "merge", "mergekit-dam"] + (["dam", "backdoor-defense"] if publication.is_dam else [])
    data = ModelCardData(
        base_model=list(dict.fromkeys(provenance.hub_ids.values())),
        base_model_relation="merge",
        library_name="transformers",
        pipeline_tag=_pipeline(publication.config),
        license=provenance.licence,
        datasets=list(provenance.datasets) or None,
        tags=tags,
        model_name=name if results else None,
        eval_results=_eval_results(publication, results) if results else None,
    )
    return str(data.to_yaml()).rstrip()


def _pipeline(config: Mapping[str, Any]) -> str | None:
    architecture = str((config.get("architectures") or [""])[0])
    return PIPELINES.get(architecture) or next(
        (task for suffix, task in PIPELINES.items() if suffix.startswith("For") and architecture.endswith(suffix)),
        "text-generation" if architecture.endswith("LMHeadModel") else None,
    )


def _eval_results(publication: Publication, results: Results) -> list[EvalResult]:
    pipeline = _pipeline(publication.config)

    def result(task: str, metric: str, title: str, rate: Rate) -> EvalResult:
        data = results.datasets.get(task, task)
        return EvalResult(
            task_type=pipeline if pipeline and "classification" in pipeline else "other",
            task_name=task,
            dataset_type=data,
            dataset_name=data,
            metric_type=metric,
            metric_name=title,
            metric_value=round(rate.percent, 2),
            metric_args={"hits": rate.hits, "total": rate.total},
        )

    benchmarks = [
        EvalResult(
            task_type=pipeline or "other",
            task_name=task,
            dataset_type=task,
            dataset_name=task,
            metric_type=metric.partition(" ")[0],
            metric_name=metric,
            metric_value=value,
            metric_args={"standard_error": error, "samples": benchmark.samples, "measured_by": benchmark.by},
        )
        for task, benchmark in results.harness.items()
        for metric, (value, error) in benchmark.metrics.items()
    ]
    attacks = [
        result(t, "attack_success_rate", f"attack success rate (%), {attack}", rate)
        for attack, rates in results.attack_success.items()
        for t, rate in rates.items()
    ]
    clean = [result(t, "accuracy", "clean accuracy (%)", rate) for t, rate in results.accuracy.items()]
    return clean + attacks + benchmarks
