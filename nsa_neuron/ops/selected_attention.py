"""Attention to the tokens of chosen blocks (rule 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.ops import common, softmax
from nsa_neuron.ops.attention_family import (
    COMPARE_FORWARD,
    QKV,
    backward_spec,
    derive_attention,
    pairs_cost,
    qkv_inputs,
)
from nsa_neuron.ops.grid import bench_case, grid, variant
from nsa_neuron.spec import Bound, OpSpec, Size, TensorArg

if TYPE_CHECKING:
    from nsa_neuron.cases import Case

# Gathered key and value elements held at once: what stays in a CPU's cache. With 2**24 the memory
# of each tile is new to the system, and clearing it takes as long as all the arithmetic.
GATHER_ELEMENTS = 2**21
# Up to here Python's sets check a decode step's ids faster than NumPy's calls, each about 1 us.
FEW_IDS = 128


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    select_block: int = 64,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to those tokens of the selected blocks that are not after the query.

    Args:
        q: `[B, S, Hq, Dk]`.
        k: `[B, T, Hkv, Dk]`, T >= S; the queries are the last S tokens.
        v: `[B, T, Hkv, Dv]`.
        block_indices: `[B, S, Hkv, n]` int32, distinct block ids of the query's sequence, -1 where
            unused; a row serves the G query heads of its group.
        select_block: m, tokens of a block.
        scale: of the logits; default `Dk ** -0.5`.
        cu_seqlens_q: offsets of packed sequences' queries, `[N + 1]` int32; needs B == 1.
        cu_seqlens_k: the same for keys.

    Returns:
        o `[B, S, Hq, Dv]`, zero on rows that see nothing; lse `[B, S, Hq]` float32, -inf there.

    Raises:
        InvalidArgument: an argument breaks the contract.
    """
    work, (b, s, hq, _) = softmax.work_dtype(q), q.shape
    factor = common.default_scale(scale, q)
    o = q.new_zeros(b, s, hq, v.shape[-1])
    lse = torch.full((b, s, hq), -torch.inf, dtype=work, device=q.device)
    for seg in common.segments(s, k.shape[1], cu_seqlens_q, cu_seqlens_k):
        blocked = _Blocks.of(k, v, seg, select_block)
        for rows, tile in _row_tiles(q, block_indices, seg, blocked):
            logits = tile.logits(q[:, rows], factor)
            row_lse = logits.logsumexp(-1)
            p = softmax.probabilities(logits, row_lse).to(v.dtype).to(work)
            o[:, rows] = (p @ tile.v).flatten(2, 3).to(o.dtype)
            lse[:, rows] = row_lse.flatten(2)
    return o, lse


