"""Choosing tokens on the device, to the bit as `worker/sampling/` says: one program for each row of logits.

Nothing is sorted. Top-k and top-p keep the head of an order (likeliest first, equal ones by id), and a head is a logit
and how many of the tokens that have just this logit belong to it: found by bisection between the greatest logit and
the one below which weights are 0. Weights are integers, so sums are the same in any order.

Multiplications and additions must not be fused: launch with `enable_fp_fusion=False`.

Legend: S rows, V vocabulary, W = ceil(V / 32).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pelton.worker.kernels.triton.interpreter import mend_interpreter

mend_interpreter()

# What stands for a token where there is none.
NOT_FINITE = tl.constexpr(-1)
ALL_BANNED = tl.constexpr(-2)
OVERFLOW = tl.constexpr(-3)

# Columns of the settings of a row, int64; those named *_bits hold a float64.
TEMPERATURE_BITS = tl.constexpr(0)
INVERSE_BITS = tl.constexpr(1)
TOP_K = tl.constexpr(2)
TOP_P_BITS = tl.constexpr(3)
LEAST_WEIGHT = tl.constexpr(4)
RANDOM = tl.constexpr(5)  # 53 bits; -1: greedy
NUM_SETTINGS = tl.constexpr(6)

_LOWEST_KEY = tl.constexpr(-2139095041)  # of -inf
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23


@triton.jit
def key_of(x):
    """An int32 that orders as float32 does; 0.0 and -0.0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 of a key in int64."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, greatest, inverse):
    """`sampling/weights.py` for float32: exp((x - greatest) * inverse) as int64."""
    x = tl.maximum((x - greatest) * inverse, -40.0)
    shifted = x * 1.44269504 + _ROUND
    n = shifted - _ROUND
    r = x - n * 0.693359375 - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    y = p * (r * r) + (r + 1.0)
    mantissa = (y * 16777216.0).to(tl.int32).to(tl.int64) << 15
    return mantissa >> (0x4B400000 - shifted.to(tl.int32, bitcast=True)).to(tl.int64)


@triton.jit
def measure(x_ptr, size, key, greatest, inverse, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """What tokens from `key` up come to: their number, or the sum of their weights."""
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + ids, mask=ids < size, other=float("-inf"))
        is_in = (key_of(x) >= key) & (ids < size)
        if COUNTS:
            total += is_in.to(tl.int64)
        else:
            total += tl.where(is_in, weight_of(x, greatest, inverse), 0)
    return tl.sum(total, axis=0)


@triton.jit
def find_edge(x_ptr, size, wanted, low, high, greatest, inverse, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """(edge, above): the greatest key in [low, high] from which up tokens come to `wanted`, else `low`; and what those
    above it come to. Nothing is above `high`."""
    above = tl.zeros((), dtype=tl.int64)
    num_steps = 0
    while low < high:
        middle = low + (high - low + 1) // 2
        if num_steps < 16:
            # Halves the logits while that parts tokens best; keys lie dense about 0.
            half = value_of(low) * 0.5 + value_of(high) * 0.5
            middle = tl.minimum(tl.maximum(key_of(half).to(tl.int64), low + 1), high)
        found = measure(x_ptr, size, middle, greatest, inverse, COUNTS, BLOCK)
        if found >= wanted:
            low = middle
            if COUNTS and found == wanted:
                # All from here up, however many have this very key.
                high = middle
                above = above * 0 - size
        else:
            high = middle - 1
            above = found
        num_steps += 1
    return low, above


@triton.jit
def sum_of_head(x_ptr, size, edge, num_ties, least, greatest, inverse, BLOCK: tl.constexpr):
    """(sum of the weights of a head that weigh at least `least`, tokens at its edge)."""
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    ties = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + ids, mask=ids < size, other=float("-inf"))
        key = key_of(x)
        weight = weight_of(x, greatest, inverse)
        total += tl.where((key > edge) & (weight >= least) & (ids < size), weight, 0)
        ties += ((key == edge) & (ids < size)).to(tl.int64)
    num_at_edge = tl.sum(ties, axis=0)
    weight = weight_of(value_of(edge), greatest, inverse)
    at_edge = tl.minimum(num_ties, num_at_edge) * weight
    return tl.sum(total, axis=0) + tl.where(weight >= least, at_edge, 0), num_at_edge


@triton.jit
def token_at(x_ptr, size, drawn, edge, num_ties, num_at_edge, least, greatest, inverse, BLOCK: tl.constexpr):
    """The token of the head whose interval of the cumulative weights, by id, holds `drawn`."""
    token = tl.zeros((), dtype=tl.int64) - 1
    num_seen = tl.zeros((), dtype=tl.int64)
    first = 0
    while (token < 0) & (first < size):
        ids = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + ids, mask=ids < size, other=float("-inf"))
        key = key_of(x)
        weight = weight_of(x, greatest, inverse)
        is_edge = (key == edge) & (ids < size)
        is_kept = (key > edge) | is_edge
        if num_ties < num_at_edge:
            ranks = tl.cumsum(is_edge.to(tl.int64), axis=0) + num_seen
            is_kept = (key > edge) | (is_edge & (ranks <= num_ties))
            num_seen += tl.sum(is_edge.to(tl.int64), axis=0)
        weight = tl.where(is_kept & (weight >= least) & (ids < size), weight, 0)
        here = tl.sum(weight, axis=0)
        if drawn < here:
            is_past = tl.cumsum(weight, axis=0) > drawn
            token = tl.min(tl.where(is_past, ids, size), axis=0).to(tl.int64)
        drawn -= here
        first += BLOCK
    return token


