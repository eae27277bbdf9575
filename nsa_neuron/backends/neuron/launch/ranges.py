"""What attention over one range of keys per query shares: bounds, layout, sign of the scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_neuron.backends.neuron.launch import finite
from nsa_neuron.backends.neuron.launch.groups import Groups, loops, unrolled_instructions
from nsa_neuron.backends.neuron.launch.reach import UNLIMITED, Ranges
from nsa_neuron.ops.softmax import row_shift

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels


def causal(
    queries: int,
    keys: int,
    window: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    device: torch.device,
) -> Ranges:
    """Keys up to each query's own, the last `window` of them if window > 0; packed or not."""
    row = torch.arange(queries, device=device)
    past = keys - queries
    if cu_seqlens_q is None or cu_seqlens_k is None:
        first = torch.zeros_like(row)
        last = row + past + 1
    else:
        sequence = torch.bucketize(row, cu_seqlens_q[1:].to(row.dtype), right=True)
        # Queries are the last of their sequence's keys, so both end together.
        last = row + 1 + (cu_seqlens_k - cu_seqlens_q)[1:].to(row.dtype)[sequence]
        first = cu_seqlens_k.to(row.dtype)[sequence]
    if window:
        first = torch.maximum(first, last - window)
    # A packed query's keys end between row + 1 and row + past + 1.
    exact = cu_seqlens_q is None
    oldest = (past if exact else 0) + 1 - window if window else UNLIMITED
    bounds = torch.stack((first, last), 1).float()
    return Ranges(bounds, (past + 1, oldest, 1, exact))


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and scale with the same products, but scale > 0."""
    if scale > 0:
        return q, scale
    return (q * 0, 1.0) if scale == 0 else (-q, -scale)


def turned(x: Tensor) -> Tensor:
    """[B, T, H, D] -> contiguous [B, H, D, T]."""
    return x.permute(0, 2, 3, 1).contiguous()


def forward(
    kernels: Kernels,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Ranges,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [B, S, Hq, Dv] in q's dtype and lse [B, S, Hq] float32.

    Args:
        kernels: with a kernel `forward`; plan: its constants.
        q: [B, S, Hq, Dk]; k, v: [B, T, Hkv, D].
        scale: of the logits, any sign.
    """
    if not ranges.reach[3]:
        spans, bad_k, bad_v = _spoiled(k, v, ranges)
        clean = (finite.cleaned(k, bad_k), finite.cleaned(v, bad_v))
        o, lse = _forward(kernels, plan, q, *clean, ranges, scale)
        in_keys = spans.seeing(bad_k)
        o = finite.marked(o, in_keys | spans.seeing(bad_v))
        return o, finite.marked(lse, in_keys)
    return _forward(kernels, plan, q, k, v, ranges, scale)


def _spoiled(k: Tensor, v: Tensor, ranges: Ranges) -> tuple[finite.Spans, Tensor, Tensor]:
    """What queries of a packed call see, and which keys and values are not finite."""
    first, end = ranges.bounds.unbind(-1)
    spans = finite.Spans.of(first, end, k.shape[0], k.shape[2], k.shape[1])
    return spans, finite.spoiled(k), finite.spoiled(v)


