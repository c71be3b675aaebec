"""Many tensors of a model at once on an accelerator: a launch per group of them instead of several per tensor.

A model of 200 tensors otherwise takes 400 launches per step from Python, as long as its passes take with a small
batch. Addresses of the tensors go to the kernels in tables; merged tensors and gradients are parts of one allocation.
Legend: T models, n tensors of a group, P columns of the coefficients, F factors of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam import fused
from mergekit_dam.chunks import Mask
from mergekit_dam.fused import BLOCK, kernels
from mergekit_dam.grouped import groups
from mergekit_dam.mask_product import MaskProduct

_SUMS = 256  # products per step of their sum
_ALIGNED = 16  # bytes of addresses, elements of sizes: what lets a thread load 16 bytes at once


@dataclass(frozen=True)
class Member:
    """One tensor that changes.

    Attributes:
        name: of the tensor.
        mask: name of its mask, which no other tensor has.
        column: of the coefficients.
        base: theta_0.
        models: theta_1..T; None where a model lacks the tensor.
    """

    name: str
    mask: str
    column: int
    base: Tensor
    models: Sequence[Tensor | None]

    @property
    def fits(self) -> bool:
        """Whether the kernels can take it together with others."""
        every = [self.base, *(model for model in self.models if model is not None)]
        whole = self.base.numel() > 0 and self.base.numel() % _ALIGNED == 0
        return whole and all(tensor.dtype == self.base.dtype and _is_plain(tensor) for tensor in every)


def grouped(members: Sequence[Member], most: int) -> list[Group]:
    """Groups of tensors of one type that end once they have `most` elements; tensors that do not fit are left out."""
    by_type: dict[torch.dtype, list[Member]] = {}
    for member in members:
        if member.fits:
            by_type.setdefault(member.base.dtype, []).append(member)
    return [Group(some) for same in by_type.values() for some in groups(same, most, lambda m: m.base.numel())]


class Group:
    """Tensors of one type on one device, and what the kernels must know of them.

    Attributes:
        members: n of them.
        numel: elements of all.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self._device, self._stored = members[0].base.device, members[0].base.dtype
        self._tasks = len(members[0].models)
        sizes = [member.base.numel() for member in members]
        self.numel = sum(sizes)
        self._sizes_n = sizes
        blocks = [-(-size // BLOCK) for size in sizes]
        self._programs = sum(blocks)
        # a model that lacks the tensor has theta_0's: its task vector is zero
        addresses = [(m.base if t is None else t).data_ptr() for m in members for t in (m.base, *m.models)]
        self._frozen = self._table(addresses)
        self._sizes, self._offsets = self._table(sizes), self._table(_starts(sizes))
        self._columns = self._table([member.column for member in members], torch.int32)
        self._firsts, self._counts = self._table(_starts(blocks), torch.int32), self._table(blocks, torch.int32)
        order = torch.arange(len(members), dtype=torch.int32)
        self._owners = order.repeat_interleave(torch.tensor(blocks)).to(self._device)

    @property
    def mask_names(self) -> frozenset[str]:
        """Of all members."""
        return frozenset(member.mask for member in self.members)

    def serves(self, masks: Mapping[str, Mask]) -> bool:
        """Whether these masks, by name, are of a kind that the kernels know."""
        found = [masks.get(member.mask) for member in self.members]
        products = [mask for mask in found if isinstance(mask, MaskProduct) and mask.separate]
        if len(products) < len(found):
            return False
        kinds = {(len(mask.factors), mask.logits, mask.temperature) for mask in products}
        shapes = all(mask.shape == m.base.shape for mask, m in zip(products, self.members, strict=True))
        factors = (factor for mask in products for factor in mask.factors)
        return len(kinds) == 1 and shapes and all(f.dtype == torch.float32 and _is_plain(f) for f in factors)

    def num_factors(self, masks: Mapping[str, Mask]) -> int:
        """F of masks that this group serves."""
        return len(_product(masks[self.members[0].mask]).factors)

    def merged(self, masks: Mapping[str, Mask], coefficients: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """theta by name, each a part of one allocation.

        Args:
            masks: M by mask name, which this group serves.
            coefficients: lambda, (T, 1) or (T, P), on the device.
            dtype: of theta.
        """
        flat = torch.empty(self.numel, dtype=dtype, device=self._device)
        factors, (count, logits, _) = self._factors(masks)
        with fused.on(self._device):
            kernels.merge_many[self._programs,](
                flat, self._frozen, factors, coefficients, *self._strides(coefficients), self._owners, self._firsts,
                self._sizes, self._offsets, self._columns, self._tasks, count, fused.element_type(self._stored),
                logits, BLOCK,
            )  # fmt: skip
        return {m.name: part for m, part in zip(self.members, self._parts(flat), strict=True)}

    def logit_gradients(
        self, upstreams: Sequence[Tensor | None], masks: Mapping[str, Mask], coefficients: Tensor,
        coefficient_out: Tensor,
    ) -> Iterator[tuple[str, list[Tensor]]]:  # fmt: skip
        """dL/dlogit of all factors, mask by mask; dL/dlambda is added to `coefficient_out`, shaped like lambda.

        Args:
            upstreams: dL/dtheta of each tensor; None if no task used it: then nothing is said of it.
        """
        present = [u for u in upstreams if u is not None]
        if not present:
            return
        unused = max((m.base.numel() for m, u in zip(self.members, upstreams, strict=True) if u is None), default=0)
        nothing = present[0].new_zeros(unused)
        flat, sums = self._chained([_ready(nothing if u is None else u) for u in upstreams], masks, coefficients)
        if coefficient_out.shape[1] == 1:
            coefficient_out.add_(sums.sum(1, keepdim=True))
        else:
            coefficient_out[:, self._columns.long()] += sums  # each column once: no two tensors share a mask
        rows = [self._parts(row) for row in flat]
        for member, used, *parts in zip(self.members, upstreams, *rows, strict=True):
            if used is not None:
                yield member.mask, parts

    def _chained(
        self, upstreams: Sequence[Tensor], masks: Mapping[str, Mask], coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dL/dlogit, (F, elements of all), and dL/dlambda of each tensor, (T, n)."""
        factors, (count, logits, temperature) = self._factors(masks)
        flat = torch.empty((count, self.numel), dtype=torch.float32, device=self._device)
        products = torch.empty((self._tasks, self._programs), dtype=torch.float32, device=self._device)
        sums = torch.empty((self._tasks, len(self.members)), dtype=torch.float32, device=self._device)
        with fused.on(self._device):
            kernels.gradients_many[self._programs,](
                flat, self._table([u.data_ptr() for u in upstreams]), self._frozen, factors, coefficients,
                *self._strides(coefficients), self._owners, self._firsts, self._sizes, self._offsets, self._columns,
                products, self._programs, self.numel, 1.0 / temperature, self._tasks, count,
                fused.element_type(self._stored), fused.element_type(upstreams[0].dtype), logits, BLOCK,
            )  # fmt: skip
            kernels.sum_products[len(self.members), self._tasks](
                products, self._programs, self._firsts, self._counts, sums, _SUMS
            )
        return flat, sums

    def _table(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device)

    def _parts(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._sizes_n)
        return [part.view(m.base.shape) for part, m in zip(parts, self.members, strict=True)]

    def _factors(self, masks: Mapping[str, Mask]) -> tuple[Tensor, tuple[int, bool, float]]:
        """Addresses (n F,) of the factors; F, whether they are logits, and their temperature."""
        found = [_product(masks[member.mask]) for member in self.members]
        addresses = self._table([f.data_ptr() for mask in found for f in mask.factors])
        return addresses, (len(found[0].factors), found[0].logits, found[0].temperature)

    @staticmethod
    def _strides(coefficients: Tensor) -> tuple[int, int]:
        return coefficients.stride(0), coefficients.stride(1) if coefficients.shape[1] > 1 else 0


def _product(mask: Mask) -> MaskProduct:
    assert isinstance(mask, MaskProduct)
    return mask


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each of them begins if they lie one after the other."""
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNED == 0


def _ready(upstream: Tensor) -> Tensor:
    upstream = upstream.contiguous()
    return upstream if _is_plain(upstream) else upstream.clone()
