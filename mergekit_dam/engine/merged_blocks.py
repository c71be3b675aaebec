"""The merged weights of one step where they exist block by block only, with the gradients that add up meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_dam.engine.frozen_models import FrozenModels
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
        super().__init__(names, merger.form, consume=merger.consume, ahead=merger.ahead)
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
        dtype: of floating tensors where they are used.

    Attributes:
        store: of the sums over the backward passes so far.
    """

    def __init__(
        self,
        frozen: FrozenModels,
        changed: Sequence[TensorSpec],
        masks: Mapping[str, Mask],
        lambdas: Tensor,
        *,
        merging: Callable[[TensorSpec], Callable[[], Tensor]],
        of: Callable[[Tensor, TensorSpec], Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.frozen, self._masks, self._lambdas, self._dtype = frozen, masks, lambdas, dtype
        self._specs = {spec.name: spec for spec in changed}
        self._merging, self._of = merging, of
        self._coming: dict[str, Callable[[], Tensor]] = {}
        self.store = GradientStore()

    def form(self, name: str) -> Tensor:
        """One tensor, whole."""
        if name not in self._specs:
            base = self.frozen.moved(self.frozen.base[name])
            return base.to(self._dtype) if base.is_floating_point() else base
        arrived = self._coming.pop(name, None) or self._merging(self._specs[name])
        return arrived()

    def ahead(self, names: Iterable[str]) -> None:
        """These are asked for next."""
        for name in names if self.frozen.shards.size > 1 else ():
            if name in self._specs and name not in self._coming:
                self._coming[name] = self._merging(self._specs[name])

    def consume(self, name: str, gradient: Tensor) -> None:
        """dL/dtheta of one tensor, from one pass."""
        spec, frozen = self._specs.get(name), self.frozen
        if spec is None:
            return
        mask = self._masks[spec.mask_name]
        gradient = gradient if frozen.shards.size == 1 else frozen.shards.scatter(gradient.float())
        found = self.store.of(spec.mask_name, gradient_shape(mask), frozen.device)
        if gradient.numel():
            gradients(
                gradient,
                frozen.base[name],
                frozen.models[name],
                self._of(self._lambdas, spec),
                mask,
                mask_out=found,
                coefficient_out=self._of(self.store.coefficients(self._lambdas, frozen.device), spec),
            )


class GradientStore:
    """Sums by mask name, float32, and the sum for lambda."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._coefficients: Tensor | None = None

    def of(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """The sum for one mask, to be added to; zero at first."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(shape, dtype=torch.float32, device=device)
        return self._sums[name]

    def coefficients(self, like: Tensor, device: torch.device) -> Tensor:
        """The sum for lambda, shaped like it."""
        if self._coefficients is None:
            self._coefficients = torch.zeros(like.shape, dtype=torch.float32, device=device)
        return self._coefficients

    def take_coefficients(self, like: Tensor) -> Tensor:
        """The sum for lambda; zero from then on."""
        found, self._coefficients = self.coefficients(like, like.device), None
        return found

    def take(self) -> Iterator[tuple[str, Tensor]]:
        """All sums, one by one; each is forgotten once the next one is asked for."""
        for name in list(self._sums):
            yield name, self._sums.pop(name)
