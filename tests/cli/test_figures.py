"""Every figure that `nsa bench` shows, from times that are made up: units, ratios, what is counted.

Clocks stand still but for what a step says that it took, so nothing here depends on the machine.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nsa_neuron
from nsa_neuron.bench import (
    attention,
    modelling,
    native,
    native_memory,
    native_peers,
    native_stages,
    overhead,
    record,
    simulator,
    turns,
)  # fmt: skip
from nsa_neuron.bench.record import Absent, Modelled, Record
from nsa_neuron.registry import use_backend


class Clock:
    """Stands in for the module `time`; `spend` makes a step that takes some ms, and is noted."""

    def __init__(self) -> None:
        self.wall = self.cpu = 100.0
        self.ran: list[str] = []

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.cpu

    def spend(self, name: str, wall: float, cpu: float, gives: Any = None) -> Callable[..., Any]:
        def step(*args: Any) -> Any:
            self.ran.append(name)
            self.wall += wall / 1e3
            self.cpu += cpu / 1e3
            return gives

        return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (attention, native, turns, simulator, modelling):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The rows of every table that is printed, by header."""
    made: list[list[dict[str, str]]] = []

    def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *_: Any) -> str:
        made.append([dict(zip(headers, row, strict=True)) for row in rows])
        return title

    for module in (attention, native, native_memory, native_peers, native_stages, overhead):
        monkeypatch.setattr(module, "table", table)
    return made


def ms(name: str, value: float, bench: str = "native", **facts: Any) -> Record:
    return Record.of(bench, name, "ms", [value], **facts)


# ---- records


def test_each_kind_of_record_says_what_it_is() -> None:
    facts = {"tokens": 5}
    measured = Record.of("b", "n", "us", [4.0, 1.0, 2.0], **facts).to_dict()
    modelled = Modelled("b", "n", "us", 1.0, 2.0, 4.0, facts)
    assert (measured["median"], measured["runs"], measured["kind"]) == (2.0, 3, "measured")
    assert measured["p20"] == pytest.approx(1.4) and measured["p80"] == pytest.approx(3.2)
    assert modelled.to_dict()["kind"] == "modelled" and str(modelled) == "2 (1 to 4)"
    assert Absent("b", "n", "why", facts).to_dict()["kind"] == "absent"
    assert record._percentile([7.0], 0.8) == 7.0


# ---- steps in turns, and what a layer or a model is measured with


def test_steps_take_turns_and_keep_wall_and_cpu_time(clock: Clock) -> None:
    steps = {"a": clock.spend("a", 2, 30), "b": clock.spend("b", 8, 5)}
    a, b = turns.in_turns("x", steps, 3, {"tokens": 9}, held={"a": 70, "b": 80})
    assert clock.ran == ["a", "b"] + ["a", "b"] * 3, "each runs once before"
    assert (a.median, a.facts["cpu_ms"]) == (pytest.approx(2), pytest.approx(30))
    assert (b.median, b.facts["cpu_ms"]) == (pytest.approx(8), pytest.approx(5))
    assert (a.facts["bytes"], b.facts["bytes"], a.facts["tokens"], a.runs) == (70, 80, 9, 3)
    clock.ran.clear()
    (cold,) = turns.in_turns("x", {"a": steps["a"]}, 1, {}, warm=False)
    assert clock.ran == ["a"] and "bytes" not in cold.facts


# ---- the reference against SDPA


def test_attention_is_timed_in_ms_and_ratios_are_ours_over_theirs(
    clock: Clock, monkeypatch, tables
) -> None:
    monkeypatch.setattr(attention, "nsa_step", clock.spend("nsa", 6, 0))
    monkeypatch.setattr(attention, "sdpa_step", clock.spend("sdpa", 2, 0))
    found = attention.measure([64, 8192])
    assert [r.median for r in found] == pytest.approx([6, 2, 3] * 2)
    assert [r.runs for r in found] == [10] * 3 + [2] * 3
    assert clock.ran[:4] == ["nsa", "sdpa"] * 2
    attention.to_text(found)
    assert [(row["tokens"], row["NSA / SDPA"]) for row in tables[0]] == [
        ("64", "3 (3 to 3)"), ("8192", "3 (3 to 3)")
    ]  # fmt: skip


