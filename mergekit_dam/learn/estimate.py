"""Memory and time of learning, from shapes alone: orders of magnitude to plan with, not promises.

Legend: T models, P merged parameters, B batch, L tokens per sample, D width, K classes, N layers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from mergekit_dam.learn.masks import detects_per_model
from mergekit_dam.learn.students import wanted
from mergekit_dam.merging.mask_keys import mask_shape
from mergekit_dam.models.plan import Plan
from mergekit_dam.tasks import family_of

_FLOAT = 4  # bytes; learning is done in float32
_DISPATCH = 5e-4  # seconds that Python takes per layer and pass, whatever its size
_STATES = 4  # per mask logit: itself, its gradient, two moments of Adam
_SPREAD = (0.5, 4.0)  # a run's time against the estimate: small models wait for Python, large ones for memory


@dataclass(frozen=True)
class Estimate:
    """What learning a plan takes.

    Attributes:
        memory_bytes: by part, at the peak, on the device that learns.
        forward_passes: single samples through one model, each backward pass counted as one or two more.
        flops: floating point operations of all of them, and of the passes over masks.
        seconds: shortest and longest time to expect; None without a measured speed.
    """

    memory_bytes: dict[str, int]
    forward_passes: int
    flops: float
    seconds: tuple[float, float] | None = None


def estimate(plan: Plan, *, flops_per_second: float | None = None) -> Estimate:
    """Memory and work of `learn_masks` for a plan; one suspect class per model is assumed.

    Args:
        flops_per_second: of a large float32 matrix product on the device (`measured_speed`).
    """
    config, num_models = plan.config, len(plan.models)
    floating = [spec for spec in plan.tensors if spec.dtype.is_floating_point]
    parameters = sum(math.prod(spec.shape) for spec in floating)
    stored = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in floating)
    detection = num_models if detects_per_model(config, suspects=True) else 1
    masks = {"dual": 1 + detection, "m2": detection, "m1": 1}[config.mask]
    entries = sum(math.prod(mask_shape(spec.shape, config.granularity)) for spec in floating)
    length = max(_tokens(model.config, config.max_length) for model in plan.models)
    num_classes = max(_classes(model.config) for model in plan.models)
    taught = wanted([family_of(plan)], config)
    scans = config.objective == "inversion" and num_classes > 0 and not taught
    at_once = max(
        config.batch_size, config.scan_batch_size * num_classes if scans else 0,
        config.student_batch_size if taught else 0,
    )  # fmt: skip
    memory = {
        "base and models, mapped files on the CPU": (num_models + 1) * stored,
        "masks with gradients and moments": masks * _STATES * entries * _FLOAT,
        "samples of the masks": (masks + 1) * entries * _FLOAT,
        "merged weights with gradients": 2 * parameters * _FLOAT,
        "activations": at_once * _activation_bytes(plan.base.config, length),
    }
    calls, passes = _work(plan, num_classes if scans else 0)
    if taught:
        memory["a student with gradients and moments"] = _STATES * parameters * _FLOAT
        steps = num_models * config.student_steps * 3
        calls, passes = calls + steps, passes + steps * config.student_batch_size
    elif config.objective == "inversion":
        passes += sum(_token_scan(model.config) // length for model in plan.models)
    body = sum(math.prod(spec.shape) for spec in floating if len(spec.shape) > 1 and "embedding" not in spec.name)
    # every step also reads T + 1 models and writes masks and their states, about 30 operations an entry
    flops = 2.0 * body * length * passes + 30.0 * (num_models + 1) * parameters * config.steps
    seconds = None
    if flops_per_second is not None:
        likely = flops / flops_per_second + calls * _layers(plan.base.config) * _DISPATCH
        seconds = (likely * _SPREAD[0], likely * _SPREAD[1])
    return Estimate(memory, passes, flops, seconds)


def _work(plan: Plan, num_classes: int) -> tuple[int, int]:
    """Calls of a model, and samples through it; a backward pass counts as one more (inputs) or two (weights)."""
    config, num_models = plan.config, len(plan.models)
    if config.objective == "paper":
        calls = num_models * (config.steps * 15 + config.coefficient_steps * 3)
        return calls, calls * config.batch_size
    # the model's own answers, the merge's, and those under one suspect's trigger
    calls = num_models * config.steps * (7 if num_classes else 4)
    passes = calls * config.batch_size
    if num_classes:
        # all classes for two fifths of the steps and a few for the rest, as if all took them; styles, and the others
        scan = num_models * config.scan_steps * 2 * (3 if config.scan_others else 2)
        refresh = num_models * (config.steps // config.refresh_every) * config.refresh_steps * 2
        calls += scan + refresh
        passes += (scan * num_classes + refresh) * config.scan_batch_size
    return calls, passes


def measured_speed(device: torch.device, *, budget: float = 0.2) -> float:
    """Floating point operations per second of float32 matrix products, measured for about `budget` seconds."""
    size = 512
    a = torch.rand(size, size, device=device)
    done, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < budget or done == 0:
        (a @ a)[0, 0].item()
        done += 1
    return done * 2.0 * size**3 / spent if spent > 0 else math.inf


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
    width = _first(config, "hidden_size", "dim", "n_embd")
    heads = _first(config, "num_attention_heads", "n_heads", "n_head")
    return 2 * _layers(config) * length * (34 * width + 5 * heads * length)


def _layers(config: PretrainedConfig) -> int:
    return _first(config, "num_hidden_layers", "n_layers", "n_layer")


def _first(config: PretrainedConfig, *names: str) -> int:
    """The number under the first of these names: families spell them differently."""
    inner = getattr(config, "vision_config", None) or config.get_text_config()
    return next((int(getattr(inner, name)) for name in names if hasattr(inner, name)), 1)
