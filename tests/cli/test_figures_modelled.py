"""What `nsa bench --target trn2` makes of modelled times: shares of cores, sums, ratios, floors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import plans, whole
from nsa_neuron.bench import decoding, looped, trainium
from nsa_neuron.bench.record import Modelled
from nsa_neuron.ops import get
from nsa_neuron.simulator.cost.parameters import load


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The rows of every table that is printed, by header."""
    made: list[list[dict[str, str]]] = []

    def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        made.append([dict(zip(headers, row, strict=True)) for row in rows])
        return title

    for module in (decoding, trainium):
        monkeypatch.setattr(module, "table", table)
    return made


def test_a_query_s_time_is_what_more_queries_add(monkeypatch) -> None:
    """100 us of start-up, 2 ns of a query and position and core: only the latter counts."""

    def time(stage: Any, problem: Any, position: int, queries: int, looping: bool) -> Any:
        assert problem.cores == problem.lnc and problem.tokens == position
        own = 100e3 + 2 * queries * position / problem.cores
        return 0.5 * own, own, 4 * own

    monkeypatch.setattr(trainium, "_time", time)
    monkeypatch.setattr(trainium, "_loops", lambda problem, op: False)
    stage = trainium.Stage("select_blocks", 32, trainium._select)
    for cores, heads in ((1, 4), (2, 4), (8, 1)):
        problem = trainium.Problem(4096, (64, 4), (192, 128), 0.05, cores=cores)
        found = trainium._stage(problem, stage)
        # Positions average to half of the sequence.
        ns = 2 * 2048 * 4096 * heads / min(cores, 2)
        assert found.central == pytest.approx(ns / 1e6, rel=1e-3)
        assert (found.low, found.high) == pytest.approx((found.central / 2, 4 * found.central))
        assert found.unit == "ms" and found.facts["cores"] == cores
    monkeypatch.setattr(trainium, "LONGEST", 1024)
    far = trainium._stage(problem, stage)
    assert far.central == pytest.approx(found.central, rel=1e-3), "a line goes on"
    assert far.facts["error"] < 1e-3


def test_a_model_of_loops_leaves_the_plans_as_they_were() -> None:
    before = json.dumps([plans.load("select_blocks"), plans.load(trainium.WHOLE)], default=str)
    with pytest.raises(ZeroDivisionError), trainium._looping(True, 5):
        assert plans.load("select_blocks")["forward"]["unrolled_key_tiles"] == -1
        assert plans.load(trainium.WHOLE)["looped"]["least_ranked"] == 5
        raise ZeroDivisionError
    after = json.dumps([plans.load("select_blocks"), plans.load(trainium.WHOLE)], default=str)
    assert after == before


def test_the_whole_compresses_keys_and_values_and_is_compared_with_dense(tables) -> None:
    facts = {
        "tokens": 64, "Hq": 4, "Hkv": 1, "Dk": 8, "Dv": 8, "replaced": 0.05, "pass": "forward",
        "cores": 1,
    }  # fmt: skip
    names = [stage.op for stage in trainium.STAGES]
    times = {**dict.fromkeys(names, 1.0), "compress": 3.0, trainium.WHOLE: 5.0, "attention": 33.0}
    rows = [Modelled("trn2", n, "ms", x / 2, x, 2 * x, facts) for n, x in times.items()]
    trainium.to_text(rows)
    shown = {row["stage"]: row["one core, ms (low to high)"] for row in tables[0]}
    assert shown["nsa (compress twice)"] == "11 (5.5 to 22)"
    assert shown["nsa in one kernel (compress twice)"] == "11 (5.5 to 22)"
    assert shown["dense / nsa, central"] == shown["dense / nsa in one kernel, central"] == "3.00"
    assert shown["dense attention"] == "33 (16.5 to 66)"