def test_both_sides_compute_what_they_are_said_to() -> None:
    q, k, v, gates, grad = attention.tensors(48)
    with use_backend("reference"):
        dense = torch.autograd.grad(nsa_neuron.attention(q, k, v)[0], (q, k, v), grad)
        torch.testing.assert_close(attention.sdpa_step(q, k, v, gates, grad), dense)
        # Of 48 tokens, the window and the one chosen block are everything.
        o = gates[..., 1:].sum(-1, keepdim=True) * nsa_neuron.attention(q, k, v)[0]
        k_cmp, v_cmp = k.unfold(1, 32, 16).mean(-1), v.unfold(1, 32, 16).mean(-1)
        far, _ = nsa_neuron.compressed_attention(q, k_cmp, v_cmp, kv_len=48)
        whole = torch.autograd.grad(o + gates[..., :1] * far, (q, k, v, gates), grad)
        torch.testing.assert_close(attention.nsa_step(q, k, v, gates, grad), whole)


# ---- the cpu backend

PROBLEM = native.Problem(40, (2, 1), 16, torch.float32, native.FORWARD)


def test_rates_are_operations_and_bytes_of_a_second(monkeypatch) -> None:
    monkeypatch.setattr(native, "GEMM_SIZE", 8)
    monkeypatch.setattr(native, "COPY_BYTES", 4096)
    monkeypatch.setattr(native, "seconds", lambda step: step() is None or (1e-6, 0.0))
    product, read = native.rates()
    assert product.median == pytest.approx(2 * 8**3 / 1e3) and product.unit == "GFLOP/s"
    assert read.median == pytest.approx(4.096) and read.unit == "GB/s"
    for found, own in ((product, {"size": 8}), (read, {"bytes": 4096})):
        assert found.facts == {"threads": torch.get_num_threads(), "dtype": "float32", **own}
        assert found.runs == 5


def test_passes_are_timed_after_a_small_one_with_gradients_only_where_asked(clock: Clock) -> None:
    for way in (native.FORWARD, native.BACKWARD):
        problem = native.Problem(8192, (2, 1), 4, torch.bfloat16, way)
        q, k, v, gates, grad = problem.tensors()
        assert [x.requires_grad for x in (q, k, v, gates)] == [way == native.BACKWARD] * 4
        assert not grad.requires_grad and q.dtype == torch.bfloat16
        assert 0 <= gates.min() and gates.max() <= 1
        (found,) = native._timed(problem, {"ours": clock.spend(way, 4, 7)})
        assert (found.median, found.facts["cpu_ms"], found.runs) == (pytest.approx(4), 7, 5)
        assert clock.ran.count(way) == 1 + 5


@pytest.mark.parametrize(
    ("tokens", "rows"), [(16, 0 + 16 + 16), (40, 1 + 40 + 40), (4096, 255 + 1024 + 512)]
)
def test_a_decode_step_reads_what_it_sees(clock: Clock, monkeypatch, tokens, rows) -> None:
    steps = {native.STEP: clock.spend("ours", 3, 2)}
    monkeypatch.setattr(native, "decode_steps", lambda problem: steps)
    problem = native.Problem(tokens, (4, 2), 16, torch.bfloat16, "decode")
    (found,) = native.decode(problem, steps=4)
    assert found.facts["bytes"] == rows * 2 * 2 * 16 * 2, "keys and values of two heads"
    assert (found.median, found.facts["cpu_ms"], found.runs) == (pytest.approx(3), 2, 4)


