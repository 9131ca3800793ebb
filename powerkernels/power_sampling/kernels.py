"""A tick's transition in Triton: reference.py, with the same bits.

Two launches. One program a slot resolves the items of its chain and hands out new ones; all lanes
are one vector, of which it uses the slot's own, and what one step leaves to the next stays in
registers. Then one program a lane does the lane's move and writes what the model is fed, and one
program more counts.

Both are bound by latency. A slot's program is a chain of a few dependent loads and, for each item
that it hands out, Philox and an exponential for the positions from the cut to the divergence: a few
microseconds. A move of m tokens reads 48 m bytes.

Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerkernels.logprob.kernels import uniform53
from powerkernels.power_sampling import lane_state, metropolis_hastings

IDLE = tl.constexpr(lane_state.IDLE)
WAIT = tl.constexpr(lane_state.WAIT)
EXTEND = tl.constexpr(lane_state.EXTEND)
PROPOSE = tl.constexpr(lane_state.PROPOSE)

SLOT = tl.constexpr(lane_state.SLOT)
PHASE = tl.constexpr(lane_state.PHASE)
ITEM = tl.constexpr(lane_state.ITEM)
LENGTH = tl.constexpr(lane_state.LENGTH)
AGREE = tl.constexpr(lane_state.AGREE)
CURSOR = tl.constexpr(lane_state.CURSOR)
DIVERGENCE = tl.constexpr(lane_state.DIVERGENCE)
WRITTEN = tl.constexpr(lane_state.WRITTEN)
BANNED = tl.constexpr(lane_state.BANNED)
LIMIT = tl.constexpr(lane_state.LIMIT)
CUT = tl.constexpr(lane_state.CUT)
PROMPT_TOKEN = tl.constexpr(lane_state.PROMPT_TOKEN)
NUM_LANE_FIELDS = tl.constexpr(lane_state.NUM_LANE_FIELDS)

STATUS = tl.constexpr(lane_state.STATUS)
CHAIN = tl.constexpr(lane_state.CHAIN)
NEXT_ITEM = tl.constexpr(lane_state.NEXT_ITEM)
END_ITEM = tl.constexpr(lane_state.END_ITEM)
NEWEST = tl.constexpr(lane_state.NEWEST)
NEWEST_LENGTH = tl.constexpr(lane_state.NEWEST_LENGTH)
ENDED = tl.constexpr(lane_state.ENDED)
NUM_SLOT_FIELDS = tl.constexpr(lane_state.NUM_SLOT_FIELDS)
RUNNING = tl.constexpr(lane_state.RUNNING)
FINISHED = tl.constexpr(lane_state.FINISHED)

BAD = tl.constexpr(lane_state.BAD)
NUM_FINISHED = tl.constexpr(lane_state.NUM_FINISHED)
NUM_RUNNING = tl.constexpr(lane_state.NUM_RUNNING)
NUM_BUSY = tl.constexpr(lane_state.NUM_BUSY)
NUM_DECODED = tl.constexpr(lane_state.NUM_DECODED)

WORKING = tl.constexpr(lane_state.WORKING)
CURRENT = tl.constexpr(lane_state.CURRENT)
LOG_PROB = tl.constexpr(lane_state.LOG_PROB)
LOG_Q = tl.constexpr(lane_state.LOG_Q)
ENTROPY = tl.constexpr(lane_state.ENTROPY)
LOG_PROB_SUM = tl.constexpr(lane_state.LOG_PROB_SUM)
NUM_SCORES = tl.constexpr(lane_state.NUM_SCORES)
SOURCE_LANE = tl.constexpr(lane_state.SOURCE_LANE)
SOURCE_COPY = tl.constexpr(lane_state.SOURCE_COPY)
FIRST = tl.constexpr(lane_state.FIRST)
COUNT = tl.constexpr(lane_state.COUNT)
BOTH_FROM = tl.constexpr(lane_state.BOTH_FROM)
NUM_MOVE_FIELDS = tl.constexpr(lane_state.NUM_MOVE_FIELDS)
NUM_TRACE_FIELDS = tl.constexpr(len(lane_state.TRACE_FIELDS))

TOKEN_DRAW = tl.constexpr(metropolis_hastings.TOKEN_DRAW)
TRANSITION_DRAW = tl.constexpr(metropolis_hastings.TRANSITION_DRAW)
MATCH_DRAW = tl.constexpr(metropolis_hastings.MATCH_DRAW)

# Entries of `powers`.
ALPHA = tl.constexpr(0)
PROPOSAL_POWER = tl.constexpr(1)
# An item that no lane has, a position that no completion has.
NO_ITEM = tl.constexpr(2**31 - 1)
NOWHERE = NO_ITEM


@triton.jit
def any_of(mask):
    return tl.max(mask.to(tl.int32), axis=0) > 0


@triton.jit
def picked(values, is_it):
    """The integer of the one lane where `is_it`, 0 if there is none."""
    return tl.sum(tl.where(is_it, values, 0), axis=0)


@triton.jit
def picked_float(values, is_it):
    """The same for float64, bit for bit."""
    return picked(values.to(tl.int64, bitcast=True), is_it).to(tl.float64, bitcast=True)


@triton.jit
def load_field(lane_ptr, COLUMN: tl.constexpr, mask):
    """In 32 bits lanes, items and positions take half the registers, and divisions far less."""
    return tl.load(lane_ptr + COLUMN, mask=mask, other=0).to(tl.int32)


@triton.jit
def transition_number(item, num_mcmc_steps):
    """Number of a transition among the chain's, from 1; 0 for an extension."""
    number = item % (num_mcmc_steps + 1)
    return tl.where(number > 0, item // (num_mcmc_steps + 1) * num_mcmc_steps + number, 0)


@triton.jit
def philox_words(seed, DRAW: tl.constexpr, position, number, chain):
    """The words of a counter, in the shape of `position`."""
    return tl.philox(
        seed,
        tl.full([], DRAW, tl.uint32),
        position.to(tl.uint32),
        number.to(tl.uint32),
        chain.to(tl.uint32),
    )


@triton.jit
def first_difference(
    scores_ptr,  # of the newest completion
    cut,
    n,
    last_log_q,
    is_last_new,
    seed,
    number,
    chain,
    BLOCK_T: tl.constexpr,
):
    """The first position from `cut` on whose redrawn token is another; n if there is none."""
    position = cut
    searching = position < n
    while searching:
        t = position + tl.arange(0, BLOCK_T)
        log_q = tl.load(scores_ptr + t * NUM_SCORES + LOG_Q, mask=t < n, other=0.0)
        log_q = tl.where(is_last_new & (t == n - 1), last_log_q, log_q)
        w0, w1, _, _ = philox_words(seed, MATCH_DRAW, t, number, chain)
        differs = uniform53(w0, w1) >= tl.exp(log_q)
        found = tl.min(tl.where(differs | (t >= n), t, NOWHERE), axis=0)
        searching = found == NOWHERE
        position = tl.where(searching, position + BLOCK_T, found)
    return tl.minimum(position, n)


@triton.jit
def record(
    row_ptr, item, num_mcmc_steps, cut, length, accepted, log_r, log_likelihood, decoded, mask
):
    """Write the trace of an item, or of a vector of them."""
    tl.store(row_ptr, (item // (num_mcmc_steps + 1)).to(tl.float64), mask=mask)
    tl.store(row_ptr + 1, cut.to(tl.float64), mask=mask)
    tl.store(row_ptr + 2, length.to(tl.float64), mask=mask)
    tl.store(row_ptr + 3, accepted.to(tl.float64), mask=mask)
    tl.store(row_ptr + 4, log_r, mask=mask)
    tl.store(row_ptr + 5, log_likelihood, mask=mask)
    tl.store(row_ptr + 6, decoded.to(tl.float64), mask=mask)


@triton.jit
def drawn_cut(word, n):
    """The cut of a proposal from a completion of n tokens."""
    return (((word.to(tl.int64) & 0xFFFFFFFF) * n) >> 32).to(tl.int32)


@triton.jit
def first_free(item, held, items):
    """The first item from `item` on that no lane holds."""
    while any_of(held & (items == item)):
        item += 1
    return item


@triton.jit
def store_moves(move_ptr, source_lane, source_copy, first, count, both_from, mask):
    tl.store(move_ptr + SOURCE_LANE, source_lane, mask=mask)
    tl.store(move_ptr + SOURCE_COPY, source_copy, mask=mask)
    tl.store(move_ptr + FIRST, first, mask=mask)
    tl.store(move_ptr + COUNT, count, mask=mask)
    tl.store(move_ptr + BOTH_FROM, both_from, mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_lanes",
        "max_length",
        "num_items",
        "num_eos",
        "num_mcmc_steps",
        "block_size",
    ]
)
def mh_transition_kernel(
    lanes_ptr,  # int64 [C, NUM_LANE_FIELDS]
    slots_ptr,  # int64 [C, NUM_SLOT_FIELDS]
    log_u_ptr,  # float64 [C]
    tokens_ptr,  # int64 [2, C, L]
    scores_ptr,  # float64 [2, C, L, NUM_SCORES]
    w_sum_ptr,  # float64 [2, C, L + 1]
    trace_ptr,  # float64 [C, N, NUM_TRACE_FIELDS]
    moves_ptr,  # int64 [C, NUM_MOVE_FIELDS]
    totals_ptr,  # int64 [NUM_TOTALS]
    block_limits_ptr,  # int64 [number of blocks]
    log_int_ptr,  # float64 [L + 1]
    eos_ptr,  # int64 [num_eos]
    seed_ptr,  # int64 [1]
    powers_ptr,  # float64 [2]: alpha, s
    token_ptr,  # int64 [C], or None: nothing was drawn
    log_prob_ptr,  # float32 or float64 [C] or None, as the next
    log_z_ptr,
    entropy_ptr,
    num_lanes,
    max_length,
    num_items,
    num_eos,
    num_mcmc_steps,
    block_size,
    OTHER_POWER: tl.constexpr,  # s != alpha
    BOUNDED: tl.constexpr,
    EARLY_REJECTION: tl.constexpr,
    SHARED_PREFIX_SKIP: tl.constexpr,
    LENGTH_TERM: tl.constexpr,
    GROWTH_CAP: tl.constexpr,
    TRUNCATED_SUM: tl.constexpr,
    STOP_AT_EOS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # a power of 2, >= C
    BLOCK_T: tl.constexpr,
):
    """Append, reject, accept and begin, on the lanes of a slot. Grid: C programs.

    What the tick appends is not read back from memory: the one completion of which more than that
    is read after it, the accepted one, has its last token in registers.
    """
    slot = tl.program_id(0)
    lane = tl.arange(0, BLOCK_C)
    exists = lane < num_lanes
    lane_ptr = lanes_ptr + lane * NUM_LANE_FIELDS
    move_ptr = moves_ptr + lane * NUM_MOVE_FIELDS
    slot_of = tl.load(lane_ptr + SLOT, mask=exists, other=-1)
    mine = exists & (slot_of == slot)
    # A lane in no slot is nobody's; its row of the moves is cleared by the slot of its number.
    of_moves = mine | ((slot_of < 0) & (lane == slot))
    none = tl.zeros_like(lane)
    slot_ptr = slots_ptr + slot * NUM_SLOT_FIELDS
    if tl.load(slot_ptr + STATUS) != RUNNING:
        store_moves(move_ptr, none, none, none, none, none, of_moves)
        return

    phase = load_field(lane_ptr, PHASE, mine)
    item = load_field(lane_ptr, ITEM, mine)
    length = load_field(lane_ptr, LENGTH, mine)
    agree = load_field(lane_ptr, AGREE, mine)
    cursor = load_field(lane_ptr, CURSOR, mine)
    divergence = load_field(lane_ptr, DIVERGENCE, mine)
    written = load_field(lane_ptr, WRITTEN, mine)
    cut = load_field(lane_ptr, CUT, mine)
    chain = tl.load(slot_ptr + CHAIN)
    next_item = tl.load(slot_ptr + NEXT_ITEM).to(tl.int32)
    end_item = tl.load(slot_ptr + END_ITEM).to(tl.int32)
    newest = tl.load(slot_ptr + NEWEST).to(tl.int32)
    n = tl.load(slot_ptr + NEWEST_LENGTH).to(tl.int32)
    ended = tl.load(slot_ptr + ENDED).to(tl.int32)
    trace_ptr += slot.to(tl.int64) * num_items * NUM_TRACE_FIELDS

    move_lane = none
    move_copy = none
    move_first = none
    move_count = none
    move_both_from = none
    goes_on = lane < 0
    # The accepted completion's last token; it has one if there is an accepted item.
    has_winner = slot < 0
    last_token = tl.full([], 0, tl.int64)
    last_log_q = tl.full([], 0.0, tl.float64)
    log_likelihood = tl.full([], 0.0, tl.float64)
    if token_ptr is not None:
        busy = mine & (phase >= EXTEND)
        s = tl.load(powers_ptr + PROPOSAL_POWER)
        token = tl.load(token_ptr + lane, mask=busy, other=0)
        log_prob = tl.load(log_prob_ptr + lane, mask=busy, other=0.0).to(tl.float64)
        log_z = tl.load(log_z_ptr + lane, mask=busy, other=0.0).to(tl.float64)
        entropy = tl.load(entropy_ptr + lane, mask=busy, other=0.0).to(tl.float64)
        w = log_z
        if OTHER_POWER:
            w = w + (tl.load(powers_ptr + ALPHA) - s) * log_prob
        if BOUNDED:
            w = tl.where(w > 0.0, 0.0, w)
        log_q = s * log_prob - log_z

        # The working copy comes first.
        at = lane.to(tl.int64) * max_length + cursor
        score_ptr = scores_ptr + at * NUM_SCORES
        before_ptr = score_ptr - NUM_SCORES + LOG_PROB_SUM
        log_prob_sum = tl.load(before_ptr, mask=busy & (cursor > 0), other=0.0) + log_prob
        sum_ptr = w_sum_ptr + at + lane  # one entry more a lane
        w_sum = tl.load(sum_ptr, mask=busy, other=0.0) + w
        tl.store(tokens_ptr + at, token, mask=busy)
        tl.store(score_ptr + LOG_PROB, log_prob, mask=busy)
        tl.store(score_ptr + LOG_Q, log_q, mask=busy)
        tl.store(score_ptr + ENTROPY, entropy, mask=busy)
        tl.store(score_ptr + LOG_PROB_SUM, log_prob_sum, mask=busy)
        tl.store(sum_ptr + 1, w_sum, mask=busy)
        written = tl.where(busy, cursor + 1, written)
        num_decoded = tl.sum(busy.to(tl.int32), axis=0)
        if num_decoded > 0:
            # Relaxed: whoever reads the sum waits for the kernel.
            tl.atomic_add(totals_ptr + NUM_DECODED, num_decoded.to(tl.int64), sem="relaxed")
        if any_of(busy & (token < 0)):
            tl.store(totals_ptr + BAD, 1)

        is_eos = lane < 0
        for i in range(num_eos):
            is_eos = is_eos | (token == tl.load(eos_ptr + i))
        complete = busy & (is_eos | (written == load_field(lane_ptr, LIMIT, busy)))
        proposes = busy & (phase == PROPOSE)
        log_u = tl.load(log_u_ptr + lane, mask=proposes, other=0.0)
        compared = length
        if TRUNCATED_SUM:
            compared = tl.where(complete, tl.minimum(length, written), length)
        current_row = (num_lanes + lane).to(tl.int64)
        current_sum_ptr = w_sum_ptr + current_row * (max_length + 1) + compared
        log_r = w_sum - tl.load(current_sum_ptr, mask=proposes, other=0.0)
        if LENGTH_TERM:
            log_n = tl.load(log_int_ptr + compared, mask=proposes, other=0.0)
            log_r = (log_r + log_n) - tl.load(log_int_ptr + written, mask=proposes, other=0.0)
        log_r = tl.where(proposes, log_r, 0.0)
        through = complete
        if EARLY_REJECTION:
            # Each term only falls while a proposal grows, in floating point too.
            through = through | (proposes & (log_r <= log_u))
        cursor = tl.where(busy & (through == 0), written, cursor)

        # First item first: the first one accepted ends what was begun after it.
        accepted = complete & ((phase == EXTEND) | (log_u < log_r))
        won_item = tl.min(tl.where(accepted, item, NO_ITEM), axis=0)
        has_winner = won_item < NO_ITEM
        is_winner = accepted & (item == won_item)
        rejected = through & (accepted == 0) & (item < won_item)
        current_last_ptr = scores_ptr + (current_row * max_length + length - 1) * NUM_SCORES
        current_log_likelihood = tl.load(current_last_ptr + LOG_PROB_SUM, mask=rejected, other=0.0)
        record(
            trace_ptr + item * NUM_TRACE_FIELDS,
            item,
            num_mcmc_steps,
            cut,
            tl.where(is_winner, written, length),
            is_winner,
            log_r,
            tl.where(is_winner, log_prob_sum, current_log_likelihood),
            written - divergence,
            is_winner | rejected,
        )
        phase = tl.where(rejected | is_winner, WAIT, phase)
        if has_winner:
            newest = picked(lane, is_winner)
            n = picked(written, is_winner)
            last_token = picked(token, is_winner)
            last_log_q = picked_float(log_q, is_winner)
            log_likelihood = picked_float(log_prob_sum, is_winner)
            ended = picked(is_eos.to(tl.int32), is_winner)
            end_item = tl.zeros_like(end_item) + num_items
            split = picked(tl.minimum(divergence, agree), is_winner)
            agree = tl.where(is_winner, n, tl.minimum(agree, split))

            # What was begun after this item was begun from another state. It goes on if it would be
            # what it is from this one. The lanes that are at no earlier item take the items that
            # follow, none left out, so they can hold these.
            later = mine & (phase >= EXTEND) & (item > won_item)
            at_earlier = mine & (phase >= EXTEND) & (item < won_item)
            last = won_item + tl.sum((mine & (at_earlier == 0)).to(tl.int32), axis=0)
            goes_on = later & (item <= last) & (phase == PROPOSE) & (through == 0)
            goes_on = goes_on & (divergence < agree)
            # Behind an extension comes another state.
            block = item // (num_mcmc_steps + 1)
            goes_on = goes_on & (block == won_item // (num_mcmc_steps + 1))
            if GROWTH_CAP:
                goes_on = goes_on & (load_field(lane_ptr, LIMIT, goes_on) == n)
            number = transition_number(item, num_mcmc_steps)
            word, _, _, _ = philox_words(
                tl.load(seed_ptr),
                TRANSITION_DRAW,
                tl.zeros_like(number),
                number,
                tl.zeros_like(number) + chain.to(tl.int32),
            )
            goes_on = goes_on & (drawn_cut(word, n) == cut)
            if EARLY_REJECTION:
                bound = w_sum - picked_float(w_sum, is_winner)
                if LENGTH_TERM:
                    log_written = tl.load(log_int_ptr + written, mask=goes_on, other=0.0)
                    bound = (bound + tl.load(log_int_ptr + n)) - log_written
                goes_on = goes_on & ((bound <= log_u) == 0)
            phase = tl.where(later & (goes_on == 0), WAIT, phase)
            next_item = first_free(won_item + 1, goes_on, item)

            moves_to = is_winner | goes_on
            length = tl.where(moves_to, n, length)
            move_lane = tl.where(moves_to, newest, 0)
            move_copy = tl.where(moves_to, WORKING, none)
            move_first = tl.where(is_winner, divergence, tl.where(goes_on, agree, 0))
            move_count = tl.where(moves_to, n - move_first, 0)
            move_both_from = tl.where(goes_on, tl.maximum(agree, written), move_first)
            agree = tl.where(goes_on, n, agree)
            divergence = tl.where(is_winner, n, divergence)

    # The newest completion is in the winner's working copy, or else in a current copy.
    source = tl.where(has_winner, newest, num_lanes + newest).to(tl.int64) * max_length
    newest_scores_ptr = scores_ptr + source * NUM_SCORES
    if (has_winner == 0) & (n > 0):
        log_likelihood = tl.load(newest_scores_ptr + (n - 1) * NUM_SCORES + LOG_PROB_SUM)

    # Hand out the next items that take a model step. Nothing is known of the state behind an
    # extension before it is there.
    seed = tl.load(seed_ptr)
    waiting = mine & (phase == WAIT)
    next_lane = tl.min(tl.where(waiting, lane, num_lanes), axis=0)
    extending = any_of(mine & (phase == EXTEND))
    begun = lane < 0
    new_log_u = tl.zeros([BLOCK_C], tl.float64)
    banned = tl.zeros([BLOCK_C], tl.int64)
    open = (next_lane < num_lanes) & (next_item < end_item) & (extending == 0)
    while open:
        number = transition_number(next_item, num_mcmc_steps)
        extends = number == 0
        stops = extends & (next_item > 0) & (ended != 0) if STOP_AT_EOS else next_item < 0
        if stops:
            end_item = next_item
        else:
            w0, w1, w2, _ = philox_words(
                seed, TRANSITION_DRAW, tl.zeros_like(number), number, chain
            )
            its_cut = drawn_cut(w0, n)
            new_cut = tl.where(extends, 0, its_cut)
            first = tl.where(extends, n, its_cut)
            ban = tl.full([], -1, tl.int64)
            if SHARED_PREFIX_SKIP:
                first = first_difference(
                    newest_scores_ptr,
                    first,
                    n,
                    last_log_q,
                    has_winner,
                    seed,
                    number,
                    chain,
                    BLOCK_T,
                )
                if first < n:
                    ban = tl.load(tokens_ptr + source + first)
                    ban = tl.where(has_winner & (first == n - 1), last_token, ban)
            # A proposal that repeats the whole completion, accepted at no cost, or a completion
            # with its EOS, which is not extended.
            repeats = (first == n) & ((extends == 0) | (ended != 0))
            record(
                trace_ptr + next_item * NUM_TRACE_FIELDS,
                next_item,
                num_mcmc_steps,
                new_cut,
                n,
                repeats,
                tl.full([], 0.0, tl.float64),
                log_likelihood,
                tl.zeros_like(n),
                repeats,
            )
            begins = waiting & (lane == next_lane) & (repeats == 0)
            begun = begun | begins
            item = tl.where(begins, next_item, item)
            cut = tl.where(begins, new_cut, cut)
            cursor = tl.where(begins, first, cursor)
            banned = tl.where(begins, ban, banned)
            its_log_u = tl.where(extends, 0.0, tl.log(uniform53(w1, w2)))
            new_log_u = tl.where(begins, its_log_u, new_log_u)
            extending = extends & (repeats == 0)
            next_lane = tl.min(tl.where(waiting & (begun == 0), lane, num_lanes), axis=0)
            next_item = first_free(next_item + 1, goes_on, item)
        open = (next_lane < num_lanes) & (next_item < end_item) & (extending == 0)

    # Both copies of the lanes that begin become the newest state: from its own current copy, if
    # that is it, or from where that is.
    own = agree >= n
    sync_first = tl.where(own, divergence, tl.minimum(agree, divergence))
    sync_count = tl.where(own, tl.minimum(written, n), n) - sync_first
    syncs = begun & (sync_count > 0)
    source_copy = tl.where(has_winner, WORKING, CURRENT)
    move_lane = tl.where(syncs, tl.where(own, lane, newest), move_lane)
    move_copy = tl.where(syncs, tl.where(own, CURRENT, source_copy), move_copy)
    move_first = tl.where(syncs, sync_first, move_first)
    move_count = tl.where(syncs, sync_count, move_count)
    move_both_from = tl.where(syncs, sync_first, move_both_from)
    store_moves(move_ptr, move_lane, move_copy, move_first, move_count, move_both_from, of_moves)

    is_extension = begun & (transition_number(item, num_mcmc_steps) == 0)
    if GROWTH_CAP:
        limit = tl.where(is_extension, tl.minimum(n + block_size, max_length), n)
    else:
        limit = tl.load(block_limits_ptr + item // (num_mcmc_steps + 1), mask=begun, other=0)
    phase = tl.where(begun, tl.where(is_extension, EXTEND, PROPOSE), phase)
    finishes = (any_of(mine & (phase >= EXTEND)) == 0) & (next_item >= end_item)
    phase = tl.where(finishes, IDLE, phase)
    tl.store(lane_ptr + PHASE, phase, mask=mine)
    tl.store(lane_ptr + ITEM, item, mask=begun)
    tl.store(lane_ptr + LENGTH, tl.where(begun, n, length), mask=mine)
    tl.store(lane_ptr + AGREE, tl.where(begun, n, agree), mask=mine)
    tl.store(lane_ptr + CURSOR, cursor, mask=mine)
    tl.store(lane_ptr + DIVERGENCE, tl.where(begun, cursor, divergence), mask=mine)
    tl.store(lane_ptr + WRITTEN, tl.where(begun, cursor, written), mask=mine)
    tl.store(lane_ptr + BANNED, banned, mask=begun)
    tl.store(lane_ptr + LIMIT, limit, mask=begun)
    tl.store(lane_ptr + CUT, cut, mask=begun)
    tl.store(log_u_ptr + lane, new_log_u, mask=begun)
    tl.store(slot_ptr + STATUS, tl.where(finishes, FINISHED, RUNNING))
    tl.store(slot_ptr + NEXT_ITEM, next_item)
    tl.store(slot_ptr + END_ITEM, end_item)
    tl.store(slot_ptr + NEWEST, newest)
    tl.store(slot_ptr + NEWEST_LENGTH, n)
    tl.store(slot_ptr + ENDED, ended)


@triton.jit
def copy_entries(
    source_ptr, working_ptr, current_ptr, working_from, current_from, count, BLOCK: tl.constexpr
):
    """To the two targets, to each from an entry on."""
    index = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        kept = start + index < count
        values = tl.load(source_ptr + start + index, mask=kept)
        at = start + index
        tl.store(working_ptr + at, values, mask=kept & (at >= working_from))
        tl.store(current_ptr + at, values, mask=kept & (at >= current_from))


@triton.jit
def count_lanes(lanes_ptr, slots_ptr, totals_ptr, go_ptr, num_lanes, BLOCK: tl.constexpr):
    """Writes `totals` and `go`."""
    num_finished = tl.zeros([BLOCK], tl.int64)
    num_running = tl.zeros([BLOCK], tl.int64)
    num_busy = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num_lanes, BLOCK):
        index = start + tl.arange(0, BLOCK)
        exists = index < num_lanes
        status = tl.load(slots_ptr + index * NUM_SLOT_FIELDS + STATUS, mask=exists, other=0)
        phase = tl.load(lanes_ptr + index * NUM_LANE_FIELDS + PHASE, mask=exists, other=0)
        num_finished += (status == FINISHED).to(tl.int64)
        num_running += (status == RUNNING).to(tl.int64)
        num_busy += (phase >= EXTEND).to(tl.int64)
    finished = tl.sum(num_finished, axis=0)
    running = tl.sum(num_running, axis=0)
    is_good = tl.load(totals_ptr + BAD) == 0
    tl.store(totals_ptr + NUM_FINISHED, finished)
    tl.store(totals_ptr + NUM_RUNNING, running)
    tl.store(totals_ptr + NUM_BUSY, tl.sum(num_busy, axis=0))
    tl.store(go_ptr, ((running > 0) & (finished == 0) & is_good).to(tl.int32))


@triton.jit(do_not_specialize=["num_lanes", "max_length", "num_mcmc_steps"])
def prepare_step_kernel(
    lanes_ptr,  # as in `mh_transition_kernel`
    slots_ptr,
    offset_ptr,  # int64 [C]
    tokens_ptr,
    scores_ptr,
    w_sum_ptr,
    fed_ptr,  # int64 [C]
    position_ptr,  # int64 [C]
    counters_ptr,  # int64 [C, 4]
    ban_ptr,  # int64 [C]
    moves_ptr,
    totals_ptr,
    go_ptr,  # int32 [1]
    num_lanes,
    max_length,
    num_mcmc_steps,
    BLOCK: tl.constexpr,
):
    """Do a lane's move and write what the model is fed. Grid: C + 1 programs, the last one counts.

    No move's source is the target of another, so what is read is what the transition left.
    """
    if tl.program_id(0) == num_lanes:
        count_lanes(lanes_ptr, slots_ptr, totals_ptr, go_ptr, num_lanes, BLOCK)
        return
    lane = tl.program_id(0)
    move_ptr = moves_ptr + lane * NUM_MOVE_FIELDS
    first = tl.load(move_ptr + FIRST).to(tl.int32)
    last = first + tl.load(move_ptr + COUNT).to(tl.int32)
    # Positions of the prompt have no tokens.
    count = last - first
    # Rows of both copies; offsets into them are in 64 bits.
    working = lane.to(tl.int64)
    current = (num_lanes + lane).to(tl.int64)
    source_copy = tl.load(move_ptr + SOURCE_COPY)
    source = source_copy * num_lanes + tl.load(move_ptr + SOURCE_LANE)
    both_from = tl.load(move_ptr + BOTH_FROM).to(tl.int32)
    # Each copy's first position that is moved to.
    to_working = tl.where(source_copy == WORKING, both_from, first)
    to_working = tl.where(source == working, last, to_working)
    to_current = tl.where(source_copy == CURRENT, both_from, first)
    to_current = tl.where(source == current, last, to_current)
    if count > 0:
        at = source * max_length + first
        at_working = working * max_length + first
        at_current = current * max_length + first
        copy_entries(
            tokens_ptr + at,
            tokens_ptr + at_working,
            tokens_ptr + at_current,
            to_working - first,
            to_current - first,
            count,
            BLOCK,
        )
        copy_entries(
            scores_ptr + at * NUM_SCORES,
            scores_ptr + at_working * NUM_SCORES,
            scores_ptr + at_current * NUM_SCORES,
            (to_working - first) * NUM_SCORES,
            (to_current - first) * NUM_SCORES,
            count * NUM_SCORES,
            BLOCK,
        )
        # One entry more a lane, and the sum behind each token.
        copy_entries(
            w_sum_ptr + at + source + 1,
            w_sum_ptr + at_working + working + 1,
            w_sum_ptr + at_current + current + 1,
            to_working - first,
            to_current - first,
            count,
            BLOCK,
        )

    lane_ptr = lanes_ptr + lane * NUM_LANE_FIELDS
    busy = tl.load(lane_ptr + PHASE) >= EXTEND
    cursor = tl.where(busy, tl.load(lane_ptr + CURSOR).to(tl.int32), 0)
    fed = tl.load(lane_ptr + PROMPT_TOKEN)
    if cursor > 0:
        # From where the move has it: its copy may not be in memory yet.
        t = cursor - 1
        row = tl.where((t >= to_working) & (t < last), source, working)
        fed = tl.load(tokens_ptr + row * max_length + t)
    tl.store(fed_ptr + lane, fed)
    tl.store(position_ptr + lane, tl.load(offset_ptr + lane) + cursor)
    starts = busy & (cursor == tl.load(lane_ptr + DIVERGENCE))
    tl.store(ban_ptr + lane, tl.where(starts, tl.load(lane_ptr + BANNED), -1))
    number = tl.zeros_like(cursor)
    chain = tl.full([], 0, tl.int64)
    if busy:
        number = transition_number(tl.load(lane_ptr + ITEM).to(tl.int32), num_mcmc_steps)
        chain = tl.load(slots_ptr + tl.load(lane_ptr + SLOT) * NUM_SLOT_FIELDS + CHAIN)
    tl.store(counters_ptr + 4 * lane, TOKEN_DRAW)
    tl.store(counters_ptr + 4 * lane + 1, cursor)
    tl.store(counters_ptr + 4 * lane + 2, number)
    tl.store(counters_ptr + 4 * lane + 3, chain)
