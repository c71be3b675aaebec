"""Merge many tensors of a model at once on an accelerator: one launch per group replaces several per tensor.

A model of 200 tensors otherwise takes 400 launches per step from Python, as long as its passes take with a small
batch. Addresses of the tensors go to the kernels in tables; merged tensors and gradients are parts of one allocation.
The kinds of groups differ in the elements that a mask entry covers: `ElementGroup` and `RowGroup`.
Legend: T models, n tensors of a group, P columns of the coefficients, F factors of a mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.merging import triton_merge
from mergekit_dam.merging.chunks import Mask
from mergekit_dam.merging.foreach import groups
from mergekit_dam.merging.mask_keys import mask_shape
from mergekit_dam.merging.mask_product import MaskProduct
from mergekit_dam.merging.triton_merge import BLOCK, triton_kernels

_SUMS = 2048  # products that a step of the sum adds
ALIGNED = 16  # bytes of addresses and elements of sizes, so that a thread can load 16 bytes at once


@dataclass(frozen=True)
class Member:
    """A tensor that the merge changes.

    Attributes:
        name: name of the tensor.
        mask: name of its mask, which no other tensor uses.
        column: its column of the coefficients.
        base: theta_0.
        models: theta_1..T; None where a model lacks the tensor.
    """

    name: str
    mask: str
    column: int
    base: Tensor
    models: Sequence[Tensor | None]

    @property
    def is_readable(self) -> bool:
        """Whether the kernels can read it as a member of a group."""
        every = [self.base, *(model for model in self.models if model is not None)]
        return self.base.numel() > 0 and all(t.dtype == self.base.dtype and _is_aligned(t) for t in every)


class Group(ABC):
    """Tensors of one type on one device, with the tables that the kernels need.

    Attributes:
        members: the n tensors.
        numel: number of elements of all tensors.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self._device, self._stored = members[0].base.device, members[0].base.dtype
        self._tasks = len(members[0].models)
        self._mask_shapes = [self.mask_shape(member) for member in members]
        sizes = [member.base.numel() for member in members]
        self.numel = sum(sizes)
        # a model that lacks the tensor gets theta_0's address: its task vector is zero
        addresses = [(m.base if t is None else t).data_ptr() for m in members for t in (m.base, *m.models)]
        self._frozen = self._table(addresses)
        self._offsets = self._table(_starts(sizes))
        self._columns = self._table([member.column for member in members], torch.int32)
        programs = [self._num_programs(member) for member in members]
        self._programs = sum(programs)
        self._firsts, self._counts = self._table(_starts(programs), torch.int32), self._table(programs, torch.int32)
        order = torch.arange(len(members), dtype=torch.int32)
        self._owners = order.repeat_interleave(torch.tensor(programs)).to(self._device)

    @staticmethod
    @abstractmethod
    def takes(member: Member) -> bool:
        """Whether groups of this kind can hold this tensor."""

    @staticmethod
    @abstractmethod
    def mask_shape(member: Member) -> tuple[int, ...]:
        """Shape of the tensor's mask in groups of this kind."""

    @staticmethod
    @abstractmethod
    def _num_programs(member: Member) -> int:
        """Number of programs that work on a tensor; their indices are consecutive."""

    @abstractmethod
    def _merge(self, arguments: Mapping[str, Any]) -> None:
        """Start the kernel that writes theta of all members to `out`."""

    @abstractmethod
    def _chain(self, arguments: Mapping[str, Any]) -> None:
        """Start the kernel that writes the gradients.

        It writes dL/dlogit, (parts, entries of all masks), to `out`, and summands of dL/dlambda, (T, programs), to
        `products`.
        """

    @property
    def mask_names(self) -> frozenset[str]:
        """Names of the masks of all members."""
        return frozenset(member.mask for member in self.members)

    def serves(self, masks: Mapping[str, Mask]) -> bool:
        """Whether the kernels support these masks, by name."""
        wanted = [masks.get(member.mask) for member in self.members]
        products = [mask for mask in wanted if isinstance(mask, MaskProduct) and mask.separate]
        if len(products) < len(wanted):
            return False
        kinds = {(len(mask.factors), len(mask.own), mask.logits, mask.temperature) for mask in products}
        if len(kinds) > 1 or [tuple(mask.shape) for mask in products] != self._mask_shapes:
            return False
        return all(f.dtype == torch.float32 and _is_aligned(f) for mask in products for f in mask.parts)

    def num_parts(self, masks: Mapping[str, Mask]) -> int:
        """F, or F + T where models have own factors, of masks that this group serves."""
        return len(self._product(masks).parts)

    def merged(self, masks: Mapping[str, Mask], coefficients: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Compute theta by name, as parts of one allocation.

        Args:
            masks: M by mask name, which this group serves.
            coefficients: lambda, (T, 1) or (T, P), on the device.
            dtype: of theta.
        """
        flat = torch.empty(self.numel, dtype=dtype, device=self._device)
        with triton_merge.on_device(self._device):
            self._merge({**self._arguments(masks, coefficients), "out": flat, "offsets": self._offsets})
        parts = _parts(flat, [tuple(member.base.shape) for member in self.members])
        return {member.name: part for member, part in zip(self.members, parts, strict=True)}

    def logit_gradients(
        self,
        upstreams: Sequence[Tensor | None],
        masks: Mapping[str, Mask],
        coefficients: Tensor,
        coefficient_out: Tensor,
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield mask name and dL/dlogit of all its parts, and add dL/dlambda to `coefficient_out`, shaped like lambda.

        Args:
            upstreams: dL/dtheta of each tensor; None for a tensor that no task used, which is left out.
        """
        present = [u for u in upstreams if u is not None]
        if not present:
            return
        unused = max((m.base.numel() for m, u in zip(self.members, upstreams, strict=True) if u is None), default=0)
        zeros = present[0].new_zeros(unused)
        entries = sum(torch.Size(shape).numel() for shape in self._mask_shapes)
        flat = torch.empty((self.num_parts(masks), entries), dtype=torch.float32, device=self._device)
        products = torch.empty((self._tasks, self._programs), dtype=torch.float32, device=self._device)
        sums = torch.empty((self._tasks, len(self.members)), dtype=torch.float32, device=self._device)
        with triton_merge.on_device(self._device):
            aligned = [_aligned(zeros if u is None else u) for u in upstreams]
            self._chain(
                {
                    **self._arguments(masks, coefficients),
                    "out": flat,
                    "products": products,
                    "upstreams": self._table([u.data_ptr() for u in aligned]),
                    "programs": self._programs,
                    "sharpness": 1.0 / self._product(masks).temperature,
                    "COMPUTED": triton_merge.element_type(aligned[0].dtype),
                }
            )
            triton_kernels.sum_products[len(self.members), self._tasks](
                products, self._programs, self._firsts, self._counts, sums, _SUMS
            )
        if coefficient_out.shape[1] == 1:
            coefficient_out.add_(sums.sum(1, keepdim=True))
        else:
            coefficient_out[:, self._columns.long()] += sums  # each column once: no two tensors share a mask
        rows = [_parts(row, self._mask_shapes) for row in flat]
        for member, used, *parts in zip(self.members, upstreams, *rows, strict=True):
            if used is not None:
                yield member.mask, parts

    def _table(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device)

    def _arguments(self, masks: Mapping[str, Mask], coefficients: Tensor) -> dict[str, Any]:
        """Arguments that both kernels of a group share."""
        first = self._product(masks)
        every = (masks[member.mask] for member in self.members)
        factors = [f.data_ptr() for mask in every if isinstance(mask, MaskProduct) for f in mask.parts]
        return {
            "frozen": self._frozen,
            "factors": self._table(factors),
            "lambdas": coefficients,
            "stride_t": coefficients.stride(0),
            "stride_p": coefficients.stride(1) if coefficients.shape[1] > 1 else 0,
            "owners": self._owners,
            "firsts": self._firsts,
            "columns": self._columns,
            "TASKS": self._tasks,
            "FACTORS": len(first.factors),
            "OWN": len(first.own),
            "STORED": triton_merge.element_type(self._stored),
            "LOGITS": first.logits,
            "BLOCK": BLOCK,
        }

    def _product(self, masks: Mapping[str, Mask]) -> MaskProduct:
        """The first member's mask; the masks of all members have the same number, kind and temperature of factors."""
        first = masks[self.members[0].mask]
        assert isinstance(first, MaskProduct)
        return first


def _starts(sizes: Sequence[int]) -> list[int]:
    """Start offsets of consecutive ranges of these sizes."""
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def _parts(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of consecutive parts of a flat tensor."""
    parts = flat.split([torch.Size(shape).numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNED == 0


def _aligned(upstream: Tensor) -> Tensor:
    upstream = upstream.contiguous()
    return upstream if _is_aligned(upstream) else upstream.clone()


def grouped(members: Sequence[Member], most: int) -> list[Group]:
    """Make groups of each kind; `Group.serves` tells which of them the masks allow. Unsuitable tensors are left out.

    Vectors have an entry per element at both granularities, so they never share a group with tensors of more axes.

    Args:
        members: tensors that the merge changes.
        most: number of elements from which a group is complete.
    """
    all_groups: list[Group] = []
    for kind in (ElementGroup, RowGroup):
        alike: dict[tuple[torch.dtype, bool], list[Member]] = {}
        for member in members:
            if member.is_readable and kind.takes(member):
                alike.setdefault((member.base.dtype, member.base.ndim > 1), []).append(member)
        for same in alike.values():
            all_groups += [kind(part) for part in groups(same, most, lambda m: m.base.numel())]
    return all_groups


class ElementGroup(Group):
    """Tensors whose masks have an entry per element; a program works on a block of elements."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        self._sizes = self._table([member.base.numel() for member in members])

    @staticmethod
    def takes(member: Member) -> bool:
        return member.base.numel() % ALIGNED == 0

    @staticmethod
    def mask_shape(member: Member) -> tuple[int, ...]:
        return mask_shape(member.base.shape, "element")

    @staticmethod
    def _num_programs(member: Member) -> int:
        return -(-member.base.numel() // BLOCK)

    def _merge(self, arguments: Mapping[str, Any]) -> None:
        triton_kernels.merge_many[self._programs,](**arguments, sizes=self._sizes)

    def _chain(self, arguments: Mapping[str, Any]) -> None:
        triton_kernels.gradients_many[self._programs,](
            **arguments, sizes=self._sizes, offsets=self._offsets, numel=self.numel
        )


class RowGroup(Group):
    """Tensors whose masks have an entry per row; a program works on a row."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        self._widths = self._table([_width(member) for member in members])

    @staticmethod
    def takes(member: Member) -> bool:
        return member.base.ndim > 1 and _width(member) % ALIGNED == 0

    @staticmethod
    def mask_shape(member: Member) -> tuple[int, ...]:
        return mask_shape(member.base.shape, "row")

    @staticmethod
    def _num_programs(member: Member) -> int:
        return len(member.base)

    def _merge(self, arguments: Mapping[str, Any]) -> None:
        triton_kernels.merge_rows[self._programs,](**arguments, widths=self._widths)

    def _chain(self, arguments: Mapping[str, Any]) -> None:
        triton_kernels.gradients_rows[self._programs,](**arguments, widths=self._widths)


def _width(member: Member) -> int:
    """Number of elements of a row."""
    return member.base.numel() // len(member.base)
