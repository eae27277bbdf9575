"""What `nsa bench --part native` times, how often, up to which length; no test asserts a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nsa_neuron
from nsa_neuron.bench import native
from nsa_neuron.bench.native import BACKWARD, FORWARD, Problem
from nsa_neuron.registry import use_backend

SMALL = Problem(70, (4, 2), 16, torch.float32, FORWARD)


def with_gradients(problem: Problem) -> Problem:
    return Problem(problem.tokens, problem.heads, problem.dim, problem.dtype, BACKWARD)


# ---- problems


def test_a_problem_s_facts_are_its_sizes() -> None:
    assert SMALL.facts() == {
        "tokens": 70, "B": 1, "Hq": 4, "Hkv": 2, "Dk": 16, "Dv": 16, "dtype": "float32",
        "pass": "forward", "threads": torch.get_num_threads(),
    }  # fmt: skip
    assert with_gradients(SMALL).facts()["pass"] == "forward + backward"
    assert Problem(1, (1, 1), 8, torch.bfloat16, "decode").facts()["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_problem_s_tensors(dtype: torch.dtype) -> None:
    problem = Problem(70, (4, 2), 16, dtype, FORWARD)
    q, k, v, gates, grad = made = problem.tensors()
    assert q.shape == grad.shape == (1, 70, 4, 16) and gates.shape == (1, 70, 4, 3)
    assert k.shape == v.shape == (1, 70, 2, 16)
    assert {x.dtype for x in made} == {dtype} and not any(x.requires_grad for x in made)
    assert 0 < gates.min() < 0.4 and 0.6 < gates.max() < 1
    for x in (q, k, v, grad):
        assert 0.9 < x.float().std() < 1.1 and abs(x.float().mean()) < 0.1
    assert not torch.equal(k, v)
    *leaves, grad = with_gradients(problem).tensors()
    assert all(x.requires_grad and x.is_leaf for x in leaves) and not grad.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(made, (*leaves, grad), strict=True))


# ---- what is timed


@pytest.mark.parametrize("gradients", [True, False])
def test_passes_come_first_and_decode_last_and_gradients_have_a_limit(
    monkeypatch, gradients: bool
) -> None:
    asked: list[Any] = []

    def timed(problem: Problem, steps: Any) -> list[Any]:
        asked.append((problem.way, problem.tokens, steps))
        assert (problem.heads, problem.dim, problem.dtype) == ((2, 1), 8, torch.float16)
        return [problem.way]

    monkeypatch.setattr(native, "rates", lambda: ["rates"])
    monkeypatch.setattr(native, "_steps", lambda problem: f"steps of {problem.tokens}")
    monkeypatch.setattr(native, "_timed", timed)
    monkeypatch.setattr(native, "decode", lambda p: [(p.way, p.tokens, p.heads, p.dim, p.dtype)])
    lengths = [64, 65_536, 65_537]
    found = native.measure(lengths, (2, 1), 8, "float16", gradients)
    wanted = [(FORWARD, x) for x in lengths] + [(BACKWARD, x) for x in lengths[:2]] * gradients
    assert asked == [(way, x, f"steps of {x}") for way, x in wanted]
    assert found == ["rates", *(way for way, _ in wanted)] + [
        ("decode", x, (2, 1), 8, torch.float16) for x in lengths
    ]


@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        (16_384, ["sdpa", "cpu:native", "cpu:torch"]), (16_385, ["sdpa", "cpu:native"]),
        (65_536, ["sdpa", "cpu:native"]), (65_537, ["cpu:native"]),
    ],
)  # fmt: skip
def test_who_is_timed_at_which_length(monkeypatch, tokens: int, names: list[str]) -> None:
    monkeypatch.setattr(native, "usable", lambda: ["cpu:native", "cpu:torch"])
    monkeypatch.setattr(native, "nsa_on", lambda mode: f"on {mode}")
    found = native._steps(Problem(tokens, (2, 1), 8, torch.float32, FORWARD))
    assert list(found) == names
    assert found == {n: native.sdpa if n == "sdpa" else f"on {n}" for n in names}


def test_modes_that_cannot_run_are_not_timed(monkeypatch) -> None:
    class Backend:
        def modes(self) -> dict[str, str]:
            return {"torch": "", "native": "no compiler", "other": ""}

    class Registry:
        def get(self, name: str) -> Backend:
            assert name == "cpu"
            return Backend()

    monkeypatch.setattr(native, "REGISTRY", Registry())
    assert native.usable() == ["cpu:torch"]


@pytest.mark.parametrize(
    ("tokens", "rounds"), [(81_921, 1), (40_960, 2), (20_480, 4), (16_384, 5), (64, 5)]
)
def test_steps_are_timed_in_turns_and_short_ones_more_often(
    monkeypatch, tokens: int, rounds: int
) -> None:
    ran: list[Any] = []
    times = iter([(k / 1e3, 2 * k / 1e3) for k in range(1, 2 * rounds + 1)])

    def seconds(step: Any) -> tuple[float, float]:
        step()
        return next(times)

    def step(name: str) -> Any:
        return lambda problem, values: ran.append((name, problem, values))

    monkeypatch.setattr(native, "seconds", seconds)
    monkeypatch.setattr(native.os, "getloadavg", lambda: (0.126, 5.0, 6.0))
    monkeypatch.setattr(Problem, "tensors", lambda problem: f"tensors of {problem.tokens}")
    problem = Problem(tokens, (2, 1), 8, torch.float16, BACKWARD)
    small = Problem(512, (2, 1), 8, torch.float16, BACKWARD)
    one, two = native._timed(problem, {"a": step("a"), "b": step("b")})
    warm = [(name, small, "tensors of 512") for name in "ab"]
    assert ran == warm + [(name, problem, f"tensors of {tokens}") for name in "ab"] * rounds
    middle = sorted(range(1, 2 * rounds, 2))
    median = (middle[(rounds - 1) // 2] + middle[rounds // 2]) / 2
    for record, name, ms in ((one, "a", median), (two, "b", median + 1)):
        assert (record.bench, record.name, record.unit) == ("native", name, "ms")
        assert record.median == pytest.approx(ms) and record.runs == rounds
        assert record.facts == {**problem.facts(), "cpu_ms": 2 * ms, "load": 0.13}


def test_seconds_are_of_the_wall_and_of_the_cpu(monkeypatch) -> None:
    wall, cpu = iter([10.0, 13.0]), iter([1.0, 6.0])
    monkeypatch.setattr(native.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(native.time, "process_time", lambda: next(cpu))
    ran: list[int] = []
    assert native.seconds(lambda: ran.append(1)) == (3.0, 5.0) and ran == [1]


# ---- the steps


def exact(problem: Problem, op: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Result and gradients of q, k, v and gates in float64, on the reference."""
    *leaves, grad = (x.detach().double() for x in problem.tensors())
    leaves = [x.requires_grad_() for x in leaves]
    with use_backend("reference"):
        o = op(*leaves)
        grads = torch.autograd.grad(o, leaves, grad, allow_unused=True)
    return o.detach(), [g for g in grads if g is not None]


