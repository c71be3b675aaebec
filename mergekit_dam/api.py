"""Define the Python API: the functions behind the commands, for programs and notebooks.

The examples run as tests, in a folder with small models in models/ and images in data/.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_dam.artifact.folder import REPORT_JSON
from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.config import KNOWN, REMOVED, parse
from mergekit_dam.engine.progress import progress_bar
from mergekit_dam.errors import DamError, did_you_mean
from mergekit_dam.io.files import write_atomic
from mergekit_dam.publish.audit_page import write_audit
from mergekit_dam.publish.report import write_report
from mergekit_dam.publish.vaccine_card import vaccine_card
from mergekit_dam.recipe import OpenRecipe, Recipe, open_audit, open_recipe
from mergekit_dam.scan.advice import suspect_lines
from mergekit_dam.vaccine.run import Cleaned, clean_models, expected
from mergekit_dam.vaccine.settings import VaccineSettings

LOG = logging.getLogger(__name__)


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    options: MergeOptions | None = None,
    report: bool = True,
    resume: bool = True,
    scan: bool | None = None,
    **settings: Any,
) -> Path:
    """Merge, refuse unknown settings, and compare the output with the base, as `mergekit-dam merge` does.

    Args:
        recipe: a YAML file, or the same as a mapping or as mergekit's configuration. Models are directories or Hub
            ids (`ORG/NAME@REVISION`, `BASE+LORA`).
        out: the directory to write; masks, recovered triggers, heads and metrics go to `out/dam/`.
        options: mergekit's options (devices, caches, shard size).
        report: with `dam`, whether to write `out/dam/report.html` and `.json`.
        resume: whether masks from the cache are used, learned on the same inputs and settings.
        scan: with `dam`, whether the finished merge is scanned for backdoors (see `audit`); None: where that takes less
            than a fifth of learning's passes.
        **settings: shared settings of `dam`, such as `steps` or `seed`, which override the recipe's.

    Returns:
        The directory.

    Raises:
        DamError: models, data or settings that cannot be merged, before anything is written; or an output that
            lacks tensors of the base.

    Examples:
        >>> from mergekit_dam import load_merged, merge
        >>> recipe = {
        ...     "merge_method": "dam",
        ...     "base_model": "models/base",
        ...     "models": [
        ...         {"model": "models/flowers", "parameters": {"calibration": "data/flowers"}},
        ...         {"model": "models/cars", "parameters": {"calibration": "data/cars"}},
        ...     ],
        ...     "dtype": "float32",
        ... }
        >>> out = merge(recipe, "out", report=False, steps=2, scan_steps=2)
        >>> sorted(path.name for path in (out / "dam").glob("[!.]*"))
        ['dam_masks.safetensors', 'heads', 'metrics.jsonl', 'run.json', 'triggers.safetensors']
        >>> type(load_merged(out, task="cars")).__name__
        'ViTForImageClassification'

        A misspelt setting is refused before a weight is read:

        >>> merge(recipe, "other", step=2)
        Traceback (most recent call last):
        ...
        mergekit_dam.errors.DamError: setting 'step' in parameters: expected a setting of dam, got an unknown one. \
Did you mean 'steps'?
    """
    begun = time.perf_counter()
    folder = Path(out)
    opened = open_recipe(recipe, options=options, **settings)
    masks = opened.merge(folder, resume=resume)
    if opened.scans_merge(scan):
        for line in suspect_lines(run_audit(opened, None, source=out, merged=folder)):
            LOG.warning("%s", line)
    if report and (folder / "dam" / MASKS_FILE).is_file():
        for note in write_report(folder, seconds=time.perf_counter() - begun, masks=masks)[1]:
            LOG.warning("%s", note)
    return folder


def audit(
    source: Recipe,
    out: str | Path | None = None,
    *,
    threshold: float | None = None,
    controls: int = 0,
    options: MergeOptions | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Score the input models of a recipe for backdoors, or a finished merge of `dam`, as `mergekit-dam audit` does.

    Args:
        source: a recipe, as for `merge`; or the directory of a merge, which is then scanned as a model of its own: per
            task, with the head and the calibration data that its recipe names.
        out: the directory for audit.json, audit.html and the recovered triggers; of a merge, None is its folder `dam`,
            and the finding then stands in the merge's report, too.
        threshold: suspicion from which a model is over; None: the setting `suspicion`.
        controls: backdoors to plant in copies of each model, to see how many of them the scan finds here.
        options: mergekit's options (caches, quiet).
        **settings: as for `merge`.

    Returns:
        The content of audit.json.

    Raises:
        DamError: as for `merge`, a directory that holds no merge of `dam`, or inputs that changed since the merge.

    Examples:
        >>> from mergekit_dam import audit, merge
        >>> recipe = {
        ...     "merge_method": "dam",
        ...     "base_model": "models/base",
        ...     "models": [
        ...         {"model": "models/flowers", "parameters": {"calibration": "data/flowers"}},
        ...         {"model": "models/cars", "parameters": {"calibration": "data/cars"}},
        ...     ],
        ...     "parameters": {"steps": 2, "scan_steps": 2},
        ... }
        >>> facts = audit(recipe, "audit", threshold=2.0)
        >>> facts["over"], [model["name"] for model in facts["models"]]
        ([], ['flowers', 'cars'])
        >>> facts = audit(merge(recipe, "merged"), threshold=2.0)
        >>> facts["over"], facts["merge"]["name"]
        ([], 'merged')
    """
    opened, merged = open_audit(source, options=options, **settings)
    if merged is None and out is None:
        raise DamError("out", expected="a directory for the audit of a recipe", got="none", cure="Name one.")
    facts = run_audit(opened, out, source=source, threshold=threshold, merged=merged, controls=controls)
    if merged is not None and out is None and (merged / "dam" / REPORT_JSON).is_file():
        write_report(merged)
    return facts


