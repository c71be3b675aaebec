"""Vaccinate a model of a suite, as a user would by `mergekit-dam clean`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dam_bench.suites.base import Poison
from dam_bench.victims.model_store import ModelStore
from mergekit_dam import clean
from mergekit_dam.io.cache import code_digest
from mergekit_dam.vaccine.run import Cleaned


def clean_model(
    store: ModelStore, task: str, poison: Poison | None, seed: int, settings: Mapping[str, Any], out: Path
) -> Cleaned:
    """Clean a model into a folder.

    Args:
        store: the suite's models.
        task: task of the model.
        poison: the model's backdoor, to find it in the store; cleaning does not see it.
        seed: of the model and of the vaccination.
        settings: of the vaccination.
        out: folder to write.
    """
    suite, model, base = store.suite, store.model(task, poison, seed), store.base()
    recipe = {
        "merge_method": "dam",
        "base_model": suite.base_entry(base),
        "models": [
            {
                "model": str(model),
                "parameters": {"calibration": str(store.calibration(task)), **suite.model_parameters(model)},
            }
        ],
        "parameters": dict(suite.shared_parameters(base)),
    }
    with contextlib.redirect_stderr(io.StringIO()):
        (cleaned,) = clean(recipe, out, seed=seed, **settings)
    return cleaned


def cleaned_model(store: ModelStore, task: str, poison: Poison | None, seed: int, settings: Mapping[str, Any]) -> Path:
    """Return the folder of a cleaned model, made if missing, and again if the code of mergekit-dam has changed."""
    key = {"settings": dict(settings), "code": code_digest()}
    return store.made_from(
        task, poison, seed, "cleaned", key, lambda folder: clean_model(store, task, poison, seed, settings, folder)
    )