@pytest.mark.parametrize("tokens", [20, 150], ids=["before_the_first_block", "many"])
def test_decode_steps_give_the_last_token_of_the_whole(tokens: int) -> None:
    problem = native.Problem(tokens, (2, 1), 16, torch.float32, native.FORWARD)
    q, k, v, gates, _ = problem.tensors()
    steps = native.decode_steps(problem)
    with use_backend("reference"):
        k_cmp, v_cmp = nsa_neuron.compress(k), nsa_neuron.compress(v)
        whole = nsa_neuron.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates)[:, -1:]
        dense = nsa_neuron.attention(q, k, v)[0][:, -1:]
        torch.testing.assert_close(steps[native.STEP](), whole)
        torch.testing.assert_close(steps[native.DENSE_STEP]().transpose(1, 2), dense)


def test_the_text_of_the_cpu_backend(tables) -> None:
    facts = {
        "tokens": 64, "pass": native.FORWARD, "Hq": 2, "Hkv": 1, "Dk": 16, "dtype": "float32",
        "threads": 1, "load": 0.25,
    }  # fmt: skip
    step = {**facts, "pass": "decode", "bytes": 3_000_000}
    rates = [
        Record.of("native", native.GEMM, "GFLOP/s", [50.0]),
        Record.of("native", "read", "GB/s", [6.0]),
    ]
    text = native.to_text([
        *rates, ms("sdpa", 12, **facts, cpu_ms=20), ms("cpu:native", 4, **facts, cpu_ms=8),
        ms(native.STEP, 2, **step, cpu_ms=1), ms(native.DENSE_STEP, 5, **step, cpu_ms=1),
    ])  # fmt: skip
    assert text.startswith("float32 GEMM 50 GFLOP/s, reading memory 6.0 GB/s")
    (row,), (decoded,) = tables
    assert row["SDPA / cpu:native"] == "3.00" and row["by CPU time, cpu:native"] == "2.50"
    assert row["load"] == "0.25" and row["sdpa, ms"].startswith("12 ")
    assert decoded["its bytes at the rate above, ms"] == "0.500"
    assert decoded["decode, ms"].startswith("2 ") and decoded["SDPA, ms"].startswith("5 ")


def test_memory_is_in_binary_units(monkeypatch, tables) -> None:
    told = json.dumps({"above": 3 * 2**20, "before": 5, "outputs": 7})
    asked = []
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: asked.append(a[0]) or SimpleNamespace(stdout=told)
    )
    found = native_memory._in_a_process("cpu:torch", PROBLEM)
    assert asked[0][3:] == ["cpu:torch", "forward", "40", "2", "1", "16", "float32"]
    assert (found.median, found.facts["outputs"], found.unit) == (3.0, 7, "MiB")
    facts = {"tokens": 2048, "pass": native.FORWARD}
    native_memory.to_text(
        [ms("cpu:torch", 1, **facts), ms("cpu:torch", 5, **facts | {"tokens": 64})]
    )
    assert tables[0][0]["KiB per token at the longest"] == "0.50"
    assert (tables[0][0]["64 tokens"], tables[0][0]["2048 tokens"]) == ("5.0", "1.0")


@pytest.mark.parametrize(("off", "agrees"), [(1.9e-3, True), (2.1e-3, False)])
def test_a_peer_agrees_within_its_limit(off: float, agrees: bool) -> None:
    ours = torch.ones(2, 3)
    said = native_peers._wrong("FlexAttention", lambda: ours + torch.tensor([0, 0, off]), ours)
    assert (said == "") == agrees


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_peers_mask_as_nsa_does(monkeypatch) -> None:
    """Window and blocks small enough that they hide something."""
    if "cpu:native" not in native.usable():
        pytest.skip("no C++ kernels here")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name, value in (("WINDOW", 24), ("MODULE_LIMIT", 0)):
        monkeypatch.setattr(native_peers, name, value)
    ids = torch.tensor([[0, -1], [1, 0]], dtype=torch.int32).repeat(128, 1)[None, :, None]
    ids[:, :64] = torch.tensor([0, -1], dtype=torch.int32)
    monkeypatch.setattr(native_peers, "_chosen", lambda *_: ids.sort(-1, descending=True)[0])
    problem = native.Problem(256, (2, 1), 16, torch.float32, native.FORWARD)
    with torch.inference_mode():
        found = native_peers.attentions(problem, problem.tensors())
        for what in (native_peers.DENSE, native_peers.NEAR, native_peers.SELECTED):
            mine = found[what][native_peers.MODE]()
            for name, step in found[what].items():
                assert native_peers._wrong(name, step, mine) == "", (what, name)


