"""The record of a call that kernels take: `src/call.h`, field by field, and how it is filled."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

FEW_QUERIES = 8
"""Queries of a sequence up to which the kernel for a few queries runs: a decode step, or one that
checks drafted tokens. Above, packing the keys pays."""

Run = tuple[slice, slice, int]
"""A sequence: its query rows, its key rows, the position of its first query."""
EVERYTHING = 2**62
"""A window that hides nothing."""


_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Rows(ctypes.Structure):
    """Where a tensor `[batch, token, head, channel]` lies; strides in elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """The rows of a tensor as `float_rows` or `near_rows` gives it."""
        batch, token, head = x.stride()[:3]
        # The stride of an only token may be anything, but products ask for one that is legal.
        return cls(x.data_ptr(), batch, max(token, x.shape[3]), head, _TYPES[x.dtype])


class SequenceRecord(ctypes.Structure):
    """See `Sequence` in `src/call.h`."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("q_first", "q_count", "k_first", "k_count", "offset")
    )


_ROWS = ("q", "k", "v", "o", "grad_o", "dq", "dk", "dv")


class Call(ctypes.Structure):
    """See `Call` in `src/call.h`."""

    _fields_ = (
        *((name, Rows) for name in _ROWS),
        ("sequences", ctypes.POINTER(SequenceRecord)),
        *(
            (name, ctypes.c_int64)
            for name in (
                "sequence_count", "batch", "queries", "kv_heads", "group", "dk_dim", "dv_dim",
            )
        ),
        ("scale", ctypes.c_double),
        ("length", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("gates", ctypes.c_void_p),
        ("branch", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("select_block", ctypes.c_int64),
        ("selected", ctypes.c_int64),
        ("initial", ctypes.c_int64),
        ("local", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("pages", ctypes.c_int64),
        ("page", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
    )  # fmt: skip


def float_rows(x: Tensor) -> Tensor:
    """A float32 tensor `[batch, token, head, channel]` whose channels are adjacent and whose tokens
    do not overlap, as products need it; the given one where it is that."""
    return near_rows(x.float())


def near_rows(x: Tensor) -> Tensor:
    """The same in its own dtype, as the kernel for a few queries reads keys and values."""
    apart = x.shape[1] == 1 or x.stride(1) >= x.shape[3]
    return x if x.stride(3) == 1 and apart else x.contiguous()


def few(q: Tensor, runs: Sequence[Run]) -> bool:
    """Whether a call of so many queries is one for `few_queries`."""
    return len(runs) == 1 and q.shape[1] <= FEW_QUERIES


def new_call(q: Tensor, k: Tensor, v: Tensor | None, runs: Sequence[Run], scale: float) -> Call:
    """A call of q `[B, S, Hq, Dk]` with keys and values of `runs`; all as `float_rows` gives them.

    The caller keeps the tensors alive, and sets what its kernel needs besides.
    """
    records = (SequenceRecord * len(runs))(
        *(
            SequenceRecord(
                rows.start, rows.stop - rows.start, keys.start, keys.stop - keys.start, offset
            )
            for rows, keys, offset in runs
        )
    )
    b, s, hq, dk = q.shape
    call = Call(
        q=Rows.of(q), k=Rows.of(k), sequences=records, sequence_count=len(runs), batch=b, queries=s,
        kv_heads=k.shape[2], group=hq // k.shape[2], dk_dim=dk, scale=scale, length=1, stride=1,
        window=EVERYTHING, pages=b, page=max(1, k.shape[1]),
    )  # fmt: skip
    if v is not None:
        call.v, call.dv_dim = Rows.of(v), v.shape[3]
    return call


def new_results(q: Tensor, dv: int) -> tuple[Tensor, Tensor]:
    """Uninitialised o `[B, S, Hq, Dv]` and lse `[B, S, Hq]`, float32."""
    o = torch.empty(*q.shape[:3], dv, dtype=torch.float32)
    return o, torch.empty(q.shape[:3], dtype=torch.float32)
