"""A model whose weights are trained in place: all of those that are to change, or low-rank additions to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ADAPTER = "default"
_LORA_SCALE = 2.0  # alpha over rank


@dataclass(frozen=True, eq=False)
class Addition:
    """A low-rank change of one matrix.

    Attributes:
        module: name of the linear layer in the model.
        a: (rank, in), float32.
        b: (out, rank), float32, scaled: what is added is their product.
        transposed: whether the layer keeps its matrix as (in, out), as GPT-2's do.
    """

    module: str
    a: Tensor
    b: Tensor
    transposed: bool = False

    def dense(self) -> Tensor:
        """The change in the shape of the layer's matrix."""
        return (self.b @ self.a).T if self.transposed else self.b @ self.a


class AddedWeights(Mapping[str, Tensor]):
    """Matrices with low-rank changes, by output name, float32: each is formed when it is asked for."""

    def __init__(self, stored: Mapping[str, Tensor], additions: Mapping[str, Addition]) -> None:
        self._stored, self.additions = stored, additions

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].detach().cpu().float() + self.additions[name].dense()

    def __iter__(self) -> Iterator[str]:
        return iter(self.additions)

    def __len__(self) -> int:
        return len(self.additions)


class TrainedModule(Mapping[str, Tensor]):
    """Weights by output name that are a module's own parameters.

    It can be given wherever a task takes weights: the forward pass then is the module's.

    Args:
        module: built for the model, parameters on the meta device; it is filled.
        tensors: by parameter or buffer name, aliases of tied ones included; they are copied, but for LoRAs, which
            leave them as they are: a second copy of a large model would not fit.
        targets: output name -> parameter name.
        free: output names of what may change.
        lora_rank: 0 trains these themselves, otherwise LoRAs of this rank (Hu et al., arXiv 2106.09685) on those of
            them that are matrices of linear layers.

    Attributes:
        trained: what an optimiser changes, by parameter name, float32.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tensors: Mapping[str, Tensor],
        targets: Mapping[str, str],
        free: Iterable[str],
        *,
        lora_rank: int,
    ) -> None:
        self.module, self._targets, self.lora_rank = module, dict(targets), lora_rank
        copies: dict[int, nn.Parameter] = {}  # tied ones stay one
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            if leaf in holder._buffers:
                holder._buffers[leaf] = tensor.clone()
            else:
                if id(tensor) not in copies:
                    kept = tensor.detach() if lora_rank else tensor.detach().clone()
                    copies[id(tensor)] = nn.Parameter(kept, requires_grad=False)
                holder._parameters[leaf] = copies[id(tensor)]
        wanted = sorted(self._targets[name] for name in free)
        if lora_rank:
            self._add_loras(wanted, lora_rank)
            self.trained = {n: p for n, p in module.named_parameters() if "lora_" in n}
        else:
            self.trained = {name: module.get_parameter(name) for name in wanted}
        module.requires_grad_(False)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self._layers: dict[str, Any] = {n: m for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)}

    def _add_loras(self, wanted: Iterable[str], rank: int) -> None:
        """Put a LoRA beside every linear layer whose matrix is among `wanted`; at first they change nothing."""
        owners = [name.removesuffix(".weight") for name in wanted if name.endswith(".weight")]
        layers = [n for n in owners if isinstance(self.module.get_submodule(n), (nn.Linear, Conv1D))]
        config = peft.LoraConfig(
            r=rank, lora_alpha=int(_LORA_SCALE * rank), lora_dropout=0.0, target_modules=layers, bias="none"
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # Conv1D keeps its matrix transposed
            torch.manual_seed(0)  # whatever comes of it: `begin` draws them
            peft.inject_adapter_in_model(config, self.module, _ADAPTER)

    def begin(self, generator: torch.Generator) -> None:
        """Draw the first factors of the LoRAs; without LoRAs nothing is drawn."""
        for name, parameter in self.trained.items() if self.lora_rank else ():
            with torch.no_grad():
                if "lora_A" in name or "lora_embedding_A" in name:
                    bound = parameter.shape[1] ** -0.5
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.copy_(drawn)
                else:
                    parameter.zero_()

    @property
    def changed(self) -> frozenset[str]:
        """Output names of what training changes."""
        if not self.lora_rank:
            return frozenset(name for name, target in self._targets.items() if target in self.trained)
        layers = {f"{name}.weight" for name in self._layers}
        return frozenset(name for name, target in self._targets.items() if target in layers)

    def squared_additions(self) -> Tensor:
        """Sum of the squares of all that the LoRAs add, differentiable and without their products."""
        pairs = [(m.lora_A[_ADAPTER].weight, m.lora_B[_ADAPTER].weight) for m in self._layers.values()]
        found = torch.stack([((a @ a.T) * (b.T @ b)).sum() for a, b in pairs]).sum()
        return _LORA_SCALE**2 * found

    @torch.no_grad()
    def towards(self, begun: Mapping[str, Tensor], share: float) -> None:
        """Keep a share of the change since the parameters were `begun`; of LoRAs, of what they add."""
        for name, parameter in self.trained.items():
            if not self.lora_rank:
                parameter.copy_(begun[name] + share * (parameter - begun[name]))
            elif "lora_B" in name:
                parameter.mul_(share)

    def additions(self) -> dict[str, Addition]:
        """What the LoRAs add, by output name; copies on the CPU."""
        names = {target: name for name, target in self._targets.items()}
        return {names[f"{owner}.weight"]: self._addition(owner) for owner in self._layers}

    def _addition(self, owner: str) -> Addition:
        layer = self._layers[owner]
        a, b = (pair[_ADAPTER].weight.detach().float().cpu().clone() for pair in (layer.lora_A, layer.lora_B))
        return Addition(owner, a, b * _LORA_SCALE, transposed=isinstance(layer.get_base_layer(), Conv1D))

    def __getitem__(self, name: str) -> Tensor:
        target = self._targets[name]
        owner, _, leaf = target.rpartition(".")
        if owner in self._layers:
            base: Tensor = getattr(self._layers[owner].get_base_layer(), leaf).detach()
            return base if leaf != "weight" else base + self._addition(owner).dense().to(base)
        holder = self.module.get_submodule(owner)
        found = holder._parameters.get(leaf)
        tensor = found if found is not None else holder._buffers[leaf]
        assert tensor is not None, "names are those of tensors that are there"
        return tensor.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)
