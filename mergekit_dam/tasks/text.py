"""The Task of text encoders with a classification head. Legend: B batch, L tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergekit_dam.engine.task_vectors import TaskVectors
from mergekit_dam.errors import DamError
from mergekit_dam.io.calibration import load_calibration
from mergekit_dam.models.families import CAUSAL_CLASSES
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks.base import Task
from mergekit_dam.tasks.bounds import Bounds, Perturb
from mergekit_dam.tasks.encoding import encoded
from mergekit_dam.tasks.readout import Readout, linear_head, own_head, require_rows, tokenizer_of

_NEAREST = 3  # words shown per recovered token


class TextTask(Task):
    """BERT, RoBERTa and DistilBERT, with their own classification head or a linear one."""

    modality = "text"
    trigger_kinds = ("tokens",)
    defended = False

    def __init__(self, plan: Plan, index: int, device: torch.device) -> None:
        super().__init__(plan, index, device)
        self._read = self._readout()
        embedding = self.module.get_input_embeddings()
        self._embedding = next(n for n, m in self.module.named_modules() if m is embedding) + ".weight"
        output_name = next(name for name, target in self.targets.items() if target == self._embedding)
        table = TaskVectors(plan).base(output_name).float()
        self._max_length = plan.config.max_length
        self._table, self._folders = self.sources[output_name], (self.input.path, plan.base.path)
        self.bounds = Bounds.of(table.amin(0), table.amax(0)).to(device)
        self.perturbation_shape = (plan.config.constants.perturbation_tokens, table.shape[1])
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

    @property
    def num_words(self) -> int:
        """Size of the vocabulary, V."""
        return int(self.input.config.get_text_config().vocab_size)

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """Output names of the tables of words, positions and segments."""
        tables = {name for name, module in self.module.named_modules() if isinstance(module, nn.Embedding)}
        return frozenset(name for name, target in self.targets.items() if target.rpartition(".")[0] in tables)

    @cached_property
    def special_tokens(self) -> Tensor:
        """Ids of special tokens, e.g. the one that ends a text."""
        ids = tokenizer_of(self._folders, self.name).all_special_ids
        return torch.tensor(sorted(i for i in ids if i < self.num_words), dtype=torch.long)

    def with_random_words(self, rows_B: Tensor, most: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Insert 0 to `most` random words into each sample, anywhere between its first and last token.

        A text that would get longer than `max_length` ends sooner.
        """
        words = torch.ones(self.num_words)
        words[self.special_tokens] = 0.0
        changed = []
        for row in rows_B.tolist():
            text_L = self._sequences[row]
            count = int(torch.randint(most + 1, (), generator=generator))
            for word in torch.multinomial(words, count, generator=generator) if count else ():
                at = int(torch.randint(1, max(2, len(text_L)), (), generator=generator))
                text_L = torch.cat([text_L[:at], word[None], text_L[at:]])
            fits = len(text_L) <= self._max_length
            changed.append(text_L if fits else torch.cat([text_L[: self._max_length - 1], text_L[-1:]]))
        return self._padded(changed)

    def _readout(self) -> Readout:
        """Choose the head: the class's own, or a linear one from a file."""
        settings, kind = self.input.settings, type(self.module).__name__
        if kind.endswith(("ForSequenceClassification", *CAUSAL_CLASSES)):
            return own_head()
        if settings.head is not None:
            return linear_head(settings.head, int(self.input.config.hidden_size), self.name, self.device)
        raise DamError(
            f"model {self.name}",
            expected="a classification head (...ForSequenceClassification) or `head:`",
            got=kind,
            cure="Give the fine-tuned model with its head; only the base may be without one.",
        )

    def _calibrate(self, plan: Plan) -> Sequence[Tensor]:
        data = load_calibration(
            self.input.settings,
            "text",
            num_samples=plan.config.num_samples,
            seed=plan.config.seed,
            task=self.name,
            position=self.index,
        )
        self.sample_digests = data.digests
        tokenizer = tokenizer_of((self.input.path, plan.base.path), self.name)
        found = encoded(tokenizer, data.samples, self._room, self.name)
        require_rows(found, self.num_words, tokenizer, self.name)
        return [torch.tensor(ids) for ids in found]

    @property
    def _room(self) -> int:
        """Longest calibration sample, in tokens."""
        return self._max_length

    def read_tensors(self) -> Sequence[Tensor]:
        return [*self._sequences, self.special_tokens, *self._read.tensors]

    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        return self._padded(self.samples(indices))

    def samples(self, indices: Tensor) -> list[Tensor]:
        return [self._sequences[int(i)] for i in indices]

    def batch(self, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        return self._padded(samples)

    @property
    def longest(self) -> int:
        """Longest text, in tokens, with whatever is inserted into it."""
        return self._max_length

    @property
    def tokenizer(self) -> Any:
        """The model's own, or the base's."""
        return tokenizer_of(self._folders, self.name)

    def _padded(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        config = self.input.config.get_text_config()
        pad = config.pad_token_id
        pad = pad if pad is not None and 0 <= pad < self.num_words else 0  # masked: any token will do
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def logits(
        self, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], perturb: Perturb | None = None
    ) -> Tensor:
        return self._read(self._forward(weights, inputs, perturb))

    def token_counts(self, indices: Tensor) -> list[int] | None:
        return [int(n) for n in self.inputs(indices)["attention_mask"].sum(1)]

    def without_trigger(self, hidden_BLD: Tensor, length: int) -> Tensor:
        inserted = hidden_BLD.shape[1] - length  # after position 0
        return torch.cat([hidden_BLD[:, :1], hidden_BLD[:, 1 + inserted :]], dim=1)

    def _forward(
        self, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], perturb: Perturb | None, **options: Any
    ) -> Any:
        parameters = self.parameters(weights)
        assert self._embedding is not None
        table_VD = parameters.get(self._embedding)
        is_behind = table_VD is None and parameters.module is None  # the pass begins there, and only the shape counts
        if perturb is None and not is_behind:
            return self.call(parameters, **inputs, **options)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if is_behind:
            embedded = torch.zeros(*ids.shape, self.perturbation_shape[1], device=self.device)
        else:
            embedded = F.embedding(ids, parameters[self._embedding])
        if perturb is not None:
            embedded, extended = perturb(embedded.float(), mask)
            assert extended is not None
            mask = extended
        return self.call(parameters, inputs_embeds=embedded.to(self.dtype), attention_mask=mask, **options)
