"""How benchmarks alternate, repeat and divide: with clocks that tell what a test wants."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nsa_neuron.bench import attention, modelling, overhead, simulator
from nsa_neuron.ops import get
from nsa_neuron.registry import REGISTRY, requested

# ---- the reference beside torch's attention


@pytest.mark.parametrize(
    ("tokens", "rounds"), [(64, 10), (1639, 9), (1638, 10), (4096, 4), (8192, 2), (65_536, 2)]
)
def test_short_sequences_are_timed_more_often(monkeypatch, tokens: int, rounds: int) -> None:
    asked: list[Any] = []

    def times(length: int, count: int) -> Any:
        asked.append((length, count, str(requested())))
        return [6.0, 3.0, 10.0], [2.0, 3.0, 4.0]

    monkeypatch.setattr(attention, "_times", times)
    nsa, sdpa, ratio = attention.measure([tokens])
    assert [x[:2] for x in asked] == [(tokens, rounds)] and "reference" in asked[0][2]
    facts = {
        "tokens": tokens, "B": 1, "Hq": 4, "Hkv": 1, "Dk": 64, "Dv": 64, "dtype": "float32",
        "threads": torch.get_num_threads(), "pass": "forward + backward",
    }  # fmt: skip
    for record, name, unit, median in (
        (nsa, "reference NSA", "ms", 6), (sdpa, "scaled_dot_product_attention", "ms", 3),
        (ratio, "ratio", "ratio", 2.5),
    ):  # fmt: skip
        assert (record.bench, record.name, record.unit) == ("attention", name, unit)
        assert record.median == median and record.facts == facts and record.runs == 3


def test_both_attentions_are_warmed_up_and_take_turns(monkeypatch) -> None:
    ran: list[Any] = []
    clock = iter([0.0, 0.001, 1.0, 1.002, 2.0, 2.003, 3.0, 3.004])
    monkeypatch.setattr(attention, "tensors", lambda length: (length,))
    monkeypatch.setattr(attention, "nsa_step", lambda x: ran.append(("nsa", x)))
    monkeypatch.setattr(attention, "sdpa_step", lambda x: ran.append(("sdpa", x)))
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(clock))
    nsa, sdpa = attention._times(5000, 2)
    assert ran == [("nsa", 256), ("sdpa", 256), *[("nsa", 5000), ("sdpa", 5000)] * 2]
    assert nsa == pytest.approx([1, 3]) and sdpa == pytest.approx([2, 4])


# ---- a call beside an empty op


def test_modes_of_calls() -> None:
    three = ("forward", "forward, grad", "forward + backward")
    assert overhead.modes(get("attention")) == overhead.modes(get("gated_sum")) == three
    ids = ("forward, new ids", "forward, new ids, checked by the kernel")
    assert overhead.modes(get("selected_attention")) == three + ids
    assert overhead.required_ids(get("selected_attention")) == ("block_indices",)
    assert overhead.required_ids(get("attention")) == ()


@pytest.mark.parametrize(
    ("mode", "calls", "grad"),
    [
        ("forward", 1, False), ("forward, grad", 1, True), ("forward + backward", 1, True),
        ("forward, new ids", 2, False), ("forward, new ids, checked by the kernel", 2, False),
    ],
)  # fmt: skip
def test_whoever_is_timed_first_changes(monkeypatch, mode: str, calls: int, grad: bool) -> None:
    ran: list[Any] = []
    spec = get("selected_attention")
    case = next(case for case in spec.cases if case.name == overhead.CASE)
    values = spec.arguments(case, torch.float32)

    class Clock:
        def __init__(self, op: str, args: Any, how: str) -> None:
            assert how == mode
            floating = [x for x in args if x.is_floating_point()]
            assert len(args) == 4 and [x.requires_grad for x in floating] == [grad] * 3
            self.op = op

        def timeit(self, number: int) -> Any:
            ran.append((self.op, number))
            return SimpleNamespace(mean=len(ran) * 1e-6)

    monkeypatch.setattr(overhead, "_timer", Clock)
    ours, empty = overhead._pair("ours", "empty", spec, values, mode, 3, 50)
    assert [op for op, _ in ran] == [
        "ours", "empty", "empty", "ours", "ours", "empty", "empty", "ours"
    ]  # fmt: skip
    assert {number for _, number in ran} == {50}
    assert ours == pytest.approx([x / calls for x in (4, 5, 8)])
    assert empty == pytest.approx([x / calls for x in (3, 6, 7)])


BACK = "forward + backward"


def test_what_a_timed_run_calls() -> None:
    calls: list[Any] = []
    ids, x = torch.tensor([1, 2]), torch.ones(2, requires_grad=True)

    def op(*args: torch.Tensor) -> Any:
        calls.append(args)
        return args[0] * 2

    overhead._timer(op, [x, ids], "forward").timeit(2)
    assert len(calls) >= 2 and all(a is x and b is ids for a, b in calls)
    calls.clear()
    overhead._timer(op, [x, ids], "forward, new ids").timeit(2)
    (_, first), (again, second), *_ = calls
    assert first is ids and second is not ids and torch.equal(first, second) and again is x
    mine = [given is ids for _, given in calls]
    assert len(mine) >= 4 and mine == [True, False] * (len(mine) // 2), "neighbours have other ids"
    calls.clear()
    grads: list[Any] = []
    hooked = torch.ones(2, requires_grad=True)
    hooked.register_hook(grads.append)
    overhead._timer(op, [hooked, ids], BACK).timeit(3)
    before = len(grads)
    assert before == len(calls) - 1 >= 3 and {tuple(g.tolist()) for g in grads} == {(2.0, 2.0)}
    several = overhead._timer(lambda *a: (op(*a), op(*a).sum()), [hooked, ids], BACK)
    several.timeit(1)
    assert len(grads) > before


def test_every_op_is_called_in_every_way_beside_its_empty_one(monkeypatch) -> None:
    asked: list[Any] = []

    def pair(ours: Any, empty: Any, spec: Any, values: Any, *rest: Any) -> Any:
        asked.append((str(ours), str(empty), spec.name, *rest))
        checks = REGISTRY.get("null")._checks  # type: ignore[attr-defined]
        assert checks is ("checked" in rest[0])
        return [6.0, 8.0], [2.0, 4.0]

    monkeypatch.setattr(overhead, "_pair", pair)
    found = overhead.measure(["selected_attention"], 7, 9)
    modes = overhead.modes(get("selected_attention"))
    names = ("nsa.selected_attention.default", "nsa_bench.selected_attention.default")
    assert asked == [(*names, "selected_attention", mode, 7, 9) for mode in modes]
    for k, mode in enumerate(modes):
        mine, empty, ratio = found[3 * k : 3 * k + 3]
        assert [r.name for r in (mine, empty, ratio)] == ["torch.ops.nsa", "empty op", "ratio"]
        assert [r.unit for r in (mine, empty, ratio)] == ["us", "us", "ratio"]
        assert (mine.median, empty.median, ratio.median) == (7, 3, 2.5)
        for record in (mine, empty, ratio):
            assert record.bench == "overhead" and record.facts == {
                "op": "selected_attention", "mode": mode, "calls_per_run": 9,
                "threads": torch.get_num_threads(),
            }  # fmt: skip


# ---- the simulator beside NumPy


class Kernel:
    """Stands for a simulated kernel that returns what it is told."""

    def __init__(self, result: Any) -> None:
        self.result, self.calls = result, 0
        self.run = SimpleNamespace(instructions=[0] * 50, peaks=[{"sbuf": 3, "psum": 2}] * 2)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.result


@pytest.mark.parametrize("off", [0.25, 0.2501, float("nan")])
def test_results_at_their_tolerance_are_compared(monkeypatch, off: float) -> None:
    kernel = Kernel(np.array([1.0, 2.0 + off]))
    times = iter([0.001, 0.003, 0.002, 0.008, 0.004, 0.014])
    monkeypatch.setattr(simulator, "simulate", lambda given: kernel)
    monkeypatch.setattr(simulator, "_seconds", lambda call, arguments: next(times))
    case = simulator.Case("x", None, lambda *a: np.array([1.0, 2.0]), ("a",), 0.25)
    if not off <= 0.25:
        with pytest.raises(AssertionError, match="x: simulator and NumPy differ by"):
            simulator._compare(case, 3)
        return
    ratio, plain, slow, beyond = simulator._compare(case, 3)
    facts = {"instructions": 50, "max_abs_difference": 0.25}
    assert [r.name for r in (ratio, plain, slow, beyond)] == [
        "x",
        "x, NumPy",
        "x, simulated",
        "x, beyond NumPy per instruction",
    ]
    assert [r.unit for r in (ratio, plain, slow, beyond)] == ["ratio", "ms", "ms", "us"]
    assert [r.median for r in (ratio, plain, slow)] == pytest.approx([3.5, 2, 8])
    assert beyond.median == pytest.approx(0.006 / 50 * 1e6)
    assert ratio.facts == beyond.facts == facts and plain.facts == slow.facts == {}
    assert {r.bench for r in (ratio, plain, slow, beyond)} == {"simulator"}


def test_a_call_s_seconds(monkeypatch) -> None:
    clock, given = iter([5.0, 7.5]), []
    monkeypatch.setattr(simulator.time, "perf_counter", lambda: next(clock))
    assert simulator._seconds(lambda *a: given.append(a), ("x", 2)) == 2.5
    assert given == [("x", 2)]


# ---- what modelling costs


def test_cpu_seconds_are_never_none(monkeypatch) -> None:
    clock = iter([5.0, 7.5, 3.0, 3.0])
    monkeypatch.setattr(modelling.time, "process_time", lambda: next(clock))
    assert modelling._seconds(lambda: None) == 2.5 and modelling._seconds(lambda: None) == 1e-9
