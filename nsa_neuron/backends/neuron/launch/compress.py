"""Launches `nki_kernels/compress`: mean, linear and mlp compression, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_neuron.backends.neuron.launch import finite
from nsa_neuron.backends.neuron.launch.packed import Aligned, block_counts, take

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels


@dataclass(frozen=True)
class _Packed:
    """A packed batch as one sequence whose blocks start at multiples of the stride.

    Attributes:
        tokens: [padded T] unpadded row of each padded token (some row for padding, whose blocks
            nobody takes).
        places: [T] padded row of each token.
        rows, valid: [Nc] padded block of each compressed row, and whether there is one.
        blocks, real: [padded Nc] compressed row of each padded block, and whether it has one.
    """

    tokens: Tensor
    places: Tensor
    rows: Tensor
    valid: Tensor
    blocks: Tensor
    real: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, tokens: int, block: int, stride: int) -> _Packed:
        lengths = cu_seqlens.diff()
        counts = block_counts(lengths, block, stride)
        layout = Aligned.of(lengths, stride, tokens)
        out = Aligned.of(counts, 1, tokens)
        sequence, place = layout.padded_sequence()
        row = layout.starts[sequence] + place.minimum(lengths[sequence] - 1)
        own, at = layout.sequence(tokens)
        blocks = (layout.size - block) // stride + 1
        which, number = out.sequence((tokens - block) // stride + 1)
        inside, first = sequence[::stride][:blocks], place[::stride][:blocks] // stride
        return _Packed(
            tokens=row,
            places=layout.aligned[own] + at,
            rows=layout.aligned[which] // stride + number,
            valid=number < counts[which],
            blocks=out.starts[inside] + first,
            real=first < counts[inside],
        )

    def spread(self, grad_y: Tensor) -> Tensor:
        """grad_y [B, Nc, H, D] as the gradient of the padded blocks."""
        return take(grad_y, self.blocks.clamp(max=grad_y.shape[1] - 1), self.real)

    def windows(self, x: Tensor, block: int, stride: int) -> finite.Spans:
        """Which padded tokens each padded block reads."""
        first = torch.arange(len(self.blocks), device=x.device) * stride
        return finite.Spans.of(first, first + block, x.shape[0], x.shape[2], x.shape[1])

    def gather(self, y: Tensor) -> Tensor:
        """The compressed rows of the padded blocks y; zero behind the last."""
        return take(y, self.rows.clamp(max=y.shape[1] - 1), self.valid)


def forward(
    kernels: Kernels,
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
    """Compresses x [B, T, Hkv, D] to [B, Nc, Hkv, D]; arguments as of the op `compress`."""
    x = x.contiguous()
    batch, tokens, heads, _ = x.shape
    if tokens < block:
        return x.new_zeros(batch, 0, heads, x.shape[-1])
    weights = (w1, b1, w2, b2, pe)
    if cu_seqlens_k is None:
        return _forward(kernels, plan, x, weights, method, block, stride)
    packed = _Packed.of(cu_seqlens_k, tokens, block, stride)
    x = take(x, packed.tokens)
    bad = finite.spoiled(x)
    y = _forward(kernels, plan, finite.cleaned(x, bad), weights, method, block, stride)
    return packed.gather(finite.marked(y, packed.windows(x, block, stride).seeing(bad)))


_Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""w1, b1, w2, b2, pe."""


def _forward(
    kernels: Kernels, plan: Plan, x: Tensor, weights: _Weights, method: str, block: int, stride: int
) -> Tensor:
    """Blocks of one sequence."""
    w1, b1, w2, b2, pe = weights
    if method == "mean":
        y: Tensor
        (y,) = kernels.mean_forward(x, _dense(pe), block=block, stride=stride)
        return y
    y = _layer(kernels, plan, x, w1, b1, pe, block, stride, gelu=method == "mlp")
    return _layer(kernels, plan, y, w2, b2, None, 1, 1) if method == "mlp" else y


