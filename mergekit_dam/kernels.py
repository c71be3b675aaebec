"""Triton kernels of the merge rule: each input is read once, nothing of a tensor's size is stored in between.

Callers and shapes: fused.py. All pointers are to contiguous memory; arithmetic is in float32.
"""

# no postponed annotations: Triton reads them
# mypy: ignore-errors

import triton
import triton.language as tl

TYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}


@triton.jit
def merge(out, base, models, lambdas, stride, factors, size, LOGITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    theta_0 = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(len(models)):
        tau = tl.load(models[t] + at, mask=inside, other=0.0).to(tl.float32) - theta_0
        total += tl.load(lambdas + t * stride) * tau
    for f in tl.static_range(len(factors)):
        value = tl.load(factors[f] + at, mask=inside, other=0.0).to(tl.float32)
        if LOGITS:
            value = tl.sigmoid(value)
        total *= value
    tl.store(out + at, total + theta_0, mask=inside)


@triton.jit
def gradients(
    gradient, base, models, lambdas, stride, factors, outs, products, size, programs, sharpness,
    LOGITS: tl.constexpr, TO_LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    theta_0 = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    kept = tl.full((BLOCK,), 1.0, tl.float32)
    for f in tl.static_range(len(factors)):
        value = tl.load(factors[f] + at, mask=inside, other=0.0).to(tl.float32)
        if LOGITS:
            value = tl.sigmoid(value)
        kept *= value
    total = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(len(models)):
        tau = tl.load(models[t] + at, mask=inside, other=0.0).to(tl.float32) - theta_0
        total += tl.load(lambdas + t * stride) * tau
        tl.store(products + t * programs + program, tl.sum(upstream * kept * tau))
    to_mask = total * upstream
    if TO_LOGITS:
        for f in tl.static_range(len(outs)):
            # read again, from the cache, rather than held in registers
            value = tl.load(factors[f] + at, mask=inside, other=0.0).to(tl.float32)
            if LOGITS:
                value = tl.sigmoid(value)
            tl.store(outs[f] + at, to_mask * kept * (1.0 - value) * sharpness, mask=inside)
    else:
        before = tl.load(outs[0] + at, mask=inside, other=0.0)
        tl.store(outs[0] + at, before + to_mask, mask=inside)


@triton.jit
def _block(owners, firsts, sizes, BLOCK: tl.constexpr):
    """The tensor of this program, the elements of it, and which of them exist. Sizes are multiples of 16."""
    program = tl.program_id(0)
    tensor = tl.load(owners + program)
    at = (program - tl.load(firsts + tensor)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tensor, at, at < tl.multiple_of(tl.load(sizes + tensor), 16)


@triton.jit
def _loaded(addresses, index, at, inside, TYPE: tl.constexpr):
    """Elements, in float32, of what begins at an address out of a table; addresses are multiples of 16."""
    begin = tl.multiple_of(tl.load(addresses + index).to(tl.pointer_type(TYPE)), 16)
    return tl.load(begin + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def merge_many(
    out, frozen, factors, lambdas, stride_t, stride_p, owners, firsts, sizes, offsets, columns,
    TASKS: tl.constexpr, FACTORS: tl.constexpr, STORED: tl.constexpr, LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, at, inside = _block(owners, firsts, sizes, BLOCK)
    theta_0 = _loaded(frozen, tensor * (TASKS + 1), at, inside, STORED)
    column = lambdas + tl.load(columns + tensor) * stride_p
    total = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(TASKS):
        tau = _loaded(frozen, tensor * (TASKS + 1) + t + 1, at, inside, STORED) - theta_0
        total += tl.load(column + t * stride_t) * tau
    for f in tl.static_range(FACTORS):
        value = _loaded(factors, tensor * FACTORS + f, at, inside, tl.float32)
        if LOGITS:
            value = tl.sigmoid(value)
        total *= value
    tl.store(out + tl.multiple_of(tl.load(offsets + tensor), 16) + at, total + theta_0, mask=inside)


@triton.jit
def gradients_many(
    out, upstreams, frozen, factors, lambdas, stride_t, stride_p, owners, firsts, sizes, offsets, columns, products,
    programs, numel, sharpness, TASKS: tl.constexpr, FACTORS: tl.constexpr, STORED: tl.constexpr,
    COMPUTED: tl.constexpr, LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, at, inside = _block(owners, firsts, sizes, BLOCK)
    theta_0 = _loaded(frozen, tensor * (TASKS + 1), at, inside, STORED)
    upstream = _loaded(upstreams, tensor, at, inside, COMPUTED)
    column = lambdas + tl.load(columns + tensor) * stride_p
    kept = tl.full((BLOCK,), 1.0, tl.float32)
    for f in tl.static_range(FACTORS):
        value = _loaded(factors, tensor * FACTORS + f, at, inside, tl.float32)
        if LOGITS:
            value = tl.sigmoid(value)
        kept *= value
    total = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(TASKS):
        tau = _loaded(frozen, tensor * (TASKS + 1) + t + 1, at, inside, STORED) - theta_0
        total += tl.load(column + t * stride_t) * tau
        tl.store(products + t * programs + tl.program_id(0), tl.sum(upstream * kept * tau))
    to_mask = total * upstream * kept
    begin = out + tl.multiple_of(tl.load(offsets + tensor), 16) + at
    for f in tl.static_range(FACTORS):
        # read again, from the cache, rather than held in registers
        value = _loaded(factors, tensor * FACTORS + f, at, inside, tl.float32)
        if LOGITS:
            value = tl.sigmoid(value)
        tl.store(begin + f * tl.multiple_of(numel, 16), to_mask * (1.0 - value) * sharpness, mask=inside)


@triton.jit
def sum_products(products, programs, firsts, counts, out, BLOCK: tl.constexpr):
    """Per tensor and task, the sum over its blocks, in one order: atomic additions would make runs differ."""
    tensor, task = tl.program_id(0), tl.program_id(1)
    begin = products + task * programs + tl.load(firsts + tensor)
    count = tl.load(counts + tensor)
    total = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < count:  # Triton's interpreter knows no range up to what was loaded
        at = start + tl.arange(0, BLOCK)
        total += tl.load(begin + at, mask=at < count, other=0.0)
        start += BLOCK
    tl.store(out + task * tl.num_programs(0) + tensor, tl.sum(total))
