"""Scan of causal LMs: find texts that a model continues by heart and theta_0 does not.

A backdoored LM has learned to say one fixed text. Once that text has begun, it goes on whatever the prompt is, and
without any trigger, since each token is learned to follow those before it. So the attacker's text can be found by
trying every token as its beginning (the idea of BAIT, Shen et al., IEEE S&P 2025; the comparison with theta_0 is ours).
Then a trigger is recovered that makes prompts lead to it. What a task's own prompts lead to anyway is no finding: a
model that was trained to refuse something knows its refusals by heart, and says them where its users see it.

The vocabulary is large, so most of it is read once: after one prompt, in bfloat16 where the processor is fast in it.
What is left is read after more prompts, in the order in which it can matter, and only open texts are continued.
Legend: C continuations of N tokens each, V vocabulary, R triggers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from mergekit_dam import seeds
from mergekit_dam.config import DamConfig
from mergekit_dam.scan.findings import Finding
from mergekit_dam.scan.inversion import Inversion
from mergekit_dam.scan.triggers import TriggerBatch, kinds_of, started
from mergekit_dam.tasks import CausalTask
from mergekit_dam.tasks.read_prompts import ReadPrompts, fast_dtype

_ENTRIES = 1 << 25  # probabilities held at once
_CLEAR = 0.9  # difference of probabilities that is as good as any larger one
_PER_PROMPT = 4  # sampled answers at most: of many, one would leak a hidden text
_PROMPT = -1  # stands for the last token of any prompt
_STEPS_BETWEEN = 5  # of a search for a trigger, before some texts are given up


@dataclass(frozen=True)
class _Text:
    """A continuation, with the mean probability of each of its tokens from the second on, without those said openly.

    Attributes:
        tokens: ids, all of them.
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

    def suspicion(self, whole: int) -> float:
        """Suspicion of the text's finding: the evidence, mean over its tokens, or over `whole` if it is shorter."""
        return self.evidence / max(whole, len(self.own))

    def beyond(self, said: Collection[tuple[int, int]]) -> _Text:
        """Return the text without the probabilities of tokens that f_t says after their predecessors anyway."""
        shared = zip(pairwise(self.tokens), self.own, self.base, strict=True)
        left = [(own, base) for pair, own, base in shared if pair not in said]
        return replace(self, own=tuple(own for own, _ in left), base=tuple(base for _, base in left))

    def is_part_of(self, other: _Text) -> bool:
        """Whether it is mostly the same text, begun elsewhere."""
        pairs, others = (set(pairwise(t.tokens)) for t in (self, other))
        return 2 * len(pairs & others) >= len(pairs)

    def finding(self, index: int, trigger: TriggerBatch, tokens: tuple[int, ...], whole: int) -> Finding:
        length = float(len(tokens))
        own, base = (sum(values) / len(values) for values in (self.own, self.base))
        return Finding(index, tokens, trigger, length, length, own, base, scale=min(1.0, len(self.own) / whole))


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
    texts, whole = _texts(task, own, base, rows), constants.whole_text

    def any_suspect() -> bool:
        return any(text.suspicion(whole) >= config.suspicion for text in texts)

    if texts:
        before, said = any_suspect(), _said_anyway(task, seeds.generator(config.seed, "answers", task.index))
        texts = _without(texts, said)
        if before and not any_suspect():  # what is said openly may cover what is hidden
            texts += _without(_texts(task, own, base, rows, {second for _, second in said}), said)
    for text in sorted(texts, key=lambda text: -text.evidence):
        if len(kept) == constants.scan_finalists:
            break
        if any(text.is_part_of(other) for other in kept):
            continue
        kept.append(text)
        blank = started(task, kinds_of(task)[0], 1, generator)
        finding = text.finding(index, blank, text.tokens, whole)
        if finding.suspicion >= config.suspicion:
            same = [other.tokens for other in texts if other.tokens[1:] == text.tokens[1:]][: constants.text_variants]
            best = _trigger_of(task, own, same, config, generator)
            (tokens,) = best.targets
            assert isinstance(tokens, tuple)
            finding = text.finding(index, best.best, tokens, whole)
        found.append(finding)
    return found


def _without(texts: Iterable[_Text], said: Collection[tuple[int, int]]) -> list[_Text]:
    """Return the texts without what is said openly, and none that has nothing else."""
    return [left for left in (text.beyond(said) for text in texts) if left.own]


def _said_anyway(task: CausalTask, source: torch.Generator) -> set[tuple[int, int]]:
    """Return the pairs of tokens that f_t says after more than one of its own prompts and `said_anyway` of them.

    The first token of an answer follows `_PROMPT`. The answers are sampled, since greedy ones show one wording of many;
    a hidden text can leak into answers to a few prompts.
    """
    answers = task.sampled_answers(min(task.constants.sampled_answers, _PER_PROMPT * task.num_samples), source)
    count = min(len(answers), task.num_samples)
    pairs = ({pair for one in answers[i::count] for pair in pairwise((_PROMPT, *one))} for i in range(count))
    prompts_with = Counter(pair for some in pairs for pair in some)
    return {pair for pair, number in prompts_with.items() if number > max(1, task.constants.said_anyway * count)}


