"""The Python API: what the commands do, for programs and notebooks.

The examples run as tests, in a folder with small models under models/ and images under data/.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.publish.report import write_report
from mergekit_dam.recipe import Recipe, prepare

LOG = logging.getLogger(__name__)


def merge(
    recipe: Recipe, out: str | Path, *, options: MergeOptions | None = None, report: bool = True, resume: bool = True,
    **settings: Any,
) -> Path:  # fmt: skip
    """Merge, strict about settings, and compare the output with the base: `mergekit-dam merge`, and for other methods
    than `dam`, `mergekit-dam yaml`.

    Args:
        recipe: a YAML file, or the same as a mapping or as mergekit's configuration. Models are directories or Hub
            ids (`ORG/NAME@REVISION`, `BASE+LORA`).
        out: the directory to write; masks, recovered triggers, heads and metrics go to `out/dam/`.
        options: mergekit's options (devices, caches, shard size).
        report: of `dam`, whether to write `out/dam/report.html` and `.json`.
        resume: whether masks learned before on the same inputs and settings are taken from the cache.
        **settings: shared settings of `dam` that win over the recipe's, such as `steps` or `seed`.

    Returns:
        The directory.

    Raises:
        DamError: models, data or settings that cannot be merged, before anything is written; or an output that
            lacks tensors of the base.

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
    >>> out = merge(recipe, "out", report=False, steps=2, scan_steps=2, refresh_steps=1)
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
    masks = prepare(recipe, options=options, **settings).merge(folder, resume=resume)
    if report and (folder / "dam" / MASKS_FILE).is_file():
        for note in write_report(folder, seconds=time.perf_counter() - begun, masks=masks)[1]:
            LOG.warning("%s", note)
    return folder


def learn_masks(
    recipe: Recipe, out: str | Path | None = None, *, options: MergeOptions | None = None, resume: bool = True,
    **settings: Any,
) -> Path:  # fmt: skip
    """Learn the masks of a recipe without merging, as `mergekit-dam learn` does; a later merge finds them in the cache.

    Args:
        recipe: as for `merge`; the method must be `dam`.
        out: a directory to copy masks, recovered triggers, heads and metrics to; None leaves them in the cache.
        options: mergekit's options (caches, quiet).
        resume: as for `merge`.
        **settings: as for `merge`.

    Returns:
        The masks file, which `parameters: {masks: FILE}` applies, here or on another machine.

    Raises:
        DamError: as for `merge`, or a recipe of another method.

    >>> from mergekit_dam import learn_masks, merge
    >>> recipe = {
    ...     "merge_method": "dam",
    ...     "base_model": "models/base",
    ...     "models": [
    ...         {"model": "models/flowers", "parameters": {"calibration": "data/flowers"}},
    ...         {"model": "models/cars", "parameters": {"calibration": "data/cars"}},
    ...     ],
    ... }
    >>> masks = learn_masks(recipe, "learned", steps=2, scan_steps=2, refresh_steps=1)
    >>> masks.name
    'dam_masks.safetensors'
    >>> merge(recipe, "applied", masks=str(masks)).name
    'applied'
    """
    return prepare(recipe, options=options, **settings).learn(None if out is None else Path(out), resume=resume)
