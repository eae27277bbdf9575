"""What a model's queries looked at, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.fields import check_int
from nsa_neuron.nn import ByteLanguageModel, capture

if TYPE_CHECKING:
    from nsa_neuron.nn.capture import CapturedQuery


@dataclass(frozen=True)
class Passage:
    """A selection block that a query picked.

    Attributes:
        block: id. first, last: bytes it covers, as far as the query sees.
        importance: summed over the group's heads; forced blocks have one too.
        why: `first`, `own`, `before` when it is always selected, else `importance`.
    """

    block: int
    first: int
    last: int
    importance: float
    why: str


@dataclass(frozen=True)
class View:
    """One query in one layer and kv head.

    Attributes:
        query: position. layer: number of the NSA layer. name: of its module. kv_head: number.
        picked: in the order of the text.
        importance: of every selection block that the query can see.
        gates: of each query head of the group: compressed, selected, window.
        compressed: probabilities of the compressed blocks, mean of the heads.
        window: probabilities of the window's bytes, oldest first, mean of the heads.
        outputs: length of each branch's output after its gate, mean of the heads.
    """

    query: int
    layer: int
    name: str
    kv_head: int
    picked: tuple[Passage, ...]
    importance: tuple[float, ...]
    gates: tuple[tuple[float, float, float], ...]
    compressed: tuple[float, ...]
    window: tuple[float, ...]
    outputs: tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """A text, and what some of its positions looked at.

    Attributes:
        text: that the model read.
        select_block, block, stride: m, l and d.
        queries: positions.
        views: for each query, layer and kv head.
    """

    text: bytes
    select_block: int
    block: int
    stride: int
    queries: tuple[int, ...]
    views: tuple[View, ...]


@torch.no_grad()
def look(model: ByteLanguageModel, text: bytes, queries: Sequence[int]) -> Look:
    """Reads a text once and records what queries of every NSA layer look at.

    Args:
        model: has NSA layers.
        text: not empty.
        queries: positions; negative ones count from the end.

    Raises:
        InvalidArgument: an empty text, no query, or one outside of the text.
    """
    if not isinstance(text, (bytes, bytearray)):
        raise InvalidType("look", "text", f"of type {type(text).__name__}", "bytes")
    if not text:
        raise InvalidArgument("look", "text", "empty", "at least one byte")
    if not isinstance(queries, Sequence):
        raise InvalidType("look", "queries", repr(queries), "a sequence of positions")
    for query in queries:
        check_int("look", "queries", query, -len(text), len(text) - 1)
    places = tuple(dict.fromkeys(at + len(text) if at < 0 else at for at in queries))
    if not places:
        raise InvalidArgument("look", "queries", "empty", "one or more positions")
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
    with capture(model, places) as layers:
        model(tokens, last=1)
    c = model.config
    views = [
        _view(found.queries[t], t, i, found.name, head, model)
        for t in places
        for i, found in enumerate(layers)
        for head in range(c.kv_heads)
    ]
    return Look(text, c.select_block, c.block, c.stride, places, tuple(views))


def _view(
    found: CapturedQuery, t: int, layer: int, name: str, head: int, model: ByteLanguageModel
) -> View:
    c = model.config
    group = c.heads // c.kv_heads
    heads = slice(head * group, (head + 1) * group)
    importance = [float(x) for x in found.importance[0, head]]
    gates = found.gates[0, heads].float()
    lengths = [found.outputs[b][0, heads].float().norm(dim=-1) for b in ("cmp", "slc", "win")]
    weighed = (torch.stack(lengths, -1) * gates).mean(0).tolist()
    picked = [
        Passage(j, j * c.select_block, min((j + 1) * c.select_block, t + 1) - 1, importance[j],
                _why(j, t // c.select_block, c.num_initial, c.num_local))
        for j in found.block_indices[0, head].tolist()
        if j >= 0
    ]  # fmt: skip
    return View(
        query=t,
        layer=layer,
        name=name,
        kv_head=head,
        picked=tuple(picked),
        importance=tuple(importance),
        gates=tuple((row[0], row[1], row[2]) for row in gates.tolist()),
        compressed=tuple(found.compressed[0, heads].mean(0).tolist()),
        window=tuple(found.window[0, heads].mean(0).tolist()),
        outputs=(weighed[0], weighed[1], weighed[2]),
    )


def _why(block: int, own: int, initial: int, local: int) -> str:
    if block == own:
        return "own"
    if own - local < block:
        return "before"
    return "first" if block < initial else "importance"
