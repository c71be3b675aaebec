"""A model whose weights are trained in place: all of those that are to change, or low-rank additions to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ADAPTER = "default"
_LORA_SCALE = 2.0  # alpha over rank


class TrainedModule(Mapping[str, Tensor]):
    """Weights by output name that are a module's own parameters.

    It can be given wherever a task takes weights: the forward pass then is the module's.

    Args:
        module: built for the model, parameters on the meta device; it is filled.
        tensors: by parameter or buffer name, aliases of tied ones included; they are copied.
        targets: output name -> parameter name.
        free: output names of what may change.
        lora_rank: 0 trains these themselves, otherwise LoRAs of this rank (Hu et al., arXiv 2106.09685) on those of
            them that are matrices of linear layers.

    Attributes:
        trained: what an optimiser changes, by parameter name, float32.
    """

    def __init__(
        self, module: PreTrainedModel, tensors: Mapping[str, Tensor], targets: Mapping[str, str], free: Iterable[str],
        *, lora_rank: int,
    ) -> None:  # fmt: skip
        self.module, self._targets, self.lora_rank = module, dict(targets), lora_rank
        copies: dict[int, nn.Parameter] = {}  # tied ones stay one
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            if leaf in holder._buffers:
                holder._buffers[leaf] = tensor.clone()
            else:
                if id(tensor) not in copies:
                    copies[id(tensor)] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
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
        self._layers = {n: m for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)}

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

    @torch.no_grad()
    def addition(self, name: str) -> Tensor:
        """What the LoRA of an output name adds to its matrix, float32."""
        layer = self._layers[self._targets[name].removesuffix(".weight")]
        return torch.as_tensor(layer.get_delta_weight(_ADAPTER)).float()  # type: ignore[operator]

    def squared_additions(self) -> Tensor:
        """Sum of the squares of all that the LoRAs add, differentiable and without their products."""
        pairs = [(m.lora_A[_ADAPTER].weight, m.lora_B[_ADAPTER].weight) for m in self._layers.values()]  # type: ignore[index,union-attr]
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

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer the two matrices A (rank, in) and B (out, rank) of its LoRA, and B already scaled."""
        return {
            name: (
                layer.lora_A[_ADAPTER].weight.detach(),  # type: ignore[index,union-attr]
                layer.lora_B[_ADAPTER].weight.detach() * _LORA_SCALE,  # type: ignore[index,union-attr]
            )
            for name, layer in self._layers.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        target = self._targets[name]
        owner, _, leaf = target.rpartition(".")
        if owner in self._layers:
            base: Tensor = getattr(self._layers[owner].get_base_layer(), leaf).detach()
            return base if leaf != "weight" else base + self.addition(name).to(base.dtype)
        holder = self.module.get_submodule(owner)
        found = holder._parameters.get(leaf)
        tensor = found if found is not None else holder._buffers[leaf]
        assert tensor is not None, "names are those of tensors that are there"
        return tensor.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)
