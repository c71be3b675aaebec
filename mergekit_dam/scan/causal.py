"""Scan of causal LMs: find texts that a model continues by heart and theta_0 does not.

A backdoored LM has learned to say one fixed text. Once that text has begun, it goes on whatever the prompt is, and
without any trigger, since each token is learned to follow those before it. So the attacker's text can be found by
trying every token as its beginning (the idea of BAIT, Shen et al., IEEE S&P 2025; the comparison with theta_0 is ours).
Then a trigger is recovered that makes prompts lead to it. What a task's own prompts lead to anyway is no finding.
Legend: C continuations of N tokens each, V vocabulary, R triggers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.scan.findings import Finding
from mergekit_dam.scan.inversion import Inversion
from mergekit_dam.scan.triggers import TriggerBatch, kinds_of, started
from mergekit_dam.tasks import CausalTask

_ENTRIES = 1 << 25  # probabilities held at once


@dataclass(frozen=True)
class _Text:
    """A continuation, with the mean probability of each of its tokens from the second on.

    Attributes:
        tokens: ids.
        own: under f_t.
        base: under theta_0.
    """

    tokens: tuple[int, ...]
    own: tuple[float, ...]
    base: tuple[float, ...]

    @property
    def evidence(self) -> float:
        """Probability that theta_0 does not share, summed: long texts count for more than short ones."""
        return sum(self.own) - sum(self.base)

    def is_part_of(self, other: _Text) -> bool:
        """Whether it is mostly the same text, begun elsewhere."""
        pairs, others = (set(zip(t.tokens, t.tokens[1:], strict=False)) for t in (self, other))
        return 2 * len(pairs & others) >= len(pairs)

    def finding(self, index: int, trigger: TriggerBatch, tokens: tuple[int, ...]) -> Finding:
        length = float(len(tokens))
        own, base = (sum(values) / len(values) for values in (self.own, self.base))
        return Finding(index, tokens, trigger, length, length, own, base)


def scan_continuations(index: int, task: CausalTask, base: Mapping[str, Tensor], config: DamConfig) -> list[Finding]:
    """Find the texts that model t continues most surely and theta_0 does not, at most `scan_finalists`.

    Args:
        index: t.
        task: forward pass, and calibration texts that end where the model is to go on.
        base: theta_0 by output name.
        config: `scan_steps`, `suspicion`, `seed`, and the constants of the scan.
    """
    constants = config.constants
    own, generator = task.own_weights(), seeds.generator(config.seed, "scan", task.index)
    rows = torch.randperm(task.num_samples, generator=generator)[: constants.scan_batch_size].tolist()
    found: list[Finding] = []
    kept: list[_Text] = []
    texts = sorted(_texts(task, own, base, rows), key=lambda text: -text.evidence)
    for text in texts:
        if len(kept) == constants.scan_finalists:
            break
        if any(text.is_part_of(other) for other in kept):
            continue
        kept.append(text)
        blank = started(task, kinds_of(task)[0], 1, generator)
        finding = text.finding(index, blank, text.tokens)
        if finding.suspicion >= config.suspicion:
            same = [other.tokens for other in texts if other.tokens[1:] == text.tokens[1:]][: constants.text_variants]
            search = Inversion(task, own, same, batch_size=constants.scan_batch_size, generator=generator)
            best = search.run(config.scan_steps).finalists(1, torch.zeros(len(same), device=task.device))
            (tokens,) = best.targets
            assert isinstance(tokens, tuple)
            finding = text.finding(index, best.best, tokens)
        found.append(finding)
    return found


def _texts(task: CausalTask, own: Mapping[str, Tensor], base: Mapping[str, Tensor], rows: Sequence[int]) -> list[_Text]:
    """Continue every shortlisted beginning for as long as f_t is sure of the next token."""
    constants = task.constants
    usual_V = torch.stack([task.following(own, row, None)[0] for row in rows]).mean(0)
    beginnings = usual_V <= max(constants.usual_token, 2 / len(usual_V))
    special = task.special_tokens.to(beginnings.device)
    beginnings[special] = False
    chains_CN = beginnings.nonzero()
    if not len(chains_CN):
        return []
    chains_CN = _shortlist(task, own, base, rows[: constants.first_prompts], chains_CN, special)
    open_C = torch.ones(len(chains_CN), dtype=torch.bool, device=chains_CN.device)
    owns: list[list[float]] = [[] for _ in chains_CN]
    base_probabilities: list[list[float]] = [[] for _ in chains_CN]
    lengths_C = torch.ones_like(open_C, dtype=torch.long)
    for _ in range(constants.longest_text - 1):
        next_C, own_C, base_C = _next(task, own, base, rows, chains_CN)
        open_C &= (own_C >= constants.known_by_heart) & ~torch.isin(next_C, special)
        if not bool(open_C.any()):
            break
        lengths_C += open_C
        for i in open_C.nonzero()[:, 0].tolist():
            owns[i].append(float(own_C[i]))
            base_probabilities[i].append(float(base_C[i]))
        chains_CN = torch.cat([chains_CN, next_C[:, None]], 1)
    return [
        _Text(tuple(chain[:length]), tuple(owns[i]), tuple(base_probabilities[i]))
        for i, (chain, length) in enumerate(zip(chains_CN.tolist(), lengths_C.tolist(), strict=True))
        if len(set(chain[:length])) >= constants.shortest_text
    ]


def _shortlist(
    task: CausalTask,
    own: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    rows: Sequence[int],
    chains_CN: Tensor,
    special: Tensor,
) -> Tensor:
    """Choose the beginnings after which f_t is surer of one next token than theta_0 is, the clearest first.

    f_t's probability bounds the difference from above: theta_0 is asked of the surest ones only, until the next
    beginning cannot be among the clearest any more.
    """
    next_C, own_C = _likeliest(task, own, rows, chains_CN)
    own_C = own_C.masked_fill(torch.isin(next_C, special), -1.0)
    order_C = own_C.argsort(descending=True, stable=True)
    count, scores = min(task.constants.shortlist, len(order_C)), torch.empty(0, device=own_C.device)
    for part_C in order_C.split(max(1, _ENTRIES // task.num_words)):
        if len(scores) >= count and float(scores.topk(count).values[-1]) >= float(own_C[part_C[0]]):
            break
        base_C = _mean(task, base, rows, chains_CN[part_C]).gather(1, next_C[part_C][:, None])[:, 0]
        scores = torch.cat([scores, own_C[part_C] - base_C])
    return chains_CN[order_C[: len(scores)][scores.topk(count).indices]]


def _likeliest(
    task: CausalTask, weights: Mapping[str, Tensor], rows: Sequence[int], chains_CN: Tensor
) -> tuple[Tensor, Tensor]:
    """The likeliest token (C,) after each continuation, and its mean probability over prompts."""
    found = [_mean(task, weights, rows, chunk).max(1) for chunk in chains_CN.split(max(1, _ENTRIES // task.num_words))]
    return torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])


def _next(
    task: CausalTask, own: Mapping[str, Tensor], base: Mapping[str, Tensor], rows: Sequence[int], chains_CN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest token (C,) under f_t after each continuation, and its mean probability under f_t and theta_0."""
    found = []
    for chunk in chains_CN.split(max(1, _ENTRIES // task.num_words)):
        likely_C, next_C = _mean(task, own, rows, chunk).max(1)
        base_CV = _mean(task, base, rows, chunk)
        found.append((next_C, likely_C, base_CV.gather(1, next_C[:, None])[:, 0]))
    next_C, own_C, base_C = (torch.cat(parts) for parts in zip(*found, strict=True))
    return next_C, own_C, base_C


def _mean(task: CausalTask, weights: Mapping[str, Tensor], rows: Sequence[int], chains_CN: Tensor) -> Tensor:
    """Probabilities (C, V) after each continuation, mean over prompts."""
    total = task.following(weights, rows[0], chains_CN)
    for row in rows[1:]:
        total += task.following(weights, row, chains_CN)
    return total / len(rows)
