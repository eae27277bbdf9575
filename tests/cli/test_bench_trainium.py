"""How `nsa bench --target trn2` gets from some queries' times to those of a whole sequence."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import plans
from nsa_neuron.bench import decoding, looped, trainium
from nsa_neuron.bench.record import Modelled
from nsa_neuron.bench.trainium import Problem, Stage

PROBLEM = Problem(4096, (64, 4), (192, 128), 0.05)
OPS = [stage.op for stage in trainium.STAGES]


@pytest.mark.parametrize(
    ("dense", "only", "ops"),
    [
        (True, (), [*OPS, "nsa_attention", "attention"]), (False, (), [*OPS, "nsa_attention"]),
        (False, ("attention", "gated_sum"), ["gated_sum", "attention"]),
        (True, ("gated_sum",), ["gated_sum"]), (True, ("nsa_attention",), ["nsa_attention"]),
    ],
)  # fmt: skip
def test_stages_are_modelled_in_order_for_every_problem(monkeypatch, dense, only, ops) -> None:
    asked = []
    monkeypatch.setattr(trainium, "_stage", lambda p, s: asked.append((p, s.op)) or s.op)
    problems = [PROBLEM, replace(PROBLEM, backward=True)]
    found = trainium.measure(problems, dense, only)
    gradient = [op for op in ops if op not in ("select_blocks", "nsa_attention")]
    assert found == [*ops, *gradient]
    assert asked == [(p, op) for p, own in zip(problems, (ops, gradient)) for op in own]  # noqa: B905


@pytest.mark.parametrize(
    ("op", "cores", "split"),
    [
        ("gated_sum", 1, "none"), ("nsa_attention", 1, "none"), ("gated_sum", 2, "sequence halves"),
        ("nsa_attention", 2, "kv heads"),
        ("gated_sum", 8, "kv heads x sequence halves, 2 cores a launch"),
        ("nsa_attention", 8, "pairs of kv heads x the first and last quarter, or the others"),
    ],
)  # fmt: skip
def test_a_stage_s_milliseconds_are_of_all_queries_and_heads(monkeypatch, op, cores, split) -> None:
    """Of 1, 2 and 4 ns of a query and kv head."""
    monkeypatch.setattr(trainium, "_means", lambda p, s: ([1.0, 2.0, 4.0], {"how": "so"}))
    problem = replace(PROBLEM, cores=cores, backward=True)
    found = trainium._stage(problem, Stage(op, 8, trainium._gated_sum))
    ms = 4096 * {1: 4, 2: 4, 8: 1}[cores] / 1e6
    assert (found.low, found.central, found.high) == pytest.approx((ms, 2 * ms, 4 * ms))
    assert (found.bench, found.name, found.unit) == ("trn2", op, "ms")
    assert found.facts == {
        "tokens": 4096, "Hq": 64, "Hkv": 4, "Dk": 192, "Dv": 128, "replaced": 0.05,
        "dtype": "bfloat16", "pass": "backward", "cores": cores, "work split": split, "how": "so",
    }  # fmt: skip


def test_range_attention_in_loops_is_paces_times_turns(monkeypatch) -> None:
    calls = []

    def nanoseconds(call: looped.Call) -> Any:
        calls.append(call)
        return (1e6, 2e6, 3e6), 0.123456

    monkeypatch.setattr(looped, "nanoseconds", nanoseconds)
    monkeypatch.setattr(looped.Call, "loops", lambda call: True)
    problem = replace(PROBLEM, cores=2, backward=True)
    for op in ("attention", "sliding_window_attention", "compressed_attention"):
        found = trainium._stage(problem, Stage(op, 8, trainium._attention))
        assert (found.low, found.central, found.high) == pytest.approx((4, 8, 12)), "four heads"
        assert found.facts["error"] == 0.1235 and "pace times turns" in found.facts["how"]
    assert calls == [
        looped.Call(op, 4096, 16, (192, 128), window, True, 2, 4)
        for op, window in (("attention", 0), ("sliding_window_attention", 512),
                           ("compressed_attention", 0))
    ]  # fmt: skip


def linear(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A query costs 100 ns and 1, 2 or 3 for each token before it."""
    asked: list[Any] = []

    def per_query(problem: Problem, stage: Stage, position: int, looping: bool) -> list[float]:
        asked.append((position, looping))
        return [100 + k * position for k in (1, 2, 3)]

    monkeypatch.setattr(trainium, "_per_query", per_query)
    monkeypatch.setattr(trainium, "_loops", lambda problem, op: False)
    return asked


