"""Store masks and coefficients of finished windows, one file per window, during a run. T models, P masks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_dam.config import DamConfig
from mergekit_dam.engine.merged_model import MergedModel
from mergekit_dam.engine.shards import Shards
from mergekit_dam.io.files import replacing
from mergekit_dam.learn.fit import MaskFit
from mergekit_dam.learn.masks import ProbabilityBytes, final_probabilities, mask_facts
from mergekit_dam.merging.mask_bytes import to_bytes
from mergekit_dam.merging.mask_keys import own_key
from mergekit_dam.merging.mask_product import MaskProduct, means_of

_COEFFICIENTS = "coefficients"


class WindowMasks:
    """The files of a run's windows; tensors that are read are views of the files.

    Args:
        folder: folder of the files; all processes see it.
        shards: processes that share the masks' rows.
        num_models: T.
        config: shared settings.
    """

    def __init__(self, folder: Path, shards: Shards, num_models: int, config: DamConfig) -> None:
        self.folder, self.shards, self.num_models = folder, shards, num_models
        self.rescale = config.constants.rescale

    def has(self, number: int) -> bool:
        """Whether the window is finished."""
        return self._path(number).is_file()

    def write(self, number: int, fit: MaskFit | None) -> None:
        """Write the result of a window, None if the window had no masks; collective over the processes."""
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {"kept": {}, "entries": {}, "own_masks": []}
        if fit is not None:
            probabilities, of_masks = final_probabilities(fit.masks), mask_facts(fit.masks)
            names = fit.model.mask_names
            tensors |= {f"{mask}/{key}": v.cpu() for mask, by_key in probabilities.items() for key, v in by_key.items()}
            columns_TP = fit.coefficients.expand(-1, len(names)).cpu()
            tensors |= {f"{_COEFFICIENTS}/{n}": c.clone() for n, c in zip(names, columns_TP.unbind(1), strict=True)}
            entries = {name: sum(math.prod(shape) for shape in m.shapes.values()) for name, m in fit.masks.items()}
            kept = {name: density * entries[name] for name, density in of_masks["densities"].items()}
            facts = {"kept": kept, "entries": entries, "own_masks": of_masks["own_masks"]}
        if self.shards.rank == 0:
            with replacing(self._path(number)) as temporary:
                save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})
        self.shards.barrier()

    def from_fit(self, fit: MaskFit | None, model: MergedModel) -> tuple[dict[str, MaskProduct], Tensor]:
        """Return what `read` will return for a window that is not written yet."""
        if fit is None:
            return {}, torch.ones(self.num_models, 1, device=model.device)
        products = {}
        for name in model.mask_names:
            shared = [mask for mask in fit.masks.values() if not mask.owners]
            owned = [mask for mask in fit.masks.values() if mask.owners]
            factors = tuple(to_bytes(mask.expectation(name)) for mask in shared)
            own = tuple(to_bytes(mask.expectation(key)) for mask in owned for key in mask.keys_of(name))
            means = tuple(m.mean(name, f) for m, f in zip(shared, factors, strict=True)) if self.rescale else None
            products[name] = MaskProduct(factors, means=means, own=own)
        return products, fit.coefficients.detach()

    def read(self, model: MergedModel, numbers: Iterable[int]) -> tuple[dict[str, MaskProduct], Tensor]:
        """Read this process's rows of M of a model's tensors, and its coefficients (T, P), from windows' files."""
        products: dict[str, MaskProduct] = {}
        columns: dict[str, Tensor] = {}
        for number in numbers:
            with safe_open(self._path(number), framework="pt") as file:
                facts, keys = json.loads(file.metadata()["facts"]), set(file.keys())
                shared = [mask for mask in facts["kept"] if mask not in facts["own_masks"]]
                for name in (n for n in model.mask_names if f"{_COEFFICIENTS}/{n}" in keys):
                    columns[name] = file.get_tensor(f"{_COEFFICIENTS}/{name}")
                    factors = [file.get_tensor(f"{mask}/{name}") for mask in shared]
                    own = [
                        file.get_tensor(f"{mask}/{own_key(t, name)}")
                        for mask in facts["own_masks"]
                        for t in range(self.num_models)
                    ]
                    means = means_of(factors) if self.rescale else None
                    products[name] = MaskProduct(
                        tuple(self._local(t, model) for t in factors),
                        means=means,
                        own=tuple(self._local(t, model) for t in own),
                    )
        if not model.mask_names:
            return {}, torch.ones(self.num_models, 1, device=model.device)
        return products, torch.stack([columns[name] for name in model.mask_names], dim=1).to(model.device)

    def _local(self, mask: Tensor, model: MergedModel) -> Tensor:
        """Return this process's rows of a mask, on the device."""
        return self.shards.local(mask).to(model.device)

    def read_all(self, count: int) -> ProbabilityBytes:
        """Read all probabilities as bytes, by mask and key, in the first process; elsewhere return an empty mapping."""
        probabilities: ProbabilityBytes = {}
        for number in range(count) if self.shards.rank == 0 else ():
            with safe_open(self._path(number), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no iterator there)
                    mask, _, name = key.partition("/")
                    if mask != _COEFFICIENTS:
                        probabilities.setdefault(mask, {})[name] = file.get_tensor(key)
        return probabilities

    def facts(self, count: int) -> dict[str, Any]:
        """Return the result of `mask_facts` for the masks of all windows together."""
        by_window: list[Mapping[str, Any]] = []
        for number in range(count):
            with safe_open(self._path(number), framework="pt") as file:
                by_window.append(json.loads(file.metadata()["facts"]))
        names = dict.fromkeys(name for facts in by_window for name in facts["kept"])
        sums = {
            key: {name: sum(facts[key].get(name, 0) for facts in by_window) for name in names}
            for key in ("kept", "entries")
        }
        return {
            "densities": {name: sums["kept"][name] / max(1, sums["entries"][name]) for name in names},
            "own_masks": list(dict.fromkeys(name for facts in by_window for name in facts["own_masks"])),
        }

    def _path(self, number: int) -> Path:
        return self.folder / f"masks-{number}.safetensors"
