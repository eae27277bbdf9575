"""An honest kernel's arithmetic, and its mutants: tiles, running maximum, 16-bit probabilities.

`forward` and `backward` take a visibility mask `[S, T]`, so one implementation serves every op;
keyword switches turn on one mistake each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 16


@dataclass(frozen=True)
class Bugs:
    """Mistakes of a kernel; the default has none."""

    no_max: bool = False  # exp(logits) without subtracting a maximum, in the input's dtype
    coarse_sum: bool = False  # the softmax denominator accumulates in bfloat16
    lse_base_2: bool = False
    lse_of_dead_rows_0: bool = False
    lse_without_max: bool = False
    heads_interleaved: bool = False  # query head h reads kv head h % Hkv, not h // G
    no_delta: bool = False  # backward without rowsum(dO * O)
    dq_unscaled: bool = False
    group_mean: bool = False  # dk, dv averaged over the group's heads
    last_head_only: bool = False  # dk, dv of the group's last head
    grad_lse_ignored: bool = False
    nan_on_dead_rows: bool = False


HONEST = Bugs()


def spread(x: Tensor, hq: int, bugs: Bugs) -> Tensor:
    """Key-like `[B, T, Hkv, D]` -> float32 `[B, Hq, T, D]`."""
    x = x.float().transpose(1, 2)
    group = hq // x.shape[1]
    return x.repeat(1, group, 1, 1) if bugs.heads_interleaved else x.repeat_interleave(group, 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, bugs: Bugs = HONEST
) -> tuple[Tensor, Tensor]:
    """o `[B, S, Hq, Dv]` in q's dtype, lse `[B, S, Hq]` float32; mask `[S, T]`."""
    hq, dtype = q.shape[2], q.dtype
    qh, kh, vh = q.float().transpose(1, 2), spread(k, hq, bugs), spread(v, hq, bugs)
    top = torch.full(qh.shape[:3], -math.inf)
    total, acc = torch.zeros(qh.shape[:3]), torch.zeros(*qh.shape[:3], v.shape[-1])
    for start in range(0, k.shape[1], TILE):
        keys = slice(start, start + TILE)
        logits = (qh @ kh[:, :, keys].mT) * scale
        logits = logits.masked_fill(~mask[..., keys], -math.inf)
        best = torch.zeros_like(top) if bugs.no_max else torch.maximum(top, logits.amax(-1))
        anchor = best if bugs.nan_on_dead_rows else best.masked_fill(best == -math.inf, 0.0)
        p = (logits - anchor[..., None]).exp()
        if bugs.no_max:
            p = p.to(dtype).float()
        keep = (top - anchor).exp() if not bugs.no_max else torch.ones_like(top)
        total = total * keep + p.sum(-1)
        if bugs.coarse_sum:
            total = total.bfloat16().float()
        acc = acc * keep[..., None] + p.to(dtype).float() @ vh[:, :, keys]
        top = best
    seen = total > 0
    o = acc / total.clamp(min=1e-38)[..., None]
    o = o if bugs.nan_on_dead_rows else o.masked_fill(~seen[..., None], 0.0)
    lse = total.log() if bugs.lse_without_max else total.log() + top.masked_fill(~seen, 0.0)
    lse = lse / math.log(2) if bugs.lse_base_2 else lse
    lse = lse.masked_fill(~seen, 0.0 if bugs.lse_of_dead_rows_0 else -math.inf)
    return o.transpose(1, 2).to(dtype).contiguous(), lse.transpose(1, 2).contiguous()


def backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    grad_lse: Tensor | None, mask: Tensor, scale: float, bugs: Bugs = HONEST,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the inputs' dtype, key tile by key tile."""
    hq, dtype, hkv = q.shape[2], q.dtype, k.shape[2]
    qh, do = q.float().transpose(1, 2), grad_o.float().transpose(1, 2)
    kh, vh = spread(k, hq, bugs), spread(v, hq, bugs)
    row = lse.transpose(1, 2)
    safe = row.masked_fill(row == -math.inf, 0.0)[..., None]
    delta = (do * o.float().transpose(1, 2)).sum(-1, keepdim=True)
    if bugs.no_delta:
        delta = torch.zeros_like(delta)
    if grad_lse is not None and not bugs.grad_lse_ignored:
        delta = delta - grad_lse.transpose(1, 2)[..., None].masked_fill(
            row[..., None].isneginf(), 0.0
        )
    dq, dk, dv = torch.zeros_like(qh), torch.zeros_like(kh), torch.zeros_like(vh)
    for start in range(0, k.shape[1], TILE):
        keys = slice(start, start + TILE)
        logits = (qh @ kh[:, :, keys].mT) * scale
        p = (logits - safe).exp().masked_fill(~mask[..., keys], 0.0)
        ds = (p * (do @ vh[:, :, keys].mT - delta)).to(dtype).float()
        dv[:, :, keys] = p.to(dtype).float().mT @ do
        dk[:, :, keys] = ds.mT @ qh * scale
        dq += ds @ kh[:, :, keys] * (1.0 if bugs.dq_unscaled else scale)

    def grouped(x: Tensor) -> Tensor:
        parts = x.unflatten(1, (hkv, hq // hkv))
        if bugs.last_head_only:
            return parts[:, :, -1].transpose(1, 2).to(dtype)
        return (parts.mean(2) if bugs.group_mean else parts.sum(2)).transpose(1, 2).to(dtype)

    return dq.transpose(1, 2).to(dtype), grouped(dk), grouped(dv)
