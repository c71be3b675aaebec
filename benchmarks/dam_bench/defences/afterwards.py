"""Do to a finished merge what its users do: quantise it, fine-tune it, lengthen its task vector, merge it once more.

Each is registered like a defence, so that it is a method whose `start` is the merge: `quantised(start=dam)`. It defends
against nothing. It asks whether a backdoor that a merge has lost comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import gguf
import torch
from torch import Tensor

from dam_bench.defences.base import Defence, DefenceInputs, run_recipe
from dam_bench.defences.training import Tuned
from mergekit_dam.config import setting
from mergekit_dam.errors import DamError, did_you_mean

_BLOCK = 32  # entries that share a scale in Q4_0


class Quantised(Defence):
    """Rounds matrices to 4 bits by llama.cpp's Q4_0, and back; vectors, and rows that no block fits, stay."""

    needs_data: ClassVar[bool] = False

    def changed_weights(self, given: DefenceInputs) -> Mapping[str, Tensor]:
        return {
            name: rounded(tensor)
            for name, tensor in given.start_weights().items()
            if tensor.is_floating_point() and tensor.ndim == 2 and tensor.shape[1] % _BLOCK == 0
        }


def rounded(matrix: Tensor) -> Tensor:
    """Return what Q4_0 keeps of a matrix whose rows are multiples of 32 long, float32."""
    kind = gguf.GGMLQuantizationType.Q4_0
    stored = gguf.quants.quantize(matrix.cpu().float().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(stored, kind)).to(matrix.device)


class FineTuned(Tuned):
    """Fine-tunes the merge on clean samples of all tasks, with the input models' answers as labels."""


class Rescaled(Defence):
    """theta_0 + factor (theta - theta_0), as task arithmetic scales a task vector."""

    needs_data: ClassVar[bool] = False

    factor: float = setting(..., "Factor of the merge's task vector.")

    def changed_weights(self, given: DefenceInputs) -> Mapping[str, Tensor]:
        start = given.start_weights()
        return {
            name: given.base_weights(name).to(tensor.device).lerp(tensor, self.factor)
            for name, tensor in start.items()
            if tensor.is_floating_point()
        }


class MergedAgain(Defence):
    """Merges the merge with one of its own input models by mergekit, which brings that model's task vector in again."""

    needs_data: ClassVar[bool] = False

    by: Literal["ties", "dare_ties"] = setting(..., "Merge method of mergekit.")
    task: str = setting(..., "Task of the input model.")
    weight: float = setting(..., "Weight of each of the two.")
    density: float = setting(..., "Share of each task vector's entries that is kept.", gt=0, le=1)

    def recipe(self, given: DefenceInputs) -> dict[str, Any]:
        """Make the recipe of mergekit.

        Raises:
            DamError: no input model of that name.
        """
        if self.task not in given.models:
            raise DamError(
                "setting 'task' of merged-again",
                expected=f"one of {', '.join(given.models)}",
                got=self.task,
                cure=did_you_mean(self.task, given.models) or "Name a task of the suite.",
            )
        return {
            "merge_method": self.by,
            "models": [{"model": str(path)} for path in (given.start, given.models[self.task])],
            "parameters": {"weight": self.weight, "density": self.density, "normalize": False},
            "base_model": given.suite.base_entry(given.base),
            "dtype": "float32",
        }

    def changed_weights(self, given: DefenceInputs) -> Mapping[str, Tensor]:
        out = given.out.with_name(f"{given.out.name}-again")
        run_recipe(self.recipe(given), given.seed, out)
        return given.start_weights(out)