def nsa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    k_cmp, v_cmp = nsa_neuron.compress(k), nsa_neuron.compress(v)
    return nsa_neuron.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return nsa_neuron.attention(q, k, v)[0]


@pytest.mark.parametrize("which", ["nsa", "sdpa"])
def test_steps_are_the_attentions_that_they_are_named_after(which: str) -> None:
    problem = with_gradients(SMALL)
    step, op = (native.nsa_on("cpu:torch"), nsa) if which == "nsa" else (native.sdpa, dense)
    o, grads = exact(problem, op)
    found = step(SMALL, SMALL.tensors())
    found = found if which == "nsa" else found.transpose(1, 2)
    torch.testing.assert_close(found.double(), o, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad
    # Without a pass of gradients none are made, of leaves either.
    assert not step(SMALL, problem.tensors()).requires_grad
    backward = step(problem, problem.tensors())
    assert len(backward) == len(grads) == (4 if which == "nsa" else 3)
    for got, want in zip(backward, grads, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_pages_lie_where_their_table_says() -> None:
    x = torch.arange(130.0).view(1, 130, 1, 1).expand(1, 130, 2, 3)
    pool = native.paged(x, torch.tensor([2, 0, 1]))
    assert pool.shape == (3, 64, 2, 3)
    rows = torch.cat([pool[2], pool[0], pool[1]])
    assert torch.equal(rows[:130], x[0]) and not rows[130:].any()


def test_decode_steps_are_thirty_each_and_without_gradients(monkeypatch) -> None:
    seen: list[Any] = []

    def step() -> torch.Tensor:
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return torch.zeros(1)

    monkeypatch.setattr(native, "decode_steps", lambda problem: {"decode": step})
    monkeypatch.setattr(native.os, "getloadavg", lambda: (0.126, 5.0, 6.0))
    (record,) = native.decode(Problem(64, (2, 1), 8, torch.float32, "decode"))
    assert record.facts["load"] == 0.13 and record.runs == 30 and seen == [(True, False)] * 31


@pytest.mark.parametrize(("tokens", "pages"), [(20, (1, 1)), (1040, (1, 17)), (1056, (2, 17))])
def test_pools_have_the_pages_that_their_rows_need(monkeypatch, tokens: int, pages: Any) -> None:
    """64 compressed tokens fill a page."""
    made, paged = [], native.paged

    def counted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        made.append(len(order))
        return paged(x, order)

    monkeypatch.setattr(native, "paged", counted)
    native.decode_steps(Problem(tokens, (2, 1), 8, torch.float32, "decode"))
    assert made == [pages[0]] * 2 + [pages[1]] * 2
