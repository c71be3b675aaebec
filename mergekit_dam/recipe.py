"""Open a recipe, download its models, and merge or learn with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
import yaml
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_dam.artifact.folder import copy_artifact, remove_artifact
from mergekit_dam.artifact.masks_file import MASKS_FILE, LearnedMasks
from mergekit_dam.artifact.match import require_inputs_of
from mergekit_dam.artifact.scan_file import StoredScan
from mergekit_dam.config import ModelSettings
from mergekit_dam.engine.device import device_of
from mergekit_dam.engine.group import is_first, process_group
from mergekit_dam.engine.progress import progress_bar
from mergekit_dam.engine.shards import ALONE, Shards
from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.errors import DamError, Interrupted
from mergekit_dam.io.cache import cache_folder
from mergekit_dam.io.files import cannot_write
from mergekit_dam.io.hub_download import LocalRecipe, localise, record_inputs
from mergekit_dam.io.untrusted import load_yaml, read_utf8
from mergekit_dam.learn.controls import run_controls, with_controls
from mergekit_dam.learn.estimate import scans_merge
from mergekit_dam.learn.run import find_or_learn
from mergekit_dam.models.finished import finished_merge
from mergekit_dam.models.plan import Plan, model_input
from mergekit_dam.models.verify import verify_output
from mergekit_dam.plugin.method import register_dam
from mergekit_dam.plugin.options import refuse_launcher, require_options
from mergekit_dam.plugin.output import remove_stale_files
from mergekit_dam.plugin.planner import plan_of, require_chat_template
from mergekit_dam.plugin.recipe_keys import require_known_keys
from mergekit_dam.scan.audit import Audit, audit, merge_settings
from mergekit_dam.tasks import build_tasks, family_of
from mergekit_dam.tasks.content import digests_of
from mergekit_dam.tasks.preflight import longest_texts, preflight, renamed_classes
from mergekit_dam.tasks.readout import has_tokenizer

LOG = logging.getLogger(__name__)
RECIPE_FILE = "mergekit_config.yml"  # of an output, as mergekit calls it
Recipe: TypeAlias = str | Path | Mapping[str, Any] | MergeConfiguration


def open_recipe(recipe: Recipe, *, options: MergeOptions | None = None, least: int = 2, **settings: Any) -> OpenRecipe:
    """Read a recipe, download its models, and register `dam` with mergekit; every command starts with it.

    Args: as for `merge`; the recipe needs at least `least` models.

    Raises:
        DamError: no mergekit configuration, or a model that cannot be read or downloaded.
    """
    register_dam()
    require_options(options or MergeOptions())
    source, config = read_recipe(recipe, settings)
    return OpenRecipe(source, localise(config, options or MergeOptions(), lora_cache=cache_folder() / "lora"), least)


def open_audit(
    source: Recipe, *, options: MergeOptions | None = None, **settings: Any
) -> tuple[OpenRecipe, Path | None]:
    """Open what is to be audited: a recipe, or the recipe in the directory of a merge of `dam`.

    Args: as for `merge`; `source` may also be such a directory.

    Returns:
        The recipe, and the directory if it was one.

    Raises:
        DamError: as for `open_recipe`, or a directory that holds no merge of `dam`.
    """
    merged = merged_folder(source)
    return open_recipe(source if merged is None else merged / RECIPE_FILE, options=options, **settings), merged


def merged_folder(source: Recipe) -> Path | None:
    """Return the directory if `source` is one of a merge of `dam`; None for a recipe.

    Raises:
        DamError: a directory without the recipe of such a merge.
    """
    folder = Path(source) if isinstance(source, (str, Path)) else None
    if folder is None or not folder.is_dir():
        return None
    method, file = None, folder / RECIPE_FILE
    if file.is_file():
        recipe = load_yaml(read_utf8(file, str(file)), str(file))
        method = recipe.get("merge_method") if isinstance(recipe, dict) else None
    if method != "dam":
        raise DamError(
            f"merge {folder}",
            expected=f"a directory of dam, whose {RECIPE_FILE} names models and calibration data",
            got=f"no {RECIPE_FILE}" if method is None else f"a merge by {method}",
            cure="Give the directory that `mergekit-dam merge` or mergekit-yaml wrote, or a recipe.",
        )
    return folder


@contextmanager
def preview(recipe: Recipe, *, options: MergeOptions | None = None, **settings: Any) -> Iterator[Plan]:
    """Yield the plan of a `dam` recipe without downloading weights; it is valid during the context.

    Args: as for `merge`.

    Raises:
        DamError: as for `open_recipe`, and any fault that `plan_of` refuses.
    """
    register_dam()
    require_options(options or MergeOptions())
    source, config = read_recipe(recipe, settings)
    with TemporaryDirectory(prefix="mergekit-dam-") as folder:
        yield OpenRecipe(
            source,
            localise(config, options or MergeOptions(), lora_cache=cache_folder() / "lora", headers=Path(folder)),
        ).plan


@dataclass(frozen=True)
class OpenRecipe:
    """A recipe whose models are on this disk.

    Attributes:
        source: text of the recipe, with the settings that override it.
        inputs: mergekit's configuration and options, with every model on this disk.
        least: number of models that it needs at least.
    """

    source: str
    inputs: LocalRecipe
    least: int = 2

    @property
    def is_dam(self) -> bool:
        """Whether the merge method is `dam`."""
        return str(self.inputs.config.merge_method) == "dam"

    @cached_property
    def plan(self) -> Plan:
        """The plan of a `dam` recipe; unknown settings are refused.

        Raises:
            DamError: another merge method, or any fault that `plan_of` refuses.
        """
        if not self.is_dam:
            raise DamError(
                "merge_method",
                expected="dam",
                got=str(self.inputs.config.merge_method),
                cure="Only dam learns masks. `mergekit-dam merge` runs recipes of other methods, without `--dry-run`.",
            )
        return plan_of(self.inputs.config, self.inputs.options, least=self.least)

    def merge(self, out: Path, *, resume: bool = True) -> LearnedMasks | None:
        """Merge as `api.merge` does, without a report; return the applied masks, None for other methods than `dam`."""
        refuse_launcher()
        config, options = self.inputs.config, self.inputs.options
        options = _without_missing_tokenizer(config, options)
        handoff = None
        with ExitStack() as around:
            if self.is_dam:
                plan = around.enter_context(_planned(self.plan, resume=resume))  # refuses faults before mergekit starts
                handoff = around.enter_context(register_dam().with_plan(config, options, plan))
                self._warn()
            around.enter_context(remove_stale_files(out))
            try:
                run_merge(config, str(out), options, config_source=self.source)
            except KeyboardInterrupt as stop:
                if isinstance(stop, Interrupted):
                    raise
                raise Interrupted("the same command merges again; masks that were learned are in the cache") from stop
        if not self.is_dam:
            remove_artifact(out / "dam")
        record_inputs(out / "dam", self.inputs.commits)
        if config.base_model is not None:
            base = model_input("base", config.base_model, ModelSettings(), options)
            dtype = dtype_from_name(config.out_dtype or config.dtype)
            verify_output(out, base.path, dtype=dtype, base_config=base.config)
        return None if handoff is None else handoff.masks

    def learn(self, out: Path | None, *, resume: bool = True) -> Path:
        """Learn as `api.learn_masks` does; processes of `accelerate launch` learn together, and the first writes."""
        plan = self.plan
        if plan.config.masks is not None:
            raise DamError(
                "setting 'masks'",
                expected="no masks, since masks are to be learned",
                got=plan.config.masks,
                cure="Remove it, or merge with these masks.",
            )
        if out is None and not resume:
            raise DamError(
                "learning without the cache",
                expected="a folder for the masks",
                got="none",
                cure="Name one: masks that are learned without the cache are not put into it.",
            )
        config = plan.config
        if is_first():
            self._warn()
        with (
            process_group(device=config.device, timeout=config.constants.worker_timeout) as (shards, device),
            _planned(plan, resume=resume, shards=shards) as planned,
        ):
            quiet = self.inputs.options.quiet
            copy = None if out is None else lambda folder: _copy(folder, out)
            folder, _ = find_or_learn(planned, quiet=quiet, shards=shards, device=device, copy=copy)
        return (out or folder) / MASKS_FILE

    def audit(
        self, *, source: str, threshold: float | None = None, merge: Path | None = None, controls: int = 0
    ) -> Audit:
        """Scan the input models, or the merge of them; a scan of the same content is taken from the cache.

        Args:
            source: the recipe, or the directory of the merge, as the user named it.
            threshold: suspicion from which a model is over; None: the setting `suspicion`.
            merge: directory of a merge that was made by this recipe.
            controls: backdoors to plant in copies of each model, which are scanned as well.

        Raises:
            DamError: as for `merge`, or models that are not those that were merged.
        """
        plan, quiet = self.plan, self.inputs.options.quiet
        device, seconds = device_of(plan.config.device), dict[str, float]()
        tasks, digests = build_tasks(plan, device), digests_of(plan)
        finished, scanned = None, plan
        if merge is not None:
            require_inputs_of(merge / "dam" / MASKS_FILE, plan, digests)
            finished = finished_merge(plan, merge)
            scanned = replace(plan, config=merge_settings(plan.config))
            # a task's head is in its own model's files, the rest in the merge's
            own = {model.name: f"{finished.sha256} {digests[model.name]}" for model in plan.models}
            digests = {plan.base.name: digests[plan.base.name], **own}

        def progress(steps: Iterable[int], title: str) -> Iterable[int]:
            begun = time.perf_counter()
            yield from progress_bar(steps, title, quiet=quiet)
            seconds[title] = round(time.perf_counter() - begun, 3)

        threshold = plan.config.suspicion if threshold is None else threshold
        known = StoredScan(scanned, tasks, digests, seconds, quiet=quiet)
        try:
            found = audit(
                plan,
                tasks,
                threshold=threshold,
                source=source,
                device=device,
                progress=progress,
                known=known,
                merge=finished,
            )
            if not controls:
                return found
            vectors = TaskVectors(plan)
            with torch.enable_grad():  # mergekit may have switched gradients off
                planted = run_controls(
                    tasks if finished is None else [task.with_weights(finished.tensors) for task in tasks],
                    {spec.name: vectors.base(spec.name).to(device) for spec in plan.tensors},
                    plan.config,
                    threshold=threshold,
                    count=controls,
                    named=found.suspects,
                    keys=[file.stem for file in known.files],
                    progress=progress,
                    twins=finished is None,
                    cache=plan.cache,
                )
        except KeyboardInterrupt as stop:
            raise Interrupted("the same command goes on, since what was scanned is in the cache") from stop
        return replace(found, facts=with_controls(found.facts, planted, source))

    def scans_merge(self, wanted: bool | None) -> bool:
        """Whether a finished merge of this recipe is scanned, by the user's wish (None: where it is cheap)."""
        if not self.is_dam or wanted is not None:
            return self.is_dam and bool(wanted)
        # a causal LM's scan reads tokens, however long its texts are
        texts = not family_of(self.plan).classifies and self.plan.config.masks is None
        return scans_merge(self.plan, longest_texts(preflight(self.plan)[0]) if texts else None)

    def _warn(self) -> None:
        """Warn of classes whose names differ, as `check` does; the merge continues."""
        for warning in renamed_classes(self.plan):
            LOG.warning("dam: %s", warning)


