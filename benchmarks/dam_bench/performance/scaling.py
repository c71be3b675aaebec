"""Compute bytes and seconds of learning, for the figures of docs/scaling.md.

Legend: P merged parameters, T tasks, W processes (one per accelerator).
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_OF_7B, BLOCK_OF_13B = 218e6, 317e6  # parameters of one of 32, of 40 blocks
_FLOAT32 = 4
_MOMENTS = 2  # of Adam, per logit
_FORWARD, _BACKWARD = 2, 4  # floating-point operations per parameter and token


@dataclass(frozen=True)
class Job:
    """What is learned.

    Attributes:
        parameters: P.
        tasks: T.
        stored: bytes per weight in the models' files: 2 for bfloat16.
        computed: bytes per merged weight: setting `compute_dtype`.
        masks: 2 for `dual`, else 1; `dual` with a Backdoor-Detection mask per model: T + 1.
        entries: mask entries per parameter: 1 for granularity `element`, about 1 / width for `row`.
        block: share of P in the largest block.
        window: share of P in the largest window: 1 where the whole model is learned at once.
        gather: setting of that name, for several processes.
    """

    parameters: float
    tasks: int
    stored: int = 2
    computed: int = 4
    masks: int = 2
    entries: float = 1.0
    block: float = 1 / 32
    window: float = 1.0
    gather: str = "model"


def device_bytes(job: Job, processes: int = 1) -> dict[str, float]:
    """Bytes on each device by what they hold, without activations; masks and frozen tensors are sharded over W.

    The merged model, or window, and its gradient are whole in each process, unless blocks are gathered one by one
    (`gather: block` with several processes): then one block and its gradient are there, a second block on its way from
    the other processes.
    """
    held = job.window * job.parameters
    entries = job.masks * job.entries * held
    streamed = job.gather == "block" and processes > 1
    whole = job.block * job.parameters if streamed else held
    return {
        "mask logits": _FLOAT32 * entries / processes,
        "Adam's moments": _FLOAT32 * _MOMENTS * entries / processes,
        "merged weights": job.computed * whole * (2 if streamed else 1),
        "their gradient": job.computed * whole,
        "frozen models": job.stored * (job.tasks + 1) * held / processes,
        "sums of dL/dM": _FLOAT32 * job.entries * job.parameters / processes if streamed else 0.0,
    }


def window_gigabytes(block: float, size: int, tasks: int = 4) -> float:
    """GB that a window of `size` blocks takes on one device in bfloat16, with an M2 per model, without activations."""
    job = Job(size * block, tasks, computed=2, masks=tasks + 1)
    return sum(device_bytes(job).values()) / 1e9


def step_flops(job: Job, tokens: int, suspects: int = 0) -> float:
    """Floating-point operations of the passes of one inversion step, in its window, attention scores not counted.

    Args:
        tokens: per task and pass: batch size x length.
        suspects: recovered triggers that are trained against, all tasks together.
    """
    fit = _FORWARD + _BACKWARD
    return job.window * job.parameters * tokens * (job.tasks * (_FORWARD + fit) + suspects * fit)


def step_traffic(job: Job) -> float:
    """Bytes that the elementwise work of one step moves through memory, all processes together.

    Forward: logits, theta_0 and theta_t read, theta written. Chain rule: the gradient, logits, theta_0 and theta_t
    read, one gradient per mask written. Each of these is read to find what is not finite and by Adam, which reads and
    writes logits and two moments; the density reads the logits once more.
    """
    frozen = job.stored * (job.tasks + 1)
    logits = _FLOAT32 * job.masks * job.entries
    return job.window * job.parameters * (2 * frozen + 2 * job.computed + 6 * logits + 2 * logits * (1 + _MOMENTS))


def step_seconds(job: Job, tokens: int, *, flops: float, bandwidth: float, processes: int = 1) -> float:
    """Seconds per step: passes and elementwise work are spread over W; what devices exchange is not counted.

    With more processes than tasks, those of one task share its batch, evenly if W is a multiple of T.

    Args:
        flops: floating-point operations per second that one device reaches in the model's passes.
        bandwidth: bytes per second of its memory.
    """
    return (step_flops(job, tokens) / flops + step_traffic(job) / bandwidth) / processes
