"""One forward pass against a cache: where new rows go, and where old ones lie, as tensors.

Every size of a decode step follows from the cache's own sizes and the number of new tokens, and
lengths are tensors, so a compiled step serves growing sequences without being compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nsa_neuron import functional as nsa
from nsa_neuron.errors import InvalidArgument, InvalidType

Pools = dict[str, tuple[Tensor, Tensor]]
Pair = tuple[Tensor, Tensor]


@dataclass
class Reads:
    """All rows of the active sequences of a pool, back to back.

    Attributes:
        rows: of the flattened pool, `[N * heads]` int64, see `PageTable`.
        edges: offsets of the sequences, `[active + 1]` int32.
    """

    rows: Tensor
    edges: Tensor


@dataclass
class Step:
    """What the layers of a model share in one forward pass.

    Attributes:
        shape: batch and new tokens of each sequence, B and S; sequences with fewer than S have
            them at the end of their row.
        whole: nothing was cached before and every sequence has S tokens, so that attention needs
            the new tokens only.
        positions: of the tokens, `[B, S]` int64; 0 where there is none.
        writes: rows for the new tokens by pool, each `[B * S * heads]` int64, see `PageTable`; of
            `cmp` for the blocks.
        unfinished: rows of the `raw` pool from the first block that was not complete, alike.
        block_ends: positions of the blocks' last tokens that `unfinished` gives, `[B, blocks]`.
        seqlens: tokens of each sequence with the new ones, `[B]` int32.
        tables: pages by pool, `[B, most]` int32.
        reads: by pool, if a layer attends through them rather than through `decode`; of `near`
            the rows of `win` that a query can see.
        queries: the given queries among the B * S; None: all. cu_queries: their offsets.
        few: whether NSA layers use `decode`.
        open: False once its `with` block has ended.
        layers: one per layer of the model.
    """

    shape: tuple[int, int]
    whole: bool
    positions: Tensor
    writes: dict[str, Tensor]
    unfinished: Tensor
    block_ends: Tensor
    seqlens: Tensor
    tables: dict[str, Tensor]
    reads: dict[str, Reads]
    queries: Tensor | None
    cu_queries: Tensor
    few: bool
    open: bool = True
    layers: list[LayerStep] = field(default_factory=list)


@dataclass
class LayerStep:
    """A step as one layer sees it.

    Attributes:
        step: what all layers share.
        pools: this layer's keys and values by pool, each `[pages, page, Hkv, D]`, in memory so or
            as `[pages, Hkv, page, D]`.
        alias: the pool that holds a branch's raw rows: its own, or one that branches share.
    """

    step: Step
    pools: Pools
    alias: Mapping[str, str]

    @property
    def whole(self) -> bool:
        """Attention needs the new tokens only."""
        return self.step.whole

    @property
    def positions(self) -> Tensor:
        """Of the tokens, `[B, S]` int64."""
        return self.step.positions

    @property
    def block_ends(self) -> Tensor:
        """Positions of the last tokens of the blocks that `unfinished` gives."""
        return self.step.block_ends

    def check(self, x: Tensor) -> None:
        """x has the step's batch, tokens and device.

        Raises:
            InvalidArgument: it has not.
        """
        if not self.step.open:
            raise InvalidArgument("cache step", "step", "over", "used inside its `with` block")
        if tuple(x.shape[:2]) != self.step.shape:
            found = f"of {x.shape[0]} sequences and {x.shape[1]} tokens"
            b, s = self.step.shape
            raise InvalidArgument("cache step", "x", found, f"of the {b} and {s} of the step")
        if x.device != self.positions.device:
            expected = f"on {self.positions.device} like the cache"
            raise InvalidArgument("cache step", "x", f"on {x.device}", expected)

    def store(self, **new: Pair) -> None:
        """Writes new tokens' raw keys and values `[B, S, Hkv, D]` by branch: cmp, slc, win.

        They are stored without their graph: no gradient flows into a cache.

        Raises:
            InvalidType: their dtype is not the cache's.
        """
        done = set()
        for branch, pair in new.items():
            name = self.alias["raw" if branch == "cmp" else branch]
            if name not in done:
                self._write(name, self.step.writes[name], pair)
                done.add(name)

    def store_blocks(self, k_cmp: Tensor, v_cmp: Tensor) -> None:
        """Writes the compressed blocks that the new tokens complete, `[B, blocks, Hkv, D]`."""
        self._write("cmp", self.step.writes["cmp"], (k_cmp, v_cmp))

    def unfinished(self) -> Pair:
        """Raw rows from the first block that was incomplete, `[B, L, Hkv, D]`."""
        b = self.step.shape[0]
        k, v = (self._rows(x, self.step.unfinished) for x in self.pools[self.alias["raw"]])
        return k.unflatten(0, (b, -1)), v.unflatten(0, (b, -1))

    def attend(self, q: Tensor, gates: Tensor, geometry: dict[str, Any]) -> Tensor:
        """NSA of the new queries against everything cached, `[B, S, Hq, Dv]`."""
        slc, win, tables = self.alias["slc"], self.alias["win"], self.step.tables
        if self.step.few:
            return nsa.decode(
                q, *self.pools["cmp"], *self.pools[slc], *self.pools[win], gates,
                self.step.seqlens, tables["cmp"], tables[slc], tables[win], **geometry,
            )  # fmt: skip
        (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = (
            [self._rows(x, self.step.reads[name].rows)[None] for x in self.pools[name]]
            for name in ("cmp", slc, win)
        )
        o = nsa.nsa_attention(
            self._given(q), k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, self._given(gates),
            self.step.cu_queries, self.step.reads[slc].edges, **geometry,
        )  # fmt: skip
        return self._placed(o)

    def attend_raw(self, q: Tensor, branch: str, attend: Callable[..., Tensor]) -> Tensor:
        """Softmax attention of the new queries against raw rows of a branch.

        Args:
            q: `[B, S, Hq, Dk]`.
            branch: `slc`: all tokens; `win`: those that a window can hold.
            attend: o of q, k, v, cu_seqlens_q, cu_seqlens_k.
        """
        reads = self.step.reads["near" if branch == "win" else branch]
        k, v = (self._rows(x, reads.rows)[None] for x in self.pools[self.alias[branch]])
        return self._placed(attend(self._given(q), k, v, self.step.cu_queries, reads.edges))

    def _write(self, name: str, rows: Tensor, pair: Pair) -> None:
        for pool, new in zip(self.pools[name], pair, strict=True):
            if new.dtype != pool.dtype:
                expected = f"{pool.dtype} like the cache (under autocast, make it with that dtype)"
                raise InvalidType("cache step", "x", f"giving {new.dtype}", expected)
            flat = _flat(pool)
            flat.index_copy_(0, rows, new.detach().reshape(-1, flat.shape[1]))

    @staticmethod
    def _rows(pool: Tensor, rows: Tensor) -> Tensor:
        return _flat(pool).index_select(0, rows).view(-1, *pool.shape[2:])

    def _given(self, x: Tensor) -> Tensor:
        """The step's real tokens of `[B, S, ...]`, back to back: `[1, N, ...]`."""
        flat = x.flatten(0, 1)
        return (flat if self.step.queries is None else flat[self.step.queries])[None]

    def _placed(self, o: Tensor) -> Tensor:
        """The inverse of `_given`; zero where there is no token."""
        flat, (b, s) = o[0], self.step.shape
        if self.step.queries is not None:
            flat = flat.new_zeros(b * s, *flat.shape[1:]).index_copy(0, self.step.queries, flat)
        return flat.view(b, s, *flat.shape[1:])


def _flat(pool: Tensor) -> Tensor:
    """The rows of a pool as `PageTable` counts them, of all kv heads or of one: a view."""
    if pool.is_contiguous():
        return pool.view(-1, pool.shape[2] * pool.shape[3])
    return pool.transpose(1, 2).view(-1, pool.shape[3])


def place(values: object, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Host integers as a tensor."""
    return torch.as_tensor(values, dtype=dtype).to(device)
