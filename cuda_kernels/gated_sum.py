"""Gated sum of the three branches: `o = sum_c gates[c] * o_c`, and its gradient.

Bound by bytes: forward reads three tensors [rows, DV] and writes one; backward reads four and
writes three, all in one pass with the gates' gradients reduced in registers. 64K tokens with 64
heads of 128: 4.3 GB forward, 7.5 GB backward in bfloat16, about 1.0 and 1.75 ms on an H200.
"""

import triton
import triton.language as tl


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
def _branch(grad, branch, gate, d_branch, d_gate, element, valid, mask):
    """Gradients of one branch and of its gate."""
    value = tl.load(branch + element, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(gate, mask=valid, other=0.0).to(tl.float32)
    tl.store(d_branch + element, (grad * weight[:, None]).to(d_branch.dtype.element_ty), mask=mask)
    tl.store(d_gate, tl.sum(grad * value, 1).to(d_gate.dtype.element_ty), mask=valid)


@triton.jit
def backward(
    grad_o, o_cmp, o_slc, o_win, gates, d_cmp, d_slc, d_win, d_gates, rows,
    DV: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid and layout as in `forward`; d_* like the tensors they are gradients of."""
    row, element, valid, mask = _tile(rows, DV, WIDTH, BLOCK_M)
    grad = tl.load(grad_o + element, mask=mask, other=0.0).to(tl.float32)
    gate = gates + row * 3
    d_gate = d_gates + row * 3
    _branch(grad, o_cmp, gate, d_cmp, d_gate, element, valid, mask)
    _branch(grad, o_slc, gate + 1, d_slc, d_gate + 1, element, valid, mask)
    _branch(grad, o_win, gate + 2, d_win, d_gate + 2, element, valid, mask)
