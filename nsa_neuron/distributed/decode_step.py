"""One decode step against caches that are spread over ranks, as attention layers see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron import functional as nsa
from nsa_neuron.distributed.exchange import gather
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.ops.softmax import work_dtype

if TYPE_CHECKING:
    import torch.distributed as dist

    from nsa_neuron.nn.attention import AttentionLayer

Pair = tuple[Tensor, Tensor]
SPARE = 32  # rows that memory grows by, at least


class Rows:
    """Keys and values of one branch, `[B, rows, H, D]`, in memory with room for more."""

    def __init__(self, first: Pair) -> None:
        self.count = first[0].shape[1]
        self._all = [x.contiguous() for x in first]

    def append(self, new: Pair) -> None:
        """Adds rows behind the last."""
        count = self.count + new[0].shape[1]
        if count > self._all[0].shape[1]:
            room = count + max(SPARE, count // 8) - self._all[0].shape[1]
            self._all = [F.pad(x, (0, 0, 0, 0, 0, room)) for x in self._all]
        for x, y in zip(self._all, new, strict=True):
            x[:, self.count : count] = y
        self.count = count

    def last(self, count: int) -> Pair:
        """The last rows, at most `count`."""
        first = max(0, self.count - count)
        k, v = (x[:, first : self.count] for x in self._all)
        return k, v

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(x.numel() * x.element_size() for x in self._all)


class Tail(Rows):
    """Of which only the last `most` are needed."""

    def __init__(self, first: Pair, most: int) -> None:
        super().__init__(first)
        self._most = most

    def append(self, new: Pair) -> None:
        if self.count >= 2 * self._most:
            super().__init__(tuple(x.clone() for x in self.last(self._most)))  # type: ignore[arg-type]
        super().append(new)


@dataclass
class Shared:
    """What the layers of a step share.

    Attributes:
        ranks: process group; None: one.
        tokens: cached, with those of the step.
        positions: of the step's tokens.
        own: ids of the blocks that this rank holds, ascending. writes: whether the step's token
            belongs to it.
    """

    ranks: dist.ProcessGroup | None
    tokens: int
    positions: Tensor
    own: Tensor
    writes: bool


@dataclass
class LayerStep:
    """One layer of a step, as attention layers use `nsa_neuron.nn.cache.LayerStep`."""

    shared: Shared
    layer: AttentionLayer
    whole: bool
    rows: dict[str, Rows]
    new: dict[str, Pair] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        return self.shared.positions

    @property
    def block_ends(self) -> Tensor:
        """The token's position, if it completes a block."""
        return self.positions if self._completes else self.positions[:0]

    @property
    def _completes(self) -> bool:
        c = self.layer.config
        behind = self.shared.tokens - c.block
        return behind >= 0 and behind % c.stride == 0

    def check(self, x: Tensor) -> None:
        """x has as many tokens as the step has positions."""
        if x.shape[1] != len(self.positions):
            expected = f"{len(self.positions)} tokens long"
            raise InvalidArgument("ContextCache", "x", f"{x.shape[1]} tokens long", expected)

    def store(self, **new: Pair) -> None:
        """New rows by branch: cmp, slc, win."""
        if self.whole:
            self.new = {k: (x.detach(), y.detach()) for k, (x, y) in new.items()}
            return
        for name, pair in new.items():
            if name != "slc" or self.shared.writes:
                self.rows[name].append(pair)

    def unfinished(self) -> Pair:
        """The rows of the block that the new token completes; too few for one if it does not."""
        block = self.layer.config.block
        return self.rows["cmp"].last(block if self._completes else block - 1)

    def store_blocks(self, k_cmp: Tensor, v_cmp: Tensor) -> None:
        """Adds the block that the new token completes; a prefill's are made when it is over."""
        if not self.whole:
            self.rows["blocks"].append((k_cmp, v_cmp))

    def attend(self, q: Tensor, gates: Tensor, geometry: dict[str, Any]) -> Tensor:
        """NSA of the new token, `[B, 1, Hq, Dv]`."""
        place: dict[str, Any] = {name: geometry[name] for name in ("block", "stride")}
        place["kv_len"] = self.shared.tokens
        k_cmp, v_cmp = self.rows["blocks"].last(self.rows["blocks"].count)
        o_cmp, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **place)
        names = ("select_block", "num_selected", "num_initial", "num_local")
        ids = nsa.select_blocks(q, k_cmp, lse, **place, **{n: geometry[n] for n in names})
        own, size = self._own_ids(ids), geometry["select_block"]

        def selected(k: Tensor, v: Tensor) -> Pair:
            return nsa.selected_attention(q, k, v, own, select_block=size)

        window = geometry["window"]
        near = self.rows["win"].last(window)
        o_win, _ = nsa.sliding_window_attention(q, *near, window=window)
        return nsa.gated_sum(o_cmp, self._together(q, selected), o_win, gates)

    def attend_raw(self, q: Tensor, branch: str, attend: Callable[..., Tensor]) -> Tensor:
        """Full or windowed attention of the new token."""
        if branch == "win":
            return attend(q, *self.rows["win"].last(self.layer.config.window))
        return self._together(q, lambda k, v: nsa.attention(q, k, v))

    def _own_ids(self, ids: Tensor) -> Tensor:
        """Places of the chosen blocks among the own ones, ascending, -1 behind."""
        own, none = self.shared.own, len(self.shared.own)
        if none == 0:
            return torch.full_like(ids, -1)
        place = torch.searchsorted(own, ids.long().clamp(min=0)).clamp(max=none - 1)
        place = place.masked_fill((own[place] != ids) | (ids < 0), none).sort(-1).values
        return place.masked_fill(place == none, -1).int()

    def _together(self, q: Tensor, attend: Callable[[Tensor, Tensor], Pair]) -> Tensor:
        """o of all ranks' keys, from each rank's o and lse of its own."""
        rows = self.rows["slc"]
        k, v = rows.last(rows.count)
        if rows.count:
            o, lse = attend(k, v)
        else:
            o = q.new_zeros(*q.shape[:3], v.shape[3])
            lse = torch.full_like(q[..., 0], -torch.inf, dtype=work_dtype(q))
        if self.shared.ranks is None:
            return o
        parts = gather(
            self.shared.ranks, torch.cat([o.to(lse.dtype), lse[..., None]], -1), "decode"
        )
        every = torch.stack(parts)
        lse = every[..., -1]
        weight = (lse - lse.amax(0)).nan_to_num(nan=-torch.inf).exp()
        total = weight.sum(0).clamp(min=torch.finfo(lse.dtype).tiny)
        summed = (every[..., :-1] * weight[..., None]).sum(0) / total[..., None]
        return summed.to(q.dtype)
