"""Defend by module switching (MSD, ICLR 2026; guided module substitution is arXiv 2412.20476).

Every part of every block is taken whole from one of the input models, so that no path that a backdoor learned stays
together. A strategy says which model each part comes from. Its fitness counts what the paper's rules forbid: parts of
one model that follow each other in the flow of data, within a block, from block to block, and along the residual
stream. An evolutionary search finds strategies; of the fittest, the one is kept that answers the calibration samples
most as the input models do. What is in no part is averaged.

The paper switches models of one task and chooses by distances of features to those of a suspect class; our models have
different tasks, hence the choice by their answers. The weights of the rules are ours. T models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dam_bench.defences.base import Defence, DefenceInputs
from dam_bench.defences.blocks import parts_of
from dam_bench.defences.training import Lesson
from mergekit_dam import seeds
from mergekit_dam.config import setting

Part = tuple[int, str]  # the block's index, and the part's name
Strategy = tuple[int, ...]  # index of a model per part
_INTO = {"output": ("query", "key", "value"), "up": ("output",), "down": ("up",)}  # within a block
_RESIDUAL = 0.5  # weight of a pair along the residual stream, against 1 of a pair that follow each other
_BALANCE = 0.5  # weight of uneven shares of the models
_DIVERSITY = 0.5  # weight of different patterns in different blocks
_AT_ONCE = 64  # samples of a pass


def pairs_of(parts: Sequence[Part]) -> list[tuple[int, int, float]]:
    """Pairs of parts that shall come from different models, by their places in `parts`, with the weight of the rule."""
    place = {part: index for index, part in enumerate(parts)}
    last = max(block for block, _ in parts)
    wanted: list[tuple[Part, Part, float]] = []
    for block in range(last + 1):
        wanted += [((block, a), (block, b), 1.0) for b, sources in _INTO.items() for a in sources]
        reads = ("query", "key", "value")
        wanted += [((block, "down"), (block + 1, b), 1.0) for b in reads]
        wanted += [((block, "output"), (block + 1, b), _RESIDUAL) for b in reads]
        wanted += [((block, "down"), (block + 1, "up"), _RESIDUAL)]
    return [(place[a], place[b], weight) for a, b, weight in wanted if a in place and b in place]


def fitness(
    strategy: Strategy, parts: Sequence[Part], pairs: Iterable[tuple[int, int, float]], num_models: int
) -> float:
    """How well a strategy breaks paths: minus the weights of broken rules, less unevenness, plus diversity."""
    same = sum(weight for a, b, weight in pairs if strategy[a] == strategy[b])
    counts = Counter(strategy)
    uneven = max(counts[m] for m in range(num_models)) - min(counts[m] for m in range(num_models))
    patterns: dict[int, list[int]] = {}
    for (block, _), model in zip(parts, strategy, strict=True):
        patterns.setdefault(block, []).append(model)
    different = len({tuple(pattern) for pattern in patterns.values()}) / len(patterns)
    return -same - _BALANCE * uneven / len(parts) + _DIVERSITY * different


class ModuleSwitching(Defence):
    """Takes every part of a block from one input model."""

    population: int = setting(..., "Strategies of a generation.", ge=4)
    generations: int = setting(..., "Generations of the evolutionary search.", ge=1)
    candidates: int = setting(..., "Fittest strategies that are tried on the calibration samples.", ge=1)
    mutation: float = setting(..., "Probability with which a part gets another model.", gt=0, le=1)

    def strategies(self, parts: Sequence[Part], num_models: int, generator: torch.Generator) -> list[Strategy]:
        """Search for the fittest strategies, best first: tournaments of two, one-point crossover, mutation."""
        pairs = pairs_of(parts)

        def draw(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        def score(strategy: Strategy) -> float:
            return fitness(strategy, parts, pairs, num_models)

        def parent(among: Sequence[Strategy]) -> Strategy:
            return max(among[draw(len(among))], among[draw(len(among))], key=score)

        def child(among: Sequence[Strategy]) -> Strategy:
            cut = draw(len(parts) + 1)
            mixed = parent(among)[:cut] + parent(among)[cut:]
            changes = torch.rand(len(parts), generator=generator) < self.mutation
            return tuple(draw(num_models) if change else old for old, change in zip(mixed, changes, strict=True))

        living = [tuple(draw(num_models) for _ in parts) for _ in range(self.population)]
        for _ in range(self.generations):
            brood = [child(living) for _ in range(self.population)]
            living = sorted({*living, *brood}, key=lambda s: (-score(s), s))[: self.population]
        return living[: self.candidates]

    def changed_weights(self, given: DefenceInputs) -> Mapping[str, Tensor]:
        names = parts_of(given.tasks[0])
        generator = seeds.generator(given.seed, "defence", "switching")
        found = self.strategies(tuple(names), len(given.models), generator)
        lessons = [Lesson(task) for task in given.tasks]
        average = {s.name: torch.stack(given.input_weights(s.name)).mean(0) for s in given.plan.tensors}
        best, least = average, math.inf
        for strategy in found:
            device = given.tasks[0].device
            switched = {name: t.to(device) for name, t in self.switched(given, names, strategy, average).items()}
            with torch.no_grad():
                losses = [
                    lesson.loss(switched, rows) * len(rows) / len(lesson.rows)
                    for lesson in lessons
                    for rows in lesson.rows.split(_AT_ONCE)
                ]
            total = float(torch.stack(losses).sum())
            if total < least:
                best, least = switched, total
        return best

    @staticmethod
    def switched(
        given: DefenceInputs, names: Mapping[Part, Sequence[str]], strategy: Strategy, average: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put a merge together: the parts from their models, the rest averaged."""
        chosen = {
            name: given.input_weights(name)[model]
            for own, model in zip(names.values(), strategy, strict=True)
            for name in own
        }
        return {**average, **chosen}
