"""Native Sparse Attention of one rank's queries, with keys that are spread over ranks.

Forward: halos of keys and values for compression (at most l - 1 tokens) and the window (w - 1) come
from the ranks before; each rank compresses its own blocks, which all later ranks of the sequence
get; the window branch runs while they travel. Then the compressed branch and the selection see all
blocks before them, and the selected branch gets either the blocks that somebody selected or all
earlier keys, one kv head at a time, whichever moves fewer bytes.

Nothing that was fetched is kept for the backward pass: it is fetched again, and gradients return to
the ranks that own the rows. So memory stays with the own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron import functional  # noqa: F401 - the ops exist once it is imported
from nsa_neuron.distributed.exchange import gather
from nsa_neuron.distributed.layout import Geometry, Group, group
from nsa_neuron.distributed.spread import Blocks, Spread, choose_blocks
from nsa_neuron.nn.rotary import rotate

if TYPE_CHECKING:
    import torch.distributed as dist

FETCHES = ("auto", "gather", "blocks")
ops = torch.ops.nsa
Weights = tuple[Tensor | None, ...]  # w1, b1, w2, b2, pe


@dataclass
class Call:
    """One call; tensors hold the own tokens.

    Attributes:
        q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gates: as of `nsa_attention`; `k_raw`, `v_raw`
            are what phi compresses.
        phi_k, phi_v: weights of `compress`.
        edges: offsets of packed sequences over all ranks; None: one sequence per batch row.
        scalars: the rest of `nsa_attention`, and `method` of `compress`.
        rope_base: of the encoding that compressed keys get; 0: none.
        context: ranks that share the tokens; None: one.
        heads: ranks that share a kv head; None: one.
        fetch: one of `FETCHES`.
    """

    q: Tensor
    k_raw: Tensor
    v_raw: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor
    phi_k: Weights
    phi_v: Weights
    edges: list[int] | None
    scalars: dict[str, Any]
    rope_base: float
    context: dist.ProcessGroup | None
    heads: dist.ProcessGroup | None
    fetch: str

    def __post_init__(self) -> None:
        c = self.context
        rank, world = (0, 1) if c is None else (c.rank(), c.size())
        sizes = Geometry(*(self.scalars[name] for name in ("block", "stride", "window")))
        self.layouts: Group = group(rank, world, self.q.shape[1], sizes, self.edges)
        own = [layout.compressed for layout in self.layouts.layouts]
        tokens, mine = self.layouts.token_bounds, self.layouts.mine
        self.raw = Spread(c, mine, tokens, own)
        self.near = Spread(c, mine, tokens, [x.window for x in self.layouts.layouts])
        self.all = Spread(c, mine, tokens, [x.keys for x in self.layouts.layouts])
        self.blocks = Spread(c, mine, self.layouts.block_bounds, self.layouts.blocks_needed)

    def some(self, *names: str) -> dict[str, Any]:
        """Scalar arguments by name."""
        return {name: self.scalars[name] for name in names}

    def offsets(self, first: int) -> tuple[Tensor | None, Tensor | None]:
        """cu_seqlens of the own queries and of keys whose rows begin with token `first`."""
        if self.edges is None:
            return None, None
        own = self.layouts.own
        return self._edges(own.offsets(own.low)), self._edges(own.offsets(first))

    def _edges(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)

    def compress(self, raw: list[Tensor]) -> list[Tensor]:
        """Own compressed keys, with their positions, and values, from rows with their halo."""
        count, at = sum(self.layouts.own.block_counts), self._block_ends()
        given = self._compress_arguments()
        made = [
            ops.compress.default(x, *weights, given["edges"], **given["scalars"])[:, :count]
            for x, weights in zip(raw, (self.phi_k, self.phi_v), strict=True)
        ]
        return [rotate(made[0], at, self.rope_base), made[1]]

    def compress_backward(self, raw: list[Tensor], grads: list[Tensor]) -> list[list[Tensor]]:
        """Gradients of raw rows with their halo and of the weights, of keys and of values."""
        given, at = self._compress_arguments(), self._block_ends()
        turned = [rotate(grads[0], -at, self.rope_base), grads[1]]
        results = []
        for x, grad, weights in zip(raw, turned, (self.phi_k, self.phi_v), strict=True):
            rows = max(0, (x.shape[1] - self.scalars["block"]) // self.scalars["stride"] + 1)
            full = grad.new_zeros(grad.shape[0], rows, *grad.shape[2:])
            full[:, : grad.shape[1]] = grad
            results.append(
                list(
                    ops.compress_backward.default(
                        full, x, *weights, given["edges"], **given["scalars"]
                    )
                )
            )
        return results

    def _compress_arguments(self) -> dict[str, Any]:
        own = self.layouts.own
        edges = None if self.edges is None else self._edges(own.offsets(own.compressed[0]))
        return {"edges": edges, "scalars": self.some("method", "block", "stride")}

    def _block_ends(self) -> Tensor:
        return torch.tensor(self.layouts.own.block_ends, device=self.q.device)

    def compressed(self, k_cmp: Tensor) -> dict[str, Any]:
        """Arguments that ops over compressed keys share."""
        first, stop = self.layouts.own.keys
        cu_q, cu_k = self.offsets(first)
        return {
            "k_cmp": k_cmp, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "kv_len": stop - first,
            **self.some("block", "stride", "scale"),
        }  # fmt: skip

    def windowed(self) -> dict[str, Any]:
        """Arguments of the window branch besides tensors."""
        cu_q, cu_k = self.offsets(self.layouts.own.window[0])
        return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **self.some("window", "scale")}

    def select(self, k_cmp: Tensor, lse: Tensor) -> Tensor:
        """Blocks of the own queries, by the importance for all heads of a kv head's group."""
        q = self.q
        if self.heads is not None:
            q = torch.cat(gather(self.heads, q, "group"), 2)
            lse = torch.cat(gather(self.heads, lse, "group"), 2)
        names = ("select_block", "num_selected", "num_initial", "num_local")
        made: Tensor = ops.select_blocks.default(
            q, lse=lse, **self.compressed(k_cmp), **self.some(*names)
        )
        return made

    @property
    def gathers(self) -> bool:
        """Whether all earlier keys will come, whatever is selected."""
        own, size = self.layouts.own, self.scalars["select_block"]
        return self.fetch == "gather" or own.world == 1 or not self.layouts.aligned(size)

    def begin(self, block_indices: Tensor | None) -> Reads:
        """Starts to fetch what the selected branch reads; ids are not needed if all is gathered."""
        own, size = self.layouts.own, self.scalars["select_block"]
        chosen: Blocks | None = None
        if block_indices is not None and not self.gathers:
            force = self.fetch == "blocks"
            chosen = choose_blocks(self.context, self.layouts, size, block_indices, force)
        if chosen is not None:
            return Reads(self, chosen, [slice(None)], own.low - chosen.ahead)
        heads = [slice(h, h + 1) for h in range(self.k_slc.shape[2])]
        return Reads(self, self.all, heads if own.world > 1 else [slice(None)], own.keys[0])


