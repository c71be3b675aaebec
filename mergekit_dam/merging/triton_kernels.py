"""Triton kernels of the merge rule, which read each input once and store no intermediate result of a tensor's size.

Callers and shapes: triton_merge.py (one tensor), triton_groups.py (a group of tensors). All pointers are to contiguous
memory; arithmetic is in float32. OWN: whether each model has an own factor beside the shared factors (in groups: T or
0).
"""

# no postponed annotations: Triton reads them
# mypy: ignore-errors

import triton
import triton.language as tl

TYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}


@triton.jit
def _probability(factor, at, inside, LOGITS: tl.constexpr):
    """Load elements of a factor as probabilities."""
    value = tl.load(factor + at, mask=inside, other=0.0).to(tl.float32)
    return tl.sigmoid(value) if LOGITS else value


@triton.jit
def merge(
    out,
    base,
    models,
    lambdas,
    stride,
    factors,
    owns,
    size,
    LOGITS: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    theta_0 = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(len(models)):
        tau = tl.load(models[t] + at, mask=inside, other=0.0).to(tl.float32) - theta_0
        if OWN:
            tau *= _probability(owns[t], at, inside, LOGITS)
        total += tl.load(lambdas + t * stride) * tau
    for f in tl.static_range(len(factors)):
        total *= _probability(factors[f], at, inside, LOGITS)
    tl.store(out + at, total + theta_0, mask=inside)


@triton.jit
def gradients(
    gradient,
    base,
    models,
    lambdas,
    stride,
    factors,
    owns,
    outs,
    products,
    size,
    programs,
    sharpness,
    LOGITS: tl.constexpr,
    TO_LOGITS: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    theta_0 = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    kept = tl.full((BLOCK,), 1.0, tl.float32)
    for f in tl.static_range(len(factors)):
        kept *= _probability(factors[f], at, inside, LOGITS)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(len(models)):
        tau = tl.load(models[t] + at, mask=inside, other=0.0).to(tl.float32) - theta_0
        coefficient = tl.load(lambdas + t * stride)
        if OWN:
            if not TO_LOGITS:
                before = tl.load(outs[t] + at, mask=inside, other=0.0)
                tl.store(outs[t] + at, before + upstream * coefficient * tau, mask=inside)
            value = _probability(owns[t], at, inside, LOGITS)
            tau *= value
            if TO_LOGITS:
                h = upstream * kept * coefficient * tau
                tl.store(outs[len(factors) + t] + at, h * (1.0 - value) * sharpness, mask=inside)
        total += coefficient * tau
        tl.store(products + t * programs + program, tl.sum(upstream * kept * tau))
    to_mask = total * upstream
    if TO_LOGITS:
        for f in tl.static_range(len(factors)):
            # read again, from the cache, rather than held in registers
            value = _probability(factors[f], at, inside, LOGITS)
            tl.store(outs[f] + at, to_mask * kept * (1.0 - value) * sharpness, mask=inside)
    elif not OWN:
        before = tl.load(outs[0] + at, mask=inside, other=0.0)
        tl.store(outs[0] + at, before + to_mask, mask=inside)


@triton.jit
def _block(owners, firsts, sizes, BLOCK: tl.constexpr):
    """Return this program's tensor, its element indices, and which of them exist. Sizes are multiples of 16."""
    program = tl.program_id(0)
    tensor = tl.load(owners + program)
    at = (program - tl.load(firsts + tensor)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tensor, at, at < tl.multiple_of(tl.load(sizes + tensor), 16)


@triton.jit
def _load(addresses, index, at, inside, TYPE: tl.constexpr):
    """Load elements, in float32, from an address in a table; addresses are multiples of 16."""
    begin = tl.multiple_of(tl.load(addresses + index).to(tl.pointer_type(TYPE)), 16)
    return tl.load(begin + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_factor(factors, index, at, inside, LOGITS: tl.constexpr):
    """Load elements of a factor, as probabilities, from an address in a table."""
    begin = tl.multiple_of(tl.load(factors + index).to(tl.pointer_type(tl.float32)), 16)
    return _probability(begin, at, inside, LOGITS)


@triton.jit
def merge_many(
    out,
    frozen,
    factors,
    lambdas,
    stride_t,
    stride_p,
    owners,
    firsts,
    sizes,
    offsets,
    columns,
    TASKS: tl.constexpr,
    FACTORS: tl.constexpr,
    OWN: tl.constexpr,
    STORED: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, at, inside = _block(owners, firsts, sizes, BLOCK)
    theta_0 = _load(frozen, tensor * (TASKS + 1), at, inside, STORED)
    column = lambdas + tl.load(columns + tensor) * stride_p
    total = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(TASKS):
        tau = _load(frozen, tensor * (TASKS + 1) + t + 1, at, inside, STORED) - theta_0
        if OWN:
            tau *= _load_factor(factors, tensor * (FACTORS + OWN) + FACTORS + t, at, inside, LOGITS)
        total += tl.load(column + t * stride_t) * tau
    for f in tl.static_range(FACTORS):
        total *= _load_factor(factors, tensor * (FACTORS + OWN) + f, at, inside, LOGITS)
    tl.store(out + tl.multiple_of(tl.load(offsets + tensor), 16) + at, total + theta_0, mask=inside)


@triton.jit
def gradients_many(
    out,
    upstreams,
    frozen,
    factors,
    lambdas,
    stride_t,
    stride_p,
    owners,
    firsts,
    sizes,
    offsets,
    columns,
    products,
    programs,
    numel,
    sharpness,
    TASKS: tl.constexpr,
    FACTORS: tl.constexpr,
    OWN: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTED: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, at, inside = _block(owners, firsts, sizes, BLOCK)
    theta_0 = _load(frozen, tensor * (TASKS + 1), at, inside, STORED)
    upstream = _load(upstreams, tensor, at, inside, COMPUTED)
    column = lambdas + tl.load(columns + tensor) * stride_p
    kept = tl.full((BLOCK,), 1.0, tl.float32)
    for f in tl.static_range(FACTORS):
        kept *= _load_factor(factors, tensor * (FACTORS + OWN) + f, at, inside, LOGITS)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = out + tl.multiple_of(tl.load(offsets + tensor), 16) + at
    for t in tl.static_range(TASKS):
        tau = _load(frozen, tensor * (TASKS + 1) + t + 1, at, inside, STORED) - theta_0
        coefficient = tl.load(column + t * stride_t)
        if OWN:
            value = _load_factor(factors, tensor * (FACTORS + OWN) + FACTORS + t, at, inside, LOGITS)
            tau *= value
            to_own = upstream * kept * coefficient * tau * (1.0 - value) * sharpness
            tl.store(begin + (FACTORS + t) * tl.multiple_of(numel, 16), to_own, mask=inside)
        total += coefficient * tau
        tl.store(products + t * programs + tl.program_id(0), tl.sum(upstream * kept * tau))
    to_mask = total * upstream * kept
    for f in tl.static_range(FACTORS):
        # read again, from the cache, rather than held in registers
        value = _load_factor(factors, tensor * (FACTORS + OWN) + f, at, inside, LOGITS)
        tl.store(begin + f * tl.multiple_of(numel, 16), to_mask * (1.0 - value) * sharpness, mask=inside)


@triton.jit
def _row(owners, firsts, widths):
    """Return this program's tensor, its row, and the row's number of elements, a multiple of 16."""
    tensor = tl.load(owners + tl.program_id(0))
    return tensor, tl.program_id(0) - tl.load(firsts + tensor), tl.multiple_of(tl.load(widths + tensor), 16)


@triton.jit
def _row_factor(factors, index, row, LOGITS: tl.constexpr):
    """Load the entry of a row of a factor, as a probability, from an address in a table."""
    value = tl.load(tl.load(factors + index).to(tl.pointer_type(tl.float32)) + row)
    return tl.sigmoid(value) if LOGITS else value


@triton.jit
def merge_rows(
    out,
    frozen,
    factors,
    lambdas,
    stride_t,
    stride_p,
    owners,
    firsts,
    widths,
    offsets,
    columns,
    TASKS: tl.constexpr,
    FACTORS: tl.constexpr,
    OWN: tl.constexpr,
    STORED: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, row, width = _row(owners, firsts, widths)
    begin = row.to(tl.int64) * width
    column = lambdas + tl.load(columns + tensor) * stride_p
    to = out + tl.multiple_of(tl.load(offsets + tensor), 16)
    kept = 1.0
    for f in tl.static_range(FACTORS):
        kept *= _row_factor(factors, tensor * (FACTORS + OWN) + f, row, LOGITS)
    block = 0
    while block * BLOCK < width:
        within = block * BLOCK + tl.arange(0, BLOCK)
        at, inside = begin + within, within < width
        theta_0 = _load(frozen, tensor * (TASKS + 1), at, inside, STORED)
        total = tl.zeros((BLOCK,), tl.float32)
        for t in tl.static_range(TASKS):
            tau = _load(frozen, tensor * (TASKS + 1) + t + 1, at, inside, STORED) - theta_0
            coefficient = tl.load(column + t * stride_t)
            if OWN:
                coefficient *= _row_factor(factors, tensor * (FACTORS + OWN) + FACTORS + t, row, LOGITS)
            total += coefficient * tau
        tl.store(to + at, total * kept + theta_0, mask=inside)
        block += 1


@triton.jit
def gradients_rows(
    out,
    upstreams,
    frozen,
    factors,
    lambdas,
    stride_t,
    stride_p,
    owners,
    firsts,
    widths,
    columns,
    products,
    programs,
    sharpness,
    TASKS: tl.constexpr,
    FACTORS: tl.constexpr,
    OWN: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTED: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, row, width = _row(owners, firsts, widths)
    begin = row.to(tl.int64) * width
    column = lambdas + tl.load(columns + tensor) * stride_p
    kept = 1.0
    for f in tl.static_range(FACTORS):
        kept *= _row_factor(factors, tensor * (FACTORS + OWN) + f, row, LOGITS)
    to_mask = 0.0
    for t in tl.static_range(TASKS):
        # from the second model on, theta_0 and the upstream gradient of the row are in the cache
        total = tl.zeros((BLOCK,), tl.float32)
        block = 0
        while block * BLOCK < width:
            within = block * BLOCK + tl.arange(0, BLOCK)
            at, inside = begin + within, within < width
            theta_0 = _load(frozen, tensor * (TASKS + 1), at, inside, STORED)
            tau = _load(frozen, tensor * (TASKS + 1) + t + 1, at, inside, STORED) - theta_0
            total += _load(upstreams, tensor, at, inside, COMPUTED) * tau
            block += 1
        product, coefficient = tl.sum(total), tl.load(column + t * stride_t)
        if OWN:
            value = _row_factor(factors, tensor * (FACTORS + OWN) + FACTORS + t, row, LOGITS)
            product *= value
            to_own = coefficient * product * kept * (1.0 - value) * sharpness
            tl.store(out + (FACTORS + t) * programs + tl.program_id(0), to_own)
        tl.store(products + t * programs + tl.program_id(0), product * kept)
        to_mask += coefficient * product
    for f in tl.static_range(FACTORS):
        value = _row_factor(factors, tensor * (FACTORS + OWN) + f, row, LOGITS)
        tl.store(out + f * programs + tl.program_id(0), to_mask * kept * (1.0 - value) * sharpness)


@triton.jit
def sum_products(products, programs, firsts, counts, out, BLOCK: tl.constexpr):
    """Sum the products of each tensor and task in a fixed order; atomic additions would make runs differ."""
    tensor, task = tl.program_id(0), tl.program_id(1)
    begin = products + task * programs + tl.load(firsts + tensor)
    count = tl.load(counts + tensor)
    total = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < count:  # Triton's interpreter supports no range up to a loaded value
        at = start + tl.arange(0, BLOCK)
        total += tl.load(begin + at, mask=at < count, other=0.0)
        start += BLOCK
    tl.store(out + task * tl.num_programs(0) + tensor, tl.sum(total))