def test_peers_are_shown_over_ours(tables) -> None:
    facts = {"tokens": 64, "attention": "window"}
    native_peers.to_text([
        ms("cpu:native", 4, **facts), ms("FlexAttention", 10, **facts),
        Absent("native peers", "lucidrains", "none", facts),
    ])  # fmt: skip
    assert [row["over cpu:native"] for row in tables[0]] == ["1.00", "2.50", "-"]


def test_drifting_queries_keep_their_variance_and_choose_nearly_the_same() -> None:
    problem = native.Problem(900, (8, 1), 64, torch.float32, native.FORWARD)
    q = native_stages.inputs(problem, native_stages.CORRELATED)[0][0].flatten(1)
    assert 0.85 < q[-100:].std() < 1.15
    near = torch.nn.functional.cosine_similarity(q[-50:-1], q[-49:]).mean()
    assert near == pytest.approx(0.995, abs=2e-3)
    plain = native_stages.inputs(problem, native_stages.RANDOM)[0][0].flatten(1)
    assert torch.nn.functional.cosine_similarity(plain[:-1], plain[1:]).mean().abs() < 0.05


def test_the_share_of_replaced_blocks_is_counted(monkeypatch) -> None:
    """Rows that could not choose all they may are left out; of the others, 1 of 3 and 3 of 3."""
    rows = [[0, -1, -1], [0, 1, 2], [0, 1, 3], [4, 5, 6]]
    ids = torch.tensor(rows, dtype=torch.int32)[None, :, None]
    monkeypatch.setattr(nsa_neuron, "select_blocks", lambda *a, **k: ids)
    monkeypatch.setattr(native_stages, "MODE", "cpu:torch")
    assert native_stages.replaced(PROBLEM.tensors()) == pytest.approx((1 / 3 + 1) / 2)
    ids = ids[:, :2]
    assert native_stages.replaced(PROBLEM.tensors()) == 0.0


def test_what_no_stage_took_is_the_rest(clock: Clock, monkeypatch) -> None:
    @contextmanager
    def kernel_times() -> Any:
        yield {"selected": (0.002, 0.003)}

    monkeypatch.setattr(native_stages, "MODE", "cpu:torch")
    monkeypatch.setattr(native_stages, "kernel_times", kernel_times)
    monkeypatch.setattr(native, "nsa_on", lambda mode: clock.spend("whole", 10, 20))
    monkeypatch.setattr(nsa_neuron, "compress", clock.spend("compress", 1, 0.5))
    run = native_stages._run(PROBLEM, PROBLEM.tensors())
    assert run[native_stages.WHOLE] == pytest.approx((0.010, 0.020))
    assert run[native_stages.COMPRESS] == pytest.approx((0.002, 0.001)), "of keys and of values"
    assert run[native_stages.REST] == pytest.approx((0.006, 0.016))


