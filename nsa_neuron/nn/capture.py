"""Looking inside: what chosen queries of each NSA layer select, and what each branch gives them.

    with capture(model, queries=[100, 8191]) as found:
        model(tokens)
    found[0].queries[8191].block_indices

Layers that nobody captures pay one comparison per call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nsa_neuron import functional as nsa
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.fields import check_int
from nsa_neuron.nn.attention import NativeSparseAttention
from nsa_neuron.ops.common import compressed_blocks, default_scale, selection_blocks
from nsa_neuron.ops.select_blocks import overlap_sum


@dataclass
class CapturedQuery:
    """One query position, for every sequence of the batch.

    Attributes:
        block_indices: selected blocks, relative to the sequence, `[B, Hkv, n]` int32; -1: none.
        importance: of every selection block, summed over the group's heads, `[B, Hkv, Ns]`.
        compressed: probabilities of the compressed blocks, `[B, Hq, Nc]`.
        window: probabilities of the window's tokens, oldest first, `[B, Hq, tokens]`.
        gates: `[B, Hq, 3]`; compressed, selected, window.
        outputs: of the branches `cmp`, `slc`, `win`, each `[B, Hq, Dv]`.
    """

    block_indices: Tensor
    importance: Tensor
    compressed: Tensor
    window: Tensor
    gates: Tensor
    outputs: dict[str, Tensor]


@dataclass
class CapturedLayer:
    """One NSA layer.

    Attributes:
        name: of the module in the model.
        queries: by position.
    """

    name: str
    queries: dict[int, CapturedQuery] = field(default_factory=dict)


@contextmanager
def capture(model: nn.Module, queries: Sequence[int]) -> Iterator[list[CapturedLayer]]:
    """Records the next forward passes of a model's NSA layers, without gradients.

    Args:
        model: has at least one NSA layer.
        queries: positions.

    Raises:
        InvalidArgument: no NSA layer, or no position; and in the forward pass: a position behind
            the sequence, packed sequences, or a later step of a cache.
    """
    if not isinstance(queries, Sequence) or not queries:
        raise InvalidArgument("capture", "queries", repr(queries), "one or more positions")
    for query in queries:
        check_int("capture", "queries", query, 0)
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, NativeSparseAttention)
    ]
    if not layers:
        raise InvalidArgument("capture", "model", "without NSA layers", "with at least one")
    found = [CapturedLayer(name) for name, _ in layers]
    try:
        for (_, layer), record in zip(layers, found, strict=True):
            layer.observer = _observer(record, queries)
        yield found
    finally:
        for _, layer in layers:
            del layer.observer


def _observer(record: CapturedLayer, queries: Sequence[int]) -> Any:
    @torch.no_grad()
    def observe(layer: NativeSparseAttention, values: dict[str, Tensor]) -> None:
        if values["cu_seqlens_q"] is not None:
            raise InvalidArgument("capture", "cu_seqlens", "given", "None: one sequence per row")
        tokens = values["q"].shape[1]
        if max(queries) >= tokens:
            raise InvalidArgument("capture", "queries", max(queries), f"below {tokens}")
        for t in queries:
            record.queries[t] = _look(layer, values, t)

    return observe


def _look(layer: NativeSparseAttention, values: dict[str, Tensor], t: int) -> CapturedQuery:
    """The branches for the query at t: it is the last of the tokens up to t."""
    c, q = layer.config, values["q"][:, t : t + 1]
    place: dict[str, Any] = {"kv_len": t + 1, "block": c.block, "stride": c.stride}
    blocks = compressed_blocks(t + 1, c.block, c.stride)
    k_cmp, v_cmp = values["k_cmp"][:, :blocks], values["v_cmp"][:, :blocks]
    o_cmp, lse_cmp = nsa.compressed_attention(q, k_cmp, v_cmp, **place)
    ids = nsa.select_blocks(q, k_cmp, lse_cmp, **place, **c.selection)
    raw = {name: values[name][:, : t + 1] for name in ("k_slc", "v_slc", "k_win", "v_win")}
    o_slc, _ = nsa.selected_attention(
        q, raw["k_slc"], raw["v_slc"], ids, select_block=c.select_block
    )
    o_win, lse_win = nsa.sliding_window_attention(q, raw["k_win"], raw["v_win"], window=c.window)
    compressed = _probabilities(q, k_cmp, lse_cmp)
    groups = compressed.unflatten(1, (c.kv_heads, -1)).sum(2)
    total = selection_blocks(t + 1, c.select_block)
    return CapturedQuery(
        block_indices=ids[:, 0],
        importance=overlap_sum(groups, total, c.block, c.stride, c.select_block),
        compressed=compressed,
        window=_probabilities(q, raw["k_win"][:, -c.window :], lse_win),
        gates=values["gates"][:, t],
        outputs={"cmp": o_cmp[:, 0], "slc": o_slc[:, 0], "win": o_win[:, 0]},
    )


def _probabilities(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse) of one query, `[B, Hq, K]` float32; zeros on a dead row."""
    group = q.shape[2] // k.shape[2]
    keys = k.repeat_interleave(group, 2).float()
    logits = torch.einsum("bhd,bkhd->bhk", q[:, 0].float(), keys) * default_scale(None, q)
    return (logits - lse[:, 0, :, None].float()).exp()
