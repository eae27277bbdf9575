"""Heads first: the layout in which one matrix product serves the heads of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_neuron.ops.softmax import work_dtype

if TYPE_CHECKING:
    from torch import Tensor


def by_query(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, S, Hq, D]` -> `[B * Hkv, S, G, D]`, contiguous, in the work dtype; a view if it can."""
    grouped: Tensor = x.to(work_dtype(x)).unflatten(2, (kv_heads, -1))
    return grouped.transpose(1, 2).contiguous().flatten(0, 1)


def by_key(x: Tensor) -> Tensor:
    """`[B, T, Hkv, D]` -> `[B * Hkv, T, D]`, contiguous, in the work dtype; a view if it can."""
    return x.to(work_dtype(x)).transpose(1, 2).contiguous().flatten(0, 1)


def query_like(x: Tensor, like: Tensor) -> Tensor:
    """`[B * Hkv, S, G, D]` -> `[B, S, Hq, D]`, contiguous, in the dtype of `like`."""
    lanes, s, group, dim = x.shape
    b = like.shape[0]
    heads = x.view(b, lanes // b, s, group, dim).transpose(1, 2)
    return dense(heads.flatten(2, 3).to(like.dtype))


def key_like(x: Tensor, like: Tensor) -> Tensor:
    """`[B * Hkv, T, D]` -> `[B, T, Hkv, D]`, contiguous, in the dtype of `like`."""
    heads: Tensor = x.unflatten(0, (like.shape[0], -1))
    return dense(heads.transpose(1, 2).to(like.dtype))


def statistic(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, S, Hq]` -> `[B * Hkv, S, G]`, contiguous, in its own dtype."""
    grouped: Tensor = x.unflatten(2, (kv_heads, -1))
    return grouped.transpose(1, 2).contiguous().flatten(0, 1)


def statistic_like(x: Tensor, batch: int) -> Tensor:
    """`[B * Hkv, S, G]` -> `[B, S, Hq]`, contiguous."""
    heads: Tensor = x.unflatten(0, (batch, -1))
    return dense(heads.transpose(1, 2).flatten(2, 3))


def dense(x: Tensor) -> Tensor:
    """Contiguous, with the strides of a new tensor on axes of size 1 too, as fakes promise."""
    # The one axis of one element may keep any stride; no axis has none.
    flat = x.reshape(()) if x.numel() == 1 else x.contiguous().flatten()
    return flat.view(x.shape)