def test_stages_are_shown_by_their_share_and_rate(tables) -> None:
    facts = {
        "tokens": 64, "pass": native.FORWARD, "input": "random", "replaced": 0.5, "load": 0.25,
    }  # fmt: skip
    rate = Record.of("native", native.GEMM, "GFLOP/s", [40.0])
    stages = native_stages.BENCH
    native_stages.to_text([
        rate, ms("selected", 2, stages, **facts, gflops=10.0), ms("whole", 8, stages, **facts),
    ])  # fmt: skip
    selected, whole = tables[0]
    assert (selected["share"], selected["GFLOP/s"], selected["of GEMM"]) == ("25%", "10", "25%")
    assert (whole["share"], whole["GFLOP/s"]) == ("100%", "-")


def test_products_of_stages_are_those_of_their_pairs() -> None:
    """40 tokens: 1 block from 31 on, 820 pairs; q k^T and p v of two heads of 16."""
    found = native_stages.products(PROBLEM.tensors())
    assert found[native_stages.FAR] == found[native_stages.CHOOSING] == 2 * 9 * 2 * 32
    assert found[native_stages.NEAR] == found[native_stages.SELECTED] == 2 * 820 * 2 * 32
    assert found["window, backward"] == 2.5 * found["window"]


# ---- the simulator


class Launch:
    """A simulated kernel: callable, with the record of its run."""

    def __init__(self, call: Callable[..., Any], run: Any) -> None:
        self.call, self.run = call, run

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def test_memory_of_the_simulator_is_over_arguments_results_and_tiles(monkeypatch) -> None:
    """Tiles have 128 partitions: peaks are bytes of each."""
    run = SimpleNamespace(peaks=[{"sbuf": 2**15, "psum": 2**13}, {"sbuf": 0, "psum": 0}])
    x = simulator.np.ones(2**20, simulator.np.float32)
    monkeypatch.setattr(simulator, "simulate", lambda kernel: Launch(lambda x: x + 1, run))
    found = simulator._memory(simulator.Case("c", None, None, (x,), 0.0))
    tensors = 2 * 2**22 + 128 * (2**15 + 2**13)
    assert found.facts["tensor_bytes"] == tensors
    # No tile was made, so the peak is the result's bytes and those of the argument.
    assert found.facts["peak_bytes"] == pytest.approx(2 * 2**22, rel=0.01)
    assert found.median == pytest.approx(2 * 2**22 / tensors, rel=0.01)


def test_instructions_of_a_ms_with_and_without_timelines(monkeypatch) -> None:
    times = iter([0.010, 0.030, 0.060] * 2)
    monkeypatch.setattr(modelling, "_seconds", lambda call: next(times))
    run = SimpleNamespace(instructions=range(1200))
    record, central, band, facts = modelling._rates(Launch(lambda: None, run), [], 2)
    assert record == pytest.approx([120] * 2) and central == pytest.approx([30] * 2)
    assert band == pytest.approx([1200 / 0.070 / 1e3] * 2) and facts == {"instructions": 1200}


def test_a_profile_costs_its_timelines_beside_the_run(monkeypatch) -> None:
    times = iter([0.010, 0.004] * 2)
    monkeypatch.setattr(modelling, "_seconds", lambda call: next(times))
    run = SimpleNamespace(instructions=range(12))
    monkeypatch.setattr(modelling, "simulate", lambda kernel: Launch(lambda: None, run))
    assert modelling.overhead("k", None, (), 2).median == pytest.approx(1.4)


def test_a_clock_that_goes_by_ticks_ends_no_measurement(clock: Clock, tables) -> None:
    """As under `ulimit -t`: a short step takes no CPU time at all."""
    assert 0 < modelling._seconds(clock.spend("step", 1, 0)) < 1e-6
    facts = {"tokens": 64, "pass": native.FORWARD, "load": 0.25, "cpu_ms": 0.0}
    facts |= {"Hq": 2, "Hkv": 1, "Dk": 16, "dtype": "float32", "threads": 1}
    native._table(native.FORWARD, [ms("sdpa", 12, **facts), ms("cpu:native", 4, **facts)])
    assert tables[0][0]["by CPU time, cpu:native"] == "-"
    assert tables[0][0]["SDPA / cpu:native"] == "3.00"
