"""Train a module's weights in place: chosen weights themselves, or LoRAs on them."""

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
class LowRankUpdate:
    """A low-rank change of one matrix, b @ a.

    Attributes:
        module: name of the linear layer in the model.
        a: (rank, in), float32.
        b: (out, rank), float32, with LoRA's scale multiplied in.
        transposed: whether the layer stores its matrix as (in, out), as GPT-2 does.
    """

    module: str
    a: Tensor
    b: Tensor
    transposed: bool = False

    def dense(self) -> Tensor:
        """Return the change in the shape of the layer's matrix."""
        return (self.b @ self.a).T if self.transposed else self.b @ self.a


class UpdatedWeights(Mapping[str, Tensor]):
    """Matrices with low-rank changes added, by output name, float32, computed on access."""

    def __init__(self, stored: Mapping[str, Tensor], updates: Mapping[str, LowRankUpdate]) -> None:
        self._stored, self.updates = stored, updates

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].detach().cpu().float() + self.updates[name].dense()

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


class TrainedModule(Mapping[str, Tensor]):
    """Weights by output name that are a module's own parameters.

    A task accepts it as its weights, and then runs the module's forward pass.

    Args:
        module: built for the model, parameters on the meta device; this class fills them.
        tensors: by parameter or buffer name, aliases of tied tensors included. They are copied for training; with LoRAs
            they do not change and are not copied, since a second copy of a large model would not fit.
        targets: output name -> parameter name.
        trainable: output names of weights that may change.
        lora_rank: 0 trains these weights; a rank trains LoRAs of that rank (Hu et al., arXiv 2106.09685) on the
            matrices of linear layers among them.

    Attributes:
        trained: parameters for the optimiser, by parameter name, float32.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tensors: Mapping[str, Tensor],
        targets: Mapping[str, str],
        trainable: Iterable[str],
        *,
        lora_rank: int,
    ) -> None:
        self.module, self._targets, self.lora_rank = module, dict(targets), lora_rank
        copies: dict[int, nn.Parameter] = {}  # tied tensors stay one parameter
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            if leaf in holder._buffers:
                holder._buffers[leaf] = tensor.clone()
            else:
                if id(tensor) not in copies:
                    values = tensor.detach() if lora_rank else tensor.detach().clone()
                    copies[id(tensor)] = nn.Parameter(values, requires_grad=False)
                holder._parameters[leaf] = copies[id(tensor)]
        wanted = sorted(self._targets[name] for name in trainable)
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
        """Add a LoRA to every linear layer whose matrix is among `wanted`."""
        owners = [name.removesuffix(".weight") for name in wanted if name.endswith(".weight")]
        layers = [n for n in owners if isinstance(self.module.get_submodule(n), (nn.Linear, Conv1D))]
        config = peft.LoraConfig(
            r=rank, lora_alpha=int(_LORA_SCALE * rank), lora_dropout=0.0, target_modules=layers, bias="none"
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # Conv1D stores its matrix transposed
            torch.manual_seed(0)  # no effect on results: `init_loras` draws the factors
            peft.inject_adapter_in_model(config, self.module, _ADAPTER)

    def init_loras(self, generator: torch.Generator) -> None:
        """Draw the factors A of the LoRAs and set the factors B to zero; without LoRAs do nothing."""
        for name, parameter in self.trained.items() if self.lora_rank else ():
            with torch.no_grad():
                if "lora_A" in name:
                    bound = parameter.shape[1] ** -0.5
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.copy_(drawn)
                else:
                    parameter.zero_()

    @property
    def changed(self) -> frozenset[str]:
        """Output names of the weights that training changes."""
        if not self.lora_rank:
            return frozenset(name for name, target in self._targets.items() if target in self.trained)
        layers = {f"{name}.weight" for name in self._layers}
        return frozenset(name for name, target in self._targets.items() if target in layers)

    def squared_updates(self) -> Tensor:
        """Return the squared norm of all LoRA updates, differentiable, without forming the products b @ a."""
        pairs = [(m.lora_A[_ADAPTER].weight, m.lora_B[_ADAPTER].weight) for m in self._layers.values()]
        squares = torch.stack([((a @ a.T) * (b.T @ b)).sum() for a, b in pairs]).sum()
        return _LORA_SCALE**2 * squares

    @torch.no_grad()
    def scale_change(self, begun: Mapping[str, Tensor], share: float) -> None:
        """Multiply the change since the parameters `begun` by `share`; for LoRAs, multiply their updates."""
        for name, parameter in self.trained.items():
            if not self.lora_rank:
                parameter.copy_(begun[name] + share * (parameter - begun[name]))
            elif "lora_B" in name:
                parameter.mul_(share)

    def updates(self) -> dict[str, LowRankUpdate]:
        """Return the updates of the LoRAs by output name; copies on the CPU."""
        names = {target: name for name, target in self._targets.items()}
        return {names[f"{owner}.weight"]: self._update(owner) for owner in self._layers}

    def _update(self, owner: str) -> LowRankUpdate:
        layer = self._layers[owner]
        a, b = (pair[_ADAPTER].weight.detach().float().cpu().clone() for pair in (layer.lora_A, layer.lora_B))
        return LowRankUpdate(owner, a, b * _LORA_SCALE, transposed=isinstance(layer.get_base_layer(), Conv1D))

    def __getitem__(self, name: str) -> Tensor:
        target = self._targets[name]
        owner, _, leaf = target.rpartition(".")
        if owner in self._layers:
            base: Tensor = getattr(self._layers[owner].get_base_layer(), leaf).detach()
            return base if leaf != "weight" else base + self._update(owner).dense().to(base)
        holder = self.module.get_submodule(owner)
        parameter = holder._parameters.get(leaf)
        tensor = parameter if parameter is not None else holder._buffers[leaf]
        assert tensor is not None, "the module has tensors of all names in targets"
        return tensor.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)