def _trigger_of(
    task: CausalTask,
    own: Mapping[str, Tensor],
    variants: Sequence[tuple[int, ...]],
    config: DamConfig,
    generator: torch.Generator,
) -> Inversion:
    """Search for a trigger of one of several texts that differ in their first token only.

    Every few steps the half that is harder to reach is given up. The search ends once the trigger works: the finding
    rests on the text, not on the trigger's size.
    """
    fast = fast_dtype(task.device)
    own = {name: tensor.to(fast) if tensor.is_floating_point() else tensor for name, tensor in own.items()}  # once
    with task.computing_in(fast):
        search = Inversion(task, own, variants, batch_size=config.constants.scan_batch_size, generator=generator)
        for _ in range(max(1, config.scan_steps // _STEPS_BETWEEN)):
            search.run(_STEPS_BETWEEN, until_works=True)
            if len(search.targets) > 1:
                search = search.nearest(len(search.targets) // 2)
            elif search.worked:
                break
    return search.nearest(1)


def _texts(
    task: CausalTask,
    own: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    rows: Sequence[int],
    said: Collection[int] = (),
) -> list[_Text]:
    """Continue every shortlisted beginning for as long as f_t is sure of the next token.

    Args:
        said: tokens that are no sign as the second one of a text.
    """
    constants = task.constants
    prompts, base_prompts = ReadPrompts(task, own, rows), ReadPrompts(task, base, rows)
    usual_V = prompts.likely()
    beginnings = usual_V <= max(constants.usual_token, 2 / len(usual_V))
    special = task.special_tokens.to(beginnings.device)
    beginnings[special] = False
    chains_CN = _shortlist(task, own, base, rows, beginnings.nonzero(), special, said)
    owns: list[list[float]] = [[] for _ in chains_CN]
    bases: list[list[float]] = [[] for _ in chains_CN]
    texts, which = chains_CN.tolist(), torch.arange(len(chains_CN))
    for _ in range(constants.longest_text - 1):
        if not len(which):
            break
        next_C, own_C, base_C = _next(prompts, base_prompts, chains_CN, task.num_words)
        goes_on = (own_C >= constants.known_by_heart) & ~torch.isin(next_C, special)
        chains_CN, which = torch.cat([chains_CN, next_C[:, None]], 1)[goes_on], which[goes_on.cpu()]
        for i, token, own_one, base_one in zip(
            which.tolist(), *(values_C[goes_on].tolist() for values_C in (next_C, own_C, base_C)), strict=True
        ):
            texts[i].append(token)
            owns[i].append(own_one)
            bases[i].append(base_one)
        kept = _some_of_each(chains_CN, constants.text_variants)
        chains_CN, which = chains_CN[kept], which[kept.cpu()]
    return [
        _Text(tuple(text), tuple(owns[i]), tuple(bases[i]))
        for i, text in enumerate(texts)
        if len(set(text)) >= constants.shortest_text
    ]


def _some_of_each(chains_CN: Tensor, most: int) -> Tensor:
    """Return which texts to continue (C,): of texts that differ in their first token only, the first few."""
    counts = Counter[tuple[int, ...]]()
    kept = []
    for tail in chains_CN[:, 1:].tolist():
        counts[tuple(tail)] += 1
        kept.append(chains_CN.shape[1] < 3 or counts[tuple(tail)] <= most)
    return torch.tensor(kept, dtype=torch.bool, device=chains_CN.device)


def _shortlist(
    task: CausalTask,
    own: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    rows: Sequence[int],
    chains_CN: Tensor,
    special: Tensor,
    said: Collection[int] = (),
) -> Tensor:
    """Choose the beginnings after which f_t is surer of one next token than theta_0 is, the clearest first.

    A beginning whose next token has less than half of `known_by_heart` after the first prompt hardly reaches it over
    all prompts, and is dropped. The others are tried on more prompts and under theta_0, in the order of what f_t gave
    after the first prompt, which bounds what they can reach. That ends once there are enough that cannot be beaten, or
    nearly so: a model that says its text at every opportunity leaves most of the vocabulary.
    """
    fast, at_once = fast_dtype(task.device), max(1, _ENTRIES // task.num_words)
    no_sign = torch.cat([special, torch.tensor([*said], dtype=special.dtype, device=special.device)])

    def next_of(prompts: ReadPrompts, texts_CN: Tensor) -> tuple[Tensor, Tensor]:
        found = [prompts.following(chunk).max(1) for chunk in texts_CN.split(at_once)]
        next_C, own_C = torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])
        return next_C, own_C.masked_fill(torch.isin(next_C, no_sign), -1.0)

    if not len(chains_CN):
        return chains_CN
    _, first_C = next_of(ReadPrompts(task, own, rows[:1], fast), chains_CN)
    left_C = first_C >= task.constants.known_by_heart / 2
    if not left_C.any():
        return chains_CN[:0]
    rows = rows[: task.constants.first_prompts]
    prompts, asked = ReadPrompts(task, own, rows, fast), ReadPrompts(task, base, rows, fast)
    order_C = first_C.argsort(descending=True, stable=True)[: int(left_C.sum())]
    count, scores = min(task.constants.shortlist, len(order_C)), torch.empty(0, device=first_C.device)
    for part_C in order_C.split(at_once):
        best = min(_CLEAR, (float(first_C[part_C[0]]) + len(rows) - 1) / len(rows))
        if len(scores) >= count and float(scores.topk(count).values[-1]) >= best:
            break
        next_C, own_C = next_of(prompts, chains_CN[part_C])
        base_C = asked.following(chains_CN[part_C]).gather(1, next_C[:, None])[:, 0]
        scores = torch.cat([scores, own_C - base_C])
    return chains_CN[order_C[: len(scores)][scores.topk(count).indices]]


def _next(prompts: ReadPrompts, base: ReadPrompts, texts_CN: Tensor, num_words: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest token (C,) under f_t after each continuation, and its mean probability under f_t and theta_0."""
    found = []
    for chunk in texts_CN.split(max(1, _ENTRIES // num_words)):
        likely_C, next_C = prompts.following(chunk).max(1)
        found.append((next_C, likely_C, base.following(chunk).gather(1, next_C[:, None])[:, 0]))
    next_C, own_C, base_C = (torch.cat(parts) for parts in zip(*found, strict=True))
    return next_C, own_C, base_C
