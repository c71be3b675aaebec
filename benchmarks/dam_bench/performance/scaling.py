"""How many bytes and seconds learning takes, by arithmetic: the figures of docs/scaling.md.

Legend: P merged parameters, T tasks, W processes (one per accelerator).
"""

from __future__ import annotations

from dataclasses import dataclass

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
        offload: setting of that name.
        gather: setting of that name, for several processes.
    """

    parameters: float
    tasks: int
    stored: int = 2
    computed: int = 4
    masks: int = 2
    entries: float = 1.0
    block: float = 1 / 32
    offload: str = "none"
    gather: str = "model"


def device_bytes(job: Job, processes: int = 1) -> dict[str, float]:
    """Bytes on each device by what they hold, without activations; masks and frozen tensors are sharded over W.

    The merged model and its gradient are whole in each process, unless they are streamed (`offload`, or `gather:
    block` with several processes): then one block and its gradient are there, a second block on its way from the
    other processes, and with `offload` one block of each frozen model.
    """
    entries = job.masks * job.entries * job.parameters
    offloaded = job.offload != "none"
    streamed = offloaded or (job.gather == "block" and processes > 1)
    share = job.block if streamed else 1.0
    sums = _FLOAT32 * job.entries * job.parameters / processes
    return {
        "mask logits": _FLOAT32 * entries / processes,
        "Adam's moments": _FLOAT32 * _MOMENTS * entries / processes,
        "merged weights": job.computed * share * job.parameters * (2 if streamed and processes > 1 else 1),
        "their gradient": job.computed * share * job.parameters,
        "frozen models": job.stored * (job.tasks + 1) * job.parameters * (job.block if offloaded else 1 / processes),
        "sums of dL/dM": sums if streamed and job.offload != "disk" else 0.0,
    }


def step_flops(job: Job, tokens: int, suspects: int = 0) -> float:
    """Floating-point operations of the passes of one inversion step, attention scores not counted.

    Args:
        tokens: per task and pass: batch size x length.
        suspects: recovered triggers that are trained against, all tasks together.
    """
    fit = _FORWARD + _BACKWARD
    return job.parameters * tokens * (job.tasks * (_FORWARD + fit) + suspects * fit)


def step_traffic(job: Job) -> float:
    """Bytes that the elementwise work of one step moves through memory, all processes together.

    Forward: logits, theta_0 and theta_t read, theta written. Chain rule: the gradient, logits, theta_0 and theta_t
    read, one gradient per mask written. Each of these is read to find what is not finite and by Adam, which reads and
    writes logits and two moments; the density reads the logits once more.
    """
    frozen = job.stored * (job.tasks + 1)
    logits = _FLOAT32 * job.masks * job.entries
    return job.parameters * (2 * frozen + 2 * job.computed + 6 * logits + 2 * logits * (1 + _MOMENTS))


def streamed_bytes(job: Job) -> float:
    """Bytes that `offload` brings to the devices in one step: all of theta_0 and theta_t three times per task.

    Once for the forward pass, once for the backward pass, once for the chain rule.
    """
    if job.offload == "none":
        return 0.0
    return 3.0 * job.tasks * job.stored * (job.tasks + 1) * job.parameters


def step_seconds(
    job: Job, tokens: int, *, flops: float, bandwidth: float, link: float = 25e9, processes: int = 1
) -> float:
    """Seconds per step: passes and elementwise work are spread over W; what devices exchange is not counted.

    With more processes than tasks, those of one task share its batch, evenly if W is a multiple of T.

    Args:
        flops: floating-point operations per second that one device reaches in the model's passes.
        bandwidth: bytes per second of its memory.
        link: bytes per second from where offloaded tensors wait to one device; not overlapped with computing.
    """
    elementwise = step_traffic(job) / bandwidth + streamed_bytes(job) / link
    return step_flops(job, tokens) / (flops * processes) + elementwise / processes