class Reads:
    """Keys and values of the selected branch, on their way; head by head if all are gathered.

    Args:
        call: whose. spread: where rows come from. heads: kv heads at a time. first: token of the
            first fetched row.
    """

    def __init__(self, call: Call, spread: Spread | Blocks, heads: list[slice], first: int) -> None:
        self._call, self._spread, self._heads, self._first = call, spread, heads, first
        self._own = [[x[:, :, part] for x in (call.k_slc, call.v_slc)] for part in heads]
        self._coming = spread.fetch(self._own[0], "selected")

    def sources(self, block_indices: Tensor) -> Iterator[Source]:
        """One after the other: the next head's rows travel while this one's are used."""
        call, ids = self._call, block_indices
        if isinstance(self._spread, Blocks):
            ids = self._spread.local_ids(ids)
        cu_q, cu_k = call.offsets(self._first)
        extra = {
            "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **call.some("select_block", "scale")
        }  # fmt: skip
        size = call.q.shape[2] // call.k_slc.shape[2]
        for i, part in enumerate(self._heads):
            now = self._coming
            if i + 1 < len(self._heads):
                self._coming = self._spread.fetch(self._own[i + 1], "selected")
            k, v = self._spread.assemble(now, self._own[i])
            queries = part
            if part.start is not None:
                queries = slice(part.start * size, part.stop * size)
            given = {"k": k, "v": v, "block_indices": ids[:, :, part], **extra}
            yield Source(self._spread, part, queries, given)


@dataclass
class Source:
    """What the selected branch reads at a time.

    Attributes:
        spread: where it came from. heads: kv heads. queries: their query heads.
        given: arguments of `selected_attention` besides q.
    """

    spread: Spread | Blocks
    heads: slice
    queries: slice
    given: dict[str, Any]


Saved = tuple[Tensor, ...]  # o, block_indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win


