"""Look up the inputs of a merge on the Hub and in their cards: ids, licences, calibration data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from mergekit_dam.errors import DamError
from mergekit_dam.io.hub_client import HUB_ERRORS, hub_error, is_hub_id
from mergekit_dam.publish.contents import Publication


def provenance(
    publication: Publication, api: HfApi, *, licence: str | None, public: bool
) -> tuple[Provenance, list[str]]:
    """Look up the inputs, and choose the licence.

    Args:
        publication: the merge.
        api: client of the Hub.
        licence: the user's choice; None to derive it from the inputs.
        public: whether the repository is public, which needs a licence.

    Returns:
        The provenance, and warnings.

    Raises:
        DamError: the repository is public, and no licence is given or derived.
    """
    ids: dict[str, str] = {}
    licences: dict[str, str | None] = {}
    warnings: list[str] = []
    for path, revision in _parts(publication):
        if Path(path).exists():
            licences[path] = _own_licence(Path(path))
            continue
        info = _look_up(path, partial(api.model_info, path, revision=revision), warnings)
        licences[path] = _licence_of(getattr(info, "card_data", None))
        if info is not None:
            ids[path] = path
    chosen = licence or _derived(licences, warnings, public=public)
    datasets = [name for name in _calibration(publication) if _look_up(name, partial(api.dataset_info, name), warnings)]
    return Provenance(ids, chosen, datasets), warnings


def _parts(publication: Publication) -> Iterator[tuple[str, str | None]]:
    """Yield model and LoRA paths with their revisions, without duplicates."""
    seen = set()
    for reference in publication.references:
        for part in (reference.model, reference.lora):
            if part is not None and part.path not in seen:
                seen.add(part.path)
                yield part.path, part.revision


def _calibration(publication: Publication) -> list[str]:
    """Ids of the recipe's data sets on the Hub, without their revision."""
    blocks = [publication.recipe, *(publication.recipe.get("models") or [])]
    settings = [(block.get("parameters") or {}).get("calibration") for block in blocks]
    ids = [str(s).partition("@")[0] for s in settings if s and not Path(str(s)).expanduser().exists()]
    return list(dict.fromkeys(filter(is_hub_id, ids)))


def _look_up(name: str, call: Callable[[], Any], warnings: list[str]) -> Any | None:
    """Call the Hub for an id; None, with a warning, for an unknown id or after an error."""
    if not is_hub_id(name):
        warnings.append(f"{name!r} is neither a local path nor a Hub id: the card names it without a link")
        return None
    try:
        return call()
    except RepositoryNotFoundError:
        warnings.append(f"the Hub has no {name!r}, or this token has no access to it: the card names it without a link")
    except HUB_ERRORS as error:
        warnings.append(f"{name!r} was not looked up: {hub_error(error, name)}")
    return None


def _own_licence(folder: Path) -> str | None:
    """The licence in a local model's card; None without a readable card."""
    try:
        return _licence_of(ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data)
    except (OSError, ValueError):
        return None


def _licence_of(data: Any) -> str | None:
    licence = getattr(data, "license", None)
    return licence if isinstance(licence, str) and licence.strip() else None


def _derived(licences: dict[str, str | None], warnings: list[str], *, public: bool) -> str | None:
    """The inputs' common licence, else None; which licence a mix allows is a person's decision."""
    distinct = set(licences.values())
    listed = ", ".join(f"{path}: {licence or 'unknown'}" for path, licence in licences.items())
    if len(distinct) == 1 and (common := distinct.pop()) is not None:
        warnings.append(f"licence {common!r} is the licence of all inputs; --license sets another")
        return common
    if public:
        raise DamError(
            "licence of a public model",
            expected="a licence that all inputs share, or --license",
            got=listed,
            cure="Give --license with a licence that the inputs' licences allow, e.g. --license apache-2.0.",
        )
    warnings.append(
        f"no licence in the card, since the inputs have different or unknown ones ({listed}); give --license"
    )
    return None


@dataclass(frozen=True)
class Provenance:
    """Facts about the inputs beyond the recipe.

    Attributes:
        hub_ids: model or LoRA path in the recipe -> its Hub id, for inputs that the Hub has.
        licence: identifier for the card, or None.
        datasets: ids of calibration data sets that the Hub has.
    """

    hub_ids: Mapping[str, str]
    licence: str | None
    datasets: Sequence[str] = ()