@pytest.mark.parametrize(
    ("batch", "sequences", "own", "said"),
    [(1, 1, 1, "1 of 4 kv heads"), (4, 1, 2, "2 of 4 kv heads"), (8, 1, 4, "1 sequence"),
     (9, 2, 4, "2 sequences"), (32, 4, 4, "4 sequences")],
)  # fmt: skip
def test_a_chip_s_cores_share_a_decode_step(monkeypatch, batch, sequences, own, said) -> None:
    asked = []

    def step(*given: Any) -> Any:
        asked.append(given)
        return [1e3, 2e3, 3e3], {"DMAs of a core": 5}

    monkeypatch.setattr(decoding, "_step", step)
    nsa, contiguous, dense = decoding._of_batch(65536, batch, (64, 4), (192, 128))
    assert asked == [(65536, sequences, 16, own, (192, 128), x) for x in (False, True)]
    assert (nsa.low, nsa.central, nsa.high, nsa.unit) == (1, 2, 3, "us")
    assert nsa.facts["of each core"] == said and contiguous.name == decoding.CONTIGUOUS
    # 4095 blocks, 16 blocks of 64, a window of 512; keys and values at two bytes.
    assert nsa.facts["bytes"] == batch * 4 * 640 * (4095 + 1024 + 512)
    assert dense.facts["bytes"] == batch * 4 * 640 * 65536
    stack = load("measured-3p", "central").hbm_stack  # bytes of a ns, of one of four
    assert dense.central == pytest.approx(dense.facts["bytes"] / (4 * stack) / 1e3)
    assert dense.low <= dense.central <= dense.high


@pytest.mark.parametrize(("tokens", "pages"), [(1040, 4), (1056, 5)])
def test_a_core_has_half_of_its_stack(monkeypatch, tokens: int, pages: int) -> None:
    """However fast its launch is modelled: two cores read one stack of HBM.

    64 compressed tokens fill four pages of 16, one more needs a fifth.
    """
    seen = []
    moved = [SimpleNamespace(transfer=SimpleNamespace(hbm_bytes=10**6))] * 3
    made = SimpleNamespace(
        band=SimpleNamespace(low=1.0, central=1.0, high=9e9), central=SimpleNamespace(costs=moved)
    )
    monkeypatch.setattr(decoding.cost, "estimate", lambda run: made)

    @contextmanager
    def recording() -> Any:
        yield ["run"]

    monkeypatch.setattr(decoding.records, "recording", recording)
    monkeypatch.setattr(
        type(neuron.BACKEND), "lower", lambda *a: lambda **values: seen.append(values)
    )
    band, told = decoding._step(tokens, 3, 2, 1, (32, 32))
    (values,) = seen
    assert values["q"].shape == (3, 1, 2, 32) and values["seqlens"].tolist() == [tokens] * 3
    for name, count in (("cmp", pages), ("slc", 5), ("win", 5)):
        table = values[f"{name}_table"]
        assert table.shape == (3, count) and table.flatten().tolist() == list(range(3 * count))
    stack = load("measured-3p", "central").hbm_stack
    assert band[1] == pytest.approx(3e6 / (stack / 2)) and band[2] == 9e9
    assert told == {"DMAs of a core": 3, "bytes of a core": 3 * 10**6}


def test_decode_is_compared_with_dense(tables) -> None:
    facts = {
        "tokens": 64, "Hq": 4, "Hkv": 1, "Dk": 8, "Dv": 8, "batch": 2, "of each core": "all",
    }  # fmt: skip
    rows = [
        Modelled("b", n, "us", x, x, x, {**facts, "batch": batch})
        for batch, times in ((2, (2.0, 5.0, 10.0)), (4, (3.0, 4.0, 12.0)))
        for n, x in zip("abc", times, strict=True)
    ]
    assert decoding.to_text(rows).startswith("MODELLED, not measured, not run on hardware")
    shown = [(row["batch"], row["dense / NSA"], row["contiguous"]) for row in tables[0]]
    assert shown == [("2", "5.00", "2.00"), ("4", "4.00", "3.00")]


