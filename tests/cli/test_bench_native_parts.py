"""Memory, peers and stages of `cpu:native`: what is tried, and what its rows say."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_neuron.backends.cpu.native_mode.call import EVERYTHING, Call
from nsa_neuron.bench import native, native_memory, native_peers, native_stages
from nsa_neuron.bench.native import BACKWARD, FORWARD, Problem
from nsa_neuron.bench.record import Absent
from nsa_neuron.errors import NsaError

SMALL = Problem(70, (4, 2), 16, torch.float32, FORWARD)


# ---- memory


def test_what_memory_is_measured_of(monkeypatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(native, "usable", lambda: ["cpu:native", "cpu:torch"])
    monkeypatch.setattr(
        native_memory, "_in_a_process", lambda name, p: asked.append((name, p)) or (name, p.way)
    )
    lengths = [8192, 8193, 16_384, 16_385, 65_536, 65_537]
    found = native_memory.measure(lengths, (2, 1), 8, "float16")
    assert found == [(name, p.way) for name, p in asked]
    assert {(p.heads, p.dim, p.dtype) for _, p in asked} == {((2, 1), 8, torch.float16)}
    assert [(name, p.way, p.tokens) for name, p in asked] == [
        *(("cpu:native", FORWARD, x) for x in lengths),
        *(("cpu:native", BACKWARD, x) for x in lengths[:5]),
        *(("cpu:native", "decode", x) for x in lengths),
        *(("cpu:torch", way, x) for way in (FORWARD, BACKWARD, "decode") for x in lengths[:3]),
        *(("sdpa", way, x) for way in (FORWARD, BACKWARD) for x in lengths[:1]),
    ]


def test_a_process_reads_the_words_that_it_is_started_with(monkeypatch, capsys) -> None:
    given: list[Any] = []
    monkeypatch.setattr(native_memory, "peak", lambda *a: given.append(a) or {"above": 1})
    native_memory.main(["cpu:torch", "forward + backward", "96", "4", "2", "16", "bfloat16"])
    assert given == [("cpu:torch", Problem(96, (4, 2), 16, torch.bfloat16, BACKWARD))]
    assert json.loads(capsys.readouterr().out) == {"above": 1}


def test_passes_of_a_measurement_run_the_steps_of_the_benchmark(monkeypatch) -> None:
    values = SMALL.tensors()
    for name, step in (("sdpa", native.sdpa), ("cpu:torch", native.nsa_on("cpu:torch"))):
        got = native_memory._pass(name, SMALL)()
        assert torch.equal(got, step(SMALL, values))
    token = Problem(70, (4, 2), 16, torch.float32, "decode")
    one = native_memory._pass("cpu:torch", token)()
    assert one.is_inference() and one.shape == (1, 1, 4, 16)
    wanted = native.decode_steps(token)["decode"]()
    torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-6)


def test_results_are_one_tensor_or_several() -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    assert list(native_memory.tensors(a)) == [a]
    assert [x.shape for x in native_memory.tensors((a, b))] == [(2,), (3,)]


def test_a_status_without_a_line_is_an_error(monkeypatch) -> None:
    text = "Name:\tpython\nVmHWM:\t  12 kB\nVmRSSx:\t 5 kB\nVmRSS:\t    7 kB\n"
    monkeypatch.setattr(native_memory.Path, "read_text", lambda path: text)
    assert native_memory._status("VmRSS") == 7 * 1024
    assert native_memory._status("VmHWM") == 12 * 1024
    with pytest.raises(OSError, match="no VmSwap"):
        native_memory._status("VmSwap")


# ---- peers


def test_a_map_of_chosen_blocks() -> None:
    ids = torch.tensor([[[0, 1], [1, -1]], [[-1, -1], [0, 2]]], dtype=torch.int32)[None]
    problem = Problem(130, (4, 2), 8, torch.float32, FORWARD)
    found = native_peers._chosen_map(ids, problem)
    assert found.shape == (2, 2, 3) and found.is_contiguous()
    assert found.int().tolist() == [[[1, 1, 0], [0, 0, 0]], [[0, 1, 0], [1, 0, 1]]]


@pytest.mark.parametrize("tokens", [4096, 4097])
def test_lucidrains_module_is_built_of_the_same_blocks(monkeypatch, tokens: int) -> None:
    built: list[dict[str, Any]] = []

    class Module(torch.nn.Module):
        def __init__(self, **sizes: Any) -> None:
            super().__init__()
            built.append(sizes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    module = SimpleNamespace(SparseAttention=Module)
    monkeypatch.setitem(sys.modules, native_peers.MODULE, module)
    problem = Problem(tokens, (8, 2), 16, torch.bfloat16, FORWARD)
    step = native_peers.lucidrains(problem)
    if tokens > 4096:
        assert step == "not tried above 4096 tokens: it copies every query's keys" and not built
        return
    assert not isinstance(step, str)
    x = step()
    assert x.shape == (1, 4096, 64) and x.dtype == torch.bfloat16
    mean = built[0].pop("compress_mlp")
    assert built == [{
        "dim": 64, "dim_head": 16, "heads": 8, "kv_heads": 2, "sliding_window_size": 512,
        "compress_block_size": 32, "compress_block_sliding_stride": 16,
        "selection_block_size": 64, "num_selected_blocks": 16, "causal": True,
    }]  # fmt: skip
    assert mean(torch.arange(6.0).view(1, 3, 2)).tolist() == [[2.0, 3.0]]


def test_what_a_peer_throws_is_its_row() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("\n" + "no " * 100 + "\nof a stack")

    why = native_peers._wrong("FlexAttention", broken, torch.zeros(1))
    assert why == f"failed: RuntimeError: {('no ' * 100)[:200]}"


@pytest.mark.parametrize(("tokens", "rounds"), [(16_385, 1), (8192, 2), (4096, 4), (64, 5)])
def test_peers_are_timed_in_turns_and_what_is_missing_stands_first(
    monkeypatch, tokens: int, rounds: int
) -> None:
    ran: list[str] = []
    times = iter([(k / 1e3, 2 * k / 1e3) for k in range(1, 2 * rounds + 1)])
    monkeypatch.setattr(native, "seconds", lambda step: (step(), next(times))[1])
    monkeypatch.setattr(native_peers.os, "getloadavg", lambda: (0.126, 5.0, 6.0))
    zeros = torch.zeros(1)

    def step(name: str) -> Any:
        return lambda: ran.append(name) or zeros

    problem = Problem(tokens, (2, 1), 8, torch.float32, FORWARD)
    steps = {"cpu:native": step("ours"), "sdpa": step("sdpa"), "lucidrains": "not here"}
    absent, ours, sdpa = native_peers._timed(problem, "window", steps)
    facts = {**problem.facts(), "attention": "window"}
    assert absent == Absent("native peers", "lucidrains", "not here", facts)
    # Ours is the measure, then each is compiled and compared, then come the turns.
    assert ran == ["ours", "ours", "sdpa"] + ["ours", "sdpa"] * rounds
    for record, first in ((ours, 1), (sdpa, 2)):
        ms = first + (rounds - 1)
        assert record.unit == "ms" and record.runs == rounds
        assert record.median == pytest.approx(ms)
        assert record.facts == {**facts, "cpu_ms": 2 * ms, "load": 0.13}
    assert (ours.name, sdpa.name) == ("cpu:native", "sdpa")


def test_peers_are_asked_length_by_length_without_gradients(monkeypatch) -> None:
    asked: list[Any] = []

    def attentions(problem: Problem, values: Any) -> dict[str, Any]:
        asked.append((problem, torch.is_inference_mode_enabled(), values[0].shape))
        return {"causal": "steps of causal", "nsa": "steps of nsa"}

    monkeypatch.setattr(native_peers, "attentions", attentions)
    monkeypatch.setattr(native_peers, "_timed", lambda p, what, steps: [(p.tokens, what, steps)])
    found = native_peers.measure([64, 96], (2, 1), 8, "bfloat16")
    both = [("causal", "steps of causal"), ("nsa", "steps of nsa")]
    assert found == [(x, *each) for x in (64, 96) for each in both]
    assert asked == [
        (Problem(x, (2, 1), 8, torch.bfloat16, FORWARD), True, (1, x, 2, 8)) for x in (64, 96)
    ]


NATIVE = pytest.mark.skipif("cpu:native" not in native.usable(), reason="no C++ kernels here")


# ---- stages


@pytest.mark.parametrize(
    ("kernel", "change", "name"),
    [
        ("compressed_forward", {}, "compressed + select"),
        ("interval_forward", {}, "compressed"),
        ("interval_backward", {}, "compressed, backward"),
        ("interval_forward", {"window": 5}, "window"),
        ("interval_backward", {"window": EVERYTHING - 1}, "window, backward"),
        ("selected_forward", {"ids": 16}, "selected"),
        ("selected_backward", {"ids": 16}, "selected, backward"),
        ("selected_forward", {"ids": 16, "local": 2}, "compressed"),
        ("gated_sum", {"window": 5}, "gated sum"),
        ("gated_sum_backward", {}, "gated sum backward"),
    ],
)
def test_a_kernel_s_stage_is_its_branch(kernel: str, change: dict[str, int], name: str) -> None:
    call = Call(window=EVERYTHING, local=0)
    for field, value in change.items():
        setattr(call, field, value)
    assert native_stages.stage(kernel, call) == name
    assert native_stages.stage(kernel, [call] * 3) == kernel.replace("_", " ")


def test_kernels_are_timed_inside_alone(monkeypatch) -> None:
    ran: list[Any] = []
    original = native_stages.extension.run
    monkeypatch.setattr(native_stages.extension, "run", lambda *a: ran.append(a))
    inner = native_stages.extension.run
    monkeypatch.setattr(native, "seconds", lambda step: (step(), (1.0, 2.0))[1])
    with pytest.raises(NsaError), native_stages.kernel_times() as taken:
        native_stages.extension.run("few_queries", "call", "decode")
        raise NsaError("stop")
    assert taken == {"few queries": (1.0, 2.0)} and ran == [("few_queries", "call", "decode")]
    assert native_stages.extension.run is inner is not original


@pytest.mark.parametrize(
    ("tokens", "rounds"), [(32_769, 1), (16_384, 2), (8192, 4), (4096, 5), (64, 5)]
)
def test_stages_are_the_median_of_their_runs(monkeypatch, tokens: int, rounds: int) -> None:
    runs = iter(range(1, rounds + 1))
    ran: list[Any] = []

    def run(problem: Problem, values: Any) -> dict[str, Any]:
        k = next(runs)
        return {"selected": (k / 1e3, 2 * k / 1e3), "whole": (4 * k / 1e3, 5 * k / 1e3)}

    monkeypatch.setattr(native_stages, "inputs", lambda problem, made: f"{made} values")
    monkeypatch.setattr(native, "nsa_on", lambda mode: lambda p, v: ran.append((mode, p, v)))
    monkeypatch.setattr(native_stages, "_run", run)
    monkeypatch.setattr(native_stages, "replaced", lambda values: 0.123456)
    monkeypatch.setattr(native_stages, "products", lambda values: {"selected": 6e9})
    monkeypatch.setattr(native_stages.os, "getloadavg", lambda: (0.126, 5.0, 6.0))
    problem = Problem(tokens, (2, 1), 8, torch.float32, FORWARD)
    selected, whole = native_stages._stages(problem, "random")
    assert ran == [("cpu:native", problem, "random values")], "once before"
    middle = (rounds + 1) / 2
    facts = {"input": "random", "replaced": 0.1235, **problem.facts(), "load": 0.13}
    assert selected.median == pytest.approx(middle) and selected.runs == rounds
    # 6 GFLOP in as many ms.
    assert selected.facts == {**facts, "cpu_ms": 2 * middle, "gflops": round(6e3 / middle, 2)}
    assert whole.median == pytest.approx(4 * middle) and whole.name == "whole"
    assert whole.facts == {**facts, "cpu_ms": 5 * middle} and whole.bench == "native stages"


@pytest.mark.parametrize(
    ("whole", "rest"),
    [
        ((4.0, 9.0), (0.0, 1.0)), ((9.0, 4.0), (4.0, 0.0)),
    ],
)  # fmt: skip
def test_the_rest_is_never_negative(monkeypatch, whole: Any, rest: Any) -> None:
    times = iter([whole, (2.0, 3.0)])

    class Kernels:
        def __enter__(self) -> dict[str, Any]:
            return {"window": (1.0, 2.0), "selected": (2.0, 3.0)}

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(native_stages, "kernel_times", Kernels)
    monkeypatch.setattr(native, "seconds", lambda step: next(times))
    found = native_stages._run(SMALL, SMALL.tensors())
    assert list(found) == ["window", "selected", "compress", "the rest", "whole"]
    assert found["compress"] == (2.0, 3.0) and found["whole"] == whole and found["the rest"] == rest


def test_stages_are_measured_on_both_inputs_of_both_passes(monkeypatch) -> None:
    monkeypatch.setattr(native, "rates", lambda: ["rates"])
    monkeypatch.setattr(native_stages, "_stages", lambda p, made: [(p, made)])
    found = native_stages.measure([64, 96], (2, 1), 8, "float16")
    assert found == ["rates"] + [
        (Problem(x, (2, 1), 8, torch.float16, way), made)
        for x in (64, 96) for way in (FORWARD, BACKWARD) for made in ("random", "correlated")
    ]  # fmt: skip
