"""The merged weights of one step where they exist block by block only, with the gradients that add up meanwhile."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dam.engine.frozen_models import FrozenModels
from mergekit_dam.engine.host_memory import drop_pages
from mergekit_dam.engine.streamed_weights import StreamedWeights
from mergekit_dam.merging.chunks import Mask, gradient_shape
from mergekit_dam.merging.rule import gradients
from mergekit_dam.models.plan import TensorSpec


class MergedBlocks(StreamedWeights):
    """theta by output name, merged when a block asks for it; backward passes leave dL/dM and dL/dlambda in `store`.

    Args:
        names: of all tensors.
        merger: makes them.
    """

    def __init__(self, names: Iterable[str], merger: BlockMerger) -> None:
        super().__init__(names, merger.form, consume=merger.consume, release=merger.frozen.release, ahead=merger.ahead)
        self.store = merger.store


class BlockMerger:
    """What `MergedBlocks` calls; it does not know them, so that nothing of a step outlives its last user.

    Args:
        frozen: theta_0 and theta_t.
        changed: tensors that are merged.
        masks: our rows of M by mask name.
        lambdas: coefficients, where the merge rule reads them.
        merging: begins to merge one tensor; what it returns waits for everyone's rows.
        of: lambda of the T models for one tensor, a view (T,) of coefficients.

    Attributes:
        store: of the sums over the backward passes so far.
    """

    def __init__(
        self, frozen: FrozenModels, changed: Sequence[TensorSpec], masks: Mapping[str, Mask], lambdas: Tensor, *,
        merging: Callable[[TensorSpec], Callable[[], Tensor]], of: Callable[[Tensor, TensorSpec], Tensor],
    ) -> None:  # fmt: skip
        self.frozen, self._masks, self._lambdas = frozen, masks, lambdas
        self._specs = {spec.name: spec for spec in changed}
        self._merging, self._of = merging, of
        self._coming: dict[str, Callable[[], Tensor]] = {}
        self.store = GradientStore(on_disk=frozen.offload == "disk")

    def form(self, name: str) -> Tensor:
        """One tensor, whole."""
        frozen = self.frozen
        if name not in self._specs:
            return frozen.computed(frozen.moved(frozen.base[name]))
        arrived = self._coming.pop(name, None) or self._merging(self._specs[name])
        return arrived()

    def ahead(self, names: Iterable[str]) -> None:
        """These are asked for next."""
        names = list(names)
        self.frozen.ahead(names)
        for name in names if self.frozen.shards.size > 1 else ():
            if name in self._specs and name not in self._coming:
                self._coming[name] = self._merging(self._specs[name])

    def consume(self, name: str, gradient: Tensor) -> None:
        """dL/dtheta of one tensor, from one pass."""
        spec, frozen = self._specs.get(name), self.frozen
        if spec is None:
            return
        mask = self._masks[spec.mask_name]
        found = self.store.of(spec.mask_name, gradient_shape(mask), frozen.device)
        gradient = gradient if frozen.shards.size == 1 else frozen.shards.scatter(gradient.float())
        if not gradient.numel():
            return
        gradients(
            gradient, frozen.moved(frozen.base[name]), frozen.models_here(name), self._of(self._lambdas, spec), mask,
            mask_out=found, coefficient_out=self._of(self.store.coefficients(self._lambdas, frozen.device), spec),
        )  # fmt: skip
        self.store.rest(spec.mask_name, found)


class GradientStore:
    """Sums by mask name.

    Args:
        on_disk: keep dL/dM in unnamed temporary files (folder: TMPDIR), of which no page stays in memory between uses.
    """

    def __init__(self, *, on_disk: bool) -> None:
        self._on_disk = on_disk
        self._sums: dict[str, Tensor] = {}
        self._coefficients: Tensor | None = None

    def of(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """The sum for one mask, float32, to be added to; zero at first."""
        if name not in self._sums:
            if self._on_disk and math.prod(shape) > 0:
                self._sums[name] = _mapped(math.prod(shape)).view(shape)
            else:
                self._sums[name] = torch.zeros(shape, dtype=torch.float32, device=device)
        found = self._sums[name]
        return found.to(device) if self._on_disk and device.type != "cpu" else found

    def rest(self, name: str, now: Tensor) -> None:
        """The sum is not needed for a while; `now` is what `of` gave, with its new values."""
        if self._on_disk:
            kept = self._sums[name]
            if now is not kept:
                kept.copy_(now)
            drop_pages(kept)

    def coefficients(self, like: Tensor, device: torch.device) -> Tensor:
        """The sum for lambda, shaped like it."""
        if self._coefficients is None:
            self._coefficients = torch.zeros(like.shape, dtype=torch.float32, device=device)
        return self._coefficients

    def take_coefficients(self, like: Tensor) -> Tensor:
        """The sum for lambda; zero from then on."""
        found, self._coefficients = self.coefficients(like, like.device), None
        return found

    def take(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """All sums, one by one; each is forgotten once the next one is asked for."""
        for name in list(self._sums):
            yield name, self._sums.pop(name).to(device)


def _mapped(numel: int) -> Tensor:
    """Zeros in a file that is gone from its folder at once and from the disk with the tensor."""
    with tempfile.NamedTemporaryFile(prefix="dam-gradient-") as file:
        file.truncate(4 * numel)
        return torch.from_file(str(Path(file.name)), shared=True, size=numel, dtype=torch.float32)