def test_loops_are_summed_by_their_turns() -> None:
    """Bodies of 100 ns and 10, 3 and 1 of each turn beyond the first of each loop."""

    def launch(turns: Sequence[int]) -> Any:
        own = 100.0 + sum(pace * (n - 1) for pace, n in zip((10, 3, 1), turns, strict=True))
        return own / 2, own, own * 2

    table = torch.tensor([[4, 1, 1], [4, 1, 1], [1, 5, 2], [1, 5, 2]]).double()
    call = looped.Call("attention", 4096, 4, (64, 64))
    band, error = looped._sum(call, launch, table)
    both = 2 * (100 + 3 * 10) + 2 * (100 + 4 * 3 + 1)
    assert band == pytest.approx((both / 2, both, both * 2)) and error < 1e-9
    (_, halved, _), _ = looped._sum(
        looped.Call("attention", 4096, 4, (64, 64), lnc=2), launch, table
    )
    assert halved == pytest.approx(both / 2)


@pytest.mark.parametrize("stage", [*trainium.STAGES, trainium.ONE_KERNEL, trainium.ATTENTION])
def test_a_stage_s_queries_are_the_last_before_its_position(stage: trainium.Stage) -> None:
    """And its keys all before it, of one kv head for each core of a launch."""
    problem = trainium.Problem(4096, (64, 4), (192, 128), 0.05, cores=2)
    spec = get(stage.op)
    values = {**spec.defaults, **stage.make(problem, 1024, 96)}
    bound = spec.bind({name: values[name] for name in spec.names})
    own = 48 if stage.op == trainium.WHOLE else 96
    wanted = {"S": own, "T": 1024, "Nc": 63, "Dk": 192, "Dv": 128, "n": 16, "m": 64, "w": 512}
    wanted |= {"Hkv": 1, "Hq": 16, "B": 1, "D": 192, "l": 32, "d": 16}
    if stage.op == trainium.WHOLE:
        wanted |= {"Hq": 32, "Hkv": 2}
    if stage.op == "compress":
        wanted |= {"T": 96, "Hkv": 1}
    found = {symbol: bound[symbol] for symbol in wanted if symbol in bound.sizes}
    assert found == {symbol: wanted[symbol] for symbol in found} and len(found) >= 4
    assert bound.dtype == torch.bfloat16
    spec.check_values(bound, values)


@pytest.mark.parametrize("op", ["attention", "selected_attention", "gated_sum"])
def test_a_backward_stage_gets_what_its_forward_gives(op: str) -> None:
    stage = next(s for s in (*trainium.STAGES, trainium.ATTENTION) if s.op == op)
    problem = trainium.Problem(4096, (64, 4), (192, 128), 0.05, backward=True)
    spec, backward = get(op), get(f"{op}_backward")
    made = {**spec.defaults, **stage.make(problem, 256, 32)}
    made = {**dict.fromkeys(backward.names), **made, **trainium._saved(stage, made)}
    bound = backward.bind({name: made[name] for name in backward.names})
    assert bound.shapes["grad_o"] == (1, 32, 16, 128)
    assert op == "gated_sum" or (made["lse"] == 30).all()


@pytest.mark.parametrize(
    ("problem", "op", "has"),
    [
        ({}, "select_blocks", True), ({"backward": True}, "select_blocks", False),
        ({"backward": True}, "attention", True), ({"backward": True}, trainium.WHOLE, False),
        ({}, trainium.WHOLE, True), ({"tokens": whole.LOOPED_BLOCKS * 64}, trainium.WHOLE, True),
        ({"tokens": whole.LOOPED_BLOCKS * 64 + 1}, trainium.WHOLE, False),
        ({"tokens": whole.LOOPED_BLOCKS * 64 + 1}, "attention", True),
    ],
    ids=str,
)  # fmt: skip
def test_stages_are_modelled_that_there_are(problem, op: str, has: bool) -> None:
    given = {"tokens": 4096, "heads": (64, 4), "dims": (192, 128), "replaced": 0.05, **problem}
    assert trainium.Problem(**given).has(op) is has


@pytest.mark.parametrize(("cores", "lnc", "heads"), [(1, 1, 4), (2, 2, 4), (8, 2, 1)])
def test_a_chip_is_launches_of_two_cores_for_each_kv_head(cores, lnc, heads) -> None:
    problem = trainium.Problem(4096, (64, 4), (192, 128), 0.05, cores=cores)
    assert (problem.group, problem.lnc, problem.kv_heads) == (16, lnc, heads)
