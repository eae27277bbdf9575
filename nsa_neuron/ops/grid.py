"""The problems every attention-like op is tried on; one list, so that ops are tried alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nsa_neuron.cases import Case


def _case(
    name: str,
    tags: str,
    s: int,
    *,
    t: int | None = None,
    b: int = 1,
    heads: tuple[int, int] = (4, 1),
    dims: tuple[int, int] = (64, 64),
    lengths: tuple[tuple[int, int], ...] | None = None,
    **options: Any,
) -> Case:
    sizes = {"B": b, "S": s, "T": t or s, "Hq": heads[0], "Hkv": heads[1]}
    sizes |= {"Dk": dims[0], "Dv": dims[1]}
    return Case(name, tuple(tags.split()), sizes, lengths=lengths, options=options)


# Lengths around the defaults' edges: 1, l-1, l, m-1, m, m+1, and no multiple of anything.
GRID = (
    _case("one_token", "smoke edge", 1),
    _case("group4_s40", "smoke", 40),
    _case("l_minus_1", "edge", 31, heads=(2, 1), dims=(32, 32)),
    _case("l", "edge", 32, heads=(2, 1), dims=(32, 32)),
    _case("m_minus_1", "edge", 63, heads=(2, 2), dims=(32, 32)),
    _case("m", "edge", 64, heads=(2, 1), dims=(32, 32)),
    _case("m_plus_1", "edge", 65, heads=(3, 1), dims=(32, 32)),
    _case("batch2_kv2", "edge", 50, b=2, heads=(4, 2), dims=(32, 48)),
    _case("dims_192_128", "edge", 70, heads=(2, 1), dims=(192, 128)),
    _case("dims_odd_80_24", "edge", 37, heads=(2, 1), dims=(80, 24)),
    _case("group16", "edge", 33, heads=(16, 1), dims=(32, 32)),
    _case("prefill_tail", "edge", 9, t=140, heads=(4, 2), dims=(32, 32)),
    _case("decode_one", "edge", 1, t=129, heads=(4, 1), dims=(64, 64)),
    _case(
        "packed_dead_rows", "edge", 0, heads=(2, 1), dims=(32, 32),
        lengths=((1, 1), (20, 20), (70, 70)),
    ),
    _case(
        "packed_tails", "edge", 0, heads=(4, 2), dims=(32, 32),
        lengths=((3, 66), (40, 40), (1, 100)),
    ),
    _case("sharp_logits", "edge", 90, heads=(4, 1), dims=(64, 64), sharp=4.0),
    _case("paper_heads", "conform", 200, heads=(16, 1), dims=(192, 128)),
    _case("several_tiles", "conform", 300, heads=(4, 2), dims=(64, 64)),
)  # fmt: skip


def bench_case(tokens: int) -> Case:
    """64/4/192/128 heads at `tokens` tokens; only timed."""
    return _case(f"bench_{tokens}", "bench", tokens, heads=(64, 4), dims=(192, 128))


def grid(
    scalars: Mapping[str, Any] | None = None, extra: tuple[Case, ...] = ()
) -> tuple[Case, ...]:
    """The grid with some scalar arguments fixed, and cases of one op."""
    fixed = dict(scalars or {})
    return tuple(replace(case, scalars=fixed) for case in GRID) + extra


def variant(
    base: str, name: str, scalars: Mapping[str, Any], queries: int | None = None, **options: Any
) -> Case:
    """A case of the grid under another name, with other scalar arguments; tagged `edge`.

    `queries`: only the last so many of its tokens ask; interpreted kernels take time for each.
    """
    case = next(case for case in GRID if case.name == base)
    merged = {**case.options, **options}
    sizes = dict(case.sizes) if queries is None else {**case.sizes, "S": queries}
    return replace(
        case, name=name, tags=("edge",), sizes=sizes, scalars=dict(scalars), options=merged
    )