def run_audit(
    opened: OpenRecipe,
    out: str | Path | None,
    *,
    source: Recipe,
    threshold: float | None = None,
    merged: Path | None = None,
    controls: int = 0,
) -> dict[str, Any]:
    """Audit the models of an open recipe, or the merge of them, and write the files; see `audit`.

    Args:
        opened: the recipe.
        out: as for `audit`.
        source: what the user named.
        threshold: as for `audit`.
        merged: directory of a merge by this recipe, which is then scanned.
        controls: as for `audit`.
    """
    name = str(source) if isinstance(source, (str, Path)) else "RECIPE"
    found = opened.audit(source=name, threshold=threshold, merge=merged, controls=controls)
    title = f"Audit of {'' if merged is None else 'the merge '}{Path(name).resolve().name}"
    folder = merged / "dam" if merged is not None and out is None else Path(out or ".")
    write_audit(folder, found, title=title)
    return dict(found.facts)


def learn_masks(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    options: MergeOptions | None = None,
    resume: bool = True,
    **settings: Any,
) -> Path:
    """Learn the masks of a recipe without merging, as `mergekit-dam learn` does, into the cache of later merges.

    Args:
        recipe: as for `merge`; the method must be `dam`.
        out: a directory to copy masks, recovered triggers, heads and metrics to; None leaves them in the cache.
        options: mergekit's options (caches, quiet).
        resume: as for `merge`.
        **settings: as for `merge`.

    Returns:
        The masks file; the setting `masks` applies it, here or on another machine.

    Raises:
        DamError: as for `merge`, or a recipe of another method.

    Examples:
        >>> from mergekit_dam import learn_masks, merge
        >>> recipe = {
        ...     "merge_method": "dam",
        ...     "base_model": "models/base",
        ...     "models": [
        ...         {"model": "models/flowers", "parameters": {"calibration": "data/flowers"}},
        ...         {"model": "models/cars", "parameters": {"calibration": "data/cars"}},
        ...     ],
        ... }
        >>> masks = learn_masks(recipe, "learned", steps=2, scan_steps=2)
        >>> masks.name
        'dam_masks.safetensors'
        >>> merge(recipe, "applied", masks=str(masks)).name
        'applied'
    """
    return open_recipe(recipe, options=options, **settings).learn(None if out is None else Path(out), resume=resume)


