"""Decoding against paged caches: of the raw keys only what is chosen or near is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_neuron.backends.cpu.torch_mode.select_blocks import Geometry, compressed_and_selected
from nsa_neuron.backends.cpu.torch_mode.selected_attention import attend_gathered, block_tokens
from nsa_neuron.ops import common
from nsa_neuron.ops.gated_sum import gated_sum


def decode(
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
    window: int,
    scale: float | None = None,
    **scalars: Any,
) -> Tensor:
    """See `nsa_neuron.decode`."""
    geometry, factor = Geometry(**scalars), common.default_scale(scale, q)
    out = q.new_zeros(*q.shape[:3], v_cmp.shape[3])
    for b, tokens in enumerate(seqlens.tolist()):
        count = min(q.shape[1], tokens)
        if count == 0:
            continue
        rows = (slice(b, b + 1), slice(q.shape[1] - count, None))
        seg = common.Segment(slice(0, count), slice(0, tokens), tokens - count)
        blocks = int(common.compressed_blocks(tokens, geometry.block, geometry.stride))
        all_blocks = torch.arange(blocks)[None]
        k, v = (_gather(pool, cmp_table[b], all_blocks) for pool in (k_cmp, v_cmp))
        o_cmp, ids = compressed_and_selected(q[rows], k, v, geometry, [seg], factor)
        t = torch.arange(seg.offset, tokens)[:, None]
        chosen = block_tokens(ids[0], geometry.select_block)  # [S, Hkv, n*m]
        o_slc = _attend(q[rows], (k_slc, v_slc), slc_table[b], chosen, t[..., None], factor)
        near = (t - torch.arange(window)).clamp_(min=-1)[:, None].expand(-1, k.shape[2], -1)
        o_win = _attend(q[rows], (k_win, v_win), win_table[b], near, t[..., None], factor)
        out[rows] = gated_sum(o_cmp, o_slc, o_win, gates[rows])
    return out


def _attend(
    q: Tensor, pools: tuple[Tensor, Tensor], pages: Tensor, token: Tensor, t: Tensor, scale: float
) -> Tensor:
    """Attention to tokens `[S, Hkv, K]` of a sequence; those below 0 or after t are not seen."""
    hidden = (token < 0) | (token > t)
    # What is hidden may lie in no page: its place is the query's own token.
    token = torch.where(hidden, t, token)
    head = torch.arange(token.shape[1])[:, None]
    page = pools[0].shape[1]
    at = (pages.long()[token // page], token % page, head)
    k, v = (pool[at][None] for pool in pools)
    return attend_gathered(q, k, v, hidden[None], scale)[0]


def _gather(pool: Tensor, pages: Tensor, row: Tensor) -> Tensor:
    """Rows `[1, N]` of one sequence out of a pool, `[1, N, Hkv, D]`."""
    page = pool.shape[1]
    return pool[pages.long()[row // page], row % page]
