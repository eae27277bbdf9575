"""Compression without unfolding: every token is read once, though blocks overlap.

A block is `ratio = l / d` strides. Projecting the flattened blocks is projecting every stride with
`ratio` parts of the weights, one product, and adding the results shifted against each other; a mean
is a shifted sum of strides' sums. The reference copies every token `ratio` times instead. Backward
runs the same way: the shifted gradients side by side, one product for the weights, one for x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.ops import common
from nsa_neuron.ops.compress import gelu_slope
from nsa_neuron.ops.softmax import work_dtype


@dataclass(frozen=True)
class Weights:
    """A call's weights in the work dtype; `wide` is w1 as one product with a stride needs it.

    Attributes:
        w1: `[l*D, F]` or `[Hkv, l*D, F]`; `wide` `[(Hkv,) d*D, ratio*F]`.
        b1, w2, b2, pe: as given to `compress`.
    """

    w1: Tensor | None
    wide: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    pe: Tensor | None

    @classmethod
    def of(cls, ratio: int, work: torch.dtype, *given: Tensor | None) -> Weights:
        w1, b1, w2, b2, pe = (None if w is None else w.to(work) for w in given)
        wide = None
        if w1 is not None:
            wide = w1.unflatten(-2, (ratio, -1)).transpose(-3, -2).flatten(-2)
        return cls(w1, wide, b1, w2, b2, pe)

    def hidden(self, strides: Tensor, ratio: int) -> Tensor:
        """`[B, Hkv, R, d*D]` -> flatten(x + pe) @ w1 + b1 of the blocks, `[B, Hkv, Nc, F]`."""
        assert self.w1 is not None and self.wide is not None
        parts = (strides @ self.wide).unflatten(-1, (ratio, -1))
        count = strides.shape[2] - ratio + 1
        total: Tensor = parts[:, :, :count, 0].clone()
        for a in range(1, ratio):
            total += parts[:, :, a : a + count, a]
        if self.b1 is not None:
            total += self.b1.unsqueeze(-2)
        if self.pe is not None:
            total += self.pe.flatten(-2).unsqueeze(-2) @ self.w1
        return total


def compress(
    x: Tensor,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    pe: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    method: str,
    block: int,
    stride: int,
) -> Tensor:
    """See `nsa_neuron.compress`."""
    b, t, hkv, dim = x.shape
    ratio = block // stride
    y = x.new_zeros(b, max(0, (t - block) // stride + 1), hkv, dim)
    weights = Weights.of(ratio, work_dtype(x), w1, b1, w2, b2, pe)
    for tokens, rows in _runs(t, block, stride, cu_seqlens_k):
        part = x[:, tokens].to(work_dtype(x))
        if method == "mean":
            y[:, rows] = _mean(part, weights.pe, block, stride)
            continue
        out = weights.hidden(_strides(part, stride), ratio)
        if method == "mlp":
            assert weights.w2 is not None and weights.b2 is not None
            out = F.gelu(out) @ weights.w2 + weights.b2.unsqueeze(-2)
        y[:, rows] = out.transpose(1, 2)
    return y


def compress_backward(
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    pe: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    method: str,
    block: int,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `nsa_neuron.ops.compress.compress_backward`."""
    work, ratio = work_dtype(x), block // stride
    given = (w1, b1, w2, b2, pe)
    weights = Weights.of(ratio, work, *given)
    dx = x.new_zeros(x.shape)
    sums = [None if w is None else w.new_zeros(w.shape, dtype=work) for w in given]
    for tokens, rows in _runs(x.shape[1], block, stride, cu_seqlens_k):
        dy = grad_y[:, rows].to(work).transpose(1, 2)
        if method == "mean":
            dx[:, tokens] = _mean_backward(dy, sums, block, stride).to(dx.dtype)
            continue
        strides = _strides(x[:, tokens].to(work), stride)
        if method == "mlp":
            dy = _second_layer_backward(dy, weights, weights.hidden(strides, ratio), sums)
        dstrides = _first_layer_backward(dy, weights, strides, ratio, sums)
        dx[:, tokens] = dstrides.unflatten(-1, (stride, -1)).flatten(2, 3).transpose(1, 2)
    results = (x.new_empty(0) if s is None else s.to(x.dtype) for s in sums)
    first, second, third, fourth, fifth = results
    return dx, first, second, third, fourth, fifth


