"""The Task of one input model: its inputs, and its logits for any weights. Legend: B batch, K classes, L tokens."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from mergekit_dam.engine.module_weights import blocks_of, slots_of, swapped
from mergekit_dam.engine.partial_pass import BlockChain
from mergekit_dam.engine.recomputed import recomputed_blocks
from mergekit_dam.engine.trained_module import TrainedModule
from mergekit_dam.io.digests import tensor_digest
from mergekit_dam.merging.checks import require_finite
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.parameter_names import meta_model, module_names, tied_names
from mergekit_dam.models.plan import ModelInput, Plan
from mergekit_dam.tasks.bounds import Bounds, Perturb

Progress = Callable[[Iterable[int], str], Iterable[int]]  # wraps steps in a progress bar with a title
_ZERO_SHOT = ("text_model.", "text_projection.", "logit_scale")  # tensors of a full CLIP that make its head
_NO_CONTENT = ("_name_or_path", "transformers_version")  # entries of configs that change no answer
Modality = Literal["image", "text"]
Target = int | tuple[int, ...]  # what a backdoor makes a model answer: a class, or the tokens of a continuation


class Task(ABC):
    """One input model, with its head and its unlabelled samples, as searches see it.

    The forward pass is model t's own transformers class with the weights of the caller (merged, own or theta_0,
    by output name) plus the tensors that only model t has: its head.

    Attributes:
        name: the model's name in the plan.
        num_samples: calibration samples held.
        sample_digests: one digest per sample, so that evaluation on the same data can be refused.
        perturbation_shape: (C, H, W) for images, (tokens, width) for text.
        bounds: valid box of what a perturbation acts on.
        head: tensors of model t that the base lacks, by name in t's checkpoint.
        targets: output name -> parameter name of the module.
        sources: output name -> its name in model t's checkpoint.
        block_of: parameter name -> the block that it lives in, see engine/module_weights.py.
        modality: what a sample is. A trigger changes the pixels of an image; into a text it is inserted.
        scanner: how such models are scanned for backdoors, a name that `scan.scanner` knows.
        scanned_alone: whether the scan of a model reads no other model but theta_0.
        trigger_kinds: which triggers the scan recovers, names that `scan.triggers` knows, the plainest first.
        classifies: whether a sample has one answer out of few classes, which a scan can go through.
        constants: of the plan's settings.
        defended: whether scans of such models were seen to find implanted backdoors (benchmarks/STUDY.md); where they
            were not, students are merged instead of the models.
    """

    modality: ClassVar[Modality]
    scanner: ClassVar[str] = "classes"
    scanned_alone: ClassVar[bool] = False
    trigger_kinds: ClassVar[tuple[str, ...]]
    classifies: ClassVar[bool] = True
    defended: ClassVar[bool] = True

    _embedding: str | None = None  # parameter name of the table of words

    num_samples: int
    sample_digests: tuple[str, ...]
    perturbation_shape: tuple[int, ...]
    bounds: Bounds

    def __init__(self, plan: Plan, index: int, device: torch.device) -> None:
        model: ModelInput = plan.models[index]
        self.index, self.name, self.input, self.device = index, model.name, model, device
        self.constants = plan.config.constants
        self._recompute = plan.config.gradient_checkpointing
        self.dtype: torch.dtype = getattr(torch, plan.config.compute_dtype)
        self.module = meta_model(model.config, device)
        self.checkpoint = Checkpoint.open(model.path)
        own = module_names(self.module, self.checkpoint.names)
        sources = {spec.name: spec.sources[index] for spec in plan.tensors}
        self.sources = {name: source for name, source in sources.items() if source in own}
        self.targets = {name: own[source] for name, source in self.sources.items()}
        covered = set(self.targets.values())
        self.head = {
            name: self.checkpoint.tensor(name).to(device) for name, target in own.items() if target not in covered
        }
        for name, tensor in self.head.items():
            require_finite(tensor, f"tensor {name}", f"the head of model {self.name}")
        self._head_targets = {own[name]: tensor for name, tensor in self.head.items()}
        self._tied = tied_names(self.module)
        self.block_of = blocks_of(self.module)
        tied = {*self._tied, *self._tied.values()}
        self._slots = slots_of(self.module, {*self.targets.values(), *self._head_targets, *tied})
        self._replaced: Mapping[str, Tensor] | None = None

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        """Return this task with other weights in place of model t's, such as those of a finished merge.

        The head and the samples stay model t's: the task then says what these weights answer to them.

        Args:
            weights: by output name; tied tensors may be given once.
        """
        task = copy(self)
        task._replaced = weights
        return task

    def fingerprint(self) -> str:
        """Digest all that the logits depend on beside the weights: class, config, samples, heads. SHA-256, hex.

        Names of folders and files do not enter; their content does.
        """
        known = [type(self.module).__name__, _without_names(self.input.config.to_dict())]
        found = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
        for tensor in self.read_tensors():
            found.update(repr((str(tensor.dtype), tuple(tensor.shape), tensor_digest(tensor))).encode())
        return found.hexdigest()

    @abstractmethod
    def read_tensors(self) -> Sequence[Tensor]:
        """Tensors from files beside the model's weights: samples as the model reads them, prompts, a head."""

    @abstractmethod
    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        """The calibration samples at `indices`, (B,), as tensors on the task's device."""

    @abstractmethod
    def samples(self, indices: Tensor) -> list[Tensor]:
        """The samples at `indices` before any trigger, on the CPU: pixels_CHW in [0, 1], or token ids (L,)."""

    @abstractmethod
    def batch(self, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        """Make inputs of the model from samples such as `samples` returns, on the task's device."""

    def prompts(self, indices: Tensor) -> dict[str, Tensor]:
        """The samples at `indices` without the model's answers to them: a trigger is put into these."""
        return self.inputs(indices)

    @abstractmethod
    def logits(
        self, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], perturb: Perturb | None = None
    ) -> Tensor:
        """logits_BK, float32, for any weights by output name; `perturb` acts on pixels or word embeddings."""

    def num_answers(self, inputs: Mapping[str, Tensor]) -> int:
        """N of the logits (N, K) for these inputs."""
        return len(next(iter(inputs.values())))

    def reach(
        self,
        weights: Mapping[str, Tensor],
        inputs: dict[str, Tensor],
        targets: Sequence[Target],
        perturb: Perturb | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Measure how far each sample is from its target.

        Returns:
            losses_B, the cross-entropy of the targets in nats, and hits_B, whether the model answers them.
        """
        logits = self.logits(weights, inputs, perturb)
        wanted_B = torch.tensor(targets, device=logits.device)
        return F.cross_entropy(logits, wanted_B, reduction="none"), logits.argmax(-1) == wanted_B

    def words_of(self, target: Target) -> int | str:
        """Write a target for people to read: the class's number, or the text of a continuation."""
        assert isinstance(target, int)
        return target

    def nearest_tokens(self, vectors_KD: Tensor) -> list[list[tuple[str, float]]]:
        """Per row the nearest words of the vocabulary, with their cosine; none where samples are no texts."""
        return []

    def own_weights(self) -> dict[str, Tensor]:
        """Model t's tensors by output name, as stored; or those that `with_weights` put in their place."""
        if self._replaced is not None:
            return {name: self._replaced[name].to(self.device) for name in self.targets if name in self._replaced}
        return {name: self.checkpoint.tensor(source).to(self.device) for name, source in self.sources.items()}

    @cached_property
    def body(self) -> frozenset[str]:
        """Output names of the tensors that a vaccination may train: no head, no table of words."""
        body = self.module.base_model
        prefix = next(name for name, module in self.module.named_modules() if module is body)
        tables = {name for name, module in self.module.named_modules() if isinstance(module, nn.Embedding)}
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        return frozenset(
            name
            for name, target in self.targets.items()
            if target in parameters
            and parameters[target].is_floating_point()
            and target.startswith(f"{prefix}." if prefix else "")
            and target.rpartition(".")[0] not in tables
            and not target.startswith(_ZERO_SHOT)
        )

    def own_tensor(self, name: str) -> Tensor | None:
        """One of `own_weights`; None if it is not there."""
        if self._replaced is not None:
            replaced = self._replaced.get(name)
            return None if replaced is None else replaced.to(self.device)
        source = self.sources.get(name)
        return None if source is None else self.checkpoint.tensor(source).to(self.device)

    @cached_property
    def chain(self) -> BlockChain | None:
        """The model's blocks; None where it is no single chain of them (a full CLIP has two towers)."""
        names = tuple(dict.fromkeys(self.block_of.values()))
        is_single = len({name.rpartition(".")[0] for name in names}) == 1
        return BlockChain(self.module, names) if is_single else None

    @cached_property
    def positions(self) -> dict[str, tuple[int, ...]]:
        """Output name -> positions where a tensor is used, see engine/partial_pass.py; tied tensors have two."""
        blocks = list(dict.fromkeys(self.block_of.values()))
        places: dict[str, list[int]] = {}
        last = 0
        for target in self.module.state_dict():
            if target in self.block_of:
                last = len(blocks) + 1
            place = blocks.index(self.block_of[target]) + 1 if target in self.block_of else last
            places.setdefault(self._tied.get(target, target), []).append(place)
        return {name: tuple(places[self._tied.get(target, target)]) for name, target in self.targets.items()}

    @cached_property
    def entrance(self) -> dict[str, Tensor]:
        """Model t's tensors before the blocks, for passes that begin at a block.

        There only the shape of their output counts. The table of words is left out, since it is large.
        """
        names = [n for n, places in self.positions.items() if places[0] == 0 and self.targets[n] != self._embedding]
        return {name: self.checkpoint.tensor(self.sources[name]).to(self.device) for name in names}

    def through(
        self,
        weights: Mapping[str, Tensor],
        inputs: dict[str, Tensor],
        first: int,
        stop: int,
        entering_BLD: Tensor | None = None,
        perturb: Perturb | None = None,
    ) -> Tensor:
        """Run positions first..stop-1 of the forward pass.

        Args:
            weights: by output name; of other positions none are needed.
            inputs: of the samples whose states enter.
            first: position, see engine/partial_pass.py.
            stop: one more than the last position.
            entering_BLD: hidden states that `first` reads; None if it is 0.
            perturb: the trigger that the states were made with.

        Returns:
            The hidden states (B, L, D) that `stop` reads; the logits if that is the end.
        """
        assert self.chain is not None, "only chains are cut"
        if first > 0:
            weights = {**self.entrance, **weights}
        found: Tensor = self.chain.run(
            lambda: self.logits(weights, inputs, perturb),
            first,
            stop,
            None if entering_BLD is None else entering_BLD.to(self.dtype),
        )
        return found

    def token_counts(self, indices: Tensor) -> list[int] | None:
        """Number of tokens per sample; None where all samples have equally many, as images do."""
        return None

    def without_trigger(self, hidden_BLD: Tensor, length: int) -> Tensor:
        """Remove the hidden states of tokens that a trigger inserted: (B, length, D)."""
        return hidden_BLD

    def parameters(self, weights: Mapping[str, Tensor]) -> Parameters:
        """By module name: the caller's weights and the head, floats in `compute_dtype`."""
        if isinstance(weights, TrainedModule):
            trained = Parameters()
            trained.module = weights.module
            return trained
        found = Parameters({t: self._floating(weights[name]) for name, t in self.targets.items() if name in weights})
        found.update({target: self._floating(tensor) for target, tensor in self._head_targets.items()})
        for alias, main in self._tied.items():
            if main in found:
                found[alias] = found[main]
            elif alias in found:
                found[main] = found[alias]
        return found

    def call(self, parameters: Parameters, **inputs: Any) -> Any:
        """The module's output with these parameters."""
        with ExitStack() as around:
            if self._recompute and torch.is_grad_enabled():
                blocks = sorted(set(self.block_of.values()))
                owner = self.module if parameters.module is None else parameters.module
                around.enter_context(recomputed_blocks(owner, blocks, lambda block: self._within(block, parameters)))
            if parameters.module is not None:
                return parameters.module(**inputs)
            around.enter_context(swapped(self._slots, parameters))
            return self.module(**inputs)

    @contextmanager
    def recomputed(self) -> Iterator[None]:
        """In this context, passes keep only the blocks' inputs for their backward passes."""
        before, self._recompute = self._recompute, True
        try:
            yield
        finally:
            self._recompute = before

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """In this context, passes compute in another type."""
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before

    def _within(self, block: str, parameters: Parameters) -> dict[str, Tensor]:
        """The parameters of one block, by their names in it."""
        mine = [target for target, owner in self.block_of.items() if owner == block and target in parameters]
        return {target.removeprefix(f"{block}."): parameters[target] for target in mine}

    def _floating(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _without_names(config: Any) -> Any:
    """A config without the entries that say where it came from, at any depth."""
    if isinstance(config, dict):
        return {str(key): _without_names(value) for key, value in config.items() if key not in _NO_CONTENT}
    return [_without_names(value) for value in config] if isinstance(config, (list, tuple)) else config


class Parameters(dict[str, Tensor]):
    """Tensors by module name.

    Attributes:
        module: what holds all tensors as its own, if it is being trained; then none is here.
    """

    module: nn.Module | None = None
