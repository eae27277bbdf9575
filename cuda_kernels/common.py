"""Device functions shared by the attention kernels, and the kernel of the backward pass's deltas.

Conventions of every kernel in this package:

- Logits are kept in base 2: `s * scale * log2(e)` in float32, so that the exponential is the
  hardware's `ex2`. The scale is applied to the float32 logits, never to q.
- A head dim D is held as two column tiles of powers of two, D0 + D1 >= D, D1 = 0 where one is
  enough: 192 is 128 + 64 and is not padded to 256. A column mask is made only where D0 + D1 > D.
- The rows of a query tile are (token, head) pairs of one group: row r is token `r // G`, head
  `r % G`. Any G >= 1 fills a tile, and dk, dv sum over the group in registers.
- Whatever depends on a token's position is added to a pointer in 64 bits; only offsets inside one
  tile are 32-bit.
- UPCAST makes every operand of a matrix product float32 first. Triton's interpreter multiplies
  bfloat16 wrongly (it multiplies their bit patterns); the product of two upcast bfloat16 values is
  exact in float32, so the result is what a tensor core gives up to the order of the sum.
- A packed batch is cut in tiles without reading lengths on the host: see `packed_tile`.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + a @ b` in float32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float32 `x` as an operand of `dtype`, rounded to nearest even.

    Triton's interpreter cuts bfloat16 off instead of rounding, so there (UPCAST) the bits are
    rounded first.
    """
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        # The interpreter turns denormal remainders into bits of the result.
        x = (bits >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_columns(
    rows, valid, COLUMN: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr
):
    """Loads columns [COLUMN, COLUMN + WIDTH) of the rows at pointers `rows`, zero past D.

    MASK: rows where `valid` is false are not read and give zeros.
    """
    columns = COLUMN + tl.arange(0, WIDTH)
    pointers = rows[:, None] + columns[None, :]
    if COLUMN + WIDTH > D:
        if MASK:
            tile = tl.load(pointers, mask=valid[:, None] & (columns < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    elif MASK:
        tile = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_split(
    rows, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr
):
    """Loads rows of D columns as tiles of D0 and D1 columns; the first one twice where D1 is 0."""
    first = load_columns(rows, valid, 0, D0, D, MASK)
    if D1 > 0:
        second = load_columns(rows, valid, D0, D1, D, MASK)
    else:
        second = first
    return first, second


@triton.jit
def store_split(rows, valid, first, second, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Stores tiles of D0 and D1 columns to the valid rows, rounded to the pointers' dtype."""
    dtype = rows.dtype.element_ty
    columns = tl.arange(0, D0)
    mask = valid[:, None] & (columns < D)[None, :]
    tl.store(rows[:, None] + columns[None, :], first.to(dtype), mask=mask)
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        mask = valid[:, None] & (columns < D)[None, :]
        tl.store(rows[:, None] + columns[None, :], second.to(dtype), mask=mask)


@triton.jit
def dot_split(a0, a1, b0, b1, D1: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ b.T` [M, N] in float32, both held as two column tiles."""
    acc = tl.zeros([a0.shape[0], b0.shape[0]], tl.float32)
    acc = dot(a0, tl.trans(b0), acc, UPCAST, PRECISION)
    if D1 > 0:
        acc = dot(a1, tl.trans(b1), acc, UPCAST, PRECISION)
    return acc


@triton.jit
def token_group_rows(
    base, first_token, stride_token, stride_head, G: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Pointers [BLOCK_M] to the (token, head) rows from the first head of `first_token` on.

    The offsets inside the tile do not depend on where it starts, so they leave loops.
    """
    inside = tl.arange(0, BLOCK_M)
    offsets = (inside // G) * stride_token + (inside % G) * stride_head
    return base + tl.cast(first_token, tl.int64) * stride_token + offsets


@triton.jit
def group_rows(base, first_row, stride_token, stride_head, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Pointers [BLOCK_M] to the rows `first_row + i` of a group: token `row // G`, head `row % G`.

    base: pointer to token 0 of the sequence, first head of the group.
    first_row: a multiple of BLOCK_M.
    """
    if BLOCK_M % G == 0:
        pointers = token_group_rows(base, first_row // G, stride_token, stride_head, G, BLOCK_M)
    else:
        rows = first_row + tl.arange(0, BLOCK_M)
        tokens = (rows // G).to(tl.int64)
        pointers = base + tokens * stride_token + (rows % G) * stride_head
    return pointers


@triton.jit
def token_rows(base, first_token, stride_token, BLOCK_N: tl.constexpr):
    """Pointers [BLOCK_N] to consecutive tokens of one head."""
    start = tl.cast(first_token, tl.int64) * stride_token
    return base + start + tl.arange(0, BLOCK_N) * stride_token


@triton.jit
def softmax_step(logits, maximum, total):
    """One step of the online softmax over a tile of base-2 logits [M, N].

    The running maximum is per row. A row that has seen nothing yet keeps -inf and probabilities 0.

    Returns:
        probabilities [M, N], the factor [M] for what was accumulated before, new maximum, total.
    """
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    probabilities = tl.math.exp2(logits - shift[:, None])
    factor = tl.math.exp2(maximum - shift)
    return probabilities, factor, new_maximum, total * factor + tl.sum(probabilities, 1)


@triton.jit
def softmax_result(maximum, total):
    """What an online softmax ends with: 1 / total and natural-log lse; 0 and -inf on dead rows."""
    dead = total == 0.0
    inverse = tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, total))
    lse = maximum * LN2 + tl.log(tl.where(dead, 1.0, total))
    return inverse, tl.where(dead, float("-inf"), lse)


@triton.jit
def load_base2_lse(pointers, valid):
    """lse of rows in base 2 as the backward pass wants it: +inf on dead rows, so that p is 0."""
    lse = tl.load(pointers, mask=valid, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def packed_tile(tile, cu_seqlens, num_seqs, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """Finds the sequence that tile number `tile` of a packed batch belongs to.

    Sequence i owns the tile numbers from `cu[i] * SCALE // BLOCK + i` on. That leaves room for
    every tile of every sequence (some numbers stay unused) and bounds the grid by
    `total * SCALE // BLOCK + num_seqs`, which the host knows from shapes alone.

    Args:
        cu_seqlens: int32 [num_seqs + 1], token offsets. SCALE: rows per token (G, or 1).

    Returns:
        sequence index, and the tile's index inside that sequence (may lie past its end).
    """
    sequence = -1
    for start in range(0, num_seqs, 64):
        index = start + tl.arange(0, 64)
        inside = index < num_seqs
        tokens = tl.load(cu_seqlens + index, mask=inside, other=0).to(tl.int64)
        first = tokens * SCALE // BLOCK + index
        sequence += tl.sum((inside & (first <= tile)).to(tl.int32), 0)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    return sequence, (tile - (start * SCALE // BLOCK + sequence)).to(tl.int32)


@triton.jit
def backward_delta(
    o, grad_o, lse, grad_lse, delta, rows, heads, tokens,
    stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`delta = sum(o * grad_o) - grad_lse` [B, S, Hq] float32, zero on dead rows.

    With it, `ds = p * (dp - delta)` is the gradient of the logits through both o and lse.
    Bytes bound: reads o and grad_o once.

    Args:
        lse, grad_lse, delta: float32 [B, S, Hq], contiguous. rows: B * S * Hq.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    head = row % heads
    token = row // heads % tokens
    batch = row // heads // tokens
    o_rows = o + batch * stride_ob + token * stride_ot + head * stride_oh
    g_rows = grad_o + batch * stride_gb + token * stride_gt + head * stride_gh
    o0, o1 = load_split(o_rows, valid, DV, V0, V1, True)
    g0, g1 = load_split(g_rows, valid, DV, V0, V1, True)
    result = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)
    if V1 > 0:
        result += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        result -= tl.load(grad_lse + row, mask=valid, other=0.0)
    dead = tl.load(lse + row, mask=valid, other=0.0) == float("-inf")
    tl.store(delta + row, tl.where(dead, 0.0, result), mask=valid)
