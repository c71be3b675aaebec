"""Memory and time of learning, from shapes alone: orders of magnitude to plan with, not promises.

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
from mergekit_dam.learn.stand_ins import has_students, vaccinated
from mergekit_dam.merging.mask_keys import Granularity, mask_shape
from mergekit_dam.models.plan import Plan, TensorSpec
from mergekit_dam.tasks import family_of
from mergekit_dam.vaccine.settings import VaccineSettings, resolved_for

_WIDTH = ("hidden_size", "dim", "n_embd")
_HEADS = ("num_attention_heads", "n_heads", "n_head")
# parts that are views of files on the CPU
MAPPED = ("base and models, mapped files on the CPU", "one whole model, for its answers and its scan")
_FLOAT = 4  # bytes; learning is done in float32
_STATES = 4  # per mask logit: itself, its gradient, two moments of Adam
_SPREAD = (0.6, 1.75)  # a run's time against the estimate, within a factor of 3
_WIDEST = 1024  # width of the block that is timed; wider ones cost as its square
_START = 2.0  # seconds to read, hash and write small models
_WRAPPED = 2  # what a block of transformers takes of Python's time, against torch's own
_PER_MASK = 3  # what a mask of one tensor takes in a step, in passes through an empty block
_UNITS = 3  # a pass forward counts as one, its backward pass as two
_SWEEPS = 8  # passes over memory per model, mask entry and step


@dataclass(frozen=True)
class Speed:
    """Of this machine, measured now, at blocks of the model's own shape.

    Attributes:
        call_seconds: that a pass through one block takes, whatever is in it: Python and the libraries' dispatch.
        sample_seconds: that each sample adds to a pass forward through one block.
        entry_seconds: of one pass over memory, per float32.
    """

    call_seconds: float
    sample_seconds: float
    entry_seconds: float


@dataclass(frozen=True)
class Estimate:
    """What learning a plan takes.

    Attributes:
        memory_bytes: by part, at the peak, on the device that learns.
        forward_passes: single samples through one model, each backward pass counted as one or two more.
        calls: passes through a model, whatever their batch.
        seconds: shortest and longest time to expect; None without a measured speed.
    """

    memory_bytes: dict[str, int]
    forward_passes: int
    calls: int
    seconds: tuple[float, float] | None = None


def estimate(plan: Plan, *, processes: int = 1, speed: Speed | None = None, tokens: int | None = None) -> Estimate:
    """Memory and work of `find_or_learn` for a plan; one suspect class per model is assumed.

    Args:
        processes: that share the rows of masks and of frozen models; memory is that of one of them.
        speed: of the device (`measured_speed`).
        tokens: of a text sample, on average; None: as many as the setting `max_length` allows.
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
    taught = has_students([family_of(plan)], config)
    scanned = scans(config) and config.mask != "m1" and num_classes > 0 and not taught
    activations = _activation_bytes(plan.base.config, length)
    layers = _layers(plan.base.config)
    held, fitted = parameters, activations  # at a time, of parameters and activations
    if isinstance(config.window, int):  # models stay in their files
        held = largest_window(floating, layers, config.window, lambda spec: math.prod(spec.shape))
        entries = largest_window(floating, layers, config.window, lambda spec: _entries(spec, config.granularity))
        fitted = activations * min(layers, config.window) // layers
    at_once = max(
        constants.scan_batch_size * num_classes if scanned else 0,
        constants.student_batch_size if taught else 0,
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
    if taught:
        memory["a student with gradients and moments"] = _STATES * parameters * _FLOAT
        steps = num_models * config.student_steps * 3
        calls, passes = calls + steps, passes + steps * constants.student_batch_size
    elif scans(config) and config.mask != "m1":
        passes += sum(_token_scan(model.config) // length for model in plan.models)
    if vaccinated([family_of(plan)], config):
        vaccine = resolved_for(VaccineSettings(), family_of(plan), parameters, config.num_samples, constants)
        assert vaccine.plant_steps is not None and vaccine.unlearn_steps is not None and vaccine.batch_size is not None
        trained = 1 if vaccine.lora_rank else _STATES
        memory["a vaccinated model with what its training needs"] = trained * parameters * _FLOAT
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
    """Entries of the largest window of `size` positions: what is before the blocks, each block, what follows.

    Args:
        specs: in the order in which a model uses them.
        layers: how many blocks there are.
        numel: entries of a tensor.
    """
    sizes = [0] * (layers + 2)
    place = 0
    for spec in specs:
        number = re.search(r"\.(\d+)\.", spec.name)
        if number is not None:
            place = min(layers, int(number[1]) + 1)
        elif place > 0:
            place = layers + 1
        sizes[place] += numel(spec)
    return max(sum(sizes[first : first + size]) for first in range(0, len(sizes), size))


def _entries(spec: TensorSpec, granularity: Granularity) -> int:
    """Of a mask of a window, where tables of words have one per token."""
    is_table = spec.vocabulary_axis == 0
    return math.prod(mask_shape(spec.shape, "row" if is_table else granularity))


def _work(plan: Plan, num_classes: int) -> tuple[int, int]:
    """Calls of a model, and samples through it; a backward pass counts as one more (inputs) or two (weights)."""
    config, constants, num_models = plan.config, plan.config.constants, len(plan.models)
    if config.objective == "paper":
        calls = num_models * (config.steps * 15 + constants.coefficient_steps * 3)
        return calls, calls * config.batch_size
    # the model's own answers, the merge's, and those under one suspect's trigger
    calls = num_models * config.steps * (7 if num_classes else 4)
    passes = calls * config.batch_size
    if isinstance(config.window, int):  # a step goes through one window, and samples through all of them three times
        passes += 3 * num_models * config.num_samples
    if num_classes:
        found = [_search(plan, num_classes), _search(plan, num_classes, styles=True)]
        found += [_search(plan, num_classes)] if constants.scan_others and num_models > 1 else []
        refreshes = config.scan_steps + config.steps // config.refresh_every * constants.refresh_steps
        calls += num_models * (sum(one[0] for one in found) + 2 * refreshes)
        passes += num_models * (sum(one[1] for one in found) + 2 * refreshes * constants.scan_batch_size)
    return calls, passes


def _search(plan: Plan, num_classes: int, *, styles: bool = False) -> tuple[int, int]:
    """The same of one search of a task: all classes for two fifths of the steps, finalists for the rest, and what
    their triggers do to the model and to theta_0."""
    config, constants = plan.config, plan.config.constants
    first = max(1, config.scan_steps * 2 // 5)
    rest, finalists = (0, 0) if styles else (config.scan_steps - first, min(constants.scan_finalists, num_classes))
    checked = (num_classes + finalists) * min(constants.measured_samples, config.num_samples) * 2
    steps = (first * num_classes + rest * finalists) * constants.scan_batch_size * 2
    return 2 * (first + rest) + 2 * (num_classes + finalists), steps + checked


def measured_speed(plan: Plan, device: torch.device, tokens: int | None = None) -> Speed:
    """What a block of the plan's width and length takes on the device; under a second, for wide ones some seconds."""
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
    """Forward and backward through one block of random weights."""
    with torch.random.fork_rng(), torch.enable_grad():
        block = torch.nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True).to(device)
        inputs_BLD = torch.rand(batch, length, width, device=device, requires_grad=True)
        return _median_seconds(lambda: block(inputs_BLD).sum().backward(), device)


def _median_seconds(work: Callable[[], object], device: torch.device, *, budget: float = 0.15) -> float:
    """The median of the seconds that some tries take."""
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 2 or time.perf_counter() - begun < budget:
        one = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - one)
        if taken[0] > 2.0:  # the first one of a large block says enough
            break
    return median(taken)


def _length(plan: Plan, tokens: int | None) -> int:
    """L, the longest of the models'."""
    return max(_tokens(model.config, tokens or plan.config.max_length) for model in plan.models)


def _tokens(config: PretrainedConfig, max_length: int) -> int:
    """L of one sample: patches and a class token, or the length at which text is cut."""
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "patch_size"):
        return int((vision.image_size // vision.patch_size) ** 2 + 1)
    return max_length


def _classes(config: PretrainedConfig) -> int:
    """K that a scan goes through; 0 for a causal LM, which has none."""
    name = (config.architectures or [""])[0]
    return 0 if name.endswith(("ForCausalLM", "LMHeadModel")) else int(config.num_labels or 0)


def _token_scan(config: PretrainedConfig) -> int:
    """Tokens that the scan of a causal LM reads: every beginning after two prompts, on the model and on theta_0."""
    return 0 if _classes(config) else 2 * 2 * int(getattr(config.get_text_config(), "vocab_size", 0))


def _activation_bytes(config: PretrainedConfig, length: int) -> int:
    """Kept for the backward pass of one sample (Korthikanti et al., arXiv 2205.05198, equation 1, in float32)."""
    width, heads = _first(config, *_WIDTH), _first(config, *_HEADS)
    return 2 * _layers(config) * length * (34 * width + 5 * heads * length)


def _layers(config: PretrainedConfig) -> int:
    return _first(config, "num_hidden_layers", "n_layers", "n_layer")


def _first(config: PretrainedConfig, *names: str) -> int:
    """The number under the first of these names: families spell them differently."""
    inner = getattr(config, "vision_config", None) or config.get_text_config()
    return next((int(getattr(inner, name)) for name in names if hasattr(inner, name)), 1)