def test_two_positions_make_the_mean_of_a_sequence(monkeypatch) -> None:
    asked = linear(monkeypatch)
    means, told = trainium._means(PROBLEM, Stage("gated_sum", 8, trainium._gated_sum))
    near, far = round(4096 * (0.5 - 12**-0.5)), round(4096 * (0.5 + 12**-0.5))
    assert asked == [(near, False), (far, False)] and near + far == 4096
    assert means == pytest.approx([100 + 2048 * k for k in (1, 2, 3)])
    assert told == {
        "how": f"some queries at {near} and {far}", "hardware loops": False,
        "ns per query and kv head": [100 + 2 * near, 100 + 2 * far],
    }  # fmt: skip
    asked.clear()
    once, told = trainium._means(PROBLEM, Stage("gated_sum", 8, trainium._gated_sum, True))
    assert asked == [(4096, False)] and once == [100 + 4096 * k for k in (1, 2, 3)]
    assert told["how"] == "some queries at 4096"
    asked.clear()
    trainium._means(replace(PROBLEM, cores=2), Stage("gated_sum", 512, trainium._gated_sum))
    assert asked[0][0] == 2048, "twice the queries of both cores fit before it"


@pytest.mark.parametrize("steady", [False, True])
def test_longer_sequences_go_on_in_a_line_or_as_they_are(monkeypatch, steady: bool) -> None:
    asked = linear(monkeypatch)
    stage = Stage("gated_sum", 8, trainium._gated_sum, steady=steady)
    means, told = trainium._means(replace(PROBLEM, tokens=2**18), stage)
    near, far, last = (position for position, _ in asked)
    assert (near + far, last) == (65_536, 65_536)
    middle = 2**15 if steady else 2**17
    assert means == pytest.approx([100 + k * middle for k in (1, 2, 3)])
    assert told["how"].endswith(", continued " + ("as it is" if steady else "in a line"))
    off = 1 - (100 + 2 * 2**15) / (100 + 2 * 2**16) if steady else 0.0
    assert told["error"] == pytest.approx(off, abs=1e-4)


@pytest.mark.parametrize(
    ("op", "looping", "longest"),
    [("select_blocks", False, 2**16), ("select_blocks", True, 2**18), ("gated_sum", True, 2**18),
     ("nsa_attention", False, 2**18), ("nsa_attention", True, 2**20)],
)  # fmt: skip
def test_how_far_queries_are_simulated(monkeypatch, op: str, looping: bool, longest: int) -> None:
    asked = linear(monkeypatch)
    monkeypatch.setattr(trainium, "_loops", lambda problem, name: looping)
    trainium._means(replace(PROBLEM, tokens=2**20), Stage(op, 8, trainium._gated_sum))
    assert asked[0][0] + asked[1][0] == longest and {x for _, x in asked} == {looping}


def test_a_query_is_what_twice_as_many_cost_more(monkeypatch) -> None:
    asked = []

    def time(*given: Any) -> Any:
        asked.append(given)
        return tuple(k * (1000 + 7 * given[3]) for k in (1, 2, 3))

    monkeypatch.setattr(trainium, "_time", time)
    stage = Stage("gated_sum", 8, trainium._gated_sum)
    for cores, lnc in ((1, 1), (2, 2), (8, 2)):
        asked.clear()
        problem = replace(PROBLEM, cores=cores)
        found = trainium._per_query(problem, stage, 100, True)
        assert found == pytest.approx([7, 14, 21])
        shorter = replace(problem, tokens=100, cores=lnc, longest=4096)
        assert asked == [(stage, shorter, 100, 8 * lnc * k, True) for k in (1, 2)]


@pytest.mark.parametrize(("more", "loops"), [(0, False), (1, True)])
def test_selection_loops_above_the_limit_of_its_plan(monkeypatch, more: int, loops: bool) -> None:
    """128 queries and 128 blocks a tile, of half of the blocks on average: 32 and 1 of 4096."""
    limit = plans.load("select_blocks")["forward"]["unrolled_key_tiles"]
    tokens = int((limit / 4 * 2 * 16 * 128 * 128) ** 0.5)
    tokens += 128 * more - tokens % 2
    assert trainium._loops(replace(PROBLEM, tokens=tokens), "select_blocks") is loops
    assert not trainium._loops(replace(PROBLEM, tokens=2**20), "gated_sum")


@pytest.mark.parametrize("before", [None, "1"])
def test_cores_of_a_launch_are_set_inside_alone(monkeypatch, before: str | None) -> None:
    monkeypatch.delenv(neuron.LNC, raising=False)
    if before:
        monkeypatch.setenv(neuron.LNC, before)
    with pytest.raises(ZeroDivisionError), trainium._cores(2):
        assert os.environ[neuron.LNC] == "2"
        raise ZeroDivisionError
    assert os.environ.get(neuron.LNC) == before


def test_numbers_are_the_same_for_the_same_shape() -> None:
    a, b = trainium._normal(40, 50), trainium._normal(40, 50)
    assert torch.equal(a, b) and a.dtype == torch.bfloat16 and a.shape == (40, 50)
    assert 0.9 < a.float().std() < 1.1 and abs(a.float().mean()) < 0.1


