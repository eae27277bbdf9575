"""`torch.ops.nsa_distributed.context_softmax`: full and windowed attention beside NSA's layers.

Full attention gathers all earlier keys, one kv head at a time; windowed attention a halo of w - 1.
Nothing fetched is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.distributed.exchange import agreed
from nsa_neuron.distributed.layout import Geometry, group
from nsa_neuron.distributed.opaque import define
from nsa_neuron.distributed.spread import Spread
from nsa_neuron.ops import get
from nsa_neuron.torch_private import process_group

OP = "context_softmax"


def context_softmax(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, context: str
) -> Tensor:
    """Softmax attention of this rank's tokens.

    Args:
        q, k, v: own tokens `[B, C, H, D]`.
        cu_seqlens: offsets of packed sequences over the tokens of all ranks, or None.
        window: w; 0: full attention.
        context: name of the group that shares the tokens.

    Returns:
        o `[B, C, Hq, Dv]`.
    """
    o: Tensor = torch.ops.nsa_distributed.context_softmax.default(
        q, k, v, cu_seqlens, window, context
    )[0]
    return o


class _Call:
    """One call: where rows lie, and the arguments of the local op."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, window: int, context: str
    ) -> None:
        ranks = process_group(context)
        rank, world = (0, 1) if ranks is None else (ranks.rank(), ranks.size())
        edges = None if cu is None else cu.tolist()
        self.layouts = group(rank, world, q.shape[1], Geometry(1, 1, max(1, window)), edges)
        needs = [x.window if window else x.keys for x in self.layouts.layouts]
        self.spread = Spread(ranks, rank, self.layouts.token_bounds, needs)
        self.tensors, self.name = (q, k, v), "sliding_window_attention" if window else "attention"
        own, first = self.layouts.own, needs[rank][0]
        offsets = (own.offsets(own.low), own.offsets(first))
        made = [None if cu is None else cu.new_tensor(values) for values in offsets]
        self.extra = {"cu_seqlens_q": made[0], "cu_seqlens_k": made[1]}
        if window:
            self.extra["window"] = window  # type: ignore[assignment]

    def heads(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Query heads, and keys and values, of one kv head after the other."""
        q, k, v = self.tensors
        size = q.shape[2] // k.shape[2]
        own = [[x[:, :, h : h + 1] for x in (k, v)] for h in range(k.shape[2])]
        coming = self.spread.fetch(own[0], "softmax")
        for h, mine in enumerate(own):
            now = coming
            if h + 1 < len(own):
                coming = self.spread.fetch(own[h + 1], "softmax")
            yield slice(h * size, (h + 1) * size), self.spread.assemble(now, mine)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, cu, window, context = args
    with agreed([process_group(context)], q) as say:
        spec = get("attention")
        bound = spec.bind({**dict.fromkeys(spec.names), "q": q, "k": k, "v": v})
        if k.shape[1] != q.shape[1]:
            raise bound.spec.refuse("k", f"{k.shape[1]} tokens long", "as long as q")
        edges = None if cu is None else cu.tolist()
        say(f"{OP}: {bound.describe()}, cu_seqlens={edges}, window={window}")
    call = _Call(*args)
    op = getattr(torch.ops.nsa, call.name).default
    stat = torch.promote_types(q.dtype, torch.float32)
    o, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=stat)
    for heads, (keys, values) in call.heads():
        o[:, :, heads], lse[:, :, heads] = op(q[:, :, heads], keys, values, **call.extra)
    return o, lse


def _backward(grad_o: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, o, lse = args
    call = _Call(*given)
    q = given[0]
    op = getattr(torch.ops.nsa, f"{call.name}_backward").default
    dq, totals = torch.empty_like(q, memory_format=torch.contiguous_format), []
    for heads, keys in call.heads():
        rows = (slice(None), slice(None), heads)
        dq[rows], *grads = op(grad_o[rows], q[rows], *keys, o[rows], lse[rows], **call.extra)
        back = call.spread.give_back(grads, "softmax gradients")
        totals.append(call.spread.collect(back, grads))
    dk, dv = (torch.cat(parts, 2).to(q.dtype) for parts in zip(*totals, strict=True))
    return dq, dk, dv


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, _, v, *_ = args
    stat = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=stat)


define(
    OP,
    tensors=("q", "k", "v"),
    optional=("cu_seqlens",),
    scalars={"window": "int", "context": "str"},
    saved=("o", "lse"),
    differentiable=3,
    run=(_forward, _fake),
    run_backward=_backward,
)
