"""Gated sum of the three branches: `o = sum_c gates[c] * o_c`, its gradient, and a plain sum.

Bound by bytes: forward reads three tensors [rows, DV] and writes one; backward reads four and
writes three, all in one pass with the gates' gradients reduced in registers. 64K tokens with 64
heads of 128: 4.3 GB forward, 7.5 GB backward in bfloat16, about 1.0 and 1.75 ms on an H200.

Inside `nsa_attention`'s backward the same pass writes what each branch's backward needs first, its
`delta = sum(o_c * grad_o_c)`: both factors are in registers, where three kernels of their own would
read 12.9 GB. `add` sums the branches' gradients of q: 6.4 GB in 192 columns, 1.5 ms, where torch's
float32 casts move 38.6 GB.
"""

import triton
import triton.language as tl

from .common import narrow


@triton.jit
def _tile(rows, DV: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row numbers, element offsets [BLOCK_M, WIDTH] and masks of this program's rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, WIDTH)
    valid = row < rows
    mask = valid[:, None] & (column < DV)[None, :]
    return row, row[:, None] * DV + column[None, :], valid, mask


@triton.jit
def forward(
    o_cmp, o_slc, o_win, gates, o, rows,
    DV: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: (rows / BLOCK_M,). All contiguous: o_* and o [rows, DV], gates [rows, 3]."""
    row, element, valid, mask = _tile(rows, DV, WIDTH, BLOCK_M)
    total = tl.load(gates + row * 3, mask=valid, other=0.0).to(tl.float32)[:, None] * tl.load(
        o_cmp + element, mask=mask, other=0.0
    ).to(tl.float32)
    total += tl.load(gates + row * 3 + 1, mask=valid, other=0.0).to(tl.float32)[:, None] * tl.load(
        o_slc + element, mask=mask, other=0.0
    ).to(tl.float32)
    total += tl.load(gates + row * 3 + 2, mask=valid, other=0.0).to(tl.float32)[:, None] * tl.load(
        o_win + element, mask=mask, other=0.0
    ).to(tl.float32)
    tl.store(o + element, total.to(o.dtype.element_ty), mask=mask)


@triton.jit
def _branch(
    grad, branch, gate, d_branch, d_gate, lse, delta, row, element, valid, mask,
    DELTA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of one branch and of its gate; where DELTA, the branch's delta."""
    value = tl.load(branch + element, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(gate, mask=valid, other=0.0).to(tl.float32)
    d_value = narrow(grad * weight[:, None], d_branch.dtype.element_ty, UPCAST)
    tl.store(d_branch + element, d_value, mask=mask)
    tl.store(d_gate, tl.sum(grad * value, 1).to(d_gate.dtype.element_ty), mask=valid)
    if DELTA:
        # Of the rounded gradient, since that is what the branch's backward multiplies.
        total = tl.sum(d_value.to(tl.float32) * value, 1)
        dead = tl.load(lse + row, mask=valid, other=0.0) == float("-inf")
        tl.store(delta + row, tl.where(dead, 0.0, total), mask=valid)


@triton.jit
def backward(
    grad_o, o_cmp, o_slc, o_win, gates, d_cmp, d_slc, d_win, d_gates,
    lse_cmp, lse_slc, lse_win, delta_cmp, delta_slc, delta_win, rows,
    DV: tl.constexpr, WIDTH: tl.constexpr, DELTA: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid and layout as in `forward`; d_* like the tensors they are gradients of.

    Args:
        lse_*: float32 [rows], read where DELTA: rows that saw nothing have delta 0.
        delta_*: float32 [rows], written where DELTA, see `common.backward_delta`.
    """
    row, element, valid, mask = _tile(rows, DV, WIDTH, BLOCK_M)
    grad = tl.load(grad_o + element, mask=mask, other=0.0).to(tl.float32)
    gate = gates + row * 3
    d_gate = d_gates + row * 3
    _branch(
        grad, o_cmp, gate, d_cmp, d_gate, lse_cmp, delta_cmp, row, element, valid, mask,
        DELTA, UPCAST,
    )  # fmt: skip
    _branch(
        grad, o_slc, gate + 1, d_slc, d_gate + 1, lse_slc, delta_slc, row, element, valid, mask,
        DELTA, UPCAST,
    )  # fmt: skip
    _branch(
        grad, o_win, gate + 2, d_win, d_gate + 2, lse_win, delta_win, row, element, valid, mask,
        DELTA, UPCAST,
    )  # fmt: skip


@triton.jit
def add(a, b, c, total, elements, UPCAST: tl.constexpr, BLOCK_E: tl.constexpr):
    """`total = a + b + c` in float32, from left to right. Grid: (elements / BLOCK_E,)."""
    element = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    valid = element < elements
    x = tl.load(a + element, mask=valid, other=0.0).to(tl.float32)
    x += tl.load(b + element, mask=valid, other=0.0).to(tl.float32)
    x += tl.load(c + element, mask=valid, other=0.0).to(tl.float32)
    tl.store(total + element, narrow(x, total.dtype.element_ty, UPCAST), mask=valid)