def backward(
    kernels: Kernels,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dw1, db1, dw2, db2, dpe), empty where the input is None."""
    given = (w1, b1, w2, b2, pe)
    x, grad_y = x.contiguous(), grad_y.contiguous()
    tokens = x.shape[1]
    if tokens < block:
        dx = x.new_zeros(x.shape)
        rest = [x.new_empty(0) if w is None else w.new_zeros(w.shape) for w in given]
        return dx, rest[0], rest[1], rest[2], rest[3], rest[4]
    if cu_seqlens_k is None:
        dx, grads = _backward(kernels, plan, grad_y, x, given, method, block, stride)
    else:
        packed = _Packed.of(cu_seqlens_k, tokens, block, stride)
        x, grad_y = take(x, packed.tokens), packed.spread(grad_y)
        windows, bad_x, bad_y = packed.windows(x, block, stride), *map(finite.spoiled, (x, grad_y))
        bad = (bad_y | windows.seeing(bad_x)) & packed.real[None, :, None]
        dx, grads = _backward(
            kernels, plan, finite.cleaned(grad_y, bad_y), finite.cleaned(x, bad_x), given, method,
            block, stride,
        )  # fmt: skip
        dx = take(finite.marked(dx, windows.seen(bad)), packed.places)
        # Weights are everybody's.
        grads = {name: g.masked_fill(bad.any(), torch.nan) for name, g in grads.items()}
    names = ("w1", "b1", "w2", "b2", "pe")
    rest = [grads.get(name, x.new_empty(0)) for name in names]
    return dx, rest[0], rest[1], rest[2], rest[3], rest[4]


def _backward(
    kernels: Kernels,
    plan: Plan,
    grad_y: Tensor,
    x: Tensor,
    weights: _Weights,
    method: str,
    block: int,
    stride: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """dx of one sequence, and the gradients of weights by name."""
    w1, b1, w2, b2, pe = weights
    grads: dict[str, Tensor] = {}
    if method == "mean":
        (dx,) = kernels.mean_backward(grad_y, tokens=x.shape[1], block=block, stride=stride)
        if pe is not None:
            (sums,) = kernels.column_sum(grad_y)
            rows = (sums / block)[:, None].expand(-1, block, -1)
            grads["pe"] = _like(rows, pe, 2)
        return dx, grads
    if method == "mlp":
        grad_y = _hidden(kernels, plan, grads, grad_y, x, w1, b1, w2, b2, pe, block, stride)
    return _input_layer(kernels, plan, grads, grad_y, x, w1, b1, pe, block, stride), grads


def _layer(
    kernels: Kernels,
    plan: Plan,
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    pe: Tensor | None,
    block: int,
    stride: int,
    *,
    gelu: bool = False,
    wide: bool = False,
) -> Tensor:
    assert w is not None
    (y,) = kernels.linear_forward(
        x, _dense(w), _dense(bias), _dense(pe), block=block, stride=stride, gelu=gelu, wide=wide,
        **plan["linear_forward"],
    )  # fmt: skip
    return y


def _hidden(
    kernels: Kernels,
    plan: Plan,
    grads: dict[str, Tensor],
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    pe: Tensor | None,
    block: int,
    stride: int,
) -> Tensor:
    """The gradient of the mlp's hidden layer; adds those of w2 and b2 to `grads`."""
    assert w2 is not None
    hidden = _layer(kernels, plan, x, w1, b1, pe, block, stride, wide=True)
    acts, d_hidden = kernels.hidden_backward(
        grad_y, w2.transpose(-1, -2).contiguous(), hidden, **plan["linear_forward"]
    )
    (sums,) = kernels.column_sum(grad_y)
    (grads["w2"],) = kernels.weight_gradient(
        acts, grad_y, None, None, per_head=w2.dim() == 3, block=1, stride=1
    )
    if b2 is not None:
        grads["b2"] = _like(sums, b2, 1)
    return d_hidden


def _input_layer(
    kernels: Kernels,
    plan: Plan,
    grads: dict[str, Tensor],
    grad_y: Tensor,
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    pe: Tensor | None,
    block: int,
    stride: int,
) -> Tensor:
    """dx of the layer that reads x; adds the gradients of its weights to `grads`."""
    assert w is not None
    turned = w.transpose(-1, -2).contiguous()
    sums = None
    if bias is not None or pe is not None:
        (sums,) = kernels.column_sum(grad_y)
    if bias is not None:
        assert sums is not None
        grads["b1"] = _like(sums, bias, 1)
    if pe is not None:
        (rows,) = kernels.encoding_gradient(turned, sums)
        grads["pe"] = _like(rows.view(rows.shape[0], block, -1), pe, 2)
    (grads["w1"],) = kernels.weight_gradient(
        x, grad_y, _dense(pe), None if pe is None else sums, per_head=w.dim() == 3, block=block,
        stride=stride,
    )  # fmt: skip
    (dx,) = kernels.input_gradient(
        grad_y, turned, tokens=x.shape[1], block=block, stride=stride, **plan["input_gradient"]
    )
    return dx


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _like(per_head: Tensor, target: Tensor, shared_rank: int) -> Tensor:
    """A gradient per head [Hkv, ...] in the shape and dtype of a tensor that heads may share."""
    total = per_head.sum(0) if target.dim() == shared_rank else per_head
    return total.to(target.dtype).contiguous()
