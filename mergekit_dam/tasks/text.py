"""Text encoders with a classification head, and causal LMs. Legend: B batch, L tokens, D width, V vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.calibration import load_calibration
from mergekit_dam.errors import DamError
from mergekit_dam.perturbation import Bounds, Perturb
from mergekit_dam.plan import Plan
from mergekit_dam.task_vectors import TaskVectors
from mergekit_dam.tasks.base import Task
from mergekit_dam.tasks.readout import Readout, linear_head, logits_of, tokenizer_of

LOG = logging.getLogger(__name__)
_NEAREST = 3  # words shown per recovered token
_SAMPLED_AT_ONCE = 64  # sequences; bounds the memory of the key-value cache


class TextTask(Task):
    """BERT, RoBERTa and DistilBERT, with their own classification head or a linear one."""

    def __init__(self, plan: Plan, index: int, device: torch.device) -> None:
        super().__init__(plan, index, device)
        self._read = self._readout()
        embedding = self.module.get_input_embeddings()
        self._embedding = next(n for n, m in self.module.named_modules() if m is embedding) + ".weight"
        output_name = next(name for name, target in self.targets.items() if target == self._embedding)
        table = TaskVectors(plan).base(output_name).float()
        self._table, self._folders = self._sources[output_name], (self.input.path, plan.base.path)
        self.bounds = Bounds.of(table.amin(0), table.amax(0)).to(device)
        self.perturbation_shape = (plan.config.perturbation_tokens, table.shape[1])
        self._sequences = self._calibrate(plan)
        self.num_samples = len(self._sequences)

    def nearest_tokens(self, vectors_KD: Tensor) -> list[list[tuple[str, float]]]:
        table_VD = F.normalize(self.checkpoint.tensor(str(self._table)).float(), dim=1)
        cosines_KV = F.normalize(vectors_KD.float().cpu(), dim=1) @ table_VD.T
        tokenizer = tokenizer_of(self._folders, self.name)
        nearest = cosines_KV.topk(min(_NEAREST, cosines_KV.shape[1]), dim=1)
        return [
            [
                (str(tokenizer.convert_ids_to_tokens(i) or f"#{i}"), round(c, 4))
                for c, i in zip(row_c, row_i, strict=True)
            ]
            for row_c, row_i in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True)
        ]

    def _readout(self) -> Readout:
        """The class's own logits, or a linear head."""
        settings, kind = self.input.settings, type(self.module).__name__
        if kind.endswith(("ForSequenceClassification", "ForCausalLM", "LMHeadModel")):
            return logits_of
        if settings.head is not None:
            return linear_head(settings.head, int(self.input.config.hidden_size), self.name, self.device)
        raise DamError(
            f"model {self.name}", expected="a classification head (...ForSequenceClassification) or `head:`", got=kind,
            cure="Give the fine-tuned model with its head; only the base may be without one.",
        )  # fmt: skip

    def _calibrate(self, plan: Plan) -> Sequence[Tensor]:
        data = load_calibration(
            self.input.settings, "text", num_samples=plan.config.num_samples, seed=plan.config.seed, task=self.name
        )
        self.sample_digests = data.digests
        tokenizer = tokenizer_of((self.input.path, plan.base.path), self.name)
        encoded = tokenizer(list(data.samples), truncation=True, max_length=plan.config.max_length)["input_ids"]
        return [torch.tensor(ids) for ids in encoded]

    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        rows = [self._sequences[int(i)] for i in indices]
        config = self.input.config.get_text_config()
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def logits(
        self, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], perturb: Perturb | None = None
    ) -> Tensor:
        return self._read(self._forward(weights, inputs, perturb))

    def _forward(
        self, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], perturb: Perturb | None, **options: Any
    ) -> Any:
        parameters = self.parameters(weights)
        if perturb is None:
            return self.call(parameters, **inputs, **options)
        embedded = F.embedding(inputs["input_ids"], parameters[self._embedding])
        embedded, mask = perturb(embedded.float(), inputs["attention_mask"])
        return self.call(parameters, inputs_embeds=embedded.to(self.dtype), attention_mask=mask, **options)


class _Later(Sequence[Tensor]):
    """Sequences that are made when the first one is asked for: of several processes only a task's own needs them."""

    def __init__(self, length: int, make: Callable[[], Tensor]) -> None:
        self._length, self._make = length, make

    @cached_property
    def _made(self) -> Tensor:
        return self._make()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]


class CausalTask(TextTask):
    """Causal LMs: a sample is a predicted position, its classes are the vocabulary."""

    classifies = False

    def _calibrate(self, plan: Plan) -> Sequence[Tensor]:
        if self.input.settings.calibration is not None:
            return [ids for ids in super()._calibrate(plan) if len(ids) > 1]
        LOG.warning("%s: no calibration data given; it samples its own text (seed %d)", self.name, plan.config.seed)
        self.sample_digests = ()  # nothing of the outside world, hence nothing to keep apart from evaluation
        config = plan.config
        return _Later(config.num_samples, lambda: self._sample_text(config.num_samples, config.max_length, config.seed))

    @torch.no_grad()
    def _sample_text(self, num_samples: int, length: int, seed: int) -> Tensor:
        """Model t's own text at temperature 1, from its BOS token or a random token: ids (num_samples, length)."""
        config = self.input.config.get_text_config()
        length = min(length, getattr(config, "max_position_embeddings", length))
        source = seeds.generator(seed, "text", self.name)
        parameters = self.parameters(self.own_weights())
        start = torch.randint(config.vocab_size, (num_samples, 1), generator=source)
        if config.bos_token_id is not None and config.bos_token_id < config.vocab_size:
            start.fill_(config.bos_token_id)
        parts = []
        for ids in start.split(_SAMPLED_AT_ONCE):
            step, cache = ids.to(self.device), None
            for _ in range(length - 1):
                output = self.call(parameters, input_ids=step, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                probabilities = output.logits[:, -1].float().softmax(-1).cpu()
                drawn = torch.multinomial(probabilities, 1, generator=source)
                ids, step = torch.cat([ids, drawn], dim=1), drawn.to(self.device)
            parts.append(ids)
        return torch.cat(parts)

    def num_answers(self, inputs: Mapping[str, Tensor]) -> int:
        return int(inputs["attention_mask"][:, 1:].sum())

    def logits(
        self, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], perturb: Perturb | None = None
    ) -> Tensor:
        """logits (N, V) of the N positions after the first that hold a token, the same ones if perturbed."""
        positions = inputs["input_ids"].shape[1] - 1
        output = self._forward(weights, inputs, perturb, use_cache=False)
        # inserted tokens come after position 0, so the last L - 1 positions are the clean text's
        logits: Tensor = output.logits[:, -positions:][inputs["attention_mask"][:, 1:].bool()]
        return logits.float()