def selected_attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    select_block: int = 64,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `selected_attention`: dq, dk, dv; the selection is a constant.

    Args:
        grad_o: `[B, S, Hq, Dv]`.
        q, k, v, block_indices, select_block, scale, cu_seqlens_q, cu_seqlens_k: as given to the
            forward op.
        o, lse: what it returned.
        grad_lse: `[B, S, Hq]` float32; None: zero.
    """
    work, hkv = softmax.work_dtype(q), k.shape[2]
    factor = common.default_scale(scale, q)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    shift = softmax.row_shift(grad_o, o, lse, grad_lse)
    for seg in common.segments(q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k):
        blocked = _Blocks.of(k, v, seg, select_block)
        dk_blocks, dv_blocks = torch.zeros_like(blocked.k), torch.zeros_like(blocked.v)
        for rows, tile in _row_tiles(q, block_indices, seg, blocked):
            shape = (*tile.ids.shape[:3], q.shape[2] // hkv, 1)
            p = softmax.probabilities(
                tile.logits(q[:, rows], factor), lse[:, rows].to(work).view(shape[:-1])
            )
            do = grad_o[:, rows].to(work).unflatten(2, (hkv, -1))
            dp = do @ tile.v.transpose(-1, -2)
            ds = (p * (dp - shift[:, rows].view(shape)) * factor).to(q.dtype).to(work)
            dq[:, rows] = (ds @ tile.k).flatten(2, 3).to(dq.dtype)
            p = p.to(v.dtype).to(work)
            grouped_q = q[:, rows].to(work).unflatten(2, (hkv, -1))
            tile.scatter_add(dk_blocks, ds.transpose(-1, -2) @ grouped_q)
            tile.scatter_add(dv_blocks, p.transpose(-1, -2) @ do)
        dk[:, seg.keys] = blocked.tokens(dk_blocks, seg.tokens).to(dk.dtype)
        dv[:, seg.keys] = blocked.tokens(dv_blocks, seg.tokens).to(dv.dtype)
    return dq, dk, dv


@dataclass(frozen=True)
class _Blocks:
    """Keys and values of one sequence as blocks, `[B * Hkv * (Ns + 1), m, D]` in the work dtype.

    The last block of every (batch, kv head) is zero: unused ids point there.
    """

    k: Tensor
    v: Tensor
    m: int
    heads: tuple[int, int]
    count: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor, seg: common.Segment, m: int) -> _Blocks:
        b, _, hkv, _ = k.shape
        count = common.selection_blocks(seg.tokens, m)
        pad = (count + 1) * m - seg.tokens

        def blocked(x: Tensor) -> Tensor:
            rows = softmax.keyed(x, seg.keys)
            return F.pad(rows, (0, 0, 0, pad)).reshape(-1, m, x.shape[-1])

        return cls(blocked(k), blocked(v), m, (b, hkv), count)

    def tokens(self, blocks: Tensor, count: int) -> Tensor:
        """Blocks back to `[B, T, Hkv, D]`."""
        b, hkv = self.heads
        return blocks.view(b, hkv, -1, blocks.shape[-1])[:, :, :count].permute(0, 2, 1, 3)


@dataclass(frozen=True)
class _RowTile:
    """A chunk of queries with the keys and values gathered for each.

    Attributes:
        ids: `[B, C, Hkv, n]` rows of the block table.
        k: `[B, C, Hkv, n*m, Dk]`; v likewise.
        hidden: `[B, C, Hkv, 1, n*m]` keys that the query must not see.
    """

    ids: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor

    def logits(self, q: Tensor, scale: float) -> Tensor:
        """`[B, C, Hkv, G, n*m]` scaled logits, -inf where hidden."""
        grouped: Tensor = q.to(self.k.dtype).unflatten(2, (self.k.shape[2], -1))
        logits = (grouped @ self.k.transpose(-1, -2)).mul_(scale)
        return logits.masked_fill_(self.hidden, -torch.inf)

    def scatter_add(self, blocks: Tensor, grads: Tensor) -> None:
        """Adds `[B, C, Hkv, n*m, D]` to their blocks, in an order that never changes."""
        rows = grads.reshape(-1, blocks.shape[1], blocks.shape[2])
        if blocks.is_cuda:
            # index_add_ is atomic on a GPU; index_put_ sorts.
            blocks.index_put_((self.ids.reshape(-1),), rows, accumulate=True)
        else:
            blocks.index_add_(0, self.ids.reshape(-1), rows)


def _row_tiles(
    q: Tensor, block_indices: Tensor, seg: common.Segment, blocked: _Blocks
) -> Iterator[tuple[slice, _RowTile]]:
    b, hkv = blocked.heads
    n, m = block_indices.shape[-1], blocked.m
    width = b * hkv * n * m * (blocked.k.shape[-1] + blocked.v.shape[-1])
    step = max(1, GATHER_ELEMENTS // width)
    head = torch.arange(b * hkv, device=q.device).view(b, 1, hkv, 1) * (blocked.count + 1)
    within = torch.arange(m, device=q.device)
    count = seg.queries.stop - seg.queries.start
    for start in range(0, count, step):
        stop = min(start + step, count)
        rows = slice(seg.queries.start + start, seg.queries.start + stop)
        ids = block_indices[:, rows].long()
        t = torch.arange(seg.offset + start, seg.offset + stop, device=q.device)
        token = (ids[..., None] * m + within).flatten(-2)
        hidden = (token > t[None, :, None, None]) | (ids < 0).repeat_interleave(m, -1)
        ids = head + ids.masked_fill(ids < 0, blocked.count)
        k, v = (
            x.index_select(0, ids.reshape(-1)).view(*ids.shape[:3], n * m, x.shape[-1])
            for x in (blocked.k, blocked.v)
        )
        yield rows, _RowTile(ids, k, v, hidden[:, :, :, None])


def check_values(bound: Bound, values: Mapping[str, Any]) -> None:
    """Offsets, and block ids in [-1, Ns) of their own sequence without repetition."""
    common.check_offsets(bound, values)
    ids = values["block_indices"]
    if ids.numel() <= FEW_IDS and not bound.packed:
        limit = common.selection_blocks(bound["T"], bound["m"])
        if _legal_rows(ids.tolist(), limit):
            return
    ordered = np.sort(ids.numpy(force=True), -1)
    offsets = (values["cu_seqlens_q"], values["cu_seqlens_k"])
    for i, seg in enumerate(common.segments(bound["S"], bound["T"], *offsets)):
        limit, own = common.selection_blocks(seg.tokens, bound["m"]), ordered[:, seg.queries]
        low, high = int(own[..., 0].min()), int(own[..., -1].max())
        if low < -1 or high >= limit:
            where = f" in sequence {i}" if bound.packed else ""
            found = f"with ids from {low} to {high}{where}"
            raise bound.spec.refuse("block_indices", found, f"in [-1, {limit}){where}")
    following = ordered[..., 1:]
    if ((following == ordered[..., :-1]) & (following >= 0)).any():
        raise bound.spec.refuse("block_indices", "repeating an id in a row", "distinct per row")


def _legal_rows(ids: list[list[list[list[int]]]], limit: Size) -> bool:
    """Whether every row of ids `[B, S, Hkv, n]` is in [-1, limit) and distinct but for -1."""
    for row in chain.from_iterable(chain.from_iterable(ids)):
        distinct = set(row)
        unused = row.count(-1)
        if len(distinct) != len(row) - unused + (unused > 0):
            return False
        if min(distinct) < -1 or max(distinct) >= limit:
            return False
    return True


def inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """q, k, v and random causal ids; some rows choose nothing, few, or blocks after them."""
    values = qkv_inputs(case, gen)
    m = case.scalars.get("select_block", 64)
    n = int(case.options.get("chosen", 4))
    rows = []
    lengths = case.lengths or ((case.size("S"), case.size("T")),)
    for s, t in lengths:
        blocks = common.selection_blocks(t, m)
        for position in range(t - s, t):
            reach = blocks if case.options.get("past") else position // m + 1
            rows.append([_ids(gen, reach, n) for _ in range(case.size("B") * case.size("Hkv"))])
    ids = torch.tensor(rows, dtype=torch.int32).view(-1, case.size("B"), case.size("Hkv"), n)
    if case.options.get("dead"):
        ids[::3] = -1
    values["block_indices"] = ids.transpose(0, 1).contiguous()
    return values


def _ids(gen: torch.Generator, reach: int, n: int) -> list[int]:
    """Up to n distinct ascending ids below `reach`, padded with -1."""
    ids = sorted(torch.randperm(reach, generator=gen)[:n].tolist())
    return ids + [-1] * (n - len(ids))


def _pairs(bound: Bound) -> int:
    return common.visible_pairs(bound, int(bound["n"]) * int(bound["m"]))


SPEC = OpSpec(
    name="selected_attention",
    args=(
        *QKV,
        TensorArg("block_indices", "B S Hkv n", "i32"),
        *common.CU_SEQLENS,
        common.SELECT_BLOCK,
        common.SCALE,
    ),
    returns=common.O_LSE,
    reference=selected_attention,
    derive=derive_attention,
    check_values=check_values,
    compare=COMPARE_FORWARD,
    cases=grid(
        {"select_block": 16},
        (
            variant("several_tiles", "default_block", {}, queries=20),
            variant("m_plus_1", "dead_rows", {"select_block": 16}, dead=True),
            variant("batch2_kv2", "blocks_after_query", {"select_block": 16}, past=True),
            variant("group4_s40", "one_id", {"select_block": 16}, chosen=1),
            variant("prefill_tail", "custom_scale", {"select_block": 32, "scale": 0.3}),
            bench_case(65536),
        ),
    ),
    inputs=inputs,
    cost=pairs_cost(_pairs, 2),
    backward="selected_attention_backward",
    saves=("o", "lse"),
)
BACKWARD = backward_spec(SPEC, selected_attention_backward, _pairs)
