"""Read prompts of a causal LM once and continue them by many texts. Legend: C texts of N tokens, V vocabulary."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_dam import seeds

if TYPE_CHECKING:
    from mergekit_dam.tasks.causal import CausalTask

_AT_ONCE = 64  # sequences; bounds the memory of the key-value cache
_TOKENS_AT_ONCE = 512  # of texts that share a prompt in one sequence
_NEEDED = ("attention_mask", "position_ids", "logits_to_keep")
_TRIED = (3, 2)  # texts, tokens
_SAME, _SAME_HALF = 1e-2, 0.25  # of logarithms of probabilities; in float32, in 16 bits
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
        read: the model's outputs after each prompt, with its key-value cache.
    """

    @torch.no_grad()
    def __init__(
        self, task: CausalTask, weights: Mapping[str, Tensor], rows: Sequence[int], dtype: torch.dtype | None = None
    ) -> None:
        self._task, self.weights = task, weights
        with task.computing_in(dtype or task.dtype):
            self._parameters = task.parameters(weights)
        prompts = task.samples(torch.tensor(rows))
        self.read = [
            task.call(self._parameters, input_ids=ids[None].to(task.device), use_cache=True) for ids in prompts
        ]

    def likely(self) -> Tensor:
        """Return the next-token probabilities (V,) right after the prompts, mean over prompts."""
        return torch.stack([output.logits[0, -1].float().softmax(-1) for output in self.read]).mean(0)

    @torch.no_grad()
    def following(self, texts_CN: Tensor) -> Tensor:
        """Return the next-token probabilities (C, V) after each text, mean over prompts.

        Args:
            texts_CN: token ids.
        """
        total = None
        follow = self.side_by_side if self._task.shares_prompts else self.one_by_one
        at_once = max(1, _TOKENS_AT_ONCE // texts_CN.shape[1]) if self._task.shares_prompts else _AT_ONCE
        for output in self.read:
            found = torch.cat([follow(output, chunk) for chunk in texts_CN.to(self._task.device).split(at_once)])
            total = found if total is None else total + found
        assert total is not None, "at least one prompt"
        return total / len(self.read)

    def one_by_one(self, output: Any, texts_CN: Tensor) -> Tensor:
        """Continue a prompt by each text in a sequence of its own, which holds a copy of the prompt's cache."""
        cache = copy.deepcopy(output[self._task.cache])
        cache.batch_repeat_interleave(len(texts_CN))
        return self._probabilities(cache, texts_CN, {})[:, -1]

    def side_by_side(self, output: Any, texts_CN: Tensor) -> Tensor:
        """Continue a prompt by all texts in one sequence, where each text sees the prompt and itself only."""
        (count, length), prompt = texts_CN.shape, output.logits.shape[1]
        tokens = count * length
        text_of, place = torch.arange(tokens) // length, torch.arange(tokens) % length
        sees = (text_of[:, None] == text_of) & (place[:, None] >= place)
        sees = torch.cat([torch.ones(tokens, prompt, dtype=torch.bool), sees], 1)
        dtype = output.logits.dtype
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        inputs = {
            "attention_mask": mask[None, None].to(texts_CN.device),
            "position_ids": (prompt + place)[None].to(texts_CN.device),
            "logits_to_keep": torch.arange(length - 1, tokens, length, device=texts_CN.device),
        }
        return self._probabilities(copy.deepcopy(output[self._task.cache]), texts_CN.reshape(1, -1), inputs)[0]

    def _probabilities(self, cache: Any, ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        given = {self._task.cache: cache, **inputs}
        logits: Tensor = self._task.call(self._parameters, input_ids=ids, use_cache=True, **given).logits
        return logits.float().softmax(-1)


def shares_prompts(task: CausalTask) -> bool:
    """Whether texts can follow a prompt side by side in one sequence, by trying it on the task's first prompt.

    It takes a class that gets masks of pairs of tokens and positions. Some ignore them, hence the comparison.
    """
    if not set(_NEEDED) <= set(inspect.signature(type(task.module).forward).parameters):
        return False
    prompts = ReadPrompts(task, task.own_weights(), [0])
    texts_CN = torch.randint(task.num_words, _TRIED, generator=seeds.generator("shared prompts")).to(task.device)
    (output,) = prompts.read
    with torch.no_grad():
        alone = prompts.one_by_one(output, texts_CN)
        try:
            together = prompts.side_by_side(output, texts_CN)
        except (RuntimeError, ValueError, TypeError, IndexError):  # what classes raise for a mask of another shape
            return False
    limit = _SAME if task.dtype == torch.float32 else _SAME_HALF
    return together.shape == alone.shape and float((together.log() - alone.log()).abs().max()) <= limit


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it at twice the speed or more, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    features = getattr(torch.cpu, "get_capabilities", dict)  # not in every version of torch that is supported
    known: Mapping[str, object] = features() if device.type == "cpu" else {}
    return torch.bfloat16 if any(known.get(name) for name in _NATIVE) else torch.float32
