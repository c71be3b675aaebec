"""Read a finished merge, check that it is complete, and choose the files to publish."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference, dtype_from_name
from safetensors import SafetensorError

from mergekit_dam.artifact.folder import EVALUATION_FILE, REPORT_JSON
from mergekit_dam.artifact.masks_file import MASKS_FILE, load_metadata
from mergekit_dam.errors import DamError
from mergekit_dam.io.hub_download import INPUTS_FILE
from mergekit_dam.io.untrusted import load_yaml
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.load_merged import config_without_code
from mergekit_dam.models.verify import verify_output
from mergekit_dam.publish.audit_page import read_merge_audit

RECIPE = "mergekit_config.yml"
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_LEFT_OUT = frozenset({".lock", ".tmp", ".part", ".incomplete"})
_TEXT = frozenset({".json", ".jsonl", ".yml", ".yaml", ".md", ".txt", ".html", ".jinja", ".csv", ".svg", ".model"})
_SECRET = re.compile(rb"hf_[A-Za-z0-9]{30,}")


@dataclass(frozen=True)
class Publication:
    """A merge directory that `contents_of` has checked.

    Attributes:
        folder: the directory.
        config: its config.json.
        recipe_text: text of mergekit_config.yml.
        recipe: the recipe, parsed.
        masks: metadata of dam_masks.safetensors; empty without that file.
        merge_audit: what the scan of the merge found (`read_merge_audit`); None if it was not scanned.
        num_tensors, num_parameters: of the merged weights.
    """

    folder: Path
    config: Mapping[str, Any]
    recipe_text: str
    recipe: Mapping[str, Any]
    masks: Mapping[str, Any]
    num_tensors: int
    num_parameters: int
    merge_audit: Mapping[str, Any] | None = None

    @property
    def is_dam(self) -> bool:
        return self.recipe.get("merge_method") == "dam"

    @property
    def references(self) -> tuple[ModelReference, ...]:
        """References of the base and then of the models, without duplicates."""
        models = [self.recipe["base_model"]] if self.recipe.get("base_model") else []
        models += [entry["model"] for entry in self.recipe.get("models") or []]
        models += [s["model"] for piece in self.recipe.get("slices") or [] for s in piece["sources"]]
        return tuple(dict.fromkeys(ModelReference.model_validate(model) for model in models))

    @property
    def commits(self) -> Mapping[str, str]:
        """Commits of the inputs from the Hub, by their name in the recipe."""
        file = self.folder / "dam" / INPUTS_FILE
        return _json(file) if file.is_file() else {}

    @property
    def records(self) -> tuple[Path, ...]:
        """Existing files that may hold measured results."""
        files = (self.folder / "dam" / name for name in (EVALUATION_FILE, REPORT_JSON))
        return tuple(file for file in files if file.is_file())

    @property
    def figures(self) -> tuple[str, ...]:
        """PNG files beside the report, as paths in the repository."""
        return tuple(p.relative_to(self.folder).as_posix() for p in sorted((self.folder / "dam").rglob("*.png")))


def contents_of(folder: Path) -> Publication:
    """Read a merge directory, and refuse an incomplete one.

    Raises:
        DamError: no directory, no config or recipe, missing or truncated weights, or tensors other than the base's.
    """
    config = _json(folder / "config.json")
    checkpoint = Checkpoint.open(folder)
    shapes = []
    for name in checkpoint:
        try:
            shapes.append(checkpoint.shape(name))
        except SafetensorError as error:
            raise DamError(
                f"output {folder}",
                expected=f"tensor {name} in the shard that the index names",
                got=str(error),
                cure="Merge again: this output is not complete.",
            ) from error
    recipe_text = _text(folder / RECIPE)
    try:
        recipe = load_yaml(recipe_text, str(folder / RECIPE))
        merge_method = recipe["merge_method"]
        publication = Publication(
            folder=folder,
            config=config,
            recipe_text=recipe_text,
            recipe=recipe,
            masks=load_metadata(folder / "dam" / MASKS_FILE) if merge_method == "dam" else {},
            num_tensors=len(shapes),
            num_parameters=sum(map(math.prod, shapes)),
            merge_audit=read_merge_audit(folder) if merge_method == "dam" else None,
        )
        base = publication.references[0].model.path if recipe.get("base_model") else None
    except DamError:
        raise
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise DamError(
            f"{folder / RECIPE}",
            expected="the recipe that mergekit wrote",
            got=" ".join(str(error).split())[:200],
            cure="Merge again, or give the directory that mergekit-yaml or mergekit-dam merge wrote.",
        ) from error
    if base is not None and Path(base).is_dir():
        override = publication.references[0].override_architecture
        base_config = config_without_code(Path(base))
        if override:
            base_config.architectures = [override]
        dtype = dtype_from_name(recipe.get("out_dtype") or recipe.get("dtype"))
        verify_output(folder, Path(base), dtype=dtype, base_config=base_config)
    return publication


def files_to_publish(publication: Publication, *, include_masks: bool) -> tuple[dict[str, Path], list[str]]:
    """Choose the files to publish, without the card.

    Returns:
        Path in the repository -> file, and notes on files that are left out.

    Raises:
        DamError: a file holds an access token.
    """
    files: dict[str, Path] = {}
    notes = []
    for path in _walk(publication.folder):
        name = path.relative_to(publication.folder).as_posix()
        if path.suffix in _PICKLES:
            notes.append(f"{name} is not published: pickle files can run code")
        elif name == f"dam/{MASKS_FILE}" and not include_masks:
            notes.append(f"{name} is not published (--include-masks publishes it)")
        elif path.suffix not in _LEFT_OUT and name != "README.md":
            files[name] = path
    refuse_secrets(files.items())
    return files, notes


def refuse_secrets(files: Iterable[tuple[str, Path]], tokens: Iterable[str] = ()) -> None:
    """Refuse text files that hold the user's access token, or text in the form of a Hub token."""
    own = [token.encode() for token in tokens if token]
    for name, path in files:
        if path.suffix not in _TEXT:
            continue
        content = path.read_bytes()
        if _SECRET.search(content) or any(token in content for token in own):
            raise DamError(
                f"file {name}",
                expected="no access token in the files to publish",
                got="an access token (not shown)",
                cure="Remove it from the file, and revoke it at https://huggingface.co/settings/tokens.",
            )


def _walk(folder: Path) -> Iterator[Path]:
    """Yield files in a fixed order, without hidden files and links out of the directory."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and path.resolve().is_relative_to(root):
            yield path


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DamError(
            f"{path}",
            expected="a file that mergekit writes when a merge has succeeded",
            got="none" if isinstance(error, FileNotFoundError) else str(error),
            cure="Wait for the merge to end, or merge again.",
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamError):
            raise
        values = None
    if not isinstance(values, dict):
        raise DamError(f"{path}", expected="a JSON object", got="something else", cure="Merge again.")
    return values
