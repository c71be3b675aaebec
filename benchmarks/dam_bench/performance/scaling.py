"""Compute bytes and seconds of learning by arithmetic: the table "What fits" of docs/scaling.md.

    python -m dam_bench.performance.scaling    # writes the table anew

Legend: P merged parameters, T tasks, W processes (one per accelerator).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"
BEGIN, END = "<!-- fits:begin -->", "<!-- fits:end -->"
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
        window: share of P in the largest window: 1 where the whole model is learned at once.
    """

    parameters: float
    tasks: int
    stored: int = 2
    computed: int = 4
    masks: int = 2
    entries: float = 1.0
    window: float = 1.0


def device_bytes(job: Job, processes: int = 1) -> dict[str, float]:
    """Bytes on each device by what they hold, without activations; masks and frozen tensors are sharded over W.

    The merged model, or window, and its gradient are whole in each process.
    """
    held = job.window * job.parameters
    entries = job.masks * job.entries * held
    return {
        "mask logits": _FLOAT32 * entries / processes,
        "Adam's moments": _FLOAT32 * _MOMENTS * entries / processes,
        "merged weights": job.computed * held,
        "their gradient": job.computed * held,
        "frozen models": job.stored * (job.tasks + 1) * held / processes,
    }


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


def fits_table(tasks: int = 4) -> str:
    """Markdown: GB per GPU for four models in bfloat16, by what is learned at a time, without activations.

    With masks of rows a mask has one entry per row of 4,096 weights. Several GPUs share masks and input models.
    """
    lines = [
        "| models | learned at a time | 1 GPU | 4 GPUs | 8 GPUs | 1 GPU, `granularity: row` |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, parameters, block in (("7B", 7e9, BLOCK_OF_7B), ("13B", 13e9, BLOCK_OF_13B)):
        for label, masks, share in (
            ("all, nothing suspect", 2, 1.0),
            ("all, a suspect", tasks + 1, 1.0),
            *((f"window of {size}", tasks + 1, size * block / parameters) for size in (4, 2, 1)),
        ):
            jobs = [
                Job(parameters, tasks, computed=2, masks=masks, entries=entries, window=share)
                for entries in (1.0, 1 / 4096)
            ]
            cells = [_gigabytes(jobs[0], processes) for processes in (1, 4, 8)] + [_gigabytes(jobs[1], 1)]
            lines.append(f"| {tasks} x {name} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gigabytes(job: Job, processes: int) -> str:
    return f"{sum(device_bytes(job, processes).values()) / 1e9:.1f}"


def put_between(page: str, begin: str, content: str, end: str) -> str:
    """The page with `content` between two marks; a page without them stays as it is."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}" if found_begin and found_end else page


if __name__ == "__main__":
    PAGE.write_text(put_between(PAGE.read_text("utf-8"), BEGIN, fits_table(), END), "utf-8")
