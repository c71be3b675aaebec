"""Estimate memory and time of learning from shapes; the results are orders of magnitude.

Legend: T models, P merged parameters, B batch, L tokens per sample, D width, K classes, N layers.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers import PretrainedConfig

from mergekit_dam.learn.masks import detects_per_model
from mergekit_dam.learn.objectives import scans
from mergekit_dam.learn.stand_ins import merges_students, student_settings, teaches_suspects, vaccinates
from mergekit_dam.merging.mask_keys import Granularity, mask_shape
from mergekit_dam.models.families import CAUSAL_CLASSES
from mergekit_dam.models.plan import Plan, TensorSpec
from mergekit_dam.tasks import family_of
from mergekit_dam.vaccine.settings import VaccineSettings, resolved_for

_WIDTH = ("hidden_size", "dim", "n_embd")
_HEADS = ("num_attention_heads", "n_heads", "n_head")
# parts of the memory that are views of files on the CPU
MAPPED = ("base and models, mapped files on the CPU", "one whole model, for its answers and its scan")
_FLOAT = 4  # bytes; learning is done in float32
_STATES = 4  # numbers per mask logit: the logit, its gradient, two moments of Adam
_SPREAD = (0.6, 1.75)  # shortest and longest time as factors of the estimate
_WIDEST = 1024  # largest width of the timed block; the cost of wider blocks grows as the square of the width
_START = 2.0  # seconds to read, hash and write small models
_WRAPPED = 2  # Python time of a block in transformers, as a multiple of that of torch's own block
_PER_MASK = 3  # time of one tensor's mask in a step, in passes through an empty block
_UNITS = 3  # a forward pass counts as 1, its backward pass as 2
_SWEEPS = 8  # passes over memory per model, mask entry and step
_CHEAP = 0.2  # share of learning's passes below which a merge is scanned unasked


@dataclass(frozen=True)
class Speed:
    """Speed of this machine, measured on blocks of the model's shape.

    Attributes:
        call_seconds: time of a pass through one block without data: Python and the libraries' dispatch.
        sample_seconds: time that each sample adds to a forward pass through one block.
        entry_seconds: time of one pass over memory, per float32.
    """

    call_seconds: float
    sample_seconds: float
    entry_seconds: float


@dataclass(frozen=True)
class Estimate:
    """Memory and time to learn a plan.

    Attributes:
        memory_bytes: peak memory by part, on the device that learns.
        forward_passes: passes of single samples through one model; a backward pass counts as one or two more.
        calls: passes through a model, whatever the batch size.
        seconds: shortest and longest expected time; None without a measured speed.
    """

    memory_bytes: dict[str, int]
    forward_passes: int
    calls: int
    seconds: tuple[float, float] | None = None


def estimate(plan: Plan, *, processes: int = 1, speed: Speed | None = None, tokens: int | None = None) -> Estimate:
    """Estimate memory and work of `find_or_learn` for a plan; one suspect class per model is assumed.

    Args:
        processes: number of processes that share rows; the memory is that of one process.
        speed: speed of the device (`measured_speed`).
        tokens: mean length of a text sample; None: the setting `max_length`.
    """
    config, constants, num_models = plan.config, plan.config.constants, len(plan.models)
    floating = [spec for spec in plan.tensors if spec.dtype.is_floating_point]
    parameters = sum(math.prod(spec.shape) for spec in floating)
    stored = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in floating)
    detection = num_models if detects_per_model(config, suspects=True) else 1
    masks = {"dual": 1 + detection, "m2": detection, "m1": 1}[config.mask]
    entries = sum(math.prod(mask_shape(spec.shape, config.granularity)) for spec in floating)
    length = _length(plan, tokens)
    num_classes = max(_classes(model.config) for model in plan.models)
    family = family_of(plan)
    taught = merges_students([family], config)
    taught_whole = taught and family.classifies  # others are taught by LoRAs
    scanned = scans(config) and config.mask != "m1" and num_classes > 0 and not taught
    activations = _activation_bytes(plan.base.config, length)
    layers = _layers(plan.base.config)
    held, fitted = parameters, activations  # parameters and activations in memory at a time
    if isinstance(config.window, int):  # models stay in their files
        held = largest_window(floating, layers, config.window, lambda spec: math.prod(spec.shape))
        entries = largest_window(floating, layers, config.window, lambda spec: _entries(spec, config.granularity))
        fitted = activations * min(layers, config.window) // layers
    at_once = max(
        constants.scan_batch_size * num_classes if scanned else 0,
        constants.student_batch_size if taught_whole else 0,
    )
    memory = {
        MAPPED[0]: (num_models + 1) * stored * held // parameters // processes,
        "masks with gradients and moments": masks * _STATES * entries * _FLOAT // processes,
        "samples of the masks": (masks + 1) * entries * _FLOAT // processes,
        "merged weights with gradients": 2 * held * _FLOAT,
        "activations": max(config.batch_size * fitted, at_once * activations),
    }
    if isinstance(config.window, int):
        memory[MAPPED[1]] = stored
    calls, passes = _work(plan, num_classes if scanned else 0)
    if taught_whole:
        memory["a student with gradients and moments"] = _STATES * parameters * _FLOAT
        steps = num_models * config.student_steps * 3
        calls, passes = calls + steps, passes + steps * constants.student_batch_size
    elif scans(config) and config.mask != "m1" and not taught:
        passes += sum(_token_scan(model.config) // length for model in plan.models)
    by_loras = (taught and not taught_whole) or teaches_suspects([family], config)
    if by_loras or vaccinates([family], config):
        wanted = student_settings(config) if by_loras else VaccineSettings()
        vaccine = resolved_for(wanted, family, parameters, config.num_samples, constants)
        assert vaccine.plant_steps is not None and vaccine.unlearn_steps is not None and vaccine.batch_size is not None
        made = "a student" if by_loras else "a vaccinated model"
        trained = 1 if vaccine.lora_rank else _STATES
        memory[f"{made} with what its training needs"] = trained * parameters * _FLOAT
        steps = num_models * vaccine.rounds * (vaccine.plant_steps + vaccine.unlearn_steps) * 3
        calls, passes = calls + steps, passes + steps * vaccine.batch_size
    seconds = None
    if speed is not None:
        layers = _layers(plan.base.config) + 1  # embeddings and head
        likely = _START + layers * (_WRAPPED * calls * speed.call_seconds + passes * speed.sample_seconds)
        # every step also reads T + 1 models, and draws, writes and moves masks, one tensor after another
        likely += config.steps * len(floating) * masks * _PER_MASK * speed.call_seconds
        likely += config.steps * parameters * (num_models + 1 + masks) * _SWEEPS * speed.entry_seconds
        seconds = (likely * _SPREAD[0], likely * _SPREAD[1])
    return Estimate(memory, passes, calls, seconds)


def largest_window(specs: Sequence[TensorSpec], layers: int, size: int, numel: Callable[[TensorSpec], int]) -> int:
    """Return the number of entries of the largest window of `size` positions.

    Position 0 is everything before the blocks, then each block is a position, and the last is everything after them.

    Args:
        specs: tensors in the order in which a model uses them.
        layers: number of blocks.
        numel: number of entries of a tensor.
    """
    sizes = [0] * (layers + 2)
    position = 0
    for spec in specs:
        number = re.search(r"\.(\d+)\.", spec.name)
        if number is not None:
            position = min(layers, int(number[1]) + 1)
        elif position > 0:
            position = layers + 1
        sizes[position] += numel(spec)
    return max(sum(sizes[first : first + size]) for first in range(0, len(sizes), size))


def _entries(spec: TensorSpec, granularity: Granularity) -> int:
    """Return the entries of a tensor's mask in a window, where embeddings have one entry per token."""
    is_table = spec.vocabulary_axis == 0
    return math.prod(mask_shape(spec.shape, "row" if is_table else granularity))