def clean(
    models: Recipe | Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    options: MergeOptions | None = None,
    adapter: bool = False,
    resume: bool = True,
    **settings: Any,
) -> list[Cleaned]:
    """Plant backdoors in models and unlearn them, which also weakens unknown backdoors, as `mergekit-dam clean` does.

    Args:
        models: a model (a directory, Hub id or `BASE+LORA`) or several, with `base` and `data`; or a recipe of `dam`
            without them.
        out: the directory to write; with several models it gets a directory per model, of the model's name.
        base: the model that these were fine-tuned from.
        data: unlabelled inputs, one source for all models or one per model.
        options: mergekit's options (caches, quiet).
        adapter: write LoRAs on the models instead of models, where LoRAs are trained.
        resume: whether finished models and snapshots of an interrupted run are used.
        **settings: settings of the vaccination (`VaccineSettings`), such as `rounds` or `seed`; with `base`, also
            settings of models and shared settings, such as `column`, `classes`, `num_samples` or `device`.

    Returns:
        Per model its name, its directory and the content of vaccine.json.

    Raises:
        DamError: models, data or settings that do not fit, before anything is written.

    Examples:
        >>> from mergekit_dam import clean
        >>> results = clean(
        ...     "models/flowers", "cleaned", base="models/base", data="data/flowers", triggers=2, held_out=1,
        ...     plant_steps=2, unlearn_steps=2, batch_size=4,
        ... )
        >>> results[0].name, sorted(path.name for path in results[0].folder.glob("[!.]*"))
        ('flowers', ['README.md', 'config.json', 'model.safetensors', 'preprocessor_config.json', 'vaccine.json'])
        >>> sorted(results[0].facts["planted"][0])[:4]
        ['answer', 'behaviour', 'held_out', 'kind']
    """
    opened, vaccine = open_cleaning(models, base=base, data=data, options=options, **settings)
    return run_cleaning(opened, out, vaccine, adapter=adapter, resume=resume)


def run_cleaning(
    opened: OpenRecipe, out: str | Path, settings: VaccineSettings, *, adapter: bool = False, resume: bool = True
) -> list[Cleaned]:
    """Clean the models that `open_cleaning` opened; see `clean`."""
    quiet = opened.inputs.options.quiet
    results = clean_models(
        opened.plan, Path(out), settings, progress=partial(progress_bar, quiet=quiet), adapter=adapter, resume=resume
    )
    for cleaned in results:
        write_atomic(cleaned.folder / "README.md", vaccine_card(cleaned.facts))
    return results


def open_cleaning(
    models: Recipe | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    options: MergeOptions | None = None,
    **settings: Any,
) -> tuple[OpenRecipe, VaccineSettings]:
    """Download the models that `clean` would clean, and return them with the settings of the vaccination.

    Args: as for `clean`.

    Raises:
        DamError: as for `clean`.
    """
    own = {key: settings.pop(key) for key in list(settings) if key in VaccineSettings.model_fields}
    known = (*VaccineSettings.model_fields, *KNOWN)
    for key in sorted(set(settings) - set(KNOWN)):
        raise DamError(
            f"setting {key!r}",
            expected="a setting of the vaccination or of its models",
            got="an unknown one",
            cure=REMOVED.get(key) or did_you_mean(key, known) or "See `mergekit-dam clean --help`.",
        )
    vaccine = parse(VaccineSettings, own, where="the vaccination")
    if base is None:
        if data is not None or (isinstance(models, Sequence) and not isinstance(models, str)):
            raise DamError(
                "base", expected="the model that these were fine-tuned from", got="none", cure="Give it as base."
            )
        opened = open_recipe(models, options=options, least=1, **settings, seed=own.get("seed"))
        return opened, vaccine.model_copy(update={"seed": opened.plan.config.seed})
    if isinstance(models, Mapping) or not isinstance(models, (str, Path, Sequence)):
        raise DamError("models", expected="paths or Hub ids beside base", got="a recipe", cure="Leave base out.")
    names = [str(models)] if isinstance(models, (str, Path)) else [str(model) for model in models]
    if data is None:
        raise DamError(
            "data",
            expected="unlabelled inputs of the models",
            got="none",
            cure="Give a file, a folder or a Hub dataset id.",
        )
    sources = [str(data)] if isinstance(data, (str, Path)) else [str(source) for source in data]
    if len(sources) not in (1, len(names)):
        raise DamError(
            "data",
            expected=f"one source for all models or one for each of {len(names)}",
            got=str(len(sources)),
            cure="Give them in the order of the models.",
        )
    sources = sources * (len(names) if len(sources) == 1 else 1)
    seed = {} if own.get("seed") is None else {"seed": own["seed"]}
    recipe = {
        "merge_method": "dam",
        "base_model": str(base),
        "models": [
            {"model": name, "parameters": {"calibration": source}} for name, source in zip(names, sources, strict=True)
        ],
        "parameters": {key: value for key, value in {**settings, **seed}.items() if value is not None},
    }
    return open_recipe(recipe, options=options, least=1), vaccine


def preview_cleaning(
    opened: OpenRecipe, out: str | Path, settings: VaccineSettings, *, adapter: bool = False
) -> dict[str, Any]:
    """Check all that `clean` needs, and estimate its time from a few steps, without cleaning.

    Raises:
        DamError: as for `clean`.
    """
    models, seconds = expected(opened.plan, Path(out), settings, adapter=adapter)
    return {"models": models, "seconds": round(seconds, 1)}
