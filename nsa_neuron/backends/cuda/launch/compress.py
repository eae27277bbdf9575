"""Launches `cuda_kernels/compress.py`: mean, linear and mlp compression, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.blocks import (
    compressed_offsets,
    count_blocks,
    first_tokens,
)
from nsa_neuron.backends.cuda.launch.common import addressable, count_tiles, next_power_of_two

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.common import Plan

Grads = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Blocks:
    """Where the compressed blocks of a batch lie.

    Attributes:
        block, stride: tokens. count: rows of the compressed tensor.
        starts: int32 [count] first token of each block (read where blocks have several tokens),
        total: int32 [1] blocks there are, cu_k, cu_cmp: int32 [num_seqs + 1]; of a packed batch
            (num_seqs > 0), else any tensor.
    """

    block: int
    stride: int
    count: int
    starts: Tensor
    total: Tensor
    cu_k: Tensor
    cu_cmp: Tensor
    num_seqs: int

    @staticmethod
    def of(
        kernels: Any, plan: Plan, x: Tensor, block: int, stride: int, cu_k: Tensor | None
    ) -> _Blocks:
        count = count_blocks(x.shape[1], block, stride)
        if cu_k is None:
            return _Blocks(block, stride, count, x, x, x, x, 0)
        cu_k = cu_k.contiguous()
        cu_cmp = compressed_offsets(kernels, plan, cu_k, block, stride)
        starts = first_tokens(kernels, plan, cu_k, cu_cmp, count, stride)
        return _Blocks(block, stride, count, starts, cu_cmp[-1:], cu_k, cu_cmp, cu_k.shape[0] - 1)

    def rows(self) -> _Blocks:
        """The compressed tensor's own rows as blocks of one token (the mlp's hidden layer)."""
        cu = self.cu_cmp
        return _Blocks(1, 1, self.count, self.starts, self.total, cu, cu, self.num_seqs)


def forward(
    kernels: Any,
    plan: Plan,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    pe: Tensor | None,
    *,
    method: str,
    block: int,
    stride: int,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Compresses x [B, T, Hkv, D] to [B, Nc, Hkv, N], N = D for `mean`; rows of no block are 0.

    Args:
        kernels: the module `cuda_kernels.compress`, compiled or interpreted.
        plan: constants of its kernels.
        w1: [block * D, H1] or per head [Hkv, ...]; b1: [H1] or [Hkv, H1]; w2: [H1, N]; b2: [N].
        pe: [block, D] or [Hkv, block, D]. method: `"mean"`, `"linear"` or `"mlp"`.
    """
    x = addressable(x)
    blocks = _Blocks.of(kernels, plan, x, block, stride, cu_seqlens_k)
    if method == "mean":
        return _mean_forward(kernels, plan, x, pe, blocks)
    assert w1 is not None
    bias = _encoding_bias(kernels, plan, x.shape[2], w1, b1, pe, blocks)
    if method == "linear":
        return _linear(kernels, plan, x, w1, bias, blocks)
    assert w2 is not None
    hidden = _linear(kernels, plan, x, w1, bias, blocks, gelu=True)
    return _linear(kernels, plan, hidden, w2, b2, blocks.rows())


def backward(kernels: Any, plan: Plan, grad_y: Tensor, x: Tensor, *args: Any, **named: Any) -> Any:
    """Gradients (dx, dw1, db1, dw2, db2, dpe) of `forward`, empty where the input is None."""
    grads = gradients(kernels, plan, grad_y, x, *args, **named)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def gradients(
    kernels: Any,
    plan: Plan,
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    pe: Tensor | None,
    *,
    method: str,
    block: int,
    stride: int,
    cu_seqlens_k: Tensor | None = None,
) -> Grads:
    """Gradients (dx, dw1, db1, dw2, db2, dpe) of `forward`, None where the input is None."""
    x, grad_y = addressable(x), grad_y.contiguous()
    blocks = _Blocks.of(kernels, plan, x, block, stride, cu_seqlens_k)
    if method == "mean":
        dx = _mean_backward(kernels, plan, grad_y, x, blocks)
        if pe is None:
            return dx, None, None, None, None, None
        sums = _column_sum(kernels, plan, grad_y, blocks) / block
        return dx, None, None, None, None, _like(sums[:, None].expand(-1, block, -1), pe, 2)
    assert w1 is not None
    if method == "linear":
        return _input_layer_backward(kernels, plan, grad_y, x, w1, b1, pe, blocks, None, None)
    assert w2 is not None
    rows = blocks.rows()
    bias = _encoding_bias(kernels, plan, x.shape[2], w1, b1, pe, blocks)
    hidden = _linear(kernels, plan, x, w1, bias, blocks, dtype=torch.float32)
    d_b2 = None
    if b2 is not None:
        d_b2 = _like(_column_sum(kernels, plan, grad_y, rows), b2, 1)
    d_w2 = _weight_gradient(kernels, plan, hidden, None, grad_y, None, w2, rows, gelu=True)
    d_hidden = _input_gradient(kernels, plan, grad_y, w2, x.dtype, hidden, rows)
    return _input_layer_backward(kernels, plan, d_hidden, x, w1, b1, pe, blocks, d_w2, d_b2)