def forward(call: Call) -> Saved:
    """o and what the backward pass needs, in the order of `nsa_attention_forward`."""
    raw_own, near_own = [call.k_raw, call.v_raw], [call.k_win, call.v_win]
    raw_halo, near_halo = call.raw.fetch(raw_own, "halo"), call.near.fetch(near_own, "halo")
    reads = call.begin(None) if call.gathers else None
    blocks = call.compress(call.raw.assemble(raw_halo, raw_own))
    coming = call.blocks.fetch(blocks, "compressed")
    k_win, v_win = call.near.assemble(near_halo, near_own)
    o_win, lse_win = ops.sliding_window_attention.default(call.q, k_win, v_win, **call.windowed())
    k_cmp, v_cmp = call.blocks.assemble(coming, blocks)
    o_cmp, lse_cmp = ops.compressed_attention.default(call.q, v_cmp=v_cmp, **call.compressed(k_cmp))
    ids = call.select(k_cmp, lse_cmp)
    reads = call.begin(ids) if reads is None else reads
    del k_win, v_win, k_cmp, v_cmp
    o_slc, lse_slc = torch.empty_like(o_win), torch.empty_like(lse_win)
    for source in reads.sources(ids):
        q = call.q[:, :, source.queries]
        part = ops.selected_attention.default(q, **source.given)
        o_slc[:, :, source.queries], lse_slc[:, :, source.queries] = part
    o = ops.gated_sum.default(o_cmp, o_slc, o_win, call.gates)
    return o, ids, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win


def backward(call: Call, grad_o: Tensor, saved: Saved) -> tuple[Tensor, ...]:
    """Gradients of q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gates, phi_k (5), phi_v (5)."""
    ids, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win = saved
    raw_own, near_own = [call.k_raw, call.v_raw], [call.k_win, call.v_win]
    raw_halo, near_halo = call.raw.fetch(raw_own, "halo"), call.near.fetch(near_own, "halo")
    reads = call.begin(ids)
    do_cmp, do_slc, do_win, dgates = ops.gated_sum_backward.default(
        grad_o, o_cmp, o_slc, o_win, call.gates
    )
    raw = call.raw.assemble(raw_halo, raw_own)
    blocks = call.compress(raw)
    coming = call.blocks.fetch(blocks, "compressed")
    near = call.near.assemble(near_halo, near_own)
    dq_win, *dnear = ops.sliding_window_attention_backward.default(
        do_win, call.q, *near, o_win, lse_win, **call.windowed()
    )
    near_back = call.near.give_back(dnear, "halo gradients")
    k_cmp, v_cmp = call.blocks.assemble(coming, blocks)
    dq_cmp, *dblocks = ops.compressed_attention_backward.default(
        do_cmp, call.q, v_cmp=v_cmp, o=o_cmp, lse=lse_cmp, **call.compressed(k_cmp)
    )
    blocks_back = call.blocks.give_back(dblocks, "compressed gradients")
    dq_slc, dk_slc, dv_slc = _selected_backward(call, reads, do_slc, ids, o_slc, lse_slc)
    own_blocks = call.blocks.collect(blocks_back, dblocks)
    (dk, *dphi_k), (dv, *dphi_v) = call.compress_backward(
        raw, [x.to(grad_o.dtype) for x in own_blocks]
    )
    raw_back = call.raw.give_back([dk, dv], "halo gradients")
    dk_win, dv_win = call.near.collect(near_back, dnear)
    dk_raw, dv_raw = call.raw.collect(raw_back, [dk, dv])
    dq = dq_cmp.to(dk_raw.dtype) + dq_slc.to(dk_raw.dtype) + dq_win.to(dk_raw.dtype)
    rows = (dk_raw, dv_raw, dk_slc, dv_slc, dk_win, dv_win)
    return (
        *(x.to(grad_o.dtype).contiguous() for x in (dq, *rows)), dgates, *dphi_k, *dphi_v
    )  # fmt: skip


def _selected_backward(
    call: Call, reads: Reads, do: Tensor, ids: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and gradients of the own keys and values in float32."""
    dq = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    totals: list[list[Tensor]] = []
    for source in reads.sources(ids):
        rows = (slice(None), slice(None), source.queries)
        part, *grads = ops.selected_attention_backward.default(
            do[rows], call.q[rows], o=o[rows], lse=lse[rows], **source.given
        )
        dq[rows] = part
        back = source.spread.give_back(grads, "selected gradients")
        totals.append(source.spread.collect(back, grads))
    dk, dv = (torch.cat(parts, 2) for parts in zip(*totals, strict=True))
    return dq, dk, dv
