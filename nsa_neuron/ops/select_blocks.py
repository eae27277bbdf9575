"""Importance of selection blocks and the choice of the best (rules 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.numerics import TopKSet
from nsa_neuron.ops import common, compressed_attention, softmax
from nsa_neuron.ops.grid import bench_case, grid, variant
from nsa_neuron.spec import Bound, Cost, OpSpec, Return, TensorArg

if TYPE_CHECKING:
    from nsa_neuron.cases import Case


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    kv_len: int,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
) -> Tensor:
    """Chooses each query's selection blocks by the importance of compressed attention.

    `p_slc[t, j]` sums the compressed probabilities of the group's heads over the compressed blocks
    i, weighted by `|tokens(i) ∩ tokens(j)| / stride`. The first `num_initial` blocks and the
    `num_local` blocks that end with the query's own are always chosen; the rest by importance,
    lowest id first on ties. No gradient flows through the choice.

    Args:
        q: `[B, S, Hq, Dk]`.
        k_cmp: `[B, Nc, Hkv, Dk]`, from `compress`.
        lse: `[B, S, Hq]` float32, from `compressed_attention` with the same arguments.
        kv_len: T; the queries are the last S of the T tokens (packed: total).
        block: l, tokens of a compression block, at most `select_block`.
        stride: d, divides `block` and `select_block`.
        select_block: m, tokens of a selection block.
        num_selected: n, ids per row, the forced ones included.
        num_initial: forced blocks at the start of the sequence.
        num_local: forced blocks that end with the query's own.
        scale: of the logits; default `Dk ** -0.5`.
        cu_seqlens_q: offsets of packed sequences' queries, `[N + 1]` int32; needs B == 1.
        cu_seqlens_k: the same for raw keys.

    Returns:
        block_indices `[B, S, Hkv, n]` int32, ascending, padded with -1 on the right; local to the
        sequence.

    Raises:
        InvalidArgument: an argument breaks the contract.
    """
    b, s, _, _ = q.shape
    shape = (b, s, k_cmp.shape[2], num_selected)
    ids = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    chunks = ranked_scores(
        q, k_cmp, lse, kv_len, block, stride, select_block, num_initial, num_local,
        common.default_scale(scale, q), cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    for rows, scores in chunks:
        ids[:, rows] = top_ids(scores, num_selected)
    return ids


def top_ids(scores: Tensor, count: int) -> Tensor:
    """Ids of the best scores `[..., Ns]` as `[..., count]` int32; -inf is never chosen."""
    blocks = scores.shape[-1]
    best, ids = scores.sort(dim=-1, descending=True, stable=True)
    best, ids = best[..., :count], ids[..., :count]
    ids = ids.masked_fill(best == -torch.inf, blocks).sort(-1).values
    ids = ids.masked_fill(ids == blocks, -1)
    return torch.nn.functional.pad(ids, (0, count - ids.shape[-1]), value=-1).int()


def ranked_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    kv_len: int,
    block: int,
    stride: int,
    select_block: int,
    num_initial: int,
    num_local: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of (rows, scores `[B, C, Hkv, Ns]`): +inf for forced, -inf for future blocks."""
    segs = list(common.segments(q.shape[1], kv_len, cu_seqlens_q, cu_seqlens_k))
    keys = common.compressed_slices(segs, block, stride)
    seen = softmax.Complete(block, stride)
    for seg, blocks in zip(segs, keys, strict=True):
        total = common.selection_blocks(seg.tokens, select_block)
        sequence = [(seg.queries, blocks, seg.offset)]
        for tile in softmax.tiles(sequence, seen, q.shape[0] * q.shape[2], q.device):
            p = _group_probabilities(q, k_cmp, lse, tile, scale)
            scores = overlap_sum(p, total, block, stride, select_block)
            scores = scores.permute(0, 2, 1, 3).contiguous()
            j = torch.arange(total, device=q.device)
            own = (tile.position // select_block)[:, None]
            forced = (j < num_initial) | (j > own - num_local)
            scores.masked_fill_(forced[:, None], torch.inf)
            scores.masked_fill_((j > own)[:, None], -torch.inf)
            yield tile.rows, scores


def _group_probabilities(
    q: Tensor, k_cmp: Tensor, lse: Tensor, tile: softmax.Tile, scale: float
) -> Tensor:
    """Compressed probabilities summed over each group's heads, `[B, Hkv, C, K]`, K <= Nc."""
    hkv, count = k_cmp.shape[2], len(tile.position)
    logits = softmax.masked_logits(q, k_cmp, tile, scale)
    row_lse = softmax.grouped(lse[..., None], tile.rows, hkv)[..., 0].to(logits.dtype)
    p = softmax.probabilities(logits, row_lse)
    return p.view(q.shape[0], hkv, count, q.shape[2] // hkv, p.shape[-1]).sum(3)


def overlap_sum(p: Tensor, total: int, block: int, stride: int, select_block: int) -> Tensor:
    """`[..., K]` -> `[..., Ns]`: p_slc[j] = sum_i p[i] * |tokens(cmp i) ∩ tokens(sel j)| / stride.

    Selection block j meets the compressed blocks from j*m/d - (l/d - 1) to (j+1)*m/d - 1, with
    the same weights for every j; a dense W would not fit into memory for long sequences.
    """
    ratio, lead = select_block // stride, block // stride - 1
    padded = torch.nn.functional.pad(p, (lead, total * ratio - p.shape[-1]))
    scores = p.new_zeros(*p.shape[:-1], total)
    for tap in range(lead + ratio):
        start = (tap - lead) * stride
        shared = min(start + block, select_block) - max(start, 0)
        scores.add_(padded[..., tap::ratio][..., :total], alpha=shared / stride)
    return scores


def exact_scores(values: Mapping[str, Any]) -> Tensor:
    """Float64 ranked scores of a call, `[B, S, Hkv, Ns]` (-inf behind short packed sequences)."""
    v = dict(values)
    q, k_cmp = v["q"].double().cpu(), v["k_cmp"].double().cpu()
    m = v["select_block"]
    total = common.selection_blocks(v["kv_len"], m)
    out = torch.full((*q.shape[:2], k_cmp.shape[2], total), -math.inf, dtype=torch.float64)
    chunks = ranked_scores(
        q, k_cmp, v["lse"].double().cpu(), v["kv_len"], v["block"], v["stride"], m,
        v["num_initial"], v["num_local"], common.default_scale(v["scale"], q),
        v["cu_seqlens_q"], v["cu_seqlens_k"],
    )  # fmt: skip
    for rows, scores in chunks:
        out[:, rows, :, : scores.shape[-1]] = scores
    return out


def derive(bound: Bound) -> None:
    compressed_attention.derive(bound)


def inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """q, k_cmp and the lse that compressed attention gives in float64."""
    values = compressed_attention.inputs(case, gen)
    known = {
        name: case.scalars[name] for name in ("block", "stride", "scale") if name in case.scalars
    }
    v_cmp = values.pop("v_cmp")
    exact = {**values, "q": values["q"].double(), "k_cmp": values["k_cmp"].double()}
    _, lse = compressed_attention.compressed_attention(v_cmp=v_cmp.double(), **exact, **known)
    return {**values, "lse": lse}


def cost(bound: Bound) -> Cost:
    """The scores' QK matmul; compared to it the top-n is free of FLOPs."""
    pairs = compressed_attention._pairs(bound)
    return Cost(2 * pairs * int(bound["Hq"]) * int(bound["Dk"]), common.tensor_bytes(bound))


SMALL = {"block": 8, "stride": 4, "select_block": 16, "num_selected": 4}

SPEC = OpSpec(
    name="select_blocks",
    args=(
        TensorArg("q", "B S Hq Dk"),
        TensorArg("k_cmp", "B Nc Hkv Dk"),
        TensorArg("lse", "B S Hq", "stat"),
        *common.CU_SEQLENS,
        common.KV_LEN,
        common.BLOCK,
        common.STRIDE,
        *common.SELECTION,
        common.SCALE,
    ),
    returns=(Return("block_indices", "B S Hkv n", "i32"),),
    reference=select_blocks,
    derive=derive,
    check_values=common.check_cmp_rows,
    compare={"block_indices": TopKSet(exact_scores)},
    cases=grid(
        SMALL,
        (
            variant("several_tiles", "default_geometry", {"num_selected": 4}, queries=20),
            variant("several_tiles", "n_exceeds_blocks", {}, queries=20),
            variant("m_plus_1", "l_d_m_equal", {**SMALL, "block": 16, "stride": 16}),
            variant(
                "prefill_tail", "no_initial_one_local", {**SMALL, "num_initial": 0, "num_local": 1}
            ),
            variant("m_plus_1", "forced_only", {**SMALL, "num_selected": 3}),
            variant("prefill_tail", "custom_scale", {**SMALL, "scale": 0.3}),
            variant(
                "several_tiles", "three_to_one", {**SMALL, "block": 12, "stride": 4}, queries=20
            ),
            bench_case(65536),
        ),
    ),
    inputs=inputs,
    cost=cost,
)
