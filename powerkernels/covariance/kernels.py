"""The GPU kernels of covariance and selection, in Triton: pointers, sizes and strides.

The stages of `reference`, each one read of the tokens: log_prob and advantage, 4 bytes each in
float32, and a byte of mask. The covariance is computed again in each, in float64, and not stored:
3 float64 operations a token beside 9 bytes. A program takes `tokens_per_program` tokens in a row, a
multiple of BLOCK.

Integer atomics add up the histograms: their order does not show. Partial moments are exact, so
neither does that of their sum.

Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerkernels.covariance import reference

COUNT = tl.constexpr(reference.COUNT)
NONFINITE = tl.constexpr(reference.NONFINITE)
LOG_PROB = tl.constexpr(reference.LOG_PROB)
ADVANTAGE = tl.constexpr(reference.ADVANTAGE)
NUM_MOMENTS = tl.constexpr(reference.NUM_MOMENTS)
UNIT_0 = tl.constexpr(reference.UNITS[0])
UNIT_1 = tl.constexpr(reference.UNITS[1])
UNIT_2 = tl.constexpr(reference.UNITS[2])
UNIT_3 = tl.constexpr(reference.UNITS[3])
ROUNDER = tl.constexpr(reference.ROUNDER)
NUM_BINS = tl.constexpr(reference.NUM_BINS)
NONZERO = tl.constexpr(reference.NONZERO)
THRESHOLD = tl.constexpr(reference.THRESHOLD)
REMAINING = tl.constexpr(reference.REMAINING)
CHOSEN = tl.constexpr(reference.CHOSEN)
NUM_NONZERO = tl.constexpr(reference.NUM_NONZERO)
STREAM = tl.constexpr(reference.STREAM)
MAX_LOG_RATIO = tl.constexpr(reference.MAX_LOG_RATIO)
INFINITY = tl.constexpr(float("inf"))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load(ptr, index, inside):
    """inside: None for a whole block, whose loads are wide then; else what is not out of bounds."""
    return tl.load(ptr + index) if inside is None else tl.load(ptr + index, mask=inside, other=0)


@triton.jit
def load_float(ptr, index, inside, kept):
    """0 where not kept, whatever is there."""
    return tl.where(kept, load(ptr, index, inside).to(tl.float32), 0.0)


@triton.jit
def load_advantage(ptr, index, inside, kept, width, PER_SEQUENCE: tl.constexpr):
    """One a token, or one for each `width` of them."""
    place = index // width if PER_SEQUENCE else index
    return load_float(ptr, place, inside, kept)


@triton.jit
def end_of_blocks(first, last, BLOCK: tl.constexpr):
    """Where the whole blocks from first on end."""
    return first + (last - first) // BLOCK * BLOCK


@triton.jit
def part_of(x, UNIT: tl.constexpr):
    shift: tl.constexpr = ROUNDER * UNIT
    return (x + shift) - shift


@triton.jit
def store_parts(out_ptr, s0, s1, s2, s3):
    tl.store(out_ptr, tl.sum(s0))
    tl.store(out_ptr + 1, tl.sum(s1))
    tl.store(out_ptr + 2, tl.sum(s2))
    tl.store(out_ptr + 3, tl.sum(s3))


@triton.jit
def add_parts(x, s0, s1, s2, s3):
    part = part_of(x, UNIT_0)
    x, s0 = x - part, s0 + part
    part = part_of(x, UNIT_1)
    x, s1 = x - part, s1 + part
    part = part_of(x, UNIT_2)
    x, s2 = x - part, s2 + part
    return s0, s1, s2, s3 + part_of(x, UNIT_3)


@triton.jit
def is_finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def add_moments(
    index,
    inside,
    log_prob_ptr,
    advantages_ptr,
    mask_ptr,
    width,
    totals,
    PER_SEQUENCE: tl.constexpr,
):
    count, nonfinite, l0, l1, l2, l3, a0, a1, a2, a3 = totals
    mask = load(mask_ptr, index, inside) != 0
    log_prob = load_float(log_prob_ptr, index, inside, mask)
    advantage = load_advantage(advantages_ptr, index, inside, mask, width, PER_SEQUENCE)
    finite = is_finite(log_prob) & is_finite(advantage)
    count += mask.to(tl.int32)
    nonfinite += (mask & (finite == 0)).to(tl.int32)
    x = tl.where(finite, log_prob, 0.0).to(tl.float64)
    l0, l1, l2, l3 = add_parts(x, l0, l1, l2, l3)
    x = tl.where(finite, advantage, 0.0).to(tl.float64)
    a0, a1, a2, a3 = add_parts(x, a0, a1, a2, a3)
    return count, nonfinite, l0, l1, l2, l3, a0, a1, a2, a3


@triton.jit(do_not_specialize=["num_tokens"])
def moments_kernel(
    log_prob_ptr,
    advantages_ptr,
    mask_ptr,
    width,
    num_tokens,
    tokens_per_program,
    partials_ptr,  # float64 [programs, NUM_MOMENTS]
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    first = tl.cast(pid, tl.int64) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, num_tokens)
    zeros = tl.zeros([BLOCK], tl.float64)
    none = tl.zeros([BLOCK], tl.int32)
    totals = none, none, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    lane = tl.arange(0, BLOCK)
    whole = end_of_blocks(first, last, BLOCK)
    for begin in range(first, whole, BLOCK):
        totals = add_moments(
            begin + lane,
            None,
            log_prob_ptr,
            advantages_ptr,
            mask_ptr,
            width,
            totals,
            PER_SEQUENCE,
        )
    if whole < last:
        totals = add_moments(
            whole + lane,
            whole + lane < last,
            log_prob_ptr,
            advantages_ptr,
            mask_ptr,
            width,
            totals,
            PER_SEQUENCE,
        )
    count, nonfinite, l0, l1, l2, l3, a0, a1, a2, a3 = totals
    out_ptr = partials_ptr + pid * NUM_MOMENTS
    tl.store(out_ptr + COUNT, tl.sum(count).to(tl.float64))
    tl.store(out_ptr + NONFINITE, tl.sum(nonfinite).to(tl.float64))
    store_parts(out_ptr + LOG_PROB, l0, l1, l2, l3)
    store_parts(out_ptr + ADVANTAGE, a0, a1, a2, a3)


@triton.jit
def mean_of(moments_ptr, FIRST: tl.constexpr):
    """NaN where a token is not finite, or there is none."""
    ptr = moments_ptr + FIRST
    total = ((tl.load(ptr + 3) + tl.load(ptr + 2)) + tl.load(ptr + 1)) + tl.load(ptr)
    count = tl.load(moments_ptr + COUNT)
    # Written out: Triton compares globals, and a NaN does not equal itself.
    count = tl.where(tl.load(moments_ptr + NONFINITE) > 0, float("nan"), count)
    return total / count


@triton.jit
def covariance_of(log_prob, advantage, mean_log_prob, mean_advantage):
    """Rounded once from float64; never -0."""
    cov = (log_prob.to(tl.float64) - mean_log_prob) * (advantage.to(tl.float64) - mean_advantage)
    cov = cov.to(tl.float32)
    return tl.where(cov == 0.0, 0.0, cov)


@triton.jit
def store(ptr, index, value, inside):
    if inside is None:
        tl.store(ptr + index, value)
    else:
        tl.store(ptr + index, value, mask=inside)


@triton.jit
def store_covariances(
    index,
    inside,
    log_prob_ptr,
    advantages_ptr,
    mask_ptr,
    width,
    moments_ptr,
    cov_ptr,
    PER_SEQUENCE: tl.constexpr,
):
    mask = load(mask_ptr, index, inside) != 0
    log_prob = load_float(log_prob_ptr, index, inside, mask)
    advantage = load_advantage(advantages_ptr, index, inside, mask, width, PER_SEQUENCE)
    mean_log_prob = mean_of(moments_ptr, LOG_PROB)
    mean_advantage = mean_of(moments_ptr, ADVANTAGE)
    cov = covariance_of(log_prob, advantage, mean_log_prob, mean_advantage)
    store(cov_ptr, index, tl.where(mask, cov, 0.0), inside)


@triton.jit(do_not_specialize=["num_tokens"])
def covariances_kernel(
    log_prob_ptr,
    advantages_ptr,
    mask_ptr,
    width,
    num_tokens,
    moments_ptr,
    cov_ptr,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    if first + BLOCK <= num_tokens:
        store_covariances(
            index,
            None,
            log_prob_ptr,
            advantages_ptr,
            mask_ptr,
            width,
            moments_ptr,
            cov_ptr,
            PER_SEQUENCE,
        )
    else:
        store_covariances(
            index,
            index < num_tokens,
            log_prob_ptr,
            advantages_ptr,
            mask_ptr,
            width,
            moments_ptr,
            cov_ptr,
            PER_SEQUENCE,
        )


@triton.jit
def clamp(x, low, high):
    """A NaN stays one."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def ratio_of(difference):
    """exp of the log-ratio, and the log-ratio within its bounds."""
    log_ratio = clamp(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return tl.exp(log_ratio), log_ratio


@triton.jit
def store_unclipped(
    index,
    inside,
    log_prob_ptr,
    old_log_prob_ptr,
    advantages_ptr,
    selectable_ptr,
    width,
    low,
    high,
    out_ptr,
    PER_SEQUENCE: tl.constexpr,
):
    kept = load(selectable_ptr, index, inside) != 0
    log_prob = load_float(log_prob_ptr, index, inside, kept)
    old_log_prob = load_float(old_log_prob_ptr, index, inside, kept)
    advantage = load_advantage(advantages_ptr, index, inside, kept, width, PER_SEQUENCE)
    ratio, _ = ratio_of(log_prob - old_log_prob)
    clipped = -advantage * clamp(ratio, low, high) > -advantage * ratio
    store(out_ptr, index, (kept & (clipped == 0)).to(tl.int8), inside)


@triton.jit(do_not_specialize=["num_tokens"])
def unclipped_kernel(
    log_prob_ptr,
    old_log_prob_ptr,
    advantages_ptr,
    selectable_ptr,
    width,
    num_tokens,
    low,
    high,
    out_ptr,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    if first + BLOCK <= num_tokens:
        store_unclipped(
            index,
            None,
            log_prob_ptr,
            old_log_prob_ptr,
            advantages_ptr,
            selectable_ptr,
            width,
            low,
            high,
            out_ptr,
            PER_SEQUENCE,
        )
    else:
        store_unclipped(
            index,
            index < num_tokens,
            log_prob_ptr,
            old_log_prob_ptr,
            advantages_ptr,
            selectable_ptr,
            width,
            low,
            high,
            out_ptr,
            PER_SEQUENCE,
        )


@triton.jit
def sequence_of(index, width, bounds_ptr, num_sequences, STEPS: tl.constexpr):
    """The sequence of each token, and its place there. STEPS: of the search in the bounds."""
    if bounds_ptr is None:
        sequence = index // width
        position = index - sequence * width
    else:
        low = tl.zeros_like(index)
        high = low + num_sequences
        for _ in tl.static_range(STEPS):
            middle = (low + high) // 2
            inside = middle < num_sequences
            after = tl.load(bounds_ptr + middle, mask=inside, other=0) > index
            high = tl.where(after | (inside == 0), middle, high)
            low = tl.where(after | (inside == 0), low, middle)
        sequence = low
        position = index - tl.load(bounds_ptr + sequence)
    return sequence, position


@triton.jit
def keys_at(
    index,
    inside,
    source,
    BAND: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """uint32 keys, 0 for what cannot be selected; and whether the covariance is not 0.

    source: see `histogram_kernel`.
    """
    log_prob_ptr, advantages_ptr, selectable_ptr, width, mean_log_prob, mean_advantage = source[:6]
    bounds_ptr, num_sequences, lb, ub, seed_ptr, first_sequence_ptr, sequence_index_ptr = source[6:]
    kept = load(selectable_ptr, index, inside) != 0
    log_prob = load_float(log_prob_ptr, index, inside, kept)
    advantage = load_advantage(advantages_ptr, index, inside, kept, width, PER_SEQUENCE)
    cov = covariance_of(log_prob, advantage, mean_log_prob, mean_advantage)
    nonzero = kept & (cov != 0.0)
    if BAND:
        kept = kept & (cov > lb) & (cov < ub)
        sequence, position = sequence_of(
            tl.where(kept, index, 0), width, bounds_ptr, num_sequences, STEPS
        )
        if sequence_index_ptr is None:
            number = sequence + tl.load(first_sequence_ptr)
        else:
            number = tl.load(sequence_index_ptr + sequence)
        c0 = position.to(tl.uint32)
        c1 = number.to(tl.uint32)
        c2 = (number >> 32).to(tl.uint32)
        words, _, _, _ = tl.philox(tl.load(seed_ptr), c0, c1, c2, c0 * 0 + STREAM)
        keys = tl.where(words == 0, 1, words)
    else:
        kept = kept & (cov == cov)
        bits = cov.to(tl.int32, bitcast=True)
        keys = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return tl.where(kept, keys, tl.zeros_like(keys)), nonzero


@triton.jit
def count_digits(keys, state_ptr, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """int32 [NUM_BINS] of the digit, among the keys that begin as the threshold does."""
    counted = keys != 0
    if state_ptr is not None:
        prefix = tl.load(state_ptr + THRESHOLD).to(tl.uint32)
        counted = counted & ((keys >> (SHIFT + BITS)) == prefix)
    bins = ((keys >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    return tl.histogram(bins, NUM_BINS, mask=counted)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences"])
def histogram_kernel(
    log_prob_ptr,
    advantages_ptr,
    selectable_ptr,
    width,
    num_tokens,
    tokens_per_program,
    bounds_ptr,
    num_sequences,
    moments_ptr,
    lb,
    ub,
    seed_ptr,
    first_sequence_ptr,
    sequence_index_ptr,
    state_ptr,
    counts_ptr,  # int64 [NUM_BINS + 1], zeros
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BAND: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.cast(tl.program_id(0), tl.int64) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, num_tokens)
    source = (
        log_prob_ptr,
        advantages_ptr,
        selectable_ptr,
        width,
        mean_of(moments_ptr, LOG_PROB),
        mean_of(moments_ptr, ADVANTAGE),
        bounds_ptr,
        num_sequences,
        lb,
        ub,
        seed_ptr,
        first_sequence_ptr,
        sequence_index_ptr,
    )
    counts = tl.zeros([NUM_BINS], tl.int32)
    nonzeros = tl.zeros([BLOCK], tl.int32)
    lane = tl.arange(0, BLOCK)
    whole = end_of_blocks(first, last, BLOCK)
    for begin in range(first, whole, BLOCK):
        keys, nonzero = keys_at(begin + lane, None, source, BAND, PER_SEQUENCE, STEPS)
        counts += count_digits(keys, state_ptr, SHIFT, BITS)
        nonzeros += nonzero.to(tl.int32)
    if whole < last:
        keys, nonzero = keys_at(
            whole + lane, whole + lane < last, source, BAND, PER_SEQUENCE, STEPS
        )
        counts += count_digits(keys, state_ptr, SHIFT, BITS)
        nonzeros += nonzero.to(tl.int32)
    bin = tl.arange(0, NUM_BINS)
    # Relaxed: only the sums count, and they are read by a later kernel. Ordered atomics would fence
    # each of the 2048.
    tl.atomic_add(counts_ptr + bin, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if state_ptr is None:
        tl.atomic_add(counts_ptr + NONZERO, tl.sum(nonzeros).to(tl.int64), sem="relaxed")


@triton.jit
def narrow_kernel(
    counts_ptr,  # int64 [NUM_BINS + 1]
    moments_ptr,
    wanted_ptr,  # float64 [1]: the ratio, or -1 - k; used before the first digit
    before_ptr,  # int64 [NUM_STATE], or None before the first digit
    state_ptr,
    BITS: tl.constexpr,
):
    bin = tl.arange(0, 1 << BITS)
    counts = tl.load(counts_ptr + bin)
    from_here_up = tl.cumsum(counts, reverse=True)
    if before_ptr is None:
        count = tl.load(moments_ptr + COUNT)
        wanted = tl.load(wanted_ptr)
        share = tl.maximum(tl.floor(count * wanted), 1.0)
        wanted = tl.where(wanted < 0, -1.0 - wanted, share)
        usable = (count > 0) & (tl.load(moments_ptr + NONFINITE) == 0)
        nonzero = tl.load(counts_ptr + NONZERO)
        total = tl.where(nonzero > 0, tl.sum(counts), 0)
        chosen = tl.minimum(tl.where(usable, wanted, 0.0).to(tl.int64), total)
        threshold = chosen * 0
        remaining = chosen
    else:
        threshold = tl.load(before_ptr + THRESHOLD)
        remaining = tl.load(before_ptr + REMAINING)
        chosen = tl.load(before_ptr + CHOSEN)
        nonzero = tl.load(before_ptr + NUM_NONZERO)
    # The last bin from which on there are enough; of none, the highest, which then takes none.
    digit = tl.sum((from_here_up >= remaining).to(tl.int64)) - 1
    above = tl.sum(tl.where(bin == digit, from_here_up - counts, 0))
    tl.store(state_ptr + THRESHOLD, (threshold << BITS) + digit)
    tl.store(state_ptr + REMAINING, remaining - above)
    tl.store(state_ptr + CHOSEN, chosen)
    tl.store(state_ptr + NUM_NONZERO, nonzero)


@triton.jit
def mark_keys(keys, index, inside, threshold, remaining, place, out_ptr):
    """Marks what is selected, if there is an out_ptr; the number of ties. place: of the first."""
    tied = ((keys == threshold) & (keys != 0)).to(tl.int32)
    if out_ptr is not None:
        own_place = place + tl.cumsum(tied, 0) - 1
        selected = (keys > threshold) | ((tied != 0) & (own_place < remaining))
        store(out_ptr, index, selected.to(tl.int8), inside)
    return tl.sum(tied)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_programs"])
def mark_kernel(
    log_prob_ptr,
    advantages_ptr,
    selectable_ptr,
    width,
    num_tokens,
    tokens_per_program,
    bounds_ptr,
    num_sequences,
    moments_ptr,
    lb,
    ub,
    seed_ptr,
    first_sequence_ptr,
    sequence_index_ptr,
    state_ptr,
    ties_ptr,  # int32 [programs], keys of each that equal the threshold
    ties_before_ptr,  # int64 [1], or None for 0
    num_programs,
    out_ptr,  # None: count the ties, and mark nothing
    BAND: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    STEPS: tl.constexpr,
    PROGRAMS: tl.constexpr,  # a power of 2, at least num_programs
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    first = tl.cast(pid, tl.int64) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, num_tokens)
    source = (
        log_prob_ptr,
        advantages_ptr,
        selectable_ptr,
        width,
        mean_of(moments_ptr, LOG_PROB),
        mean_of(moments_ptr, ADVANTAGE),
        bounds_ptr,
        num_sequences,
        lb,
        ub,
        seed_ptr,
        first_sequence_ptr,
        sequence_index_ptr,
    )
    threshold = tl.load(state_ptr + THRESHOLD).to(tl.uint32)
    remaining = tl.load(state_ptr + REMAINING)
    place = tl.zeros([], tl.int64)
    if out_ptr is not None:
        program = tl.arange(0, PROGRAMS)
        ties = tl.load(ties_ptr + program, mask=program < pid, other=0)
        place += tl.sum(ties.to(tl.int64))
        if ties_before_ptr is not None:
            place += tl.load(ties_before_ptr)
    lane = tl.arange(0, BLOCK)
    whole = end_of_blocks(first, last, BLOCK)
    for begin in range(first, whole, BLOCK):
        keys, _ = keys_at(begin + lane, None, source, BAND, PER_SEQUENCE, STEPS)
        place += mark_keys(keys, begin + lane, None, threshold, remaining, place, out_ptr)
    if whole < last:
        keys, _ = keys_at(whole + lane, whole + lane < last, source, BAND, PER_SEQUENCE, STEPS)
        place += mark_keys(
            keys, whole + lane, whole + lane < last, threshold, remaining, place, out_ptr
        )
    if out_ptr is None:
        tl.store(ties_ptr + pid, place.to(tl.int32))
