"""What `nsa bench` prints, letter by letter: `bench_tables.txt`; and what NumPy computes beside.

After a change that is wanted, `python tests/cli/test_bench_texts.py` writes the file again, and a
person reads what changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nsa_neuron import bench
from nsa_neuron.bench import (
    attention,
    decoding,
    modelling,
    native,
    native_memory,
    native_peers,
    native_stages,
    overhead,
    simulator,
    trainium,
)  # fmt: skip
from nsa_neuron.bench.record import Absent, Modelled, Record
from nsa_neuron.simulator.kernels import bench as kernels

TABLES = Path(__file__).with_name("bench_tables.txt")
OTHER = Record.of("another benchmark", "n", "ms", [1.0])


def record(name: str, values: list[float], of: str, unit: str = "ms", **facts: Any) -> Record:
    return Record.of(of, name, unit, values, **facts)


def modelled(name: str, x: float, **facts: Any) -> Modelled:
    return Modelled("trn2", name, "ms", x / 2, x, 2 * x, facts)


def of_attention() -> str:
    facts = {"tokens": 64, "threads": 3}
    return attention.to_text([
        OTHER, record(attention.NSA, [4.0, 6.0, 5.0], "attention", **facts),
        record(attention.SDPA, [2.0] * 3, "attention", **facts),
        record("ratio", [2.0, 3.0, 2.5], "attention", "ratio", **facts),
    ])  # fmt: skip


def of_overhead() -> str:
    facts = {"op": "gated_sum", "mode": "forward"}
    return overhead.to_text([
        record("torch.ops.nsa", [4.0], "overhead", "us", **facts),
        record("empty op", [2.0], "overhead", "us", **facts),
        record("ratio", [2.0], "overhead", "ratio", **facts), OTHER,
    ])  # fmt: skip


def of_native(ours: str = "cpu:native") -> str:
    facts = {
        "tokens": 64, "pass": native.FORWARD, "Hq": 2, "Hkv": 1, "Dk": 16, "dtype": "float32",
        "threads": 3, "load": 0.25,
    }  # fmt: skip
    step = {**facts, "pass": "decode", "bytes": 3_000_000, "cpu_ms": 1}
    back = {**facts, "pass": native.BACKWARD}
    return native.to_text([
        record(native.GEMM, [50.0], "native", "GFLOP/s"), record("read", [6.0], "native", "GB/s"),
        record("sdpa", [12.0], "native", **facts, cpu_ms=20),
        record(ours, [4.0], "native", **facts, cpu_ms=8),
        record("cpu:torch", [24.0], "native", **facts, cpu_ms=0),
        record(ours, [8.0], "native", **{**facts, "tokens": 9, "load": 0.5}, cpu_ms=8),
        record("cpu:torch", [3.0], "native", **back, cpu_ms=1),
        record(native.STEP, [2.0], "native", **step),
        record(native.DENSE_STEP, [5.0], "native", **step),
    ])  # fmt: skip


def of_memory() -> str:
    rows = [
        ("cpu:torch", 1.0, 2048, "forward"), ("cpu:torch", 5.0, 64, "forward"),
        ("sdpa", 2.0, 64, "forward"), ("cpu:torch", 3.0, 64, "decode"),
    ]  # fmt: skip
    return native_memory.to_text(
        [record(n, [x], "m", "MiB", tokens=t, **{"pass": way}) for n, x, t, way in rows]
    )


def of_peers() -> str:
    facts = {"tokens": 64, "attention": "window"}
    other = {"tokens": 64, "attention": "nsa"}
    return native_peers.to_text([
        Absent("p", "lucidrains", "not here", facts), record("cpu:native", [4.0], "p", **facts),
        record("FlexAttention", [10.0], "p", **facts), record("cpu:native", [5.0], "p", **other),
    ])  # fmt: skip


def of_stages() -> str:
    of, facts = native_stages.BENCH, {"pass": "forward", "replaced": 0.5, "load": 0.25}
    rows = [record(native.GEMM, [40.0], "native", "GFLOP/s")]
    for tokens, made, times in ((64, "random", (2.0, 8.0)), (64, "drifting", (1.0, 4.0))):
        more = {**facts, "tokens": tokens, "input": made}
        rows.append(record("selected", [times[0]], of, **more, gflops=10.0))
        rows.append(record("whole", [times[1]], of, **more))
    return native_stages.to_text(rows)


def of_the_simulator() -> str:
    return simulator.to_text([OTHER, record("a", [1.0, 2.0, 3.0], "simulator", "ratio")])


def of_decoding() -> str:
    facts = {
        "tokens": 64, "Hq": 4, "Hkv": 1, "Dk": 8, "Dv": 16, "batch": 2, "of each core": "all"
    }  # fmt: skip
    return decoding.to_text([modelled(n, x, **facts) for n, x in (("a", 2), ("b", 5), ("c", 10))])


def of_trainium() -> str:
    facts = {
        "tokens": 64, "Hq": 4, "Hkv": 1, "Dk": 8, "Dv": 16, "replaced": 0.05, "pass": "forward",
        "cores": 1,
    }  # fmt: skip
    chip = {**facts, "cores": 8, "pass": "backward"}
    times = dict.fromkeys([stage.op for stage in trainium.STAGES], 1.0)
    times |= {"compress": 3.0, trainium.WHOLE: 5.0, "attention": 33.0}
    few = ("gated_sum", trainium.WHOLE, "attention")
    back = [n for n in times if n not in trainium.WITHOUT_GRADIENT]
    return trainium.to_text([
        *(modelled(n, x, **facts) for n, x in times.items()),
        *(modelled(n, times[n], **chip) for n in few),
        *(modelled(n, times[n], **{**chip, "cores": 2}) for n in back),
    ])  # fmt: skip


HERE = {
    "cpu": "X", "cores": 8, "load": 0.5, "threads": "4", "versions": {"torch": "9", "numpy": "8"},
    "revision": "",
}  # fmt: skip


def everything() -> str:
    texts = (
        of_attention(), of_overhead(), of_native(), of_memory(), of_peers(), of_stages(),
        of_the_simulator(), of_decoding(), of_trainium(), bench.head(HERE),
        bench.head({**HERE, "revision": "abc"}),
    )  # fmt: skip
    return "\n\n".join(texts) + "\n"


def test_what_is_printed() -> None:
    assert everything() == TABLES.read_text(encoding="utf-8")


def test_a_machine_without_kernels_in_cpp_has_a_table_too() -> None:
    lines = of_native("cpu:torch").splitlines()
    assert any(line.startswith("9 ") and line.endswith("0.5") for line in lines)


def test_of_no_record_nothing_is_printed() -> None:
    for module in (attention, overhead, simulator):
        assert module.to_text([OTHER]) == ""


def test_a_line_of_json_is_complete_in_itself() -> None:
    rows = [Absent("b", "n", "why", {"t": 1}), record("m", [1.0, 3.0], "b")]
    absent, measured = map(json.loads, bench.to_lines(rows, HERE))
    when = absent.pop("when")
    assert len(when) == 25 and when.endswith("+00:00") and when == measured.pop("when")
    assert absent == {
        "bench": "b", "name": "n", "reason": "why", "facts": {"t": 1}, "kind": "absent",
        "environment": HERE,
    }  # fmt: skip
    assert measured == {
        "bench": "b", "name": "m", "unit": "ms", "median": 2.0, "p20": 1.4, "p80": 2.6, "runs": 2,
        "facts": {}, "kind": "measured", "environment": HERE,
    }  # fmt: skip


# ---- the simulator beside NumPy

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def test_numpy_s_side_is_right_to_the_last_bits_of_float32() -> None:
    """Several tiles each way, and chunks of keys that the running maximum has to be kept over."""
    left, right = normal(256, 384), normal(256, 1024)
    exact = left.astype(np.float64).T @ right.astype(np.float64)
    got = kernels.matmul_numpy(left, right)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-4)
    x = 3 * normal(256, 70)
    weights = np.exp(x.astype(np.float64))
    weights /= weights.sum(1, keepdims=True)
    np.testing.assert_allclose(kernels.softmax_numpy(x), weights, rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(kernels.softmax_numpy(x + 90), weights, rtol=2e-5, atol=1e-9)
    assert kernels.small_instructions_numpy(np.full((1, 1), 3.0), 4) == 3 * 2**4


@pytest.mark.parametrize(("ahead", "atol"), [(0.0, 2e-5), (-6.0, 2e-5), (100.0, 2e-4)])
def test_numpy_s_attention_is_causal_attention(ahead: float, atol: float) -> None:
    """The first keys' scores are raised or lowered: the maximum stays, or moves with the chunks.

    If it were not kept over the chunks, the highest would end in an overflow.
    """
    q, k, v = normal(128, 1024), normal(128, 1024), normal(1024, 128)
    q[0], k[0, :512] = np.sqrt(128), ahead
    scores = q.astype(np.float64).T @ k.astype(np.float64) / np.sqrt(128)
    scores[np.triu_indices(1024, 1)] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    exact = weights / weights.sum(1, keepdims=True) @ v
    np.testing.assert_allclose(kernels.attention_numpy(q, k, v), exact, rtol=0, atol=atol)


def test_what_is_compared_with_numpy_is_what_is_said(monkeypatch) -> None:
    """Normal numbers, the same each time; zeros stand in for them here, as they cost seconds."""
    seeds = []
    drawn = SimpleNamespace(standard_normal=np.zeros)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or drawn)
    found = simulator.cases()
    assert [(c.name, c.tolerance, [a.shape for a in c.arguments]) for c in found] == [
        ("matmul 1024x1024x1024 bf16", 0.5, [(1024, 1024)] * 2),
        ("softmax 4096x4096 fp32", 1e-6, [(4096, 4096)]),
        ("causal attention 2048x128 bf16", 0.02, [(128, 2048), (128, 2048), (2048, 128)]),
    ]
    kinds = [{str(a.dtype) for a in c.arguments} for c in found]
    assert kinds == [{"bfloat16"}, {"float32"}, {"bfloat16"}] and seeds == [0]
    for case, name in zip(found, ("matmul", "softmax", "attention"), strict=True):
        assert (case.kernel.__name__, case.plain.__name__) == (name, f"{name}_numpy")


def test_everything_is_measured_in_the_order_of_the_cases(monkeypatch) -> None:
    cases = [simulator.Case(n, n, None, (n,), 0.0) for n in "ab"]
    monkeypatch.setattr(simulator, "cases", lambda: cases)
    monkeypatch.setattr(
        simulator, "_compare", lambda case, rounds: [("compare", case.name, rounds)]
    )
    monkeypatch.setattr(simulator, "_memory", lambda case: ("memory", case.name))
    monkeypatch.setattr(simulator, "_overhead", lambda rounds: ("overhead", rounds))
    monkeypatch.setattr(modelling, "overhead", lambda *a: ("profiled", *a))
    monkeypatch.setattr(modelling, "shape_only", lambda rounds: [("shapes", rounds)])
    monkeypatch.setattr(modelling, "bookkeeping", lambda rounds: [("books", rounds)])
    assert simulator.measure(3) == [
        ("compare", "a", 3), ("memory", "a"), ("compare", "b", 3), ("memory", "b"), ("overhead", 3),
        ("profiled", "a", "a", ("a",), 3), ("profiled", "b", "b", ("b",), 3), ("shapes", 3),
        ("books", 3),
    ]  # fmt: skip
    assert simulator.measure()[-1] == ("books", 7)


def test_one_element_s_time_is_what_is_beyond_numpy_of_each_instruction(monkeypatch) -> None:
    times, ran = iter([0.002, 0.010] * 3), []
    monkeypatch.setattr(simulator, "_seconds", lambda call, given: ran.append(given) or next(times))
    monkeypatch.setattr(simulator, "simulate", lambda kernel: lambda *given: ran.append(given))
    found = simulator._overhead(3)
    assert found.median == pytest.approx(0.008 / 2000 * 1e6) and found.unit == "us"
    assert found.facts == {"instructions": 2000} and found.runs == 3
    assert len(ran) == 7 and {count for _, count in ran} == {2000}, "once before"
    assert found.name == "tensor_tensor of one element, beyond NumPy"


def test_what_is_timed_without_data_is_named(monkeypatch) -> None:
    asked = []

    def rates(simulated: Any, shapes: Any, rounds: int) -> Any:
        asked.append((simulated, [(s.shape, str(s.dtype)) for s in shapes], rounds))
        return [1.0], [2.0], [3.0], {"instructions": 5}

    monkeypatch.setattr(modelling, "simulate", lambda kernel, data: (kernel.__name__, data))
    monkeypatch.setattr(modelling, "_rates", rates)
    found = modelling.shape_only(4)
    assert [(r.name, r.median, r.unit, r.facts) for r in found] == [
        (f"shape-only {kernel}, {what}", x, "1/ms", {"instructions": 5})
        for kernel in ("attention 12288x128 bf16", "hoisted matmul 4096 fp32")
        for what, x in (("recorded", 1.0), ("timed", 2.0), ("timed with band", 3.0))
    ]
    (one, loop, _), (two, matrices, rounds) = asked
    assert (one, two, rounds) == (("attention", False), ("loads_hoisted", False), 4)
    assert loop == [((128, 12288), "bfloat16")] * 2 + [((12288, 128), "bfloat16")]
    assert matrices == [((4096, 4096), "float32")] * 2


def test_bookkeeping_is_of_each_instruction_of_one_run(monkeypatch) -> None:
    asked = []
    run = SimpleNamespace(cores=["core 0", "core 1"], target="trn2")

    class Launch:
        def __init__(self) -> None:
            self.run = run

        def __call__(self, shape: Any, count: int) -> None:
            asked.append((shape.shape, str(shape.dtype), count))

    monkeypatch.setattr(modelling, "simulate", lambda kernel, data: Launch())
    monkeypatch.setattr(modelling, "_seconds", lambda call: 0.5)
    monkeypatch.setattr(modelling, "SIZES", (1000, 20_000))
    found = modelling.bookkeeping(3)
    assert asked == [((128, 512), "bfloat16", 1000), ((128, 512), "bfloat16", 20_000)]
    assert [(r.name, r.unit, r.runs) for r in found] == [
        (f"bookkeeping after {n} instructions, each", "us", 3) for n in ("1,000", "20,000")
    ]
    assert [r.median for r in found] == pytest.approx([500.0, 25.0])


if __name__ == "__main__":
    TABLES.write_text(everything(), encoding="utf-8")
