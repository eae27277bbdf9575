"""The calls that `nsa bench --target trn2` models: their arguments, splits, loops; nothing runs."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import plans
from nsa_neuron.backends.neuron.launch import reach
from nsa_neuron.bench import looped, trainium
from nsa_neuron.bench.trainium import Problem

PROBLEM = Problem(4096, (8, 2), (24, 16), 0.05)
BF16 = torch.bfloat16


def shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(x.shape) for n, x in values.items() if isinstance(x, torch.Tensor)}


# ---- arguments


def test_the_stages_and_how_many_queries_they_run() -> None:
    told = [(s.op, s.queries, s.per_token, s.steady) for s in trainium.STAGES]
    assert told == [
        ("compress", 8192, True, False), ("compressed_attention", 128, False, False),
        ("select_blocks", 256, False, False), ("selected_attention", 512, False, True),
        ("sliding_window_attention", 128, False, True), ("gated_sum", 1024, True, False),
    ]  # fmt: skip
    for stage, op, queries in (
        (trainium.ONE_KERNEL, "nsa_attention", 256), (trainium.ATTENTION, "attention", 64)
    ):  # fmt: skip
        assert (stage.op, stage.queries) == (op, queries)
        assert not stage.per_token and not stage.steady


def test_arguments_of_every_stage() -> None:
    """Five queries of four heads, the last one at position 199 of one kv head."""
    made = {s.op: s.make(PROBLEM, 200, 5) for s in (*trainium.STAGES, trainium.ATTENTION)}
    keys, few = {"k": (1, 200, 1, 24), "v": (1, 200, 1, 16)}, (200 - 32) // 16 + 1
    q, out = (1, 5, 4, 24), (1, 5, 4, 16)
    assert {op: shapes(values) for op, values in made.items()} == {
        "compress": {
            "x": (1, 5, 1, 24), "w1": (768, 24), "b1": (24,), "w2": (24, 24), "b2": (24,),
            "pe": (32, 24),
        },
        "compressed_attention": {"q": q, "k_cmp": (1, few, 1, 24), "v_cmp": (1, few, 1, 16)},
        "select_blocks": {"q": q, "k_cmp": (1, few, 1, 24), "lse": (1, 5, 4)},
        "selected_attention": {"q": q, **keys, "block_indices": (1, 5, 1, 16)},
        "sliding_window_attention": {"q": q, **keys},
        "gated_sum": {"o_cmp": out, "o_slc": out, "o_win": out, "gates": (1, 5, 4, 3)},
        "attention": {"q": q, **keys},
    }  # fmt: skip
    for values in made.values():
        kinds = {n: x.dtype for n, x in values.items() if isinstance(x, torch.Tensor)}
        others = {"lse": torch.float32, "block_indices": torch.int32}
        assert kinds == {n: others.get(n, BF16) for n in kinds}
    assert made["compress"]["method"] == "mlp"
    assert made["compressed_attention"]["kv_len"] == made["select_blocks"]["kv_len"] == 200
    assert made["select_blocks"]["lse"].unique().item() == pytest.approx(2.5257 + 0.5, abs=1e-4)
    assert made["compress"]["w1"].float().std() == pytest.approx(768**-0.5, rel=0.05)
    assert made["compress"]["w2"].float().std() == pytest.approx(24**-0.5, rel=0.1)
    gates = made["gated_sum"]["gates"]
    assert 0 <= gates.min() and gates.max() <= 1 and gates.float().std() > 0.1


def test_selected_blocks_are_those_of_the_last_queries() -> None:
    ids = trainium._selected(PROBLEM, 3000, 6)["block_indices"][0, :, 0]
    rows = list(trainium.drifting_blocks(3000, 0.05))
    assert ids.tolist() == rows[-6:] and ids[-1].max() == 2999 // 64
    many = trainium._selected(PROBLEM, 3000, 1100)["block_indices"][0, :, 0]
    assert len(many) == 1100 and many[-1].max() == 2999 // 64
    again = trainium._selected(replace(PROBLEM, replaced=1.0), 3000, 6)["block_indices"]
    assert not torch.equal(again[0, :, 0], ids)


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_the_whole_has_a_kv_head_for_each_core_of_a_launch(cores: int) -> None:
    heads = min(cores, 2)
    values = trainium._whole(replace(PROBLEM, cores=cores), 200, 6)
    own, few = 6 // heads, (200 - 32) // 16 + 1
    wanted = {"q": (1, own, 4 * heads, 24), "gates": (1, own, 4 * heads, 3)}
    for branch, rows in (("cmp", few), ("slc", 200), ("win", 200)):
        wanted[f"k_{branch}"] = (1, rows, heads, 24)
        wanted[f"v_{branch}"] = (1, rows, heads, 16)
    assert shapes(values) == wanted and {x.dtype for x in values.values()} == {BF16}


# ---- heads, cores, lengths


@pytest.mark.parametrize(("more", "loops"), [(0, False), (1, True)])
@pytest.mark.parametrize(("kv_heads", "heads"), [(1, 1), (4, 2), (5, 3)])
def test_the_whole_loops_above_the_limit_of_its_plan(
    monkeypatch, more: int, loops: bool, kv_heads: int, heads: int
) -> None:
    asked: list[Any] = []
    limit = plans.load("nsa_attention")["looped"]["most_unrolled"]
    monkeypatch.setattr(trainium.fused, "instructions", lambda *a: asked.append(a) or limit + more)
    problem = replace(PROBLEM, heads=(20, kv_heads))
    assert trainium._loops(problem, "nsa_attention") is loops
    assert asked == [(heads, 4096, 4096, 512)]


@pytest.mark.parametrize("backward", [False, True])
def test_a_call_s_time_is_of_all_its_launches(monkeypatch, backward: bool) -> None:
    seen: list[Any] = []

    class Lowered:
        def supports(self, bound: Any, mode: str) -> Any:
            assert mode == "sim"
            return trainium.Supported(None)

        def lower(self, bound: Any, plan: Any) -> Any:
            assert bound.spec.name == "gated_sum" + "_backward" * backward
            seen.append((os.environ[neuron.LNC], torch.is_grad_enabled()))
            return lambda **values: seen.append(values["gates"].shape)

    def recording() -> Any:
        class Runs:
            def __enter__(self) -> list[str]:
                return ["one", "two"]

            def __exit__(self, *error: object) -> None:
                pass

        return Runs()

    bands = {"one": (1.0, 2.0, 4.0), "two": (10.0, 20.0, 40.0)}
    monkeypatch.setattr(neuron, "BACKEND", Lowered())
    monkeypatch.setattr(trainium.records, "recording", recording)
    monkeypatch.setattr(
        trainium.cost, "estimate",
        lambda run: SimpleNamespace(
            band=SimpleNamespace(**dict(zip(("low", "central", "high"), bands[run], strict=True)))
        ),
    )  # fmt: skip
    problem = replace(PROBLEM, cores=2, backward=backward)
    stage = trainium.STAGES[-1]
    found = trainium._time.__wrapped__(stage, problem, 200, 5, False)
    assert found == (11.0, 22.0, 44.0)
    assert seen == [("2", False), (1, 5, 4, 3)]


# ---- hardware loops


CALL = looped.Call("attention", 1000, 4, (8, 8), kv_heads=3)


@pytest.mark.parametrize(
    ("call", "keys", "tiles"),
    [
        (CALL, 1000, (1, reach.UNLIMITED, 1, True)),
        (
            replace(CALL, op="sliding_window_attention", window=512, backward=True), 1000,
            (1, 1 - 512, 1, True),
        ),
        (replace(CALL, op="compressed_attention"), 61, (-15, reach.UNLIMITED, 16, True)),
    ],
)  # fmt: skip
def test_whether_a_call_loops_is_the_launcher_s_to_say(monkeypatch, call, keys, tiles) -> None:
    asked: list[Any] = []
    limit = call.sizes["most_unrolled"]
    for more in (0, 1):
        monkeypatch.setattr(
            looped.groups, "unrolled_instructions", lambda *a, n=limit + more: asked.append(a) or n
        )
        assert call.loops() is (more == 1)
    direction = "backward" if call.backward else "forward"
    assert asked == [(direction, (1, 1000, call.kv_heads), 4, keys, tiles)] * 2


def test_a_sum_s_error_is_that_of_other_turns_at_the_centre() -> None:
    def launch(turns: Any) -> Any:
        central = 100.0 if tuple(turns) == (2, 2) else 10.0 * sum(turns)
        return 1.0, central, 1.0

    call = looped.Call("attention", 1000, 4, (8, 8))
    _, error = looped._sum(call, launch, torch.ones(3, 2).double())
    assert error == pytest.approx(1 - 40 / 100)


def test_turns_are_the_chunks_of_keys_that_queries_see(monkeypatch) -> None:
    """Causal: a pair of groups sees all keys up to its first query, and some up to its last."""
    turns: list[Any] = []
    monkeypatch.setattr(looped, "_queries_kernel", lambda call: "queries")
    monkeypatch.setattr(looped, "_keys_kernel", lambda call: "keys")
    monkeypatch.setattr(
        looped, "_sum", lambda call, launch, found: turns.append(found) or ((0.0,) * 3, 0.0)
    )
    call = looped.Call("attention", 8192, 4, (8, 8), backward=True)
    looped.nanoseconds(call)
    queries, keys = turns
    large, small = call.sizes["large"], call.sizes["small"]
    pair = 2 * call.sizes["tiles"] * 512 // 4
    assert torch.equal(queries[::2], queries[1::2]) and torch.equal(keys[::2], keys[1::2])
    assert len(queries[::2]) == 8192 // pair and len(keys) == 8192 // 256
    for k, (many, few, edge) in enumerate(queries[::2].tolist()):
        seen, first = math.ceil((k + 1) * pair / small), k * pair + 1
        assert many == first // large and edge == seen - first // small
        assert many * (large // small) + few + edge == seen
    for k, (edge, seen) in enumerate(keys[::2].tolist()):
        begin, end = 512 * k, 512 * (k + 1)
        assert edge + seen == 8192 // pair - begin // pair
        assert seen == 8192 // pair - ((end - 2) // pair + 1)


@pytest.fixture
def launched(monkeypatch):
    """What is launched for two bodies, instead of its time."""
    monkeypatch.setattr(looped, "_pace", lambda call, launch: launch(2))
    monkeypatch.setattr(looped, "_shape_only", lambda *given: given)


WIDE = 1 << 17  # keys of every run


@pytest.mark.parametrize("window", [0, 512])
@pytest.mark.parametrize("backward", [False, True])
def test_a_launch_of_groups_of_queries(launched, window: int, backward: bool) -> None:
    """3 turns of the large loop, 2 of the small one, 5 of edges; two groups for each core."""
    op = "sliding_window_attention" if window else "attention"
    call = looped.Call(op, 65_536, 4, (24, 16), window, backward, lnc=2)
    sizes = call.sizes
    tiles, large, small = (sizes[name] for name in ("tiles", "large", "small"))
    given, kernel, shapes, answers, constants = looped._queries_kernel(call)((3, 2, 5))
    whole = 3 * large // small
    body = [0, 3, whole, whole + 2, whole + 2, whole + 7]
    assert answers == ([0] * 4 * bool(window) + body) * 2 and given is call
    s = 2 * 2 * tiles * 512 // 4
    q, o = ((1, s, 4, 24), "bfloat16"), ((1, s, 4, 16), "bfloat16")
    k_t, v_t = ((1, 1, 24, WIDE), "bfloat16"), ((1, 1, 16, WIDE), "bfloat16")
    k, v = ((1, WIDE, 1, 24), "bfloat16"), ((1, WIDE, 1, 16), "bfloat16")
    bounds, stats = ((s, 2), "float32"), ((1, s, 4, 2), "float32")
    tables = [((4, 8), "int32"), ((4, 2), "float32")]
    kernels = looped.run.package().load(op)
    if backward:
        assert kernel is kernels.backward_dq
        assert shapes == [o, q, k_t, v_t, k, stats, bounds, *tables]
    else:
        assert kernel is kernels.forward
        assert shapes == [q, k_t, v, bounds, ((1, 1), "float32"), *tables]
    assert constants == {
        "reach": (0, 0, 1, True), "scale": 24**-0.5, "chunk": 2048, "resident": 8192,
        "looped": (tiles, large, small, not window),
    }  # fmt: skip


def test_a_launch_of_sections_of_keys(launched) -> None:
    """Chunks of queries that see some of a section, 5, and all of it, 3."""
    call = looped.Call("attention", 65_536, 4, (24, 16), backward=True, lnc=2)
    sizes, rows, t = call.sizes, 1 << 16, 2 * 2 * 256
    _, kernel, shapes, answers, constants = looped._keys_kernel(call)((5, 3))
    assert kernel is looped.run.package().load("attention").backward_dkv
    assert answers == [0, 5, 5, 8, 0, 0] * 2
    assert shapes == [
        ((1, rows, 4, 16), "bfloat16"), ((1, rows, 4, 24), "bfloat16"),
        ((1, 1, 24, t), "bfloat16"), ((1, 1, 16, t), "bfloat16"), ((1, rows, 4, 2), "float32"),
        ((rows, 2), "float32"), ((4, 4), "int32"),
    ]  # fmt: skip
    assert constants == {
        "reach": (0, 0, 1, True), "scale": 24**-0.5,
        "looped": (sizes["tiles"], sizes["large"], sizes["small"], True),
    }  # fmt: skip


def test_a_run_without_data_takes_the_turns_that_it_is_given(monkeypatch) -> None:
    asked: list[Any] = []

    def simulate(kernel: Any, *, data: bool, unknown: Any) -> Any:
        asked.append((kernel, data, unknown.bounds))
        launch = SimpleNamespace(run="record")
        return type("Launch", (), {
            "__call__": lambda self, *shapes, **constants: asked.append(
                ([(x.shape, str(x.dtype)) for x in shapes], constants)
            ),
            "run": launch.run,
        })()  # fmt: skip

    monkeypatch.setattr(looped.simulator, "simulate", simulate)
    call = looped.Call("attention", 1000, 4, (8, 8), lnc=2)
    kernel = {2: "kernel on two cores"}
    found = looped._shape_only(call, kernel, [((3, 4), "float32")], [7, 8], {"scale": 2.0})
    assert found == "record"
    assert asked == [
        ("kernel on two cores", False, [7, 8]), ([((3, 4), "float32")], {"scale": 2.0})
    ]  # fmt: skip
