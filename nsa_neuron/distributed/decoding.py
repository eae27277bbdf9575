"""Prefill and decode of long contexts whose keys and values are spread over ranks.

    cache = ContextCache(model, mesh)
    logits = cache.prefill(tokens)
    logits = cache.step(next_token)

The selected branch's rows, nearly all of a cache, lie on the rank that computed them, new blocks on
the rank with the fewest. Compressed blocks, 1 / stride of them, are everywhere, so that every rank
chooses the same blocks, attends to those that it holds, and only sends a partial result: `Hq * (Dv
+ 1)` numbers per sequence and layer. Windows and unfinished blocks are everywhere, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.distributed.context_parallel import (
    attention_layers,
    context_parallel,
    group_of,
    shard,
)
from nsa_neuron.distributed.decode_step import LayerStep, Pair, Rows, Shared, Tail
from nsa_neuron.distributed.exchange import exchange, gather
from nsa_neuron.distributed.layout import Geometry, group
from nsa_neuron.distributed.spread import Spread
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.attention import NativeSparseAttention
from nsa_neuron.ops.common import compressed_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from nsa_neuron.nn.model import ByteLanguageModel


@dataclass
class _Step:
    """What a model takes as a step of a cache."""

    layers: list[LayerStep]


class ContextCache:
    """Keys and values of sequences of one length, spread over ranks.

    Args:
        model: whose layers become context parallel.
        mesh: of one dimension.
    """

    def __init__(self, model: ByteLanguageModel, mesh: DeviceMesh) -> None:
        context_parallel(model, mesh)
        self.model, self.mesh = model, mesh
        self.ranks = group_of(mesh, "ContextCache")
        self.place = (0, 1) if self.ranks is None else (self.ranks.rank(), self.ranks.size())
        self.tokens = 0
        self.layers = attention_layers(model, "ContextCache")
        self._rows: list[dict[str, Rows]] = []
        self._owners: list[int] = []  # of each selection block

    @property
    def nbytes(self) -> int:
        """Memory of this rank's rows in bytes."""
        return sum(rows.nbytes for layer in self._rows for rows in layer.values())

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits `[B, V]` behind the last token; every rank calls this with the same tokens.

        Args:
            tokens: `[B, T]`.

        Raises:
            InvalidArgument: something is cached already.
        """
        if self.tokens:
            expected = "empty; later tokens come one at a time, see step"
            raise InvalidArgument("prefill", "cache", f"{self.tokens} tokens long", expected)
        rank, world = self.place
        count, size = tokens.shape[1], self.model.config.select_block
        each = -(-count // (world * size)) * size
        padded = F.pad(tokens, (0, world * each - count))
        positions = torch.arange(rank * each, (rank + 1) * each, device=tokens.device)
        shared = Shared(self.ranks, count, positions, positions[:0], False)
        step = _Step([LayerStep(shared, layer, True, {}) for layer in self.layers])
        given: Any = step
        hidden = self.model.hidden(shard(padded, self.mesh), given)
        self.tokens = count
        self._owners = [i * size // each for i in range(-(-count // size))]
        self._rows = [self._kept(layer, each) for layer in step.layers]
        last = count - 1 - rank * each
        row = hidden[:, last : last + 1] if 0 <= last < each else hidden[:, :0]
        return self._logits(self._spread_out([row])[0])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits `[B, V]` behind one more token of each sequence, `[B, 1]`.

        Raises:
            InvalidArgument: nothing is cached, or another number of tokens.
        """
        if not self.tokens or tokens.shape[1] != 1:
            expected = "one token per sequence, behind a prefill"
            raise InvalidArgument("step", "tokens", f"of shape {list(tokens.shape)}", expected)
        rank, world = self.place
        size = self.model.config.select_block
        if self.tokens % size == 0:
            held = [self._owners.count(r) for r in range(world)]
            self._owners.append(held.index(min(held)))
        own = [i for i, owner in enumerate(self._owners) if owner == rank]
        shared = Shared(
            self.ranks,
            self.tokens + 1,
            torch.tensor([self.tokens], device=tokens.device),
            torch.tensor(own, device=tokens.device),
            self._owners[-1] == rank,
        )
        given: Any = _Step(
            [
                LayerStep(shared, layer, False, rows)
                for layer, rows in zip(self.layers, self._rows, strict=True)
            ]
        )
        hidden = self.model.hidden(tokens, given)
        self.tokens += 1
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.head(self.model.norm(hidden))
        return logits[:, -1]

    def _kept(self, step: LayerStep, each: int) -> dict[str, Rows]:
        """What of a prefill's rows this rank keeps."""
        c, rank = step.layer.config, self.place[0]
        new, low = step.new, rank * each
        rows: dict[str, Rows] = {}
        if "slc" in new:
            k, v = (x[:, : max(0, self.tokens - low)] for x in new["slc"])
            rows["slc"] = Rows((k, v))
        for name, most in (("win", c.window), ("cmp", c.block)):
            if name in new:
                first = max(0, self.tokens - most)
                part = slice(max(0, first - low), max(0, self.tokens - low))
                k, v = self._spread_out([x[:, part] for x in new[name]])
                rows[name] = Tail((k, v), most)
        if isinstance(step.layer, NativeSparseAttention):
            rows["blocks"] = Rows(self._blocks(step.layer, new["cmp"], each))
        return rows

    def _blocks(self, layer: NativeSparseAttention, raw: Pair, each: int) -> Pair:
        """Compressed blocks of all real tokens."""
        c, (rank, world) = layer.config, self.place
        layouts = group(rank, world, each, Geometry(c.block, c.stride, c.window))
        needs = [layout.compressed for layout in layouts.layouts]
        spread = Spread(self.ranks, rank, layouts.token_bounds, needs)
        k, v = spread.assemble(spread.fetch(raw, "halo"), raw)
        made = layer.compress(k, v, torch.tensor(layouts.own.block_ends, device=k.device))
        count = int(compressed_blocks(self.tokens, c.block, c.stride))
        k_cmp, v_cmp = (x[:, :count] for x in self._spread_out(list(made)))
        return k_cmp, v_cmp

    def _spread_out(self, own: list[Tensor]) -> list[Tensor]:
        """The rows of all ranks one behind the other, everywhere."""
        if self.ranks is None:
            return own
        rank, world = self.place
        counts = torch.cat(
            gather(self.ranks, torch.tensor([own[0].shape[1]], device=own[0].device), "rows")
        ).tolist()
        shapes = [
            [(x.shape[0], 0 if r == rank else counts[r], *x.shape[2:]) for x in own]
            for r in range(world)
        ]
        send = [[x[:, :0] if r == rank else x for x in own] for r in range(world)]
        parts = exchange(self.ranks, send, shapes, own[0], "rows").wait()
        parts[rank] = own
        return [torch.cat(pieces, 1) for pieces in zip(*parts, strict=True)]