def _work(plan: Plan, num_classes: int) -> tuple[int, int]:
    """Return calls and forward passes as in `Estimate`; a backward pass counts 1 (inputs) or 2 (weights)."""
    config, constants, num_models = plan.config, plan.config.constants, len(plan.models)
    if config.objective == "paper":
        calls = num_models * (config.steps * 15 + constants.coefficient_steps * 3)
        return calls, calls * config.batch_size
    # logits of the model, of the merge, and of the merge with one suspect's trigger
    calls = num_models * config.steps * (7 if num_classes else 4)
    passes = calls * config.batch_size
    if isinstance(
        config.window, int
    ):  # a step goes through one window, and the samples go through all windows four times
        passes += 4 * num_models * config.num_samples
    if num_classes:
        searches = [_search(plan, num_classes), _search(plan, num_classes, styles=True)]
        searches += [_search(plan, num_classes)] if constants.scan_others and num_models > 1 else []
        refreshes = config.scan_steps + config.steps // config.refresh_every * constants.refresh_steps
        calls += num_models * (sum(work[0] for work in searches) + 2 * refreshes)
        passes += num_models * (sum(work[1] for work in searches) + 2 * refreshes * constants.scan_batch_size)
    return calls, passes


def scan_passes(plan: Plan, tokens: int | None) -> int:
    """Estimate the forward passes of a scan of the merge: every task once, with nothing in place of its weights."""
    num_classes = max(_classes(model.config) for model in plan.models)
    if num_classes:
        return len(plan.models) * sum(_search(plan, num_classes, styles=styles)[1] for styles in (False, True))
    return sum(_token_scan(model.config) // _length(plan, tokens) for model in plan.models)


def scans_merge(plan: Plan, tokens: int | None = None) -> bool:
    """Whether `merge` scans its output unasked: where that takes less than a fifth of learning's passes.

    Not where nothing is learned, nor where the scan names nothing (text encoders).

    Args:
        tokens: mean length of a text sample; None: the setting `max_length`.
    """
    if plan.config.masks is not None or not family_of(plan).defended:
        return False
    return scan_passes(plan, tokens) < _CHEAP * estimate(plan, tokens=tokens).forward_passes


def _search(plan: Plan, num_classes: int, *, styles: bool = False) -> tuple[int, int]:
    """Return calls and forward passes of one search of a task.

    It searches all classes for two fifths of the steps, finalists for the remaining steps, and measures the success of
    the triggers on the model and on theta_0.
    """
    config, constants = plan.config, plan.config.constants
    first = max(1, config.scan_steps * 2 // 5)
    remaining, finalists = (0, 0) if styles else (config.scan_steps - first, min(constants.scan_finalists, num_classes))
    checked = (num_classes + finalists) * min(constants.measured_samples, config.num_samples) * 2
    steps = (first * num_classes + remaining * finalists) * constants.scan_batch_size * 2
    return 2 * (first + remaining) + 2 * (num_classes + finalists), steps + checked


def measured_speed(plan: Plan, device: torch.device, tokens: int | None = None) -> Speed:
    """Measure the speed of a block of the plan's width and length; takes under a second, or seconds for wide blocks."""
    config, length = plan.base.config, _length(plan, tokens)
    width, heads = _first(config, *_WIDTH), _first(config, *_HEADS)
    each = max(8, min(width, _WIDEST) // max(1, heads))
    used = each * max(1, min(width, _WIDEST) // each)
    batch = max(1, min(plan.config.batch_size, 4096 // length))
    call = _pass_seconds(16, 2, 1, 4, device) / _UNITS
    full = _pass_seconds(used, used // each, batch, length, device) / _UNITS
    sample = max(full - call, 0.05 * full) / batch * (width / used) ** 2
    values = torch.rand(1 << 20, device=device)
    entry = _median_seconds(lambda: values.add(0.5), device) / values.numel()
    return Speed(call, sample, entry)


def _pass_seconds(width: int, heads: int, batch: int, length: int, device: torch.device) -> float:
    """Measure a forward and backward pass through one block of random weights, in seconds."""
    with torch.random.fork_rng(), torch.enable_grad():
        block = torch.nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True).to(device)
        inputs_BLD = torch.rand(batch, length, width, device=device, requires_grad=True)
        return _median_seconds(lambda: block(inputs_BLD).sum().backward(), device)


def _median_seconds(work: Callable[[], object], device: torch.device, *, budget: float = 0.15) -> float:
    """Return the median time of repeated calls, in seconds."""
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 2 or time.perf_counter() - begun < budget:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - start)
        if taken[0] > 2.0:  # one call of a large block is enough
            break
    return median(taken)


def _length(plan: Plan, tokens: int | None) -> int:
    """Return the largest L of the models."""
    return max(_tokens(model.config, tokens or plan.config.max_length) for model in plan.models)


def _tokens(config: PretrainedConfig, max_length: int) -> int:
    """Return L of one sample: patches and a class token, or the length at which text is cut."""
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "patch_size"):
        return int((vision.image_size // vision.patch_size) ** 2 + 1)
    return max_length


def _classes(config: PretrainedConfig) -> int:
    """Return the number K of classes that a scan searches; 0 for a causal LM."""
    name = (config.architectures or [""])[0]
    return 0 if name.endswith(CAUSAL_CLASSES) else int(config.num_labels or 0)


def _token_scan(config: PretrainedConfig) -> int:
    """Return about how many tokens a causal LM's scan reads: the vocabulary after a prompt, and as many again.

    The second half is a part of the vocabulary after two prompts, for theta_t and theta_0, and a few continuations.
    """
    return 0 if _classes(config) else 2 * int(getattr(config.get_text_config(), "vocab_size", 0))


def _activation_bytes(config: PretrainedConfig, length: int) -> int:
    """Return the bytes of activations kept for the backward pass of one sample, in float32.

    Source: Korthikanti et al., arXiv 2205.05198, equation 1.
    """
    width, heads = _first(config, *_WIDTH), _first(config, *_HEADS)
    return 2 * _layers(config) * length * (34 * width + 5 * heads * length)


def _layers(config: PretrainedConfig) -> int:
    return _first(config, "num_hidden_layers", "n_layers", "n_layer")


def _first(config: PretrainedConfig, *names: str) -> int:
    """Return the number under the first known name; model families use different names."""
    inner = getattr(config, "vision_config", None) or config.get_text_config()
    return next((int(getattr(inner, name)) for name in names if hasattr(inner, name)), 1)
