"""Float64 attention under a dense mask, with gradients, and what the tests of its kernels share."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on
GOLDEN = Path(__file__).with_name("golden")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
"""Largest error relative to max(1, largest value): a few roundings of the dtype."""


@dataclass(frozen=True)
class Problem:
    """q [B, S, Hq, Dk], k, v [B, T, Hkv, D] and gradients of o and lse, as one dtype sees them."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_o: Tensor
    grad_lse: Tensor
    scale: float

    @classmethod
    def random(
        cls, batch: int, queries: int, keys: int, kv_heads: int, group: int, dk: int, dv: int,
        dtype: torch.dtype = torch.float32, scale: float = 0.3, spread: float = 1.0, seed: int = 0,
    ) -> Problem:  # fmt: skip
        gen = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
        heads = kv_heads * group
        return cls(
            (rand(batch, queries, heads, dk) * spread).to(dtype),
            rand(batch, keys, kv_heads, dk).to(dtype),
            rand(batch, keys, kv_heads, dv).to(dtype),
            rand(batch, queries, heads, dv).to(dtype),
            rand(batch, queries, heads),
            scale,
        )


Masks = "Sequence[tuple[slice, slice, Tensor]]"
"""Per sequence: its queries, its keys, who sees whom [B, Hq, queries, keys] (broadcast)."""


def expected(problem: Problem, masks: Masks) -> tuple[Tensor, ...]:
    """o, lse, dq, dk, dv in float64. Rows that see nothing: 0 and -inf, no gradient."""
    q, k, v = (x.double().requires_grad_() for x in (problem.q, problem.k, problem.v))
    o = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    loss = (q.sum() + k.sum() + v.sum()) * 0.0
    for queries, keys, seen in masks:
        k_seq, v_seq = (x[:, keys].repeat_interleave(group, 2) for x in (k, v))
        logits = torch.einsum("bshd,bthd->bhst", q[:, queries], k_seq) * problem.scale
        seen = seen.expand_as(logits)
        alive = seen.any(-1, keepdim=True)
        logits = logits.masked_fill(~seen, float("-inf")).masked_fill(~alive, 0.0)
        o_seq = torch.einsum("bhst,bthd->bshd", logits.softmax(-1) * alive, v_seq)
        lse_seq = logits.logsumexp(-1)
        loss = loss + (o_seq * problem.grad_o[:, queries].double()).sum()
        grad_lse = problem.grad_lse[:, queries].double().transpose(1, 2)
        loss = loss + (lse_seq * grad_lse * alive[..., 0]).sum()
        o[:, queries] = o_seq.detach()
        dead = ~alive[..., 0]
        lse[:, queries] = lse_seq.detach().masked_fill(dead, float("-inf")).transpose(1, 2)
    return o, lse, *torch.autograd.grad(loss, (q, k, v))


def causal(queries: int, keys: int, window: int = 0) -> Tensor:
    """[queries, keys]: key <= query, and among the last `window` keys where window > 0."""
    query = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)[None, :]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Same infinities, no NaN, and errors within `tolerance` of max(1, largest value)."""
    assert not got.isnan().any()
    assert got.isinf().equal(want.isinf())
    finite = want[want.isfinite()]
    bound = tolerance * max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=bound)


def check(
    problem: Problem,
    masks: Masks,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    tolerance: float = 0.0,
) -> None:
    """Runs forward(q, k, v) and backward(grad_o, q, k, v, o, lse, grad_lse) against `expected`.

    `tolerance`: default that of the dtype.
    """
    tolerance = tolerance or TOLERANCE[problem.q.dtype]
    q, k, v = problem.q, problem.k, problem.v
    o, lse = forward(q, k, v, scale=problem.scale)
    grads = backward(problem.grad_o, q, k, v, o, lse, problem.grad_lse, scale=problem.scale)
    want = expected(problem, masks)
    assert o.dtype == q.dtype and lse.dtype == torch.float32
    close(o, want[0], tolerance)
    close(lse, want[1], 3e-6)
    for got, expect in zip(grads, want[2:], strict=True):
        assert got.dtype == q.dtype
        close(got, expect, tolerance)


def promised(count: int, dtype: torch.dtype) -> Tensor:
    """`count` zeros, whose memory the system promises and takes from nobody until it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)


def far_apart(x: Tensor, token_stride: int = 2**22 - 64) -> Tensor:
    """A [1, T, H, D] copy whose tokens lie `token_stride` elements apart.

    From T = 514 on, that is past 2^31; launchers copy what has larger strides than the default.
    """
    storage = promised(x.shape[1] * token_stride, x.dtype)
    return storage.as_strided(x.shape, (0, token_stride, x.shape[3], 1)).copy_(x)


def sequences(
    lengths_q: Sequence[int], lengths_k: Sequence[int]
) -> tuple[Tensor, Tensor, list[tuple[slice, slice]]]:
    """cu_seqlens_q, cu_seqlens_k and each sequence's slices of a packed batch."""
    cu_q = torch.tensor([0, *lengths_q]).cumsum(0).to(torch.int32)
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).to(torch.int32)
    ends = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    return cu_q, cu_k, [(slice(a, b), slice(c, d)) for a, b, c, d in ends]


def load_golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    """meta and arrays of a golden file."""
    with np.load(GOLDEN / name) as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
        return json.loads(str(archive["meta"])), arrays


def close_to_golden(meta: dict, arrays: dict[str, Tensor], name: str, got: Tensor) -> None:
    """Compares with output `name` of a golden file, at the rows that it stores (1e-5)."""
    for listed, rows in (("at_rows", "rows"), ("at_key_rows", "key_rows")):
        if name in meta.get(listed, ()):
            got = got[:, arrays[rows].long()]
    bound = 1e-5 * max(1.0, meta["max_abs"][name])
    torch.testing.assert_close(got, arrays[name], rtol=0, atol=bound)
