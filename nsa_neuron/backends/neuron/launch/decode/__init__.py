"""Launches `nki_kernels/decode`: new tokens against paged KV caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_neuron.backends.neuron.launch.decode import single
from nsa_neuron.backends.neuron.launch.decode.caches import PARTITIONS, Cache
from nsa_neuron.backends.neuron.launch.decode.rows import Rows
from nsa_neuron.backends.neuron.launch.ranges import positive_scale

if TYPE_CHECKING:
    from nsa_neuron.backends.neuron.plans import Plan
    from nsa_neuron.backends.neuron.run import Kernels

MIN_BLOCKS = 8
"""What VectorE's search for the largest wants at least."""

HELD_BYTES = 100_000
"""Of 212,984 bytes per partition, what logits and ranks of one sequence may take."""

OVERLAP_BYTES = 72_000
"""The same where two sequences overlap, whose keys and values fill the rest."""


def forward(
    kernels: Kernels,
    plan: Plan,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    seqlens: Tensor,
    cmp_table: Tensor,
    slc_table: Tensor,
    win_table: Tensor,
    *,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    window: int,
    scale: float,
) -> Tensor:
    """o [B, S, Hq, Dv] of q [B, S, Hq, Dk] against pools [pages, page, Hkv, D].

    As many queries at a time as 128 partitions hold with all heads of a group; one query of one or
    two kv heads in all goes through `single`, on one core as on two: the same bits.
    """
    q, scale = positive_scale(q, scale)
    queries, heads = q.shape[1:3]
    kv_heads = k_cmp.shape[2]
    if queries == 1 and q.shape[0] * kv_heads <= single.HEADS:
        alone = single.Call.of(
            heads // kv_heads, len(q) * kv_heads, (k_cmp, v_cmp, cmp_table),
            (k_slc, v_slc, slc_table), (k_win, v_win, win_table), block=block, stride=stride,
            size=select_block, selected=num_selected, window=window,
        )  # fmt: skip
        if alone is not None:
            return alone.run(
                kernels, q, gates, seqlens, kv_heads=kv_heads, block=block, stride=stride,
                initial=num_initial, local=num_local, window=window, scale=scale,
            )  # fmt: skip
    step = PARTITIONS // (heads // kv_heads)
    found = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        rows = Rows.of(q[:, start:stop], kv_heads, kernels.cores)
        # Sums are made row by row: rows are as long on two cores as on one, for the same bits.
        at_once = Rows.of(q[:, start:stop], kv_heads, 1).per_group
        far = Cache.of(k_cmp, v_cmp, cmp_table, at_once)
        near = Cache.of(k_win, v_win, win_table, at_once)
        blocks = Cache.of_blocks(
            k_slc, v_slc, slc_table, select_block, num_selected, rows.per_group
        )
        position = seqlens.long()[:, None] + torch.arange(
            start - queries, stop - queries, device=q.device
        )
        last_block = torch.div(position + 1 - block, stride, rounding_mode="floor")
        compressed = far.seen(far.numbers, torch.zeros_like(position), last_block)
        window_rows = near.of_window(position, window)
        own = torch.div(position, select_block, rounding_mode="floor")
        table = blocks.at_least(MIN_BLOCKS)
        base = torch.arange(len(table), device=q.device)[:, None] * table.shape[1]
        base = base.expand_as(position)
        gates_of_rows = rows.by_group(gates[:, start:stop].float())
        bounds = rows.per_row(torch.cat((compressed.bounds, window_rows.bounds), -1))
        bounds = bounds[:, None].expand(-1, gates_of_rows.shape[1], -1, -1)
        taken = min(num_selected, blocks.numbers.shape[1])
        parts = select_block // blocks.tokens
        (o,) = kernels.decode(
            rows.columns(q[:, start:stop]),
            torch.cat((compressed.index, window_rows.index), -1),
            torch.cat((compressed.kept, window_rows.kept), -1),
            torch.cat((gates_of_rows, bounds), -1).contiguous(),
            rows.per_pair(torch.stack((own, own - num_local, position + 1, base), -1)),
            table.view(-1, 1), rows.owners.to(q.device), rows.rows_of.to(q.device),
            torch.eye(taken, device=q.device).repeat_interleave(parts, 1),
            (torch.arange(PARTITIONS, device=q.device) % parts)[:, None].float(),
            far.k, far.v, blocks.k, blocks.v, near.k, near.v, step=blocks.step,
            apart=(far.apart, blocks.apart, near.apart), rows=(compressed.rows, window_rows.rows),
            length=block // stride, ratio=select_block // stride, chosen=taken,
            initial=num_initial, scale=scale,
            per_body=sequences_at_once(compressed.rows * far.tokens, table.shape[1], q),
        )  # fmt: skip
        found.append(rows.heads(o))
    return torch.cat(found, 1)


def sequences_at_once(keys: int, blocks: int, q: Tensor) -> int:
    """Sequences that overlap in one program: what SBUF has room for; 0: not even for the logits of
    one.

    Args:
        keys: of the compressed branch. blocks: that are ranked.
    """
    # Logits, exponentials in two forms, and ranks twice; the next one's logits.
    one = keys * (8 + q.element_size()) + 8 * blocks
    if one > HELD_BYTES:
        return 0
    return 4 if one + 4 * keys <= OVERLAP_BYTES // (2 if q.element_size() == 4 else 1) else 1
