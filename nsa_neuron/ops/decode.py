"""A few new tokens per sequence against paged KV caches (rules 2 to 8 and 12)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.cases import Case, exact_normal
from nsa_neuron.numerics import Budget
from nsa_neuron.ops import common
from nsa_neuron.ops.nsa_attention import compose_forward, reference_of
from nsa_neuron.spec import Bound, Cost, OpSpec, Return, TensorArg

BRANCHES = ("cmp", "slc", "win")


def decode(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    seqlens: Tensor,
    cmp_table: Tensor,
    slc_table: Tensor,
    win_table: Tensor,
    *,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
) -> Tensor:
    """`nsa_attention` of the newest S tokens of each sequence against paged KV caches.

    A cache is a pool of pages; an int32 table names the pages of each sequence in order. Token (or
    compressed block) i of sequence b lies in page `table[b, i // page]` at row `i % page`. Only
    what is visible is read, so table entries past a sequence's end, and those of window pages that
    no query sees any more, may hold anything. New tokens, and the compressed block that they
    complete, are in the caches before the call. Every size comes from shapes, and lengths stay on
    the device, so a captured CUDA graph serves growing sequences. For inference: no gradient.

    Args:
        q: `[B, S, Hq, Dk]`; query s of sequence b stands at position `seqlens[b] - S + s`.
        k_cmp: compressed keys, `[pages, page, Hkv, Dk]`.
        v_cmp: compressed values, `[pages, page, Hkv, Dv]`.
        k_slc, v_slc: raw keys and values of the selected branch, `[pages, page, Hkv, Dk or Dv]`; a
            page is a multiple of `select_block`.
        k_win, v_win: of the window branch; a model with one raw cache passes it twice.
        gates: `[B, S, Hq, 3]` in [0, 1]; order compressed, selected, window.
        seqlens: tokens of each sequence with the new ones, `[B]` int32; 0 is an idle slot.
        cmp_table: pages of `k_cmp` and `v_cmp` of each sequence, `[B, most pages]` int32.
        slc_table: the same for `k_slc` and `v_slc`.
        win_table: the same for `k_win` and `v_win`.
        block, stride: l and d of `compress`.
        select_block: m, tokens of a selection block.
        num_selected: n, ids per row, the forced ones included.
        num_initial: forced blocks at the start of the sequence.
        num_local: forced blocks that end with the query's own.
        window: w, tokens that the window branch sees.
        scale: of the logits; default `Dk ** -0.5`.

    Returns:
        o `[B, S, Hq, Dv]` in q's dtype; zero for queries before their sequence's first token.

    Raises:
        InvalidArgument: an argument breaks the contract.
    """
    values = {
        "block": block, "stride": stride, "select_block": select_block,
        "num_selected": num_selected, "num_initial": num_initial, "num_local": num_local,
        "window": window, "scale": scale, "cu_seqlens_q": None, "cu_seqlens_k": None,
    }  # fmt: skip
    out = q.new_zeros(*q.shape[:3], v_cmp.shape[-1])
    for b, tokens in enumerate(seqlens.tolist()):
        count = min(q.shape[1], tokens)
        if count == 0:
            continue
        rows = (slice(b, b + 1), slice(q.shape[1] - count, None))
        near = _first_seen(tokens, count, window)
        blocks = int(common.compressed_blocks(tokens, block, stride))
        given = {"q": q[rows], "gates": gates[rows]}
        for name, pools, table, part in (
            ("cmp", (k_cmp, v_cmp), cmp_table, range(blocks)),
            ("slc", (k_slc, v_slc), slc_table, range(tokens)),
            ("win", (k_win, v_win), win_table, range(near, tokens)),
        ):
            k, v = (_gather(pool, table[b], part) for pool in pools)
            given |= {f"k_{name}": k, f"v_{name}": v}
        out[rows] = compose_forward(reference_of, {**values, **given})[0]
    return out


def _first_seen(tokens: int, queries: int, window: int) -> int:
    """The first token that the window of any of the newest queries holds."""
    return max(0, tokens - queries - window + 1)


def _gather(pool: Tensor, pages: Tensor, rows: range) -> Tensor:
    """Rows of one sequence out of a pool, `[1, len(rows), Hkv, D]`."""
    page = pool.shape[1]
    first, last = rows.start // page, -(-rows.stop // page)
    near = pool[pages[first:last].long()].flatten(0, 1)
    return near[rows.start - first * page : rows.stop - first * page][None]


def derive(bound: Bound) -> None:
    common.check_heads(bound)
    common.check_geometry(bound)
    if bound["page_slc"] % bound["m"]:
        found = f"of pages of {bound['page_slc']} tokens"
        raise bound.spec.refuse("k_slc", found, f"of multiples of select_block = {bound['m']}")


def check_values(bound: Bound, values: Mapping[str, Any]) -> None:
    """Sequences fit their tables, and the pages that are read exist."""
    lengths = values["seqlens"].tolist()
    tables = {name: values[f"{name}_table"].tolist() for name in BRANCHES}
    for b, tokens in enumerate(lengths):
        if tokens < 0:
            raise bound.spec.refuse("seqlens", f"{tokens} for sequence {b}", "at least 0")
        for name, rows in _visible(bound, tokens).items():
            _check_pages(bound, name, b, tables[name][b], rows)


def _visible(bound: Bound, tokens: int) -> dict[str, range]:
    """Rows of each cache that a sequence reads."""
    blocks = int(common.compressed_blocks(tokens, bound["l"], bound["d"]))
    near = _first_seen(tokens, min(bound["S"], tokens), bound["w"])
    return {"cmp": range(blocks), "slc": range(tokens), "win": range(near, tokens)}


def _check_pages(bound: Bound, name: str, b: int, pages: Sequence[int], rows: range) -> None:
    page, pool = bound[f"page_{name}"], bound[f"pages_{name}"]
    if rows.stop > len(pages) * page:
        what = "compressed blocks" if name == "cmp" else "tokens"
        found = f"giving sequence {b} {rows.stop} {what}"
        expected = f"within the {len(pages) * page} of {name}_table"
        raise bound.spec.refuse("seqlens", found, expected)
    read = pages[rows.start // page : -(-rows.stop // page)]
    wrong = next((i for i in read if not 0 <= i < pool), None)
    if wrong is not None:
        found = f"naming page {wrong} for sequence {b}"
        raise bound.spec.refuse(f"{name}_table", found, f"within 0 .. {pool - 1}")


def cost(bound: Bound) -> Cost:
    """Counted for sequences as long as their tables: their lengths are on the device."""
    tokens = int(bound["most_slc"] * bound["page_slc"])
    blocks = int(common.compressed_blocks(tokens, bound["l"], bound["d"]))
    raw = min(tokens, int(bound["n"] * bound["m"])) + min(tokens, int(bound["w"]))
    items = int(bound["B"] * bound["S"])
    flops = common.attention_flops(bound, items * (blocks + raw))
    row = int(bound["Hkv"] * (bound["Dk"] + bound["Dv"])) * bound.dtype.itemsize
    own = items * int(bound["Hq"] * (bound["Dk"] + bound["Dv"] + 3)) * bound.dtype.itemsize
    return Cost(flops, int(bound["B"]) * (blocks + raw) * row + own)


def inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """Pools in shuffled page order; NaN where no visible row lies, -1 for pages never read.

    `options["tokens"]` are the sequences' lengths; `options["pages"]` the rows of a page of each
    cache, those of the selected one in selection blocks.
    """
    settings = {**SPEC.defaults, **case.scalars}
    lengths, queries = case.options["tokens"], case.size("S")
    l, d, m = (settings[name] for name in ("block", "stride", "select_block"))
    rows = {
        "cmp": [range(int(common.compressed_blocks(t, l, d))) for t in lengths],
        "slc": [range(t) for t in lengths],
        "win": [
            range(_first_seen(t, min(queries, t), settings["window"]), t) for t in lengths
        ],
    }  # fmt: skip
    pages = dict(zip(BRANCHES, case.options["pages"], strict=True))
    pages["slc"] *= m
    b, hq, hkv = len(lengths), case.size("Hq"), case.size("Hkv")
    dims = {"k": case.size("Dk"), "v": case.size("Dv")}
    values: dict[str, Any] = {"q": exact_normal(gen, b, queries, hq, dims["k"])}
    for name in BRANCHES:
        table = _shuffled(rows[name], pages[name], gen)
        values[f"{name}_table"] = table
        for side, dim in dims.items():
            pool = exact_normal(gen, table.numel() + 2, pages[name], hkv, dim)
            values[f"{side}_{name}"] = _poisoned(pool, table, rows[name])
    gates = torch.rand(b, queries, hq, 3, generator=gen)
    values["gates"] = gates.mul(64).round().div(64)
    values["seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    return values


def _shuffled(rows: Sequence[range], page: int, gen: torch.Generator) -> Tensor:
    """A table of pages in random order, one page wider than needed; -1 where nothing is read."""
    width = max(-(-part.stop // page) for part in rows) + 1
    table = torch.randperm(len(rows) * width + 2, generator=gen)[: len(rows) * width]
    table = table.view(len(rows), width).int()
    for row, part in zip(table, rows, strict=True):
        row[: part.start // page] = -1
        row[-(-part.stop // page) :] = -1
    return table


def _poisoned(pool: Tensor, table: Tensor, rows: Iterable[range]) -> Tensor:
    """The pool with NaN in every row that no sequence reads."""
    out, page = torch.full_like(pool, float("nan")), pool.shape[1]
    for pages, part in zip(table, rows, strict=True):
        at = torch.arange(part.start, part.stop)
        place = pages[at // page].long(), at % page
        out[place] = pool[place]
    return out


def _case(name: str, tags: str, tokens: tuple[int, ...], s: int = 1, **change: Any) -> Case:
    heads, dims = change.pop("heads", (4, 1)), change.pop("dims", (32, 32))
    options = {"tokens": tokens, "pages": change.pop("pages", (8, 2, 8))}
    sizes = {"B": len(tokens), "S": s, "Hq": heads[0], "Hkv": heads[1]}
    sizes |= {"Dk": dims[0], "Dv": dims[1]}
    return Case(name, tuple(tags.split()), sizes, {**SMALL, **change}, options=options)


SMALL = {"block": 8, "stride": 4, "select_block": 16, "num_selected": 4, "window": 20}
CASES = (
    _case("one_token", "smoke edge", (1,)),
    _case("two_sequences", "smoke", (40, 23), heads=(4, 2)),
    # l - 1, l, m - 1, m, m + 1, w, w + 1, and an idle slot between them.
    _case("edges", "edge", (7, 8, 15, 0, 16, 17, 20, 21), heads=(4, 2), dims=(32, 48)),
    _case("idle", "edge", (0, 0)),
    _case("group1", "edge", (33, 70), heads=(2, 2)),
    _case("group3", "edge", (50,), heads=(3, 1), dims=(80, 24)),
    _case("group20", "edge", (50, 90), heads=(20, 1)),
    _case("group34_kv2", "edge", (70,), heads=(68, 2)),
    _case("several_queries", "edge", (64, 30), 3, heads=(4, 2)),
    _case("more_queries_than_tokens", "edge", (2, 5, 0, 40), 4),
    _case("odd_pages", "edge", (90, 31), pages=(5, 3, 7)),
    _case("page_of_one", "edge", (37,), pages=(1, 1, 1)),
    _case("l_d_m_equal", "edge", (65,), block=16, stride=16),
    _case("three_to_one", "edge", (100,), block=12),
    _case("no_initial_one_local", "edge", (90,), num_initial=0, num_local=1),
    _case("forced_only", "edge", (90,), num_selected=3),
    _case("n_exceeds_blocks", "edge", (90, 40), num_selected=16),
    _case("n_of_one", "edge", (90, 3), num_initial=0, num_local=1, num_selected=1),
    _case("n_of_70", "edge", (150,), block=2, stride=2, select_block=2, num_selected=70),
    _case("long_blocks", "edge", (300,), block=16, stride=8, select_block=144, num_selected=3),
    _case("stride_one", "edge", (170,), block=3, stride=1, select_block=70),
    _case("custom_scale", "edge", (90,), scale=0.3, window=33),
    _case("window_of_splits_and_one", "edge", (90, 66), window=65),
    _case("default_geometry", "conform", (300, 129), dims=(64, 64), heads=(8, 2),
          pages=(32, 1, 64), block=32, stride=16, select_block=64, window=512),
    _case("paper_heads", "conform", (500,), heads=(16, 1), dims=(192, 128), pages=(32, 1, 64),
          block=32, stride=16, select_block=64, window=128),
)  # fmt: skip


def _pool(name: str, dim: str) -> str:
    return f"pages_{name} page_{name} Hkv {dim}"


SPEC = OpSpec(
    name="decode",
    args=(
        TensorArg("q", "B S Hq Dk"),
        *(
            TensorArg(f"{side}_{name}", _pool(name, dim))
            for name in BRANCHES
            for side, dim in (("k", "Dk"), ("v", "Dv"))
        ),
        TensorArg("gates", "B S Hq 3"),
        TensorArg("seqlens", "B", "i32"),
        *(TensorArg(f"{name}_table", f"B most_{name}", "i32") for name in BRANCHES),
        common.BLOCK,
        common.STRIDE,
        *common.SELECTION,
        common.WINDOW,
        common.SCALE,
    ),
    returns=(Return("o", "B S Hq Dv"),),
    reference=decode,
    derive=derive,
    check_values=check_values,
    compare={"o": Budget()},
    cases=CASES,
    inputs=inputs,
    cost=cost,
    typical={"S": 1, "T": 8192},  # one new token behind a long context
)
