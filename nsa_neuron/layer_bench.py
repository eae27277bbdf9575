"""A layer's forward pass beside the op inside it, and beside that op with its four projections.

Three sides are measured in turns, on the same tensors: the layer; `nsa_attention` alone, called on
what the layer gives it; and that call between the products that every attention layer has (queries,
keys, values, output; a layer of NSA makes three sets of keys and values), their results held until
the end as a layer must. What the layer takes more than the last is its own: rotation, compression,
gates, Python. Operations and bytes of every part are counted beside (`counted`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron import functional as nsa
from nsa_neuron import ops
from nsa_neuron.bench.turns import in_turns
from nsa_neuron.nn import NativeSparseAttention, NsaConfig
from nsa_neuron.terminal import progress, table

if TYPE_CHECKING:
    from nsa_neuron.bench.record import Record

BENCH = "layer"
NARROW = NsaConfig(dim=256, heads=16, kv_heads=1, dk=64, dv=64)
WIDE = dataclasses.replace(NARROW, dim=1024)  # heads * dk, as most models have it
SHAPES = ((NARROW, 2048), (WIDE, 2048), (NARROW, 8192))
SIDES = ("layer", "op", "op and projections")
TIMED_TOKENS = 50_000  # of each side, so short sequences are timed more often


def measure(
    shapes: Sequence[tuple[NsaConfig, int]] = SHAPES, rounds: int | None = None
) -> list[Record]:
    """A record of each side for each config and number of tokens."""
    records: list[Record] = []
    with progress(BENCH, len(shapes)) as advance:
        for config, tokens in shapes:
            advance(f"{tokens} tokens of width {config.dim}")
            records += overhead(config, tokens, rounds or max(5, TIMED_TOKENS // tokens))
    return records


@torch.no_grad()
def overhead(config: NsaConfig, tokens: int, rounds: int) -> list[Record]:
    """The layer, its op, and its op between its projections."""
    torch.manual_seed(0)
    layer, x = NativeSparseAttention(config), torch.randn(1, tokens, config.dim)
    seen: dict[str, Tensor] = {}
    layer.observer = lambda _, values: seen.update(values)
    layer(x)
    del layer.observer

    def op() -> Tensor:
        return nsa.nsa_attention(**seen, **config.geometry)  # type: ignore[arg-type]

    def bare() -> tuple[Tensor, ...]:
        held = F.linear(x, layer.q.weight), F.linear(x, layer.kv.weight)
        return F.linear(op().flatten(-2), layer.out.weight), *held

    steps = dict(zip(SIDES, (lambda: layer(x), op, bare), strict=True))
    facts = {"tokens": tokens, "width": config.dim, "heads": f"{config.heads}/{config.kv_heads}"}
    return in_turns(BENCH, steps, rounds, {**facts, "dk": config.dk})


def counted(config: NsaConfig, tokens: int) -> dict[str, tuple[float, float]]:
    """Operations and bytes of each part of a forward pass of one sequence in float32.

    Products by 2 * rows * columns * depth, what they read and write once; the ops as their specs
    count them; the rotation by its three passes over queries and two sets of keys.
    """
    c, s = config, tokens

    def product(columns: int, depth: int) -> tuple[float, float]:
        return 2.0 * s * columns * depth, 4.0 * (s * (columns + depth) + columns * depth)

    with torch.device("meta"):
        layer = NativeSparseAttention(c)
        x = torch.empty(1, s, c.dim)
    seen: dict[str, Tensor] = {}
    layer.observer = lambda _, values: seen.update(values)
    layer(x)
    sides = []
    for phi, dim in ((layer.phi_k, c.dk), (layer.phi_v, c.dv)):
        spec = ops.get("compress")
        names = dict(zip(("w1", "b1", "w2", "b2", "pe"), phi.weights(), strict=True))
        x_kv = torch.empty(1, s, c.kv_heads, dim, device="meta")
        shape = {"method": c.phi, "block": c.block, "stride": c.stride}
        sides.append(spec.cost(spec.bind({**spec.defaults, "x": x_kv, **names, **shape})))
    spec = ops.get("nsa_attention")
    whole = spec.cost(spec.bind({**spec.defaults, **seen, **c.geometry}))
    sets = layer.sets * c.kv_heads * (c.dk + c.dv)
    turned = s * c.dk * (c.heads + min(2, layer.sets) * c.kv_heads)
    return {
        "projection of queries": product(c.heads * c.dk, c.dim),
        f"projection of keys and values, sets: {layer.sets}": product(sets, c.dim),
        "projection of the output": product(c.dim, c.heads * c.dv),
        "gates": product(3 * c.heads, c.dim),
        "rotation": (3.0 * turned, 4.0 * turned * 5),
        "compression": (sum(x.flops for x in sides), sum(x.bytes for x in sides)),
        "nsa_attention": (whole.flops, whole.bytes),
    }


HEADERS = (
    "tokens", "width", "layer, ms", "op, ms", "op and projections, ms", "layer / op",
    "layer / op and projections", "(layer - both) / op", "the three by CPU time", "load",
)  # fmt: skip


def tables(records: Sequence[Record]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headers and rows: what was measured, and what was counted for the same shapes."""
    by = {(r.facts["width"], r.facts["tokens"], r.name): r for r in records if r.bench == BENCH}
    places = sorted({key[:2] for key in by})
    measured, count = [], []
    for width, tokens in places:
        layer, op, bare = (by[width, tokens, name] for name in SIDES)
        ratios = _ratios(layer.median, op.median, bare.median)
        by_cpu = _ratios(*(float(r.facts["cpu_ms"]) for r in (layer, op, bare)))
        measured.append(
            [str(x) for x in (tokens, width, layer, op, bare)]
            + [*ratios, ", ".join(by_cpu), str(layer.facts["load"])]
        )
        found = counted(dataclasses.replace(NARROW, dim=width), tokens)
        whole = found["nsa_attention"][0]
        for part, (operations, moved) in found.items():
            share = f"{operations / whole:.3f}"
            row = [f"{operations / 1e9:.3f}", share, f"{moved / 1e6:.1f}"]
            count.append([str(tokens), str(width), part, *row])
    if not measured:
        return []
    return [
        ("a layer's forward pass and what it stands on: median (20th to 80th)",
         list(HEADERS), measured),
        ("the same, counted", ["tokens", "width", "part", "GFLOP", "of the op's", "MB"], count),
    ]  # fmt: skip


def _ratios(layer: float, op: float, bare: float) -> list[str]:
    """Layer / op, layer / bare, and what the layer has above bare, over the op."""
    return [f"{x:.2f}" for x in (layer / op, layer / bare, (layer - bare) / op)]


def to_text(records: Sequence[Record]) -> str:
    """The tables for people."""
    return "\n\n".join(table(*parts) for parts in tables(records))
