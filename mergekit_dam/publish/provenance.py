"""What the Hub and the inputs' own cards say about the inputs of a merge: ids, licences, calibration data sets."""

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
    """Look the inputs up, and settle the licence.

    Args:
        publication: the merge.
        api: the Hub.
        licence: what the user says; None to derive it.
        public: whether all the world will see it, which takes a licence.

    Returns:
        What was found, and warnings.

    Raises:
        DamError: public, and no licence given or derived.
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
    found = [one for one in _calibration(publication) if _look_up(one, partial(api.dataset_info, one), warnings)]
    return Provenance(ids, chosen, found), warnings


def _parts(publication: Publication) -> Iterator[tuple[str, str | None]]:
    """Model and LoRA paths with their revisions, each once."""
    seen = set()
    for reference in publication.references:
        for part in (reference.model, reference.lora):
            if part is not None and part.path not in seen:
                seen.add(part.path)
                yield part.path, part.revision


def _calibration(publication: Publication) -> list[str]:
    """Data sets of the recipe that are not on this disk, without their revision."""
    blocks = [publication.recipe, *(publication.recipe.get("models") or [])]
    named = [(one.get("parameters") or {}).get("calibration") for one in blocks]
    sources = [str(one) for one in named if one and not Path(str(one)).expanduser().exists()]
    return list(dict.fromkeys(one.partition("@")[0] for one in sources if is_hub_id(one.partition("@")[0])))


def _look_up(name: str, call: Callable[[], Any], warnings: list[str]) -> Any | None:
    """What the Hub says of an id; None, with a warning, where it knows none."""
    if not is_hub_id(name):
        warnings.append(f"{name!r} is neither on this disk nor an id of the Hub: the card names it without a link")
        return None
    try:
        return call()
    except RepositoryNotFoundError:
        warnings.append(f"the Hub knows no {name!r}, or this token may not see it: the card names it without a link")
    except HUB_ERRORS as error:
        warnings.append(f"{name!r} was not looked up: {hub_error(error, name)}")
    return None


def _own_licence(folder: Path) -> str | None:
    """The licence in a local model's card, if it has one that can be read."""
    try:
        return _licence_of(ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data)
    except (OSError, ValueError):
        return None


def _licence_of(data: Any) -> str | None:
    found = getattr(data, "license", None)
    return found if isinstance(found, str) and found.strip() else None


def _derived(licences: dict[str, str | None], warnings: list[str], *, public: bool) -> str | None:
    """The inputs' common licence. Which one a mix allows is for a person to say, not for us."""
    distinct = set(licences.values())
    told = ", ".join(f"{path}: {licence or 'unknown'}" for path, licence in licences.items())
    if len(distinct) == 1 and (common := distinct.pop()) is not None:
        warnings.append(f"licence {common!r} is taken from the inputs, which all have it; --license sets another")
        return common
    if public:
        raise DamError(
            "licence of a public model",
            expected="one that all inputs share, or --license",
            got=told,
            cure="Give --license with one that the inputs' licences allow, e.g. --license apache-2.0.",
        )
    warnings.append(f"no licence in the card, since the inputs do not agree on one ({told}); give --license")
    return None


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
