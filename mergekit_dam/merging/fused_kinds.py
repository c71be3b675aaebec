"""Groups of tensors by what one entry of their masks covers: an element, or a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mergekit_dam.merging.foreach import groups
from mergekit_dam.merging.mask_keys import mask_shape
from mergekit_dam.merging.triton_groups import ALIGNED, Group, Member
from mergekit_dam.merging.triton_merge import BLOCK, triton_kernels


def grouped(members: Sequence[Member], most: int) -> list[Group]:
    """Groups of each kind; which of them serves is for the masks to say. Tensors that do not fit are left out.

    Vectors have an entry per element at both granularities, so they are never in one group with others.

    Args:
        members: tensors that change.
        most: a group ends once it has so many elements.
    """
    found: list[Group] = []
    for kind in (ElementGroup, RowGroup):
        alike: dict[tuple[torch.dtype, bool], list[Member]] = {}
        for member in members:
            if member.is_plain and kind.takes(member):
                alike.setdefault((member.base.dtype, member.base.ndim > 1), []).append(member)
        for same in alike.values():
            found += [kind(some) for some in groups(same, most, lambda m: m.base.numel())]
    return found


class ElementGroup(Group):
    """Masks with an entry per element; a program works on a block of elements."""

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
        )  # fmt: skip


class RowGroup(Group):
    """Masks with an entry per row; a program works on a row."""

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
    """Elements of one row."""
    return member.base.numel() // len(member.base)
