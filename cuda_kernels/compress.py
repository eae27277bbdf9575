"""Compression of keys or values: one vector per block of BLOCK tokens, every STRIDE tokens.

Methods, with x_r the r-th token of a block: `mean` of x_r + pe_r; `linear`, the flattened x + pe
times w [BLOCK * D, N], plus a bias; `mlp`, two linear maps with a gelu between.

Design. `mean` is bound by bytes: it reads x once (blocks overlap, the second read hits L1) and
writes 1 / STRIDE of it. `linear` is a matrix product whose left operand is never built: its rows
are windows of x at stride STRIDE, addressed in place; 2 * BLOCK / STRIDE * D * N FLOP per token, 39
GFLOP at 64K tokens, 4 heads of 192, so 0.1 ms. pe enters as a bias, pe @ w, which the same kernel
computes with pe as a sequence of one block. `mlp` is the linear kernel twice, the second time with
blocks of one token: the hidden layer is 1 / STRIDE of x and fits L2, fusing would save nothing.

Backward. Token u * STRIDE + c is row c + k * STRIDE of block u - k: for fixed c the gradient of x
is a matrix product over (k, N) with rows u, so nothing overlaps and no atomics are needed. The
gradient of w has one program per (token of the block, tile of w), which sums over all blocks.
"""

import triton
import triton.language as tl

from .common import dot, packed_tile
from .compressed_attention import count_compressed as count_compressed
from .compressed_attention import reduce_splits as reduce_splits

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_HALF))


@triton.jit
def _gelu_slope(x):
    density = tl.exp(-0.5 * x * x) * _INVERSE_SQRT_2PI
    return 0.5 * (1.0 + tl.math.erf(x * _SQRT_HALF)) + x * density


