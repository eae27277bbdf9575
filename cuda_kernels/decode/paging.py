"""Addresses in paged caches, and the partial softmax results that splits exchange.

A cache is a pool of pages [P, PAGE, Hkv, D]. Row b of a table [B, pages] names the pages of
sequence b in order; token i lies in page `table[b, i // PAGE]` at offset `i % PAGE`.

A partial result of G rows is three tensors: the running maximum (base 2), the sum of exponentials
and the weighted sum of values, unnormalised. Split s of item z has them at `[z, s]`.
"""

import triton
import triton.language as tl

from ..common import dot, dot_split, load_split, narrow, softmax_step, store_split


@triton.jit
def paged_rows(base, table, token, valid, stride_page, stride_token, PAGE: tl.constexpr):
    """Pointers [N] to the rows of tokens [N]; base points to the head in page 0."""
    page = tl.load(table + token // PAGE, mask=valid, other=0).to(tl.int64)
    return base + page * stride_page + (token % PAGE).to(tl.int64) * stride_token


@triton.jit
def position_of(item, seqlens, S, HKV):
    """Batch, query index, kv head and absolute position of work item `item` = (b, s, kv head)."""
    kv_head = item % HKV
    query = item // HKV % S
    batch = item // HKV // S
    position = tl.load(seqlens + batch) - S + tl.cast(query, tl.int32)
    return batch, query, kv_head, position


@triton.jit
def attend_tokens(
    acc0, acc1, maximum, total, q0, q1, k_head, v_head, table, token, seen,
    stride_kp, stride_kt, stride_vp, stride_vt, scale_log2,
    DK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PAGE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds tokens [N], those that are `seen`, to the running softmax of all rows."""
    k_rows = paged_rows(k_head, table, token, seen, stride_kp, stride_kt, PAGE)
    v_rows = paged_rows(v_head, table, token, seen, stride_vp, stride_vt, PAGE)
    k0, k1 = load_split(k_rows, seen, DK, D0, D1, True)
    v0, v1 = load_split(v_rows, seen, DV, V0, V1, True)
    logits = dot_split(q0, q1, k0, k1, D1, UPCAST, PRECISION) * scale_log2
    logits = tl.where(seen[None, :], logits, float("-inf"))
    p, factor, maximum, total = softmax_step(logits, maximum, total)
    p = narrow(p, v0.dtype, UPCAST)
    acc0 = dot(p, v0, acc0 * factor[:, None], UPCAST, PRECISION)
    if V1 > 0:
        acc1 = dot(p, v1, acc1 * factor[:, None], UPCAST, PRECISION)
    return acc0, acc1, maximum, total


@triton.jit
def store_partial(
    partial_o, partial_ml, place, acc0, acc1, maximum, total, rows,
    G: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """Stores the G rows of a partial result.

    Args:
        partial_o: float32 [places, G, DV]; partial_ml: float32 [places, 2, G]; place: int64.
        rows: int32 [GP], consecutive heads of the group; those from G on are padding.
    """
    tl.store(partial_ml + place * (2 * G) + rows, maximum, mask=rows < G)
    tl.store(partial_ml + place * (2 * G) + G + rows, total, mask=rows < G)
    store_split(partial_o + (place * G + rows) * DV, rows < G, acc0, acc1, DV, V0, V1)


@triton.jit
def _load_part(partial_o, place, rows, COLUMN: tl.constexpr, WIDTH: tl.constexpr,
               G: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    column = COLUMN + tl.arange(0, WIDTH)
    mask = (rows < G)[:, None] & (column < DV)[None, :]
    pointers = partial_o + (place * G + rows)[:, None] * DV + column[None, :]
    return tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def merge_partials(
    partial_o, partial_ml, first, count, rows, GP: tl.constexpr,
    G: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """The softmax over `count` consecutive partial results, normalised, added in their order.

    They were written by other programs of this launch or the last one: read past L1 (`.cg`).

    Returns:
        acc0 [GP, V0], acc1 [GP, V1], lse [GP] in base 2 (-inf and zeros on dead rows).
    """
    maximum = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc0 = tl.zeros([GP, V0], tl.float32)
    acc1 = tl.zeros([GP, V1 if V1 > 0 else V0], tl.float32)
    for split in range(count):
        place = first + split
        ml = partial_ml + place * (2 * G) + rows
        part_maximum = tl.load(ml, mask=rows < G, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(ml + G, mask=rows < G, other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, part_maximum)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        factor = tl.math.exp2(maximum - shift)
        part_factor = tl.math.exp2(part_maximum - shift)
        total = total * factor + part_total * part_factor
        part = _load_part(partial_o, place, rows, 0, V0, G, DV)
        acc0 = acc0 * factor[:, None] + part * part_factor[:, None]
        if V1 > 0:
            part = _load_part(partial_o, place, rows, V0, V1, G, DV)
            acc1 = acc1 * factor[:, None] + part * part_factor[:, None]
        maximum = new_maximum
    dead = total == 0.0
    inverse = tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, total))
    lse2 = tl.where(dead, float("-inf"), maximum + tl.log2(tl.where(dead, 1.0, total)))
    return acc0 * inverse[:, None], acc1 * inverse[:, None], lse2


@triton.jit
def is_last(counter, programs):
    """Whether this program is the last of `programs` to arrive; it resets the counter then.

    Everything the others stored before arriving is visible to the last one: a barrier orders this
    program's stores before its release, the acquire orders theirs before its loads.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == programs - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last