def _without_missing_tokenizer(config: MergeConfiguration, options: MergeOptions) -> MergeOptions:
    """Switch off `copy_tokenizer` if the model that mergekit copies the tokenizer from has none, as an image model.

    Otherwise mergekit would report a failure with a traceback after a successful merge.
    """
    donor = config.base_model or config.referenced_models()[0]
    merged = donor.merged(
        cache_dir=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
        lora_merge_dtype=options.lora_merge_dtype,
    )
    if has_tokenizer([Path(merged.local_path(cache_dir=options.transformers_cache))]):
        return options
    return options.model_copy(update={"copy_tokenizer": False})


def _copy(folder: Path, out: Path) -> None:
    """Copy an artefact to a folder that the user named.

    Raises:
        DamError: no space, or no permission to write.
    """
    try:
        copy_artifact(folder, out)
    except OSError as error:
        raise cannot_write(out, error) from error


@contextmanager
def _planned(plan: Plan, *, resume: bool, shards: Shards = ALONE) -> Iterator[Plan]:
    """Give the plan; without `resume` one that keeps all in an empty folder, which is removed in the end."""
    if resume:
        yield plan
        return
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="anew-", dir=root) as temporary:
        folder = shards.all_gather_dict({"folder": temporary} if shards.rank == 0 else {})["folder"]
        try:
            yield replace(plan, cache=Path(folder))
            shards.barrier()  # the folder is removed when no process reads it any more
        except KeyboardInterrupt as stop:
            raise Interrupted("the same command starts over, since --no-resume keeps nothing") from stop


def read_recipe(recipe: Recipe, settings: Mapping[str, Any]) -> tuple[str, MergeConfiguration]:
    """Return a recipe as text and as mergekit's configuration.

    Args:
        recipe: see `merge`.
        settings: shared settings that override the recipe's, also in the text; None keeps the recipe's value.

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
            source = read_utf8(Path(recipe), name)
        content = load_yaml(source, name)
        changed = {key: value for key, value in settings.items() if value is not None}
        if changed and isinstance(content, dict):
            content["parameters"] = {**(content.get("parameters") or {}), **changed}
            source = yaml.safe_dump(content, sort_keys=False)
        require_known_keys(content)
        config = MergeConfiguration.model_validate(content)
        require_chat_template(config)
        return source, config
    except (OSError, yaml.YAMLError, ValueError, RuntimeError, TypeError, RecursionError) as error:
        if isinstance(error, DamError):
            raise
        raise DamError(
            name,
            expected="a mergekit configuration",
            got=" ".join(str(error).split())[:200],
            cure="In a model's name + adds one LoRA: rename a folder that has + in its name, or link to it."
            if "Can't parse" in str(error)
            else "See the example in the README.",
        ) from error