@triton.jit
def _block_starts(
    block, starts, total, NC, BLOCK: tl.constexpr, STRIDE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """First tokens [M] of compressed blocks [M], and which of them exist.

    Blocks of one token lie back to back in a packed batch, too: their number is their token.
    """
    if PACKED:
        valid = block < tl.load(total)
    else:
        valid = block < NC
    if PACKED and BLOCK > 1:
        start = tl.load(starts + block, mask=valid, other=0).to(tl.int64)
    else:
        start = block.to(tl.int64) * STRIDE
    return start, valid


@triton.jit
def first_tokens(
    cu_k, cu_cmp, starts, num_seqs, STRIDE: tl.constexpr, BLOCK_I: tl.constexpr
):  # fmt: skip
    """The first token of each compressed block of a packed batch: starts. Grid: (tiles,).

    Tiles of BLOCK_I blocks are counted as `packed_tile` counts them. Bound by its launch.

    Args:
        cu_k, cu_cmp: int32 [num_seqs + 1], offsets of tokens and of compressed blocks.
        starts: int32 [Nc]; what lies behind the last block is not written.
    """
    sequence, tile = packed_tile(tl.program_id(0), cu_cmp, num_seqs, 1, BLOCK_I)
    before = tl.load(cu_cmp + sequence)
    block = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    exists = block < tl.load(cu_cmp + sequence + 1) - before
    first = tl.load(cu_k + sequence)
    tl.store(starts + before + block, first + block * STRIDE, mask=exists)


@triton.jit
def _own_blocks(tile, cu_k, cu_cmp, num_seqs, T, NC, TOKENS: tl.constexpr, PACKED: tl.constexpr):
    """Tile inside its sequence; token start, tokens, block start and blocks of that sequence."""
    k_start = 0
    cmp_start = 0
    if PACKED:
        sequence, tile = packed_tile(tile, cu_k, num_seqs, 1, TOKENS)
        k_start = tl.load(cu_k + sequence)
        cmp_start = tl.load(cu_cmp + sequence)
        T = tl.load(cu_k + sequence + 1) - k_start
        NC = tl.load(cu_cmp + sequence + 1) - cmp_start
    return tile, k_start, T, cmp_start, NC


@triton.jit
def mean_forward(
    x, pe, y, starts, total, NC, HKV, stride_xb, stride_xt, stride_xh, stride_ph,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    HAS_PE: tl.constexpr, PACKED: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Means of BLOCK_I blocks of one head. Grid: (Nc / BLOCK_I, Hkv, B).

    Args:
        x: [B, T, Hkv, D], last dim contiguous; pe: [Hkv or 1, BLOCK, D]; y: [B, Nc, Hkv, D].
        starts: int32 [Nc] first token of each block, total: int32 [1] blocks there are; read when
            PACKED. Rows from total on become 0.
    """
    block = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start, valid = _block_starts(block, starts, total, NC, BLOCK, STRIDE, PACKED)
    column = tl.arange(0, WIDTH)
    mask = valid[:, None] & (column < D)[None, :]
    first = x + batch * stride_xb + head * stride_xh
    rows = first + start[:, None] * stride_xt + column[None, :]
    acc = tl.zeros([BLOCK_I, WIDTH], tl.float32)
    for r in range(BLOCK):
        row = rows + tl.cast(r, tl.int64) * stride_xt
        acc += tl.load(row, mask=mask, other=0.0).to(tl.float32)
        if HAS_PE:
            pe_row = pe + head * stride_ph + r * D + column
            acc += tl.load(pe_row, mask=column < D, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(valid[:, None], acc / BLOCK, 0.0)
    target = ((batch * NC + block) * HKV + head)[:, None] * D + column[None, :]
    tl.store(y + target, acc.to(y.dtype.element_ty), mask=(block < NC)[:, None] & (column < D))


@triton.jit
def mean_backward(
    grad_y, dx, cu_k, cu_cmp, num_seqs, T, NC, HKV,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_T tokens: the mean gradient of the blocks that cover each.

    Grid: (token tiles, Hkv, B). grad_y: [B, Nc, Hkv, D] and dx: [B, T, Hkv, D], contiguous.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    keys = T
    blocks = NC
    tile, k_start, T, cmp_start, NC = _own_blocks(
        tl.program_id(0), cu_k, cu_cmp, num_seqs, T, NC, BLOCK_T, PACKED
    )
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, WIDTH)
    acc = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    for k in tl.static_range(BLOCK // STRIDE):
        block = token // STRIDE - k
        covers = (block >= 0) & (block < NC)
        row = (batch * blocks + cmp_start + block) * HKV + head
        acc += tl.load(
            grad_y + row[:, None] * D + column[None, :],
            mask=covers[:, None] & (column < D)[None, :],
            other=0.0,
        ).to(tl.float32)
    target = ((batch * keys + k_start + token) * HKV + head)[:, None] * D + column[None, :]
    mask = (token < T)[:, None] & (column < D)[None, :]
    tl.store(dx + target, (acc / BLOCK).to(dx.dtype.element_ty), mask=mask)


@triton.jit
def linear_forward(
    x, w, bias, y, starts, total, NC, HKV, stride_xb, stride_xt, stride_xh, stride_wh, stride_bh,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`y[i] = flatten(x[start_i : start_i + BLOCK]) @ w + bias`, then gelu if asked.

    Grid: (Nc tiles, Hkv * B, N tiles).

    Args:
        x: [B, T, Hkv, D], last dim contiguous. w: [BLOCK * D, N] contiguous at stride_wh per head
            (0: shared); bias: [N] at stride_bh per head. y: [B, Nc, Hkv, N] contiguous.
        starts, total: as in `mean_forward`.
    """
    block = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    head = (tl.program_id(1) % HKV).to(tl.int64)
    batch = (tl.program_id(1) // HKV).to(tl.int64)
    out = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, valid = _block_starts(block, starts, total, NC, BLOCK, STRIDE, PACKED)
    inner = tl.arange(0, BLOCK_K)
    x_rows = x + batch * stride_xb + head * stride_xh + start[:, None] * stride_xt + inner[None, :]
    w_rows = w + head * stride_wh + inner[:, None] * N + out[None, :]
    STEPS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
    for step in range(BLOCK * STEPS):
        token = tl.cast(step // STEPS, tl.int64)
        column = (step % STEPS) * BLOCK_K
        inside = inner < D - column
        x_mask = valid[:, None] & inside[None, :] if D % BLOCK_K else valid[:, None]
        x_tile = tl.load(x_rows + (token * stride_xt + column), mask=x_mask, other=0.0)
        w_tile = tl.load(
            w_rows + (token * D + column) * N,
            mask=inside[:, None] & (out < N)[None, :], other=0.0,
        )  # fmt: skip
        acc = dot(x_tile, w_tile, acc, UPCAST, PRECISION)
    if HAS_BIAS:
        row = tl.load(bias + head * stride_bh + out, mask=out < N, other=0.0)
        acc += row.to(tl.float32)[None, :]
    if GELU:
        acc = _gelu(acc)
    acc = tl.where(valid[:, None], acc, 0.0)
    target = ((batch * NC + block) * HKV + head)[:, None] * N + out[None, :]
    tl.store(
        y + target, acc.to(y.dtype.element_ty), mask=(block < NC)[:, None] & (out < N)[None, :]
    )


@triton.jit
def linear_backward_x(
    grad_y, w, hidden, dx, cu_k, cu_cmp, num_seqs, T, NC, HKV, stride_wh,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    GELU: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens u * STRIDE + c, for BLOCK_U values of u and one c.

    Grid: (u tiles, STRIDE * D tiles, Hkv * B).

    Args:
        grad_y: [B, Nc, Hkv, N], dx: [B, T, Hkv, D], w as in `linear_forward`, all contiguous.
        hidden: float32 [B, T, Hkv, D] x before its gelu; dx becomes its gradient. Read when GELU.
    """
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    phase = tl.program_id(1) // D_TILES
    column = (tl.program_id(1) % D_TILES) * BLOCK_D + tl.arange(0, BLOCK_D)
    head = (tl.program_id(2) % HKV).to(tl.int64)
    batch = (tl.program_id(2) // HKV).to(tl.int64)
    keys = T
    blocks = NC
    tile, k_start, T, cmp_start, NC = _own_blocks(
        tl.program_id(0), cu_k, cu_cmp, num_seqs, T, NC, BLOCK_U * STRIDE, PACKED
    )
    unit = tile * BLOCK_U + tl.arange(0, BLOCK_U)
    inner = tl.arange(0, BLOCK_K)
    w_rows = w + head * stride_wh + (phase * D + column).to(tl.int64)[:, None] * N + inner[None, :]
    y_head = grad_y + ((batch * blocks + cmp_start) * HKV + head) * N
    acc = tl.zeros([BLOCK_U, BLOCK_D], tl.float32)
    steps = tl.cdiv(N, BLOCK_K)
    for step in range(BLOCK // STRIDE * steps):
        k = step // steps
        first = (step % steps) * BLOCK_K
        block = unit - k
        covers = (block >= 0) & (block < NC)
        y_rows = y_head + block.to(tl.int64)[:, None] * (HKV * N) + inner[None, :] + first
        inside = inner < N - first
        y_tile = tl.load(y_rows, mask=covers[:, None] & inside[None, :], other=0.0)
        w_tile = tl.load(
            w_rows + tl.cast(k * STRIDE * D, tl.int64) * N + first,
            mask=(column < D)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        acc = dot(y_tile, tl.trans(w_tile), acc, UPCAST, PRECISION)
    token = unit * STRIDE + phase
    target = ((batch * keys + k_start + token) * HKV + head)[:, None] * D + column[None, :]
    mask = (token < T)[:, None] & (column < D)[None, :]
    if GELU:
        acc *= _gelu_slope(tl.load(hidden + target, mask=mask, other=0.0).to(tl.float32))
    tl.store(dx + target, acc.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def linear_backward_w(
    x, pe, grad_y, y_sum, dw, starts, total, B, NC, HKV, HEADS,
    stride_xb, stride_xt, stride_xh, stride_ph,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    HAS_PE: tl.constexpr, GELU: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of w: `sum over batch, heads that share it, blocks of x[r]^T @ grad_y`.

    Grid: (BLOCK * D tiles, N tiles, Hkv / HEADS), with HEADS heads per weight (1 or Hkv).

    Args:
        x, starts, total: as in `linear_forward`; with GELU, x is float32 before its gelu.
        grad_y: [B, Nc, Hkv, N]; dw: [Hkv / HEADS, BLOCK * D, N], contiguous.
        y_sum: float32 [Hkv, N], grad_y summed over batch and blocks; what pe's share needs.
    """
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    token = (tl.program_id(0) // D_TILES).to(tl.int64)
    column = (tl.program_id(0) % D_TILES) * BLOCK_D + tl.arange(0, BLOCK_D)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = tl.program_id(2).to(tl.int64)
    acc = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for pair in range(B * HEADS):
        head = weight * HEADS + pair % HEADS
        batch = tl.cast(pair // HEADS, tl.int64)
        x_head = x + batch * stride_xb + head * stride_xh + token * stride_xt + column[None, :]
        y_head = grad_y + (batch * NC * HKV + head) * N + out[None, :]
        for first in range(0, NC, BLOCK_I):
            block = first + tl.arange(0, BLOCK_I)
            start, valid = _block_starts(block, starts, total, NC, BLOCK, STRIDE, PACKED)
            x_tile = tl.load(
                x_head + start[:, None] * stride_xt,
                mask=valid[:, None] & (column < D)[None, :], other=0.0,
            )  # fmt: skip
            y_tile = tl.load(
                y_head + block.to(tl.int64)[:, None] * (HKV * N),
                mask=valid[:, None] & (out < N)[None, :], other=0.0,
            )  # fmt: skip
            if GELU:
                x_tile = _gelu(x_tile.to(tl.float32)).to(y_tile.dtype)
            acc = dot(tl.trans(x_tile), y_tile, acc, UPCAST, PRECISION)
    if HAS_PE:
        for h in range(HEADS):
            head = weight * HEADS + h
            pe_row = pe + head * stride_ph + token * D + column
            share = tl.load(pe_row, mask=column < D, other=0.0).to(tl.float32)
            acc += (
                share[:, None] * tl.load(y_sum + head * N + out, mask=out < N, other=0.0)[None, :]
            )
    row = weight * BLOCK * D + token * D + column
    mask = (column < D)[:, None] & (out < N)[None, :]
    tl.store(dw + row[:, None] * N + out[None, :], acc.to(dw.dtype.element_ty), mask=mask)


@triton.jit
def column_sum(
    grad_y, partial, total, B, NC, HKV,
    N: tl.constexpr, SPLITS: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of grad_y [B, Nc, Hkv, N] over batch and blocks: float32 [SPLITS, Hkv, N].

    Grid: (SPLITS, Hkv, N tiles). Bytes bound; `reduce_splits` adds the partial sums in order.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    out = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = NC
    if PACKED:
        limit = tl.load(total)
    rows = tl.cast(B, tl.int64) * NC
    share = tl.cdiv(rows, SPLITS)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, share, BLOCK_I):
        local = first + tl.arange(0, BLOCK_I)
        row = split * share + local
        valid = (local < share) & (row < rows) & (row % NC < limit)
        values = tl.load(
            grad_y + (row * HKV + head)[:, None] * N + out[None, :],
            mask=valid[:, None] & (out < N)[None, :], other=0.0,
        )  # fmt: skip
        acc += tl.sum(values.to(tl.float32), 0)
    target = (tl.cast(split, tl.int64) * HKV + head) * N + out
    tl.store(partial + target, acc, mask=out < N)


@triton.jit
def encoding_gradient(
    w, y_sum, d_pe, HEADS, stride_wh, N: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`d_pe[row] = sum over the HEADS heads that share pe, and n, of w[row, n] * y_sum[n]`.

    Grid: (ROWS / BLOCK_R, Hkv / HEADS), ROWS = BLOCK * D. w: [ROWS, N] at stride_wh per head;
    y_sum: float32 [Hkv, N]; d_pe: [Hkv / HEADS, ROWS].
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R], tl.float32)
    for h in range(HEADS):
        head = tl.program_id(1).to(tl.int64) * HEADS + h
        for first in range(0, N, BLOCK_N):
            out = first + tl.arange(0, BLOCK_N)
            tile = tl.load(
                w + head * stride_wh + row.to(tl.int64)[:, None] * N + out[None, :],
                mask=(row < ROWS)[:, None] & (out < N)[None, :], other=0.0,
            )  # fmt: skip
            sums = tl.load(y_sum + head * N + out, mask=out < N, other=0.0)
            acc += tl.sum(tile.to(tl.float32) * sums[None, :], 1)
    target = tl.program_id(1).to(tl.int64) * ROWS + row
    tl.store(d_pe + target, acc.to(d_pe.dtype.element_ty), mask=row < ROWS)