def test_queries_of_the_whole_drift_unless_blocks_are_random() -> None:
    for replaced, kept in ((0.05, 1 - 100 / 4096), (0.5, 1 - 1000 / 4096), (1.0, 0.0)):
        problem = Problem(4096, (32, 1), (64, 32), replaced)
        q = trainium._whole(problem, 4096, 48)["q"].float()
        near = torch.nn.functional.cosine_similarity(q[0, :-1].flatten(1), q[0, 1:].flatten(1))
        assert near.mean() == pytest.approx(kept, abs=0.03)
        assert 0.9 < q[0, -1].std() < 1.1
    assert not trainium._whole(Problem(64, (2, 1), (4, 4), 0.5), 100, 2)["q"].isnan().any()


# ---- decode steps


def test_decode_steps_are_modelled_batch_by_batch(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(decoding, "_of_batch", lambda *a: asked.append(a) or [a[1], -a[1]])
    assert decoding.measure(64, [1, 32], (8, 2), (16, 24)) == [1, -1, 32, -32]
    assert asked == [(64, b, (8, 2), (16, 24)) for b in (1, 32)]


def test_a_decode_step_s_facts(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "_step", lambda *a: ([1e3, 2e3, 4e3], {"DMAs of a core": 5}))
    nsa, contiguous, dense = decoding._of_batch(64, 16, (8, 2), (16, 24))
    shared = {
        "tokens": 64, "batch": 16, "Hq": 8, "Hkv": 2, "Dk": 16, "Dv": 24, "dtype": "bfloat16",
        "cores": 8,
    }  # fmt: skip
    rows = 3 + 16 * 64 + 512
    own = {**shared, "of each core": "2 sequences", "DMAs of a core": 5}
    assert nsa == Modelled(
        "trn2-decode", "decode", "us", 1, 2, 4, {**own, "bytes": 16 * 2 * 80 * rows}
    )
    assert contiguous == replace(nsa, name="decode, contiguous caches")
    assert dense.facts == {
        **shared, "of each core": "an eighth of the bytes", "bytes": 16 * 2 * 80 * 64
    }  # fmt: skip
    assert (dense.name, dense.bench, dense.unit) == ("dense, its bytes", "trn2-decode", "us")


@pytest.mark.parametrize("name", ["cmp", "slc", "win"])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_pool_s_memory_is_by_heads_where_blocks_are_chosen(name: str, heads: int) -> None:
    page = {"cmp": 16, "slc": 256, "win": 256}[name]
    for contiguous in (False, True):
        pool = decoding.a_pool(name, heads, 8, contiguous)
        assert pool.shape == (64, page, heads, 8) and pool.dtype == torch.bfloat16
        by_heads = name == "slc" and heads > 1 and not contiguous
        assert pool.is_contiguous() is not by_heads
        assert pool.transpose(1, 2).is_contiguous() is (by_heads or heads == 1)


# ---- hardware loops


def test_a_call_s_keys_and_direction() -> None:
    call = looped.Call("attention", 1000, 4, (8, 8))
    assert (call.keys, call.direction) == (1000, "forward")
    far = looped.Call("compressed_attention", 1000, 4, (8, 8), backward=True)
    assert (far.keys, far.direction) == ((1000 - 32) // 16 + 1, "backward")


def test_a_run_asks_for_the_bounds_of_its_loops_in_order_and_of_each_core(monkeypatch) -> None:
    core = SimpleNamespace(index=0)
    monkeypatch.setattr(looped, "require_core", lambda what: core)
    turns = looped.Turns([5, 7])
    assert [turns(None), turns(None), turns(None)] == [5, 7, 0]
    core.index = 1
    assert [turns(None), turns(None)] == [5, 7]


def test_a_body_is_what_four_cost_beyond_two(monkeypatch) -> None:
    def estimate(count: int) -> Any:
        own = 1000 + 30 * count
        return SimpleNamespace(band=SimpleNamespace(low=own, central=2 * own, high=3 * own))

    monkeypatch.setattr(looped.cost, "estimate", estimate)
    call = looped.Call("attention", 1000, 4, (8, 8))
    assert looped._pace(call, lambda count: count) == pytest.approx((30, 60, 90))


def test_the_backward_pass_is_queries_and_keys_and_as_far_off_as_its_worse(monkeypatch) -> None:
    parts = iter([((1.0, 2.0, 3.0), 0.01), ((10.0, 20.0, 30.0), 0.25)])
    asked = []
    monkeypatch.setattr(looped, "_queries_kernel", lambda call: "queries")
    monkeypatch.setattr(looped, "_keys_kernel", lambda call: "keys")
    monkeypatch.setattr(
        looped, "_sum", lambda call, launch, turns: asked.append((launch, turns)) or next(parts)
    )
    call = looped.Call("attention", 8192, 4, (8, 8), backward=True)
    band, error = looped.nanoseconds(call)
    assert band == (11.0, 22.0, 33.0) and error == 0.25
    (queries, by_queries), (keys, by_keys) = asked
    assert (queries, keys) == ("queries", "keys")
    # Whoever sees more keys takes more turns of the large loop; edges are there for everyone.
    assert by_queries.shape[1] == 3 and by_keys.shape[1] == 2
    assert (by_queries >= 0).all() and (by_keys >= 0).all()
    assert by_queries[-1, 0] > by_queries[0, 0] and (by_queries[:, 0].diff() >= 0).all()
