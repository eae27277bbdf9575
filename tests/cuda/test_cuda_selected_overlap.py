"""`selected_attention` where the overlap decides: which design runs, and that only it writes."""

from __future__ import annotations

from dataclasses import replace

import masked_oracle as oracle
import pytest
import torch
from chosen_blocks import mask_of, random_ids
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples
from poisoned import poison  # noqa: F401
from selected_oracle import OP, check, kernels, plan

import nsa_neuron
from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.launch import selected_attention as launch
from nsa_neuron.backends.cuda.launch.selected_attention import by_block, by_query, dispatch, lists
from nsa_neuron.backends.cuda.launch.selected_attention.call import Call
from nsa_neuron.registry import use_backend

pytest.importorskip("triton")
pytestmark = pytest.mark.sim

BLOCK = 8
QUERIES = 4
PAST = 96
BY_BLOCK, BY_QUERY = 0, 1


def neighbours(kind: str, queries: int = 8, kv_heads: int = 1) -> torch.Tensor:
    """Ids [1, S, Hkv, 3] of tiles of 4 tokens: all equal, none shared, or two pairs of equals.

    A token has at least PAST keys before it.
    """
    token = torch.arange(queries)
    first = {"equal": 0 * token, "pairs": token % QUERIES // 2 * 3, "disjoint": token % QUERIES * 3}
    ids = first[kind][:, None] + torch.arange(3)
    return ids.to(torch.int32)[None, :, None].expand(1, queries, kv_heads, 3).contiguous()


def overlap_plan(group: int, min_sharing: float, **tiles) -> dict:
    """`by_query` from `min_sharing` on, at this file's block and groups."""
    return plan("by_overlap", QUERIES, overlap_rows=min_sharing * group * 64 / BLOCK, **tiles)


def call_of(problem: oracle.Problem, ids: torch.Tensor, tiles: dict, cu=(None, None)) -> Call:
    inputs = (problem.q, problem.k, problem.v, ids)
    return Call(kernels(), tiles, *inputs, BLOCK, problem.scale, cu)


def small(queries: int = 8, group: int = 2, kv_heads: int = 1) -> oracle.Problem:
    return oracle.Problem.random(1, queries, queries + PAST, kv_heads, group, 16, 16)


def flag_of(call: Call, min_sharing: float) -> int:
    union = by_query.list_union(call, "forward")
    return int(dispatch.measure(call, union, min_sharing))


def counted_sharing(ids: torch.Tensor, past: int) -> tuple[int, int]:
    """(token, block) pairs and union entries of tiles of 4, by Python's sets."""
    pairs = entries = 0
    _, queries, kv_heads, _ = ids.shape
    for first in range(0, queries, QUERIES):
        for head in range(kv_heads):
            tile = range(first, min(first + QUERIES, queries))
            sets = [
                {b for b in ids[0, t, head].tolist() if 0 <= b * BLOCK <= past + t} for t in tile
            ]
            pairs += sum(map(len, sets))
            entries += len(set().union(*sets))
    return pairs, entries


@pytest.mark.parametrize(("kind", "sharing"), [("equal", 4.0), ("pairs", 2.0), ("disjoint", 1.0)])
def test_the_flag_turns_at_the_sharing(kind, sharing):
    call = call_of(small(), neighbours(kind), overlap_plan(2, 2.0))
    assert flag_of(call, sharing) == BY_QUERY
    assert flag_of(call, sharing * 1.001) == BY_BLOCK


@examples(6)
@given(
    queries=st.integers(1, 40), past=st.integers(0, 40), kv_heads=st.integers(1, 2),
    slots=st.integers(1, 5), min_sharing=st.floats(0.5, 4.0),
)  # fmt: skip
def test_the_flag_is_what_sets_count(queries, past, kv_heads, slots, min_sharing):
    """Empty slots, blocks of the future (ignored) and incomplete tiles included."""
    ids = random_ids(queries, queries + past, kv_heads, slots, BLOCK, seed=queries)
    ids[:, ::3, :, -1] = past // BLOCK + 9
    problem = oracle.Problem.random(1, queries, queries + past, kv_heads, 1, 16, 16)
    pairs, entries = counted_sharing(ids, past)
    call = call_of(problem, ids, overlap_plan(1, 2.0))
    assert flag_of(call, min_sharing) == int(pairs >= min_sharing * entries)


def test_the_flag_of_packed_sequences_counts_no_tile_twice():
    lengths = [9, 3, 17]
    cu_q, cu_k, _ = oracle.sequences(lengths, [n + PAST for n in lengths])
    ids = torch.cat([random_ids(n, n + PAST, 1, 3, BLOCK, seed=n) for n in lengths], 1)
    problem = oracle.Problem.random(1, sum(lengths), sum(lengths) + 3 * PAST, 1, 2, 16, 16)
    call = call_of(problem, ids, overlap_plan(2, 2.0), (cu_q, cu_k))
    union = by_query.list_union(call, "forward")
    parts = [counted_sharing(part, PAST) for part in ids.split(lengths, 1)]
    assert (int(union.pairs.sum()), int(union.counts.sum())) == tuple(
        map(sum, zip(*parts, strict=True))
    )


def test_the_flag_of_dead_rows_only():
    """Nothing to do is nothing to share out: the design without lists."""
    ids = torch.full((1, 8, 1, 3), -1, dtype=torch.int32)
    assert flag_of(call_of(small(), ids, overlap_plan(2, 2.0)), 2.0) == BY_QUERY


@pytest.mark.parametrize("kind", ["equal", "disjoint"])
@pytest.mark.parametrize(("group", "dims"), [(1, (16, 16)), (4, (192, 128)), (16, (24, 16))])
def test_both_sides_of_the_threshold(kind, group, dims):
    ids = neighbours(kind)
    problem = oracle.Problem.random(1, 8, 8 + PAST, 1, group, *dims)
    tiles = overlap_plan(group, 2.0, chunk=4, rows_per_pass=5 * group)
    call = call_of(problem, ids, tiles)
    assert dispatch.decide(call, "forward") == (dispatch.BY_OVERLAP, 2.0)
    assert flag_of(call, 2.0) == (BY_QUERY if kind == "equal" else BY_BLOCK)
    check(problem, ids, BLOCK, tiles)


@pytest.mark.parametrize("min_sharing", [1.01, 3.9])
def test_both_sides_agree_on_packed_sequences_with_dead_rows(min_sharing):
    """The same ids with thresholds on both sides of their sharing."""
    lengths_q, lengths_k = [3, 13, 1], [30, 70, 17]
    cu_q, cu_k, parts = oracle.sequences(lengths_q, lengths_k)
    problem = oracle.Problem.random(1, sum(lengths_q), sum(lengths_k), 1, 4, 24, 16)
    lengths = list(zip(lengths_q, lengths_k, strict=True))
    ids = [random_ids(s, t, 1, 4, BLOCK, seed=s) for s, t in lengths]
    ids[1][0, 4:9] = -1
    masks = [
        (*part, mask_of(chosen, t, BLOCK, 4))
        for part, chosen, (_, t) in zip(parts, ids, lengths, strict=True)
    ]
    every, tiles = torch.cat(ids, 1), overlap_plan(4, min_sharing, chunk=4, rows_per_pass=24)
    options = {"select_block": BLOCK, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    flag = flag_of(call_of(problem, every, tiles, (cu_q, cu_k)), min_sharing)
    assert flag == (BY_QUERY if min_sharing < 1.5 else BY_BLOCK)
    oracle.check(
        problem,
        masks,
        lambda q, k, v, **o: launch.forward(kernels(), tiles, q, k, v, every, **options, **o),
        lambda g, q, k, v, *rest, **o: launch.backward(
            kernels(), tiles, g, q, k, v, every, *rest, **options, **o
        ),
    )


PARTIAL = {"forward_by_block": (3, 4), "backward_dq_by_block": (6,)}
"""Where these kernels take their partial results."""


class Watched:
    """Kernels, and the partial results that they were launched with."""

    def __init__(self) -> None:
        self.partial: list[torch.Tensor] = []

    def __getattr__(self, name: str):
        return _Launches(getattr(kernels(), name), PARTIAL.get(name, ()), self.partial)


class _Launches:
    def __init__(self, kernel, at: tuple[int, ...], partial: list[torch.Tensor]) -> None:
        self.kernel, self.at, self.partial = kernel, at, partial

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args, **constants):
            self.partial += [args[i] for i in self.at]
            return self.kernel[grid](*args, **constants)

        return launch


@pytest.mark.parametrize("flag", [BY_BLOCK, BY_QUERY])
@pytest.mark.parametrize("design", [by_query, by_block])
def test_the_loser_writes_nothing(design, flag):
    """Neither results nor partial ones: all keep the NaN they are made with. The winner does."""
    problem, watched = small(), Watched()
    call = call_of(problem, neighbours("pairs"), overlap_plan(2, 2.0, rows_per_pass=8))
    call = replace(call, kernels=watched)
    chosen = torch.tensor([flag], dtype=torch.int32)
    o, lse, dq = torch.empty(problem.q.shape), torch.empty(1, 8, 2), torch.empty(problem.q.shape)
    grads = (problem.grad_o, torch.zeros(1, 8, 2), torch.zeros(1, 8, 2))
    if design is by_query:
        by_query.forward(call, by_query.list_union(call, "forward"), o, lse, chosen)
        by_query.backward_dq(call, by_query.list_union(call, "backward_dq"), grads, dq, chosen)
    else:
        cuts = (by_block.cut_for(call, f"{k}_by_block") for k in ("forward", "backward_dq"))
        found = lists.build(call, *cuts)
        by_block.forward(call, found, found.cuts[0], o, lse, chosen)
        by_block.backward_dq(call, found, found.cuts[1], grads, dq, chosen)
    wins = flag == (BY_QUERY if design is by_query else BY_BLOCK)
    assert len(watched.partial) == (6 if design is by_block else 0)  # two passes
    for written in (o, lse, dq, *watched.partial):
        assert (not written.isnan().any()) if wins else written.isnan().all()


class Silent:
    """Kernels that launch nothing and keep their names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Silent:
        self.names.append(name)
        return self

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **constants: None


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_device(packed):
    """Tensors without memory: reading a value of one raises."""
    silent, meta = Silent(), {"device": "meta"}
    q, k, v = (torch.empty(1, 64, heads, 16, **meta) for heads in (4, 2, 2))
    ids = torch.empty(1, 64, 2, 3, dtype=torch.int32, **meta)
    options = {"select_block": BLOCK, "scale": 0.1}
    if packed:
        cu = torch.empty(4, dtype=torch.int32, **meta)
        options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    tiles = overlap_plan(2, 2.0)
    o, lse = launch.forward(silent, tiles, q, k, v, ids, **options)
    both = ["union_blocks", "choose_strategy"]
    inverted = ["count_pairs", "sum_chunks", "cut_lists", "place_pairs"]
    assert silent.names == [*both, "forward", *inverted, "forward_by_block", "combine"]
    silent.names.clear()
    launch.backward(silent, tiles, q, q, k, v, ids, o, lse, **options)
    inverted.insert(2, "cut_lists")  # for dk and dv, and for dq by block
    by_block = ["backward_dq_by_block", "sum_dq", "backward_dkv", "reduce_dkv"]
    assert silent.names == ["backward_delta", *inverted, *both, "backward_dq", *by_block]
    with pytest.raises(RuntimeError, match="meta tensors"):
        ids.max().item()


@pytest.mark.parametrize("kind", ["equal", "disjoint"])
def test_two_runs_are_bit_equal(kind):
    p, ids = small(kv_heads=2), neighbours(kind, kv_heads=2)
    tiles, options = overlap_plan(2, 2.0, chunk=4), {"select_block": BLOCK, "scale": p.scale}

    def run():
        o, lse = launch.forward(kernels(), tiles, p.q, p.k, p.v, ids, **options)
        grads = launch.backward(kernels(), tiles, p.grad_o, p.q, p.k, p.v, ids, o, lse, **options)
        return o, lse, *grads

    assert all(a.equal(b) for a, b in zip(run(), run(), strict=True))


def test_long_rows_in_parts_and_many_rows_at_a_time():
    problem = oracle.Problem.random(3, 10, 10 + PAST, 1, 2, 16, 16)
    ids = torch.cat([random_ids(10, 10 + PAST, 1, 3, BLOCK, seed=seed) for seed in range(3)])
    for rows_per_pass, passes in ((8, 9), (40, 2)):
        tiles = plan("by_block", chunk=4, rows_per_pass=rows_per_pass)
        call = call_of(problem, ids, tiles)
        (items,) = lists.build(call, by_block.cut_for(call, "forward_by_block")).cuts
        assert len(items.passes) == passes
        check(problem, ids, BLOCK, tiles)


# ------------------------------------------------------------------- what is decided from shapes
SHIPPED = {"dk": 192, "dv": 128, "dtype": "bfloat16"}


def decided(group: int, tokens: int = 65536, select_block: int = 64, slots: int = 16, **wanted):
    """Strategies of forward and dq by the plan for an H200, from shapes alone."""
    wanted = {**SHIPPED, **wanted}
    tiles = plans.find("h200", OP, group=group, **wanted)
    like = {"device": "meta", "dtype": getattr(torch, wanted["dtype"])}
    q = torch.empty(1, tokens, 4 * group, wanted["dk"], **like)
    k, v = (torch.empty(1, tokens, 4, wanted[dim], **like) for dim in ("dk", "dv"))
    ids = torch.empty(1, tokens, 4, slots, dtype=torch.int32, device="meta")
    call = Call(None, tiles, q, k, v, ids, select_block, 0.1, (None, None))
    return tuple(dispatch.decide(call, kernel)[0] for kernel in ("forward", "backward_dq"))


def test_what_the_plans_leave_to_the_overlap():
    by_query, by_block, by_overlap = dispatch.BY_QUERY, dispatch.BY_BLOCK, dispatch.BY_OVERLAP
    assert decided(1) == decided(4) == (by_block, by_block)
    assert decided(5) == decided(8) == (by_overlap, by_overlap)
    assert decided(16) == (by_overlap, by_query)
    assert decided(64) == (by_query, by_query)
    assert decided(16, dtype="float32") == (by_query, by_query)
    assert decided(16, tokens=2048) == (by_query, by_query), "few pairs"
    assert decided(16, tokens=16384, slots=256) == (by_query, by_query), "everything is selected"
    assert decided(16, select_block=128)[0] == by_block, "a tile of 4 cannot share enough"
    assert decided(16, select_block=16)[0] == by_query, "short blocks are cheap to read again"


@pytest.mark.parametrize(
    ("group", "tokens", "strategy"),
    [
        (16, 999, dispatch.BY_BLOCK),  # 4 tokens of a tile of 4 would have to share
        (17, 250, dispatch.BY_OVERLAP),  # 1,000 pairs of a token and a slot
        (17, 249, dispatch.BY_QUERY),
        (63, 250, dispatch.BY_OVERLAP),
        (64, 250, dispatch.BY_QUERY),  # one token alone has rows enough
    ],
)
def test_the_edges_of_what_is_left_to_the_overlap(group, tokens, strategy):
    tiles = plan("by_overlap", 4)
    tiles["dispatch"] |= {"forward_rows": 64, "min_pairs": 1000}
    q, k = (torch.empty(1, n, h, 16, device="meta") for n, h in ((tokens, group), (4096, 1)))
    ids = torch.empty(1, tokens, 1, 4, dtype=torch.int32, device="meta")
    call = Call(None, tiles, q, k, k, ids, dispatch.PLANNED_BLOCK, 0.1, (None, None))
    assert dispatch.decide(call, "forward")[0] == strategy


@pytest.mark.parametrize(("dk", "dv"), [(192, 128), (128, 128)])
def test_the_shipped_thresholds_are_the_rooflines(dk, dv):
    """The bytes and rates of `union`: computed, not measured. A tuned plan says "measured"."""
    l2, hbm, group, size = 5.5e12, 4.3e12, 16, 2
    union_entry = 64 * (dk + dv) * size / l2
    forward = group * (dk + 2 * dv) * size / hbm + 25 / hbm
    backward = group * ((dk + dv) * size + 2 * 4 * dk + 8) / hbm
    rows = plans.load("h200", OP)["dispatch"]
    if any("measured" in row for row in rows):
        pytest.skip("these plans are measured")
    found = plans.find("h200", OP, dk=dk, dv=dv, dtype="bfloat16", group=group)["dispatch"]
    assert found["forward_rows"] == pytest.approx(union_entry / forward * group, rel=0.02)
    assert found["backward_dq_rows"] == pytest.approx(union_entry / backward * group, rel=0.02)


def test_every_strategy_is_in_the_interpreters_plan():
    kinds = {row["constants"]["strategy"] for row in plans.load("interpret", OP)["dispatch"]}
    assert kinds == {dispatch.BY_QUERY, dispatch.BY_BLOCK, dispatch.BY_OVERLAP}


def test_under_torch_compile():
    """The public op, measured, inside a graph without breaks."""
    p, ids = small(queries=12, group=2), neighbours("pairs", queries=12)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q, k, v):
        return nsa_neuron.selected_attention(q, k, v, ids, select_block=BLOCK, scale=p.scale)[0]

    q, k, v = (x.clone().requires_grad_() for x in (p.q, p.k, p.v))
    with use_backend("cuda", "sim"):
        grads = torch.autograd.grad(step(q, k, v), (q, k, v), p.grad_o)
    mask = mask_of(ids, 12 + PAST, BLOCK, 2)
    without_lse = oracle.Problem(p.q, p.k, p.v, p.grad_o, torch.zeros_like(p.grad_lse), p.scale)
    want = oracle.expected(without_lse, [(slice(None), slice(None), mask)])
    for got, expect in zip(grads, want[2:], strict=True):
        oracle.close(got, expect, 3e-6)
