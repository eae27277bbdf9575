"""Float64 statements of compression, compressed attention, importance and selection (dense, slow).

One sequence at a time: q [S, Hq, Dk], keys [N, Hkv, D]. The queries are the last S of T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(x: Tensor, heads: int) -> Tensor:
    """[N, Hkv, D] -> [N, Hq, D]: query head h reads kv head h // G."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def blocks_of(tokens: int, block: int, stride: int) -> int:
    return max(0, (tokens - block) // stride + 1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float):
    """o [S, Hq, Dv], lse [S, Hq] and p [Hq, S, N]; seen is [S, N] or [Hq, S, N]."""
    k, v = expand(k, q.shape[1]), expand(v, q.shape[1])
    logits = torch.einsum("shd,nhd->hsn", q, k) * scale
    seen = seen.expand_as(logits)
    alive = seen.any(-1, keepdim=True)
    logits = logits.masked_fill(~seen, float("-inf")).masked_fill(~alive, 0.0)
    p = logits.softmax(-1) * alive
    lse = (logits.logsumexp(-1) if logits.shape[-1] else logits.sum(-1)).masked_fill(
        ~alive[..., 0], float("-inf")
    )
    return torch.einsum("hsn,nhd->shd", p, v), lse.T, p


def compressed_mask(queries: int, tokens: int, block: int, stride: int) -> Tensor:
    position = torch.arange(tokens - queries, tokens)
    last = torch.arange(blocks_of(tokens, block, stride)) * stride + block - 1
    return last[None, :] <= position[:, None]


def importance(p: Tensor, kv_heads: int, tokens: int, block: int, stride: int, m: int) -> Tensor:
    """p [Hq, S, Nc] -> scores [S, Hkv, Ns], from the definition of W by token sets."""
    begin = torch.arange(p.shape[-1])[:, None] * stride
    select = torch.arange(-(-tokens // m))[None, :] * m
    overlap = torch.minimum(begin + block, select + m) - torch.maximum(begin, select)
    weights = overlap.clamp(min=0).to(p.dtype) / stride
    return torch.einsum("hgsi,ij->shj", p.unflatten(0, (kv_heads, -1)), weights)


def select(scores: Tensor, tokens: int, m: int, n: int, initial: int, local: int) -> Tensor:
    """ids [S, Hkv, n] int32, one row at a time as rule 4 says it."""
    queries, kv_heads, _ = scores.shape
    ids = torch.full((queries, kv_heads, n), -1, dtype=torch.int32)
    for s in range(queries):
        own = (tokens - queries + s) // m
        forced = set(range(min(initial, own + 1))) | set(range(max(0, own - local + 1), own + 1))
        free = [j for j in range(own + 1) if j not in forced]
        for h in range(kv_heads):
            row = scores[s, h].tolist()
            best = sorted(free, key=lambda j, row=row: (-row[j], j))[: n - len(forced)]
            chosen = sorted(forced | set(best))
            ids[s, h, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return ids