def _runs(
    total: int, block: int, stride: int, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Of each sequence with a block: the tokens of its blocks, and its rows of y."""
    segs = list(common.segments(total, total, cu_seqlens_k, cu_seqlens_k))
    for seg, rows in zip(segs, common.compressed_slices(segs, block, stride), strict=True):
        count = rows.stop - rows.start
        if count:
            stop = seg.keys.start + (count - 1) * stride + block
            yield slice(seg.keys.start, stop), rows


def _strides(x: Tensor, stride: int) -> Tensor:
    """`[B, T, Hkv, D]` -> `[B, Hkv, T/d, d*D]`."""
    strides: Tensor = x.transpose(1, 2).unflatten(2, (-1, stride))
    return strides.flatten(-2)


def _shifted_sum(parts: Tensor, count: int, ratio: int) -> Tensor:
    """Sums of `ratio` neighbours along axis 1: `[B, R, ...]` -> `[B, count, ...]`."""
    total = parts[:, :count].clone()
    for a in range(1, ratio):
        total += parts[:, a : a + count]
    return total


def _mean(x: Tensor, pe: Tensor | None, block: int, stride: int) -> Tensor:
    ratio = block // stride
    sums = x.unflatten(1, (-1, stride)).sum(2)
    y = _shifted_sum(sums, sums.shape[1] - ratio + 1, ratio).div_(block)
    return y if pe is None else y.add_(pe.mean(-2))


def _mean_backward(dy: Tensor, sums: list[Tensor | None], block: int, stride: int) -> Tensor:
    """Gradient of x `[B, T, Hkv, D]` from dy `[B, Hkv, Nc, D]`; adds that of pe to its sum."""
    ratio, dpe = block // stride, sums[4]
    if dpe is not None:
        heads = dy.sum((0, 2)) / block
        dpe += (heads if dpe.dim() == 3 else heads.sum(0)).unsqueeze(-2)
    padded = F.pad(dy.transpose(1, 2), (0, 0, 0, 0, ratio - 1, ratio - 1))
    each = _shifted_sum(padded, padded.shape[1] - ratio + 1, ratio).div_(block)
    return each.repeat_interleave(stride, 1)


def _second_layer_backward(
    dy: Tensor, weights: Weights, hidden: Tensor, sums: list[Tensor | None]
) -> Tensor:
    """Gradient of the hidden layer, before gelu; adds those of w2 and b2."""
    assert weights.w2 is not None and sums[2] is not None
    _add_weight(sums[2], F.gelu(hidden), dy)
    _add_bias(sums[3], dy)
    return (dy @ weights.w2.transpose(-1, -2)).mul_(gelu_slope(hidden))


def _first_layer_backward(
    dh: Tensor, weights: Weights, strides: Tensor, ratio: int, sums: list[Tensor | None]
) -> Tensor:
    """Gradient of the strides `[B, Hkv, R, d*D]`; adds those of w1, b1 and pe."""
    assert weights.w1 is not None and weights.wide is not None and sums[0] is not None
    count = dh.shape[2]
    shifted = dh.new_zeros(*dh.shape[:2], count + ratio - 1, ratio, dh.shape[3])
    for a in range(ratio):
        shifted[:, :, a : a + count, a] = dh
    shifted = shifted.flatten(-2)
    dwide = torch.zeros_like(weights.wide)
    _add_weight(dwide, strides, shifted)
    sums[0] += dwide.unflatten(-1, (ratio, -1)).transpose(-3, -2).flatten(-3, -2)
    _add_bias(sums[1], dh)
    dpe, each = sums[4], dh.sum((0, 2))
    if dpe is not None and weights.pe is not None:
        # Both are sums over blocks of what one block gives, so the blocks' sum serves them.
        flat = (each.unsqueeze(-2) @ weights.w1.transpose(-1, -2)).squeeze(-2)
        dpe += (flat if dpe.dim() == 3 else flat.sum(0)).view(dpe.shape)
        outer = weights.pe.flatten(-2).unsqueeze(-1) * each.unsqueeze(-2)
        sums[0] += outer if sums[0].dim() == 3 else outer.sum(0)
    return shifted @ weights.wide.transpose(-1, -2)


def _add_weight(total: Tensor, x: Tensor, dy: Tensor) -> None:
    """Adds x^T @ dy, `[B, Hkv, N, E]` and `[B, Hkv, N, F]`, per head or for all heads."""
    if total.dim() == 3:
        total += (x.transpose(-1, -2) @ dy).sum(0)
    else:
        total.addmm_(x.flatten(0, 2).T, dy.flatten(0, 2))


def _add_bias(total: Tensor | None, dy: Tensor) -> None:
    if total is not None:
        total += dy.sum((0, 2)) if total.dim() == 2 else dy.sum((0, 1, 2))
