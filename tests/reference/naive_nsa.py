"""The contract once more, written to be obviously right: one query, one head, one key at a time.

Nothing here is shared with `nsa_neuron`. Everything is float64 and differentiable by autograd;
sequences are `[S, H, D]` without batch, and packed calls are loops over sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Visible = Callable[[int, int], Sequence[int]]  # (t, kv head) -> keys


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, first: int, scale: float | None):
    """Softmax attention of q `[S, Hq, Dk]` to k, v `[T, Hkv, D]`; query row s is at first + s."""
    s, hq, dk = q.shape
    group = hq // k.shape[1]
    scale = dk**-0.5 if scale is None else scale
    outs, lses = [], []
    for row in range(s):
        for h in range(hq):
            keys = list(visible(first + row, h // group))
            if not keys:
                outs.append(v.new_zeros(v.shape[-1]))
                lses.append(v.new_tensor(-math.inf))
                continue
            logits = torch.stack([q[row, h] @ k[j, h // group] for j in keys]) * scale
            top = logits.max().detach()
            weights = (logits - top).exp()
            total = weights.sum()
            outs.append((weights / total) @ torch.stack([v[j, h // group] for j in keys]))
            lses.append(total.log() + top)
    return torch.stack(outs).view(s, hq, -1), torch.stack(lses).view(s, hq)


def causal(t: int, head: int) -> range:
    return range(t + 1)


def windowed(w: int) -> Visible:
    return lambda t, head: [j for j in range(t + 1) if t - w < j]


def complete(l: int, d: int, total: int) -> Visible:
    """Compressed blocks whose last token is not after t."""
    count = len(block_starts(total, l, d))
    return lambda t, head: [i for i in range(count) if i * d + l - 1 <= t]


def chosen(ids: Tensor, m: int, first: int) -> Visible:
    """Tokens of the blocks in ids `[S, Hkv, n]` that are not after t."""

    def keys(t: int, head: int) -> list[int]:
        blocks = [int(j) for j in ids[t - first, head] if j >= 0]
        return [x for j in blocks for x in range(j * m, (j + 1) * m) if x <= t]

    return keys


def block_starts(total: int, l: int, d: int) -> list[int]:
    """First tokens of the complete compression blocks."""
    return [start for start in range(0, total, d) if start + l <= total]


def compress(x: Tensor, phi: Callable[[Tensor, int], Tensor], l: int, d: int) -> Tensor:
    """x `[T, H, D]`; phi maps a block's tokens `[l, D]` of a head to `[D]`."""
    starts = block_starts(len(x), l, d)
    rows = [phi(x[a : a + l, h], h) for a in starts for h in range(x.shape[1])]
    return torch.stack(rows).view(len(starts), *x.shape[1:]) if rows else x[:0]


def importance(
    q: Tensor, k_cmp: Tensor, total: int, first: int, l: int, d: int, m: int, scale: float | None
) -> list[list[list[float]]]:
    """p_slc[row][kv head][j], by counting the tokens that two blocks share."""
    s, hq, dk = q.shape
    hkv, see = k_cmp.shape[1], complete(l, d, total)
    scale = dk**-0.5 if scale is None else scale
    table = []
    for row in range(s):
        table.append([[0.0] * math.ceil(total / m) for _ in range(hkv)])
        for h in range(hq):
            kv = h // (hq // hkv)
            keys = see(first + row, kv)
            if not keys:
                continue
            p = torch.stack([q[row, h] @ k_cmp[i, kv] * scale for i in keys]).softmax(0)
            for i, weight in zip(keys, p.tolist(), strict=True):
                for token in range(i * d, i * d + l):
                    table[row][kv][token // m] += weight / d
    return table


def select(
    scores: list[list[list[float]]], first: int, m: int, n: int, initial: int = 1, local: int = 2
) -> list[list[list[int]]]:
    """Ids by rule 4; ties go to the lowest id."""
    out = []
    for row, heads in enumerate(scores):
        own = (first + row) // m
        out.append([])
        for values in heads:
            legal = range(own + 1)
            forced = [j for j in legal if j < initial or own - local < j <= own]
            rest = sorted((j for j in legal if j not in forced), key=lambda j: (-values[j], j))
            ids = sorted((forced + rest)[:n])
            out[-1].append(ids + [-1] * (n - len(ids)))
    return out


def gated(branches: Sequence[Tensor], gates: Tensor) -> Tensor:
    return sum(gates[..., c, None] * branch for c, branch in enumerate(branches))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
