"""From the books to the tensors of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from nsa_neuron.nn.cache.pages import NONE, Books, Ints, PageTable
from nsa_neuron.nn.cache.step import Reads, Step, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsa_neuron.nn.config import NsaConfig

MAX_DECODE = 32
"""New tokens per sequence up to which NSA layers use `decode`; more go through `nsa_attention`,
whose kernels share keys between neighbouring queries."""


class CacheLike(Protocol):
    """What of a cache a plan depends on."""

    config: NsaConfig
    kinds: tuple[str, ...]
    alias: dict[str, str]
    device: torch.device

    def blocks(self, tokens: Ints | int) -> Ints: ...


def plan_step(books: Books, old: Ints, counts: Ints, tokens: int, cache: CacheLike) -> Step:
    """The tensors of a step.

    Args:
        books: with room for the new tokens.
        old: lengths without them.
        counts: new tokens of each sequence.
        tokens: S.
        cache: whose step it is.
    """
    device, batch = cache.device, len(old)
    sequences = np.arange(batch)[:, None]
    columns = np.arange(tokens)[None]
    there = columns >= tokens - counts[:, None]
    positions = np.where(there, old[:, None] + counts[:, None] - tokens + columns, NONE)
    whole = bool((old == 0).all() and (counts == tokens).all())
    writes = {
        name: _rows(table, sequences, positions)
        for name, table in books.tables.items()
        if name != "cmp"
    }
    unfinished, ends = np.zeros((0,), dtype=np.int64), np.zeros((batch, 0), dtype=np.int64)
    if "nsa" in cache.kinds:
        count = int(cache.blocks(tokens)) if whole else -(-tokens // cache.config.stride)
        ids, starts, span = _new_blocks(cache, old, count)
        complete = ids < cache.blocks(books.lengths)[:, None]
        writes["cmp"] = _rows(books.tables["cmp"], sequences, np.where(complete, ids, NONE))
        raw = starts[:, None] + np.arange(span)[None]
        raw = np.where(raw < books.lengths[:, None], raw, NONE)
        unfinished = _rows(books.tables[cache.alias["raw"]], sequences, raw)
        ends = ids * cache.config.stride + cache.config.block - 1
    few = tokens <= MAX_DECODE
    reads = {} if whole else _reads(books, counts, cache, few)
    given = np.nonzero(there.reshape(-1))[0]
    return Step(
        shape=(batch, tokens),
        whole=whole,
        positions=place(np.maximum(positions, 0), device),
        writes={name: place(rows.reshape(-1), device) for name, rows in writes.items()},
        unfinished=place(unfinished.reshape(-1), device),
        block_ends=place(ends, device),
        seqlens=place(books.lengths, device, torch.int32),
        tables={
            name: place(np.maximum(table.table, 0), device, torch.int32)
            for name, table in books.tables.items()
        },
        reads=reads,
        queries=None if there.all() else place(given, device),
        cu_queries=place(_edges(counts[counts > 0]), device, torch.int32),
        few=few,
    )


def _new_blocks(cache: CacheLike, old: Ints, count: int) -> tuple[Ints, Ints, int]:
    """Ids of the next blocks of each sequence, the first's first token, and tokens they span."""
    first = cache.blocks(old)
    stride = cache.config.stride
    span = max(0, count - 1) * stride + cache.config.block if count else 0
    return first[:, None] + np.arange(count)[None], first * stride, span


def _reads(books: Books, counts: Ints, cache: CacheLike, few: bool) -> dict[str, Reads]:
    """What layers read that do not use `decode`."""
    wanted: dict[str, tuple[str, Ints, Ints]] = {}
    alias, lengths = cache.alias, books.lengths
    zero = np.zeros_like(lengths)
    if "full" in cache.kinds or ("nsa" in cache.kinds and not few):
        wanted["slc"] = ("slc", zero, lengths)
    if "nsa" in cache.kinds and not few:
        wanted[alias["win"]] = (alias["win"], zero, lengths)
        wanted["cmp"] = ("cmp", zero, cache.blocks(lengths))
    if "window" in cache.kinds:
        near = np.maximum(0, lengths - counts - cache.config.window + 1)
        wanted["near"] = (alias["win"], near, lengths)
    active = np.nonzero(counts)[0]
    return {
        name: _read(books.tables[pool], active, first, last, cache.device)
        for name, (pool, first, last) in wanted.items()
    }


def _read(table: PageTable, active: Ints, first: Ints, last: Ints, device: torch.device) -> Reads:
    """Rows first..last-1 of each active sequence; the zero page where they were given back."""
    zero_page = len(table.users) + 1
    rows = [table.rows(np.asarray(b), np.arange(first[b], last[b]), zero_page) for b in active]
    edges = _edges((last - first)[active])
    return Reads(place(np.concatenate(rows).reshape(-1), device), place(edges, device, torch.int32))


def _rows(table: PageTable, sequences: Ints, positions: Ints) -> Ints:
    """Rows to write; what has no place goes to the first spare page."""
    return table.rows(sequences, positions, len(table.users))


def _edges(counts: Ints | Sequence[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