def _forward(
    kernels: Kernels,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Ranges,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same of finite keys and values."""
    q, scale = positive_scale(q, scale)
    largest_key = k.float().norm(dim=-1).amax(1)
    constants = {"reach": ranges.reach, "scale": scale, **plan["forward"]}
    groups = looped("forward", plan, q, k, ranges)
    if groups is None:
        o, lse = kernels.forward(
            q.contiguous(), turned(k), v.contiguous(), ranges.bounds, largest_key, None, None,
            looped=(), **constants,
        )  # fmt: skip
        return o, lse.squeeze(-1)
    k, v = groups.keys(k), groups.keys(v)
    o, lse = kernels.forward(
        groups.rows(q).contiguous(), turned(k), v.contiguous(), groups.bounds, largest_key,
        groups.trips, groups.bases, looped=groups.looped, **constants,
    )  # fmt: skip
    return o[:, : q.shape[1]], lse[:, : q.shape[1]].squeeze(-1)


def looped(direction: str, plan: Plan, q: Tensor, k: Tensor, ranges: Ranges) -> Groups | None:
    """The groups of a call that runs in hardware loops; None: its program is short enough.

    Args:
        direction: forward or backward.
    """
    sizes = plan["looped"]
    shape, group = (q.shape[0], q.shape[1], k.shape[2]), q.shape[2] // k.shape[2]
    count = unrolled_instructions(direction, shape, group, k.shape[1], ranges.reach)
    if not loops(count, sizes, not ranges.reach[3]):
        return None
    return Groups.of(ranges, group, sizes)


def backward(
    kernels: Kernels,
    plan: Plan,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    ranges: Ranges,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous, in the inputs' dtype.

    Args:
        kernels: with kernels `backward_dq` and `backward_dkv`; plan: their constants.
        grad_o: [B, S, Hq, Dv]; grad_lse: [B, S, Hq] float32, None: zero.
        o, lse: what `forward` returned for q, k, v, ranges and scale.
    """
    delta = row_shift(grad_o, o, lse, grad_lse)
    shift = -lse.masked_fill(lse == -torch.inf, 0.0)
    if ranges.reach[3]:
        return _backward(kernels, plan, grad_o, q, k, v, shift, delta, ranges, scale)
    spans, bad_k, bad_v = _spoiled(k, v, ranges)
    kv_heads = k.shape[2]
    bad = finite.spoiled(q, grad_o, torch.stack((shift, delta), -1))
    grad_o, q, shift, delta = (finite.cleaned(x, bad) for x in (grad_o, q, shift, delta))
    k, v = finite.cleaned(k, bad_k), finite.cleaned(v, bad_v)
    dq, dk, dv = _backward(kernels, plan, grad_o, q, k, v, shift, delta, ranges, scale)
    reached = spans.seeing(bad_k | bad_v)
    seen = spans.seen(reached | finite.by_kv_head(bad, kv_heads))
    dq = finite.marked(finite.marked(dq, reached), bad)
    return dq, finite.marked(dk, seen), finite.marked(dv, seen)


def _backward(
    kernels: Kernels,
    plan: Plan,
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    delta: Tensor,
    ranges: Ranges,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of -lse [B, S, Hq], finite, and delta = rowsum(dO * O) - dlse."""
    positive_q, positive = positive_scale(q, scale)
    rows, keys = q.shape[1], k.shape[1]
    bounds, trips, bases, sections = ranges.bounds, None, None, None
    groups = looped("backward", plan, q, k, ranges)
    if groups:
        # Copies of the last query, of zero gradient.
        positive_q, shift = groups.rows(positive_q), groups.rows(shift)
        grad_o, delta = groups.zero_rows(grad_o), groups.zero_rows(delta)
        k, v = groups.keys(k), groups.keys(v)
        bounds, trips, bases, sections = (
            groups.bounds, groups.trips, groups.bases, groups.sections(k.shape[1])
        )  # fmt: skip
    constants = {
        "reach": ranges.reach, "scale": positive, "looped": groups.looped if groups else ()
    }  # fmt: skip
    k_t, v_t, stats = turned(k), turned(v), torch.stack((shift, delta), -1)
    grad_o, positive_q = grad_o.contiguous(), positive_q.contiguous()
    (dq,) = kernels.backward_dq(
        grad_o, positive_q, k_t, v_t, k.contiguous(), stats, bounds, trips, bases,
        **constants, **plan["backward_dq"],
    )  # fmt: skip
    dk, dv = kernels.backward_dkv(
        grad_o, positive_q, k_t, v_t, stats, bounds, sections, **constants
    )
    dq, dk, dv = dq[:, :rows], dk[:, :keys], dv[:, :keys]
    sign = (scale > 0) - (scale < 0)
    return (dq if sign > 0 else dq * sign).contiguous(), dk.contiguous(), dv.contiguous()
