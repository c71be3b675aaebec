"""The Task of causal LMs. Legend: B batch, L tokens, V vocabulary, C continuations of N tokens each."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergekit_dam import seeds
from mergekit_dam.errors import DamError
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks.base import Parameters, Target
from mergekit_dam.tasks.bounds import Perturb
from mergekit_dam.tasks.read_prompts import shares_prompts
from mergekit_dam.tasks.readout import tokenizer_of
from mergekit_dam.tasks.text import TextTask

LOG = logging.getLogger(__name__)
_AT_ONCE = 64  # sequences; bounds the memory of the key-value cache
_NO_TARGET = -100  # cross_entropy's label of positions that are left out


def cache_argument(model_class: type[nn.Module]) -> str | None:
    """The argument by which a class takes and returns its key-value cache: `cache` since transformers 5.24.

    None of classes that have none, or a state that cannot be copied for several continuations.
    """
    if getattr(model_class, "_is_stateful", False):
        return None
    taken = inspect.signature(model_class.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


class _Later(Sequence[Tensor]):
    """Sequences that are made when the first one is read: only the process that owns the task needs them."""

    def __init__(self, length: int, make: Callable[[], Sequence[Tensor]]) -> None:
        self._length, self._make = length, make

    @cached_property
    def _made(self) -> Sequence[Tensor]:
        return self._make()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]


class CausalTask(TextTask):
    """Causal LMs: a sample is a predicted position, its classes are the vocabulary.

    A sample is a calibration text and what model t goes on with, its answer; or text that it has sampled.
    """

    scanner, scanned_alone = "continuations", True
    classifies, defended = False, True

    def __init__(self, plan: Plan, index: int, device: torch.device) -> None:
        super().__init__(plan, index, device)
        self._answered = self._sequences
        self.answer_length = length = self.constants.answer_tokens
        if self.input.settings.calibration is not None and length:
            self._answered = _Later(self.num_samples, lambda: self._continued(self._sequences, length, _likeliest))

    def _calibrate(self, plan: Plan) -> Sequence[Tensor]:
        longest = self._longest
        if self.input.settings.calibration is not None:
            texts = [ids for ids in super()._calibrate(plan) if len(ids) > 1]
            cut = sum(len(ids) >= self._room for ids in texts)
            if cut:
                LOG.warning(
                    "%s: %d of %d calibration texts fill max_length (%d tokens) and may be cut before the place where "
                    "the model answers",
                    self.name,
                    cut,
                    len(texts),
                    self._room,
                )
            return texts
        LOG.warning("%s: no calibration data given; it samples its own text (seed %d)", self.name, plan.config.seed)
        self.sample_digests = ()  # nothing of the outside world, hence nothing to keep apart from evaluation
        config, length = plan.config, min(plan.config.max_length, longest)
        return _Later(config.num_samples, lambda: self._sample_text(config.num_samples, length, config.seed))

    @property
    def _room(self) -> int:
        return min(self._max_length, self._longest)

    @property
    def cache(self) -> str:
        """The argument by which the class takes and returns its key-value cache."""
        name = cache_argument(type(self.module))
        assert name is not None, "`family_of` refuses other classes"
        return name

    @property
    def _longest(self) -> int:
        """Longest text, in tokens, that leaves positions for a trigger and a continuation."""
        return max(2, self._positions - self.constants.perturbation_tokens - self.constants.longest_text)

    @property
    def _positions(self) -> int:
        return int(getattr(self.input.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        return self._padded([self._answered[int(i)] for i in indices])

    def read_tensors(self) -> Sequence[Tensor]:
        # text that the model samples itself follows from its weights, the seed and the settings
        texts = () if self.input.settings.calibration is None else self._sequences
        return [*texts, self.special_tokens, self._ends]

    def prompts(self, indices: Tensor) -> dict[str, Tensor]:
        return super().inputs(indices)

    def answers(self, indices: Tensor) -> list[tuple[int, ...]]:
        """Token ids of model t's greedy answers to the samples' texts; empty where a text ends with an answer's end."""
        return [tuple(self._answered[int(i)][len(self._sequences[int(i)]) :].tolist()) for i in indices]

    @property
    def longest(self) -> int:
        """Longest text, in tokens, that leaves positions for an answer."""
        return min(self._longest + self.constants.perturbation_tokens, self._positions - self.answer_length)

    def sampled_answers(self, count: int, source: torch.Generator) -> list[tuple[int, ...]]:
        """Token ids of model t's answers to the samples' texts in turn, of tokens of at least `said_token` each.

        Sampled at temperature 1, `answer_tokens` long, at least `longest_text`. None without calibration data, since
        text that the model sampled from nothing shows what it hides as well.
        """
        if self.input.settings.calibration is None:
            return []
        texts = [self._sequences[i % self.num_samples] for i in range(count)]
        length = max(self.answer_length, self.constants.longest_text)
        answered = self._continued(texts, length, _drawn(source, self.constants.said_token))
        return [tuple(both[len(ids) :].tolist()) for ids, both in zip(texts, answered, strict=True)]

    def _sample_text(self, num_samples: int, length: int, seed: int) -> list[Tensor]:
        """Sample text from model t at temperature 1, from its BOS or a random token: num_samples of ids (length,)."""
        config = self.input.config.get_text_config()
        source = seeds.generator(seed, "text", self.index)
        start = torch.randint(config.vocab_size, (num_samples, 1), generator=source)
        if config.bos_token_id is not None and config.bos_token_id < config.vocab_size:
            start.fill_(config.bos_token_id)
        parameters = self.parameters(self.own_weights())
        return [
            row for ids in start.split(_AT_ONCE) for row in self._go_on(parameters, ids, length - 1, _drawn(source))
        ]

    def _continued(self, texts: Sequence[Tensor], length: int, choose: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Append model t's answers to texts, up to the token that ends them; texts that end with it stay."""
        ends, rows, parameters = self._ends, list(texts), self.parameters(self.own_weights())
        by_length: dict[int, list[int]] = {}  # together go texts of one length: no family agrees on padding
        for i, row in enumerate(rows):
            if int(row[-1]) not in ends:
                by_length.setdefault(len(row), []).append(i)
        for same in by_length.values():
            for chunk in torch.tensor(same).split(_AT_ONCE):
                ids = torch.stack([rows[i] for i in chunk.tolist()])
                answers = self._go_on(parameters, ids, length, choose, ends)
                for i, answered in zip(chunk.tolist(), answers, strict=True):
                    over = torch.isin(answered[ids.shape[1] :], ends).nonzero()
                    rows[i] = answered[: ids.shape[1] + int(over[0]) + 1] if len(over) else answered
        return rows

    @torch.no_grad()
    def _go_on(
        self,
        parameters: Parameters,
        ids: Tensor,
        length: int,
        choose: Callable[[Tensor], Tensor],
        ends: Tensor | None = None,
    ) -> Tensor:
        """Continue texts (B, L) by `length` tokens, as far as there are positions, or until all have one of `ends`."""
        length = min(length, self._positions - self.constants.perturbation_tokens - ids.shape[1])
        step, cache = ids.to(self.device), None
        over_B1 = torch.zeros(len(ids), 1, dtype=torch.bool)
        for _ in range(length):
            output = self.call(parameters, input_ids=step, use_cache=True, **{self.cache: cache})
            cache, chosen = output[self.cache], choose(output.logits[:, -1])
            ids, step = torch.cat([ids, chosen], dim=1), chosen.to(self.device)
            if ends is not None:
                over_B1 |= torch.isin(chosen, ends)
                if over_B1.all():
                    break
        return ids

    def num_answers(self, inputs: Mapping[str, Tensor]) -> int:
        return int(inputs["attention_mask"][:, 1:].sum())

    def logits(
        self, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], perturb: Perturb | None = None
    ) -> Tensor:
        """logits (N, V) of the N positions after the first that hold a token of the text, triggered or not."""
        positions = inputs["input_ids"].shape[1] - 1
        output = self._forward(weights, inputs, perturb, use_cache=False)
        # inserted tokens come after position 0, so the last L - 1 positions are the clean text's
        logits: Tensor = output.logits[:, -positions:][inputs["attention_mask"][:, 1:].bool()]
        return logits.float()

    def reach(
        self,
        weights: Mapping[str, Tensor],
        inputs: dict[str, Tensor],
        targets: Sequence[Target],
        perturb: Perturb | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Targets are continuations: losses_B are means per token, hits_B say whether every token is likeliest."""
        rows = [torch.tensor(target) for target in targets]
        targets_BN = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_NO_TARGET).to(self.device)
        places_BN = inputs["attention_mask"].sum(1, keepdim=True) + torch.arange(targets_BN.shape[1]).to(self.device)
        there_BN, room = targets_BN != _NO_TARGET, torch.zeros_like(targets_BN)
        ids, mask = (torch.cat([inputs[key], room], 1) for key in ("input_ids", "attention_mask"))
        ids = ids.scatter(1, places_BN, targets_BN.clamp(min=0))
        mask = mask.scatter(1, places_BN, there_BN.to(mask.dtype))
        longer = {"input_ids": ids, "attention_mask": mask}
        first = int(places_BN[:, 0].min()) - 1  # logits of a large vocabulary cost as much as several blocks
        last = torch.arange(first - ids.shape[1], 0, device=self.device)  # a number of them would give a slow view
        options = {"logits_to_keep": last} if self._keeps_logits else {}
        output = self._forward(weights, longer, perturb, use_cache=False, **options)
        # inserted tokens come after position 0: counted from the end, places are those of the clean text
        own = output.logits[:, first - ids.shape[1] :]
        logits_BNV = own.gather(1, (places_BN - 1 - first)[..., None].expand(-1, -1, own.shape[-1])).float()
        losses = F.cross_entropy(logits_BNV.transpose(1, 2), targets_BN, reduction="none", ignore_index=_NO_TARGET)
        hits_BN = (logits_BNV.argmax(-1) == targets_BN) | ~there_BN
        return losses.sum(1) / there_BN.sum(1), hits_BN.all(1)

    @cached_property
    def _keeps_logits(self) -> bool:
        """Whether the class can compute the logits of the last positions only."""
        return "logits_to_keep" in inspect.signature(type(self.module).forward).parameters

    @cached_property
    def shares_prompts(self) -> bool:
        """Whether many texts can follow a prompt in one sequence."""
        return shares_prompts(self)

    @cached_property
    def special_tokens(self) -> Tensor:
        """Ids of special tokens: end, start, padding and those of the tokenizer."""
        config = self.input.config.get_text_config()
        ids = {*self._ends.tolist(), *_ids(config.bos_token_id), *_ids(config.pad_token_id)}
        ids |= set(self._tokenizer.all_special_ids if self._tokenizer else ())
        return torch.tensor(sorted(i for i in ids if i < config.vocab_size))

    @property
    def ends(self) -> tuple[int, ...]:
        """Token ids that end an answer; the model writes the first of them."""
        return tuple(self._ends.tolist())

    @cached_property
    def _ends(self) -> Tensor:
        """Token ids that end an answer; prompts may well end with another special token."""
        return torch.tensor(_ids(self.input.config.get_text_config().eos_token_id), dtype=torch.long)

    @cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer; None where there is none, as for a model that samples its own text."""
        try:
            return tokenizer_of(self._folders, self.name)
        except DamError:
            return None

    def words_of(self, target: Target) -> int | str:
        ids = [target] if isinstance(target, int) else list(target)
        return str(self._tokenizer.decode(ids)) if self._tokenizer else " ".join(f"#{i}" for i in ids)


def _likeliest(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(-1, keepdim=True).cpu()


def _drawn(source: torch.Generator, least: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Draw tokens of at least this probability, or the likeliest one."""

    def draw(logits_BV: Tensor) -> Tensor:
        shares_BV = logits_BV.float().softmax(-1).cpu()
        left_BV = shares_BV >= shares_BV.amax(-1, keepdim=True).clamp(max=least)
        return torch.multinomial(shares_BV * left_BV, 1, generator=source)

    return draw


def _ids(known: int | list[int] | None) -> list[int]:
    """List the token ids of a config's entry, which is one, several or none."""
    return known if isinstance(known, list) else [] if known is None else [known]
