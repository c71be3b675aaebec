"""Read prompts of a causal LM once and continue them by many texts. Legend: C texts of N tokens, V vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_dam.tasks.base import Parameters

if TYPE_CHECKING:
    from mergekit_dam.tasks.causal import CausalTask

_AT_ONCE = 64  # sequences; bounds the memory of the key-value cache
_NATIVE = ("avx512_bf16", "amx_bf16", "bf16")  # names of processors' features


class ReadPrompts:
    """The key-value cache of some prompts, under some weights.

    Args:
        task: gives the prompts and the forward pass.
        weights: by output name.
        rows: indices of the prompts.
        dtype: type to compute in; None: the task's.

    Attributes:
        weights: as given.
    """

    @torch.no_grad()
    def __init__(
        self, task: CausalTask, weights: Mapping[str, Tensor], rows: Sequence[int], dtype: torch.dtype | None = None
    ) -> None:
        self._task, self.weights, self._parameters = task, weights, task.parameters(weights)
        if dtype is not None and dtype != task.dtype:
            converted = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self._parameters.items()}
            self._parameters = Parameters(converted)
        prompts = task.samples(torch.tensor(rows))
        self._read = [
            task.call(self._parameters, input_ids=ids[None].to(task.device), use_cache=True) for ids in prompts
        ]

    def likely(self) -> Tensor:
        """Return the next-token probabilities (V,) right after the prompts, mean over prompts."""
        return torch.stack([output.logits[0, -1].float().softmax(-1) for output in self._read]).mean(0)

    @torch.no_grad()
    def following(self, texts_CN: Tensor) -> Tensor:
        """Return the next-token probabilities (C, V) after each text, mean over prompts.

        Args:
            texts_CN: token ids.
        """
        task, total = self._task, None
        for output in self._read:
            found = []
            for chunk in texts_CN.to(task.device).split(_AT_ONCE):
                cache = copy.deepcopy(output[task.cache])
                cache.batch_repeat_interleave(len(chunk))
                going_on = task.call(self._parameters, input_ids=chunk, use_cache=True, **{task.cache: cache})
                found.append(going_on.logits[:, -1].float().softmax(-1))
            total = torch.cat(found) if total is None else total + torch.cat(found)
        assert total is not None, "at least one prompt"
        return total / len(self._read)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it at twice the speed or more, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    features = getattr(torch.cpu, "get_capabilities", dict)  # not in every version of torch that is supported
    known: Mapping[str, object] = features() if device.type == "cpu" else {}
    return torch.bfloat16 if any(known.get(name) for name in _NATIVE) else torch.float32