@triton.jit
def scaled_random(random, total):
    """random * total >> 53, of 53 and at most 57 bits, in halves that int64 holds."""
    r1, r0 = random >> 27, random & 0x7FFFFFF
    t1, t0 = total >> 29, total & 0x1FFFFFFF
    outer, inner = r0 * t1, r1 * t0
    low = r0 * t0 + ((outer & 0xFFFFFF) << 29) + ((inner & 0x3FFFFFF) << 27)
    return r1 * t1 * 8 + (outer >> 24) + (inner >> 26) + (low >> 53)


@triton.jit
def greatest_of(x_ptr, size, BLOCK: tl.constexpr):
    """(key of the greatest logit, the lowest id that has it, whether any is NaN)."""
    best = tl.zeros((BLOCK,), dtype=tl.int64) + (-9223372036854775807)
    magnitude = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + ids, mask=ids < size, other=float("-inf"))
        magnitude = tl.maximum(magnitude, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        place = (key_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
        best = tl.maximum(best, tl.where(ids < size, place, -9223372036854775807))
    found = tl.max(best, axis=0)
    return found >> 32, 0x7FFFFFFF - (found & 0x7FFFFFFF), tl.max(magnitude, axis=0) > 0x7F800000


@triton.jit
def draw(x_ptr, size, settings_ptr, top_key, BLOCK: tl.constexpr):
    """A token of the row by its settings; `top_key` is the greatest logit's."""
    temperature = tl.load(settings_ptr + TEMPERATURE_BITS).to(tl.float64, bitcast=True).to(tl.float32)
    inverse = tl.load(settings_ptr + INVERSE_BITS).to(tl.float64, bitcast=True).to(tl.float32)
    top_k = tl.load(settings_ptr + TOP_K)
    top_p = tl.load(settings_ptr + TOP_P_BITS).to(tl.float64, bitcast=True)
    least = tl.load(settings_ptr + LEAST_WEIGHT)
    greatest = value_of(top_key)
    # Below, weights are 0: whether such a token is kept makes no difference.
    edge = tl.maximum(key_of(greatest - 28.0 * temperature), _LOWEST_KEY).to(tl.int64)
    num_ties = tl.zeros((), dtype=tl.int64) + size
    if (top_k > 0) & (top_k < size):
        edge, above = find_edge(x_ptr, size, top_k, edge, top_key, greatest, inverse, True, BLOCK)
        num_ties = top_k - above
    if top_p < 1.0:
        total, _ = sum_of_head(x_ptr, size, edge, num_ties, 0, greatest, inverse, BLOCK)
        share = top_p * total.to(tl.float64)
        wanted = share.to(tl.int64)
        wanted = tl.minimum(tl.where(wanted.to(tl.float64) < share, wanted + 1, wanted), total)
        edge, above = find_edge(x_ptr, size, wanted, edge, top_key, greatest, inverse, False, BLOCK)
        weight = tl.maximum(weight_of(value_of(edge), greatest, inverse), 1)
        num_ties = (wanted - above + weight - 1) // weight
    total, num_at_edge = sum_of_head(x_ptr, size, edge, num_ties, least, greatest, inverse, BLOCK)
    drawn = scaled_random(tl.load(settings_ptr + RANDOM), total)
    return token_at(x_ptr, size, drawn, edge, num_ties, num_at_edge, least, greatest, inverse, BLOCK)


@triton.jit
def choose_kernel(
    raw_ptr,  # [S, V]
    x_ptr,  # [S, V]: edited
    settings_ptr,  # [S, NUM_SETTINGS]
    token_ptr,  # [S]
    size,
    stride,
    IS_EDITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    settings_ptr += row * NUM_SETTINGS
    top_key, token, has_nan = greatest_of(raw_ptr + row * stride, size, BLOCK)
    is_infinite = (top_key >= 0x7F800000) | (top_key <= _LOWEST_KEY)
    if has_nan | is_infinite:
        token = tl.zeros((), dtype=tl.int64) + NOT_FINITE
    else:
        if IS_EDITED:
            top_key, token, has_nan = greatest_of(x_ptr + row * stride, size, BLOCK)
            token = tl.where(top_key >= 0x7F800000, OVERFLOW, token)
            token = tl.where(top_key <= _LOWEST_KEY, ALL_BANNED, token)
        if (token >= 0) & (tl.load(settings_ptr + RANDOM) >= 0):
            token = draw(x_ptr + row * stride, size, settings_ptr, top_key, BLOCK)
    tl.store(token_ptr + row, token)


@triton.jit
def logprobs_kernel(
    x_ptr,  # [S, V]
    row_ptr,  # [n]: rows of x
    token_ptr,  # [n]
    count_ptr,  # [n]: how many of the likeliest
    fact_ptr,  # int64 [n, 4]: key of the greatest, sum of weights, key of the token, its rank; -1: not finite
    id_ptr,  # int32 [n, MOST], of -1: the likeliest by id
    value_ptr,  # float32 [n, MOST]
    size,
    stride,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    x_ptr += tl.load(row_ptr + index) * stride
    token = tl.load(token_ptr + index)
    wanted = tl.load(count_ptr + index)
    top_key, _, has_nan = greatest_of(x_ptr, size, BLOCK)
    fact_ptr += index * 4
    if has_nan | (top_key >= 0x7F800000) | (top_key <= _LOWEST_KEY) | (token < 0):
        tl.store(fact_ptr + 3, tl.zeros((), dtype=tl.int64) - 1)
    else:
        greatest = value_of(top_key)
        edge = tl.zeros((), dtype=tl.int64) + (_LOWEST_KEY + 1)
        num_ties = tl.zeros((), dtype=tl.int64)
        if wanted > 0:
            edge, above = find_edge(x_ptr, size, wanted, edge, top_key, greatest, 1.0, True, BLOCK)
            num_ties = wanted - above
        own_key = key_of(tl.load(x_ptr + token))
        total = tl.zeros((BLOCK,), dtype=tl.int64)
        num_above = tl.zeros((BLOCK,), dtype=tl.int64)
        num_edges = tl.zeros((), dtype=tl.int32)
        num_found = tl.zeros((), dtype=tl.int32)
        for first in range(0, size, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            mask = ids < size
            x = tl.load(x_ptr + ids, mask=mask, other=float("-inf"))
            key = key_of(x)
            total += tl.where(mask, weight_of(x, greatest, 1.0), 0)
            num_above += (mask & ((key > own_key) | ((key == own_key) & (ids < token)))).to(tl.int64)
            if wanted > 0:
                is_edge = (key == edge) & mask
                ranks = tl.cumsum(is_edge.to(tl.int32), axis=0) + num_edges
                is_top = ((key > edge) & mask) | (is_edge & (ranks <= num_ties))
                place = tl.cumsum(is_top.to(tl.int32), axis=0) + num_found - 1
                tl.store(id_ptr + index * MOST + place, ids, mask=is_top & (place < MOST))
                tl.store(value_ptr + index * MOST + place, x, mask=is_top & (place < MOST))
                num_edges += tl.sum(is_edge.to(tl.int32), axis=0)
                num_found += tl.sum(is_top.to(tl.int32), axis=0)
        tl.store(fact_ptr, top_key)
        tl.store(fact_ptr + 1, tl.sum(total, axis=0))
        tl.store(fact_ptr + 2, own_key.to(tl.int64))
        tl.store(fact_ptr + 3, tl.sum(num_above, axis=0) + 1)


@triton.jit
def edit_kernel(
    x_ptr,  # [S, V], edited in place
    row_ptr,  # [n]: rows of x
    mask_ptr,  # [masks, W] int32: what grammars allow
    address_ptr,  # int64 [n, 4]: bias [V] float32, banned at first [W], output counts [V] int32 (0: none); mask (-1)
    penalty_ptr,  # float32 [n, 3]: repetition, frequency, presence
    size,
    stride,
    num_words,
    BLOCK: tl.constexpr,
):
    """In the order of `SamplingParams`; a bias of -inf is a ban."""
    index = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = ids < size
    x_ptrs = x_ptr + tl.load(row_ptr + index) * stride + ids
    x = tl.load(x_ptrs, mask=in_range, other=0.0)
    bias = tl.load(address_ptr + index * 4)
    stops = tl.load(address_ptr + index * 4 + 1)
    counts = tl.load(address_ptr + index * 4 + 2)
    mask = tl.load(address_ptr + index * 4 + 3)
    lowest: tl.constexpr = float("-inf")
    if bias != 0:
        x += tl.load(bias.to(tl.pointer_type(tl.float32)) + ids, mask=in_range, other=0.0)
    if mask >= 0:
        words = tl.load(mask_ptr + mask * num_words + ids // 32, mask=in_range, other=0)
        x = tl.where((words >> (ids % 32)) & 1 != 0, x, lowest)
    if stops != 0:
        words = tl.load(stops.to(tl.pointer_type(tl.int32)) + ids // 32, mask=in_range, other=0)
        x = tl.where((words >> (ids % 32)) & 1 != 0, lowest, x)
    if counts != 0:
        count = tl.load(counts.to(tl.pointer_type(tl.int32)) + ids, mask=in_range, other=-1)
        repetition = tl.load(penalty_ptr + index * 3)
        frequency = tl.load(penalty_ptr + index * 3 + 1)
        presence = tl.load(penalty_ptr + index * 3 + 2)
        penalized = tl.where(x > 0.0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
        penalized = penalized - frequency * count.to(tl.float32)
        penalized = penalized - tl.where(count > 0, presence, 0.0)
        x = tl.where(count >= 0, penalized, x)
    tl.store(x_ptrs, x, mask=in_range)
