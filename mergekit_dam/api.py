"""The Python API: what the commands do, for programs and notebooks.

The examples run as tests, in a folder with small models under models/ and images under data/.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_dam.artifact import MASKS_FILE
from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.hub_inputs import Inputs, localise, record_inputs
from mergekit_dam.learn import cache_folder
from mergekit_dam.learn import learn_masks as learn
from mergekit_dam.method import register_dam
from mergekit_dam.plan import model_input
from mergekit_dam.recipe import plan_of
from mergekit_dam.verify import verify_output

Recipe: TypeAlias = str | Path | Mapping[str, Any] | MergeConfiguration


def merge(recipe: Recipe, out: str | Path, *, options: MergeOptions | None = None, **settings: Any) -> Path:
    """Merge as `mergekit-dam merge` does: any method, strict about settings, the output compared with the base.

    Args:
        recipe: a YAML file, or the same as a mapping or as mergekit's configuration. Models are directories or Hub
            ids (`ORG/NAME@REVISION`, `BASE+LORA`).
        out: the directory to write; masks, heads and metrics go to `out/dam/`.
        options: mergekit's options (devices, caches, shard size).
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
    >>> out = merge(recipe, "out", steps=2, scan_steps=2, refresh_steps=1)
    >>> sorted(path.name for path in (out / "dam").iterdir())
    ['dam_masks.safetensors', 'heads', 'metrics.jsonl']
    >>> type(load_merged(out, task="cars")).__name__
    'ViTForImageClassification'

    A misspelt setting is refused before a weight is read:

    >>> merge(recipe, "other", step=2)
    Traceback (most recent call last):
    ...
    mergekit_dam.errors.DamError: setting 'step' in parameters: expected a setting of dam, got an unknown one. \
Did you mean 'steps'?
    """
    source, inputs = _inputs(recipe, options, settings)
    config, folder = inputs.config, Path(out)
    if config.merge_method == "dam":
        plan_of(config, inputs.options)
    run_merge(config, str(folder), inputs.options, config_source=source)
    record_inputs(folder / "dam", inputs.commits)
    if config.base_model is not None:
        base = model_input("base", config.base_model, ModelSettings(), inputs.options)
        dtype = dtype_from_name(config.out_dtype or config.dtype)
        verify_output(folder, base.path, dtype=dtype, base_config=base.config)
    return folder


def learn_masks(
    recipe: Recipe, out: str | Path | None = None, *, options: MergeOptions | None = None, **settings: Any
) -> Path:
    """Learn the masks of a recipe without merging; a later merge of the same recipe finds them in the cache.

    Args:
        recipe: as for `merge`; the method must be `dam`.
        out: a file or directory to copy the masks to; None leaves them in the cache.
        options: mergekit's options (caches, quiet).
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
    >>> masks = learn_masks(recipe, "masks.safetensors", steps=2, scan_steps=2, refresh_steps=1)
    >>> masks.name
    'masks.safetensors'
    >>> merge(recipe, "applied", masks=str(masks)).name
    'applied'
    """
    _, inputs = _inputs(recipe, options, settings)
    if inputs.config.merge_method != "dam":
        raise DamError(
            "merge_method", expected="dam", got=str(inputs.config.merge_method),
            cure="Only dam learns masks; merge recipes of other methods with `merge`.",
        )  # fmt: skip
    folder, _ = learn(plan_of(inputs.config, inputs.options), quiet=inputs.options.quiet)
    learned = folder / MASKS_FILE
    if out is None:
        return learned
    target = Path(out) / MASKS_FILE if Path(out).is_dir() else Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(learned, target))


def _inputs(recipe: Recipe, options: MergeOptions | None, settings: Mapping[str, Any]) -> tuple[str, Inputs]:
    """The recipe as text, and with its models on this disk."""
    register_dam()
    source, config = read_recipe(recipe, settings)
    return source, localise(config, options or MergeOptions(), lora_cache=cache_folder() / "lora")


def read_recipe(recipe: Recipe, settings: Mapping[str, Any]) -> tuple[str, MergeConfiguration]:
    """A recipe as text and as mergekit's configuration.

    Args:
        recipe: see `merge`.
        settings: shared settings that win over the recipe's; the text has them too.

    Raises:
        DamError: no YAML, or not a mergekit configuration.
    """
    name = f"recipe {recipe}" if isinstance(recipe, (str, Path)) else "recipe"
    try:
        if isinstance(recipe, MergeConfiguration):
            source = recipe.to_yaml()
        elif isinstance(recipe, Mapping):
            source = yaml.safe_dump(dict(recipe), sort_keys=False)
        else:
            source = Path(recipe).read_text("utf-8")
        content = yaml.safe_load(source)
        if settings and isinstance(content, dict):
            content["parameters"] = {**(content.get("parameters") or {}), **settings}
            source = yaml.safe_dump(content, sort_keys=False)
        return source, MergeConfiguration.model_validate(content)
    except (OSError, yaml.YAMLError, ValueError, RuntimeError) as error:
        raise DamError(
            name, expected="a mergekit configuration", got=" ".join(str(error).split())[:200],
            cure="See the example in the README.",
        ) from error  # fmt: skip