def _input_layer_backward(
    kernels: Any,
    plan: Plan,
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    pe: Tensor | None,
    blocks: _Blocks,
    d_w2: Tensor | None,
    d_b2: Tensor | None,
) -> Grads:
    """All gradients, given that of the linear layer that reads x, and those of a second one."""
    d_b1 = d_pe = sums = None
    if b1 is not None or pe is not None:
        sums = _column_sum(kernels, plan, grad_y, blocks)
    if b1 is not None:
        assert sums is not None
        d_b1 = _like(sums, b1, 1)
    if pe is not None:
        assert sums is not None
        d_pe = _encoding_gradient(kernels, plan, w1, sums, pe)
    d_w1 = _weight_gradient(kernels, plan, x, pe, grad_y, sums, w1, blocks)
    dx = _input_gradient(kernels, plan, grad_y, w1, x.dtype, None, blocks, tokens=x.shape[1])
    return dx, d_w1, d_b1, d_w2, d_b2, d_pe


def _mean_forward(
    kernels: Any, plan: Plan, x: Tensor, pe: Tensor | None, blocks: _Blocks
) -> Tensor:
    batch, _, heads, dim = x.shape
    y = torch.empty(batch, blocks.count, heads, dim, dtype=x.dtype, device=x.device)
    if blocks.count == 0:
        return y
    constants = dict(plan["mean_forward"])
    pe_stride = pe.shape[-2] * pe.shape[-1] if pe is not None and pe.ndim == 3 else 0
    kernels.mean_forward[(-(-blocks.count // constants["BLOCK_I"]), heads, batch)](
        x, x if pe is None else pe.contiguous(), y, blocks.starts, blocks.total, blocks.count,
        heads, *x.stride()[:3], pe_stride, D=dim, WIDTH=next_power_of_two(dim),
        BLOCK=blocks.block, STRIDE=blocks.stride, HAS_PE=pe is not None,
        PACKED=blocks.num_seqs > 0, **constants,
    )  # fmt: skip
    return y


def _mean_backward(kernels: Any, plan: Plan, grad_y: Tensor, x: Tensor, blocks: _Blocks) -> Tensor:
    batch, tokens, heads, dim = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    constants = dict(plan["mean_backward"])
    tiles = count_tiles(tokens, 1, constants["BLOCK_T"], blocks.num_seqs)
    kernels.mean_backward[(tiles, heads, batch)](
        grad_y, dx, blocks.cu_k, blocks.cu_cmp, blocks.num_seqs, tokens, blocks.count, heads,
        D=dim, WIDTH=next_power_of_two(dim), BLOCK=blocks.block, STRIDE=blocks.stride,
        PACKED=blocks.num_seqs > 0, **constants,
    )  # fmt: skip
    return dx


def _encoding_bias(
    kernels: Any,
    plan: Plan,
    heads: int,
    w: Tensor,
    bias: Tensor | None,
    pe: Tensor | None,
    blocks: _Blocks,
) -> Tensor | None:
    """What pe and the bias add to every row: float32 [Hkv, N], or the bias itself without pe."""
    if pe is None:
        return bias
    sequence = pe.contiguous().view(-1, *pe.shape[-2:]).transpose(0, 1)[None]
    sequence = sequence.expand(1, pe.shape[-2], heads, pe.shape[-1])
    one = _Blocks(blocks.block, blocks.block, 1, pe, pe, pe, pe, 0)
    return _linear(kernels, plan, sequence, w, bias, one, dtype=torch.float32)[0, 0]


def _linear(
    kernels: Any,
    plan: Plan,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    blocks: _Blocks,
    *,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear_forward`: [B, Nc, Hkv, N] in `dtype` (default x's)."""
    batch, _, heads, dim = x.shape
    width = w.shape[-1]
    y = torch.empty(batch, blocks.count, heads, width, dtype=dtype or x.dtype, device=x.device)
    if blocks.count == 0:
        return y
    constants = _inner(plan, "linear_forward", dim)
    kernels.linear_forward[_tiles(blocks.count, constants["BLOCK_I"]), heads * batch,
                           _tiles(width, constants["BLOCK_N"])](
        x, w.contiguous(), w if bias is None else bias.contiguous(), y, blocks.starts,
        blocks.total, blocks.count, heads, *x.stride()[:3], _head_stride(w, 3),
        0 if bias is None else _head_stride(bias, 2), N=width, D=dim, BLOCK=blocks.block,
        STRIDE=blocks.stride, HAS_BIAS=bias is not None, GELU=gelu, PACKED=blocks.num_seqs > 0,
        **constants,
    )  # fmt: skip
    return y


def _input_gradient(
    kernels: Any,
    plan: Plan,
    grad_y: Tensor,
    w: Tensor,
    dtype: torch.dtype,
    hidden: Tensor | None,
    blocks: _Blocks,
    tokens: int | None = None,
) -> Tensor:
    """`linear_backward_x`: [B, T, Hkv, D]; T defaults to the rows of grad_y."""
    batch, _, heads, width = grad_y.shape
    dim = w.shape[-2] // blocks.block
    tokens = blocks.count if tokens is None else tokens
    dx = torch.empty(batch, tokens, heads, dim, dtype=dtype, device=grad_y.device)
    if tokens == 0:
        return dx
    constants = _inner(plan, "linear_backward_x", width)
    num_seqs = blocks.num_seqs if hidden is None else 0
    tiles = count_tiles(tokens, 1, constants["BLOCK_U"] * blocks.stride, num_seqs)
    columns = blocks.stride * _tiles(dim, constants["BLOCK_D"])
    kernels.linear_backward_x[(tiles, columns, heads * batch)](
        grad_y, w.contiguous(), grad_y if hidden is None else hidden, dx, blocks.cu_k,
        blocks.cu_cmp, num_seqs, tokens, blocks.count, heads, _head_stride(w, 3), N=width, D=dim,
        BLOCK=blocks.block, STRIDE=blocks.stride, GELU=hidden is not None, PACKED=num_seqs > 0,
        **constants,
    )  # fmt: skip
    return dx


def _weight_gradient(
    kernels: Any,
    plan: Plan,
    x: Tensor,
    pe: Tensor | None,
    grad_y: Tensor,
    sums: Tensor | None,
    w: Tensor,
    blocks: _Blocks,
    *,
    gelu: bool = False,
) -> Tensor:
    """`linear_backward_w`, in w's shape and dtype."""
    batch, _, heads, dim = x.shape
    width = w.shape[-1]
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    shared_by = heads if w.ndim == 2 else 1
    constants = dict(plan["linear_backward_w"])
    pe_stride = pe.shape[-2] * pe.shape[-1] if pe is not None and pe.ndim == 3 else 0
    rows = blocks.block * _tiles(dim, constants["BLOCK_D"])
    kernels.linear_backward_w[rows, _tiles(width, constants["BLOCK_N"]), heads // shared_by](
        x, x if pe is None else pe.contiguous(), grad_y, grad_y if sums is None else sums, dw,
        blocks.starts, blocks.total, batch, blocks.count, heads, shared_by,
        *x.stride()[:3], pe_stride, N=width, D=dim, BLOCK=blocks.block, STRIDE=blocks.stride,
        HAS_PE=pe is not None, GELU=gelu, PACKED=blocks.num_seqs > 0, **constants,
    )  # fmt: skip
    return dw


def _column_sum(kernels: Any, plan: Plan, grad_y: Tensor, blocks: _Blocks) -> Tensor:
    """grad_y [B, Nc, Hkv, N] summed over batch and blocks: float32 [Hkv, N]."""
    batch, _, heads, width = grad_y.shape
    constants = dict(plan["column_sum"])
    splits = constants["SPLITS"]
    partial = torch.empty(splits, heads, width, dtype=torch.float32, device=grad_y.device)
    kernels.column_sum[(splits, heads, _tiles(width, constants["BLOCK_N"]))](
        grad_y, partial, blocks.total, batch, blocks.count, heads, N=width,
        PACKED=blocks.num_seqs > 0, **constants,
    )  # fmt: skip
    total = torch.empty(heads, width, dtype=torch.float32, device=grad_y.device)
    constants = dict(plan["reduce_splits"])
    kernels.reduce_splits[(_tiles(total.numel(), constants["BLOCK_E"]),)](
        partial, total, total.numel(), SPLITS=splits, **constants
    )
    return total


def _encoding_gradient(kernels: Any, plan: Plan, w: Tensor, sums: Tensor, pe: Tensor) -> Tensor:
    """`encoding_gradient`, in pe's shape and dtype."""
    heads, width = sums.shape
    shared_by = heads if pe.ndim == 2 else 1
    d_pe = torch.empty(pe.shape, dtype=pe.dtype, device=pe.device)
    constants = dict(plan["encoding_gradient"])
    kernels.encoding_gradient[_tiles(w.shape[-2], constants["BLOCK_R"]), heads // shared_by](
        w.contiguous(), sums, d_pe, shared_by, _head_stride(w, 3), N=width, ROWS=w.shape[-2],
        **constants,
    )  # fmt: skip
    return d_pe


def _like(per_head: Tensor, target: Tensor, shared_rank: int) -> Tensor:
    """A gradient per head [Hkv, ...] in the shape and dtype of a tensor that heads may share."""
    total = per_head.sum(0) if target.ndim == shared_rank else per_head
    return total.to(target.dtype).contiguous()


def _inner(plan: Plan, kernel: str, inner: int) -> dict[str, Any]:
    """The kernel's constants, with a tile of the inner dim no wider than it needs to be."""
    constants = dict(plan[kernel])
    constants["BLOCK_K"] = min(constants["BLOCK_K"], max(16, next_power_of_two(inner)))
    return constants


def _head_stride(x: Tensor, rank: int) -> int:
    """Elements between the heads of a contiguous copy of `x`, 0 where the heads share it."""
    return x[0].numel() if x.ndim == rank else 0


def _tiles(size: int, block: int) -> int:
    return -(-size // block)
