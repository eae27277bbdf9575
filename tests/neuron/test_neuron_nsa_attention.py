"""`nsa_attention` in one kernel: geometry, exact choices, what it leaves to the parts."""

from __future__ import annotations

from typing import Any

import judged
import pytest
import torch
from test_neuron_records import assert_equal_programs, assert_static

from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import plans, whole
from nsa_neuron.backends.neuron.run import package
from nsa_neuron.cases import exact_normal
from nsa_neuron.ops import get
from nsa_neuron.ops.nsa_attention import nsa_attention_forward
from nsa_neuron.records import recording

pytestmark = pytest.mark.sim

KERNEL = "forward"


def problem(
    queries: int,
    tokens: int,
    heads: tuple[int, int] = (4, 1),
    dims: tuple[int, int] = (32, 24),
    *,
    batch: int = 1,
    alike: float = 0.9,
    sharp: float = 1.0,
    **scalars: Any,
) -> dict[str, Any]:
    """Arguments of `nsa_attention` in bfloat16; `alike`: how much queries have in common."""
    gen = torch.Generator().manual_seed(queries + tokens)
    own = exact_normal(gen, batch, queries, heads[0], dims[0])
    shared = exact_normal(gen, batch, 1, heads[0], dims[0])
    values: dict[str, Any] = {"q": sharp * (alike * shared + (1 - alike**2) ** 0.5 * own)}
    rows = max(0, (tokens - scalars.get("block", 32)) // 16 + 1)
    for branch, keys in (("cmp", rows), ("slc", tokens), ("win", tokens)):
        values[f"k_{branch}"] = exact_normal(gen, batch, keys, heads[1], dims[0])
        values[f"v_{branch}"] = exact_normal(gen, batch, keys, heads[1], dims[1])
    values["gates"] = torch.rand(batch, queries, heads[0], 3, generator=gen)
    return judged.complete("nsa_attention", {**values, **scalars}, torch.bfloat16)


def sharp_at(values: dict[str, Any], query: int) -> dict[str, Any]:
    """The same with one query whose logits are far above the others'."""
    values["q"][0, query] *= 100.0
    return values


def launched(values: dict[str, Any], lnc: int = 1) -> tuple[torch.Tensor, list[Any]]:
    """The result, and the records of all kernels."""
    with recording() as runs:
        (o,) = judged.call("nsa_attention", values, lnc)
    return o, list(runs)


def judged_in_one_launch(values: dict[str, Any]) -> dict[int, Any]:
    """What was launched on one core and on two: within the budget, the same bits, the same static
    program on both cores."""
    with recording() as runs:
        judged.judge("nsa_attention", values, torch.bfloat16)
    assert [run.kernel for run in runs] == [KERNEL] * 3
    by_cores = {1: runs[0], 2: runs[2]}
    assert_equal_programs(*by_cores[2].cores)
    for lnc, run in by_cores.items():
        assert len(run.cores) == lnc
        for core in run.cores:
            assert core.relaxed == []
            for instruction in core.instructions:
                assert_static(instruction)
    return by_cores


@pytest.mark.parametrize(
    "values",
    [
        problem(1, 1),
        problem(33, 97, (16, 1), (192, 128)),
        problem(40, 400, (8, 4), (80, 33), batch=2, num_selected=4, window=100),
        problem(129, 640, (1, 1), (128, 128), num_selected=3, block=64, window=1, scale=-0.2),
        problem(40, 2250, (2, 1), (130, 16), num_selected=9, block=16, num_local=3),
        problem(40, 3400, (4, 1), (144, 16), num_selected=12),
    ],
    ids=["one", "paper", "heads_and_batch", "block_64", "block_16", "lists"],
)
def test_whole(values):
    """On one core twice and on two: the same bits, within the budget; one launch each."""
    judged_in_one_launch(values)


@pytest.mark.parametrize("window", [1, 512])
@pytest.mark.parametrize("tokens", [96, 129, 160, 192, 224, 288, 353])
def test_tiles_with_few_jobs_wait_for_their_pages(tokens, window):
    """A tile's pages take the place of those of two tiles before, whose products come first."""
    values = problem(tokens, tokens, window=window, num_selected=4)
    judged.within_budget("nsa_attention", values, judged.call("nsa_attention", values))


def test_a_window_s_ring_takes_new_keys_in_the_place_of_old_ones():
    """Four places of 128 keys; each half of the queries passes more on its way."""
    values = problem(1280, 1280, (1, 1), (16, 16), window=40, num_selected=4)
    values["gates"][..., :2] = 0.0  # only the window's part
    judged.within_budget("nsa_attention", values, judged.call("nsa_attention", values))


def test_the_blocks_are_those_of_float32_scores():
    """Values that count the tokens of each block show which blocks a query took."""
    tokens = 3300
    values = problem(64, tokens, (16, 1), (64, 64), num_selected=12)
    values["k_slc"].zero_()
    values["gates"].zero_()
    values["gates"][..., 1] = 1.0
    block = torch.arange(tokens) // 64
    exact = nsa_attention_forward(**{n: widened(x) for n, x in values.items()})[1][0, :, 0]
    for first in range(0, int(block[-1]) + 1, 64):
        values["v_slc"][:] = (block[:, None] == first + torch.arange(64))[None, :, None]
        o, _ = launched(values)
        taken = (o[0, :, 0] > 0) & (o[0] > 0).all(1)
        for row, ids in zip(taken, exact, strict=True):
            expected = [i - first for i in ids.tolist() if first <= i < first + 64]
            assert row.nonzero().flatten().tolist() == expected


def widened(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) else x


def done_again(run: Any, crowded: bool = False) -> list[int]:
    """How many tiles each kv head of a launch does again, for an unsafe row, or for a union that is
    longer than its list: turns of its outermost loop."""
    core = run.cores[0]
    found = []
    for turns in outermost(core.loops):
        some = core.instructions[turns[0].first : turns[0].last]
        if crowded == any(i.opcode == "nonzero_with_count" for i in some):
            found.append(len(turns))
    return found


def outermost(marks: list[Any]) -> list[list[Any]]:
    """The iterations of each loop that is in no other, inner ones come before outer ones."""
    found: list[list[Any]] = []
    for mark in marks:
        while found and found[-1][0].first >= mark.first:
            found.pop()
        if found and found[-1][0].loop == mark.loop:
            found[-1].append(mark)
        else:
            found.append([mark])
    return found


@pytest.mark.parametrize(
    ("values", "again"),
    [
        (problem(40, 700, num_selected=4, sharp=60.0), [2]),  # rows far below their tile's bound
        (problem(33, 700, (16, 1), (192, 128), num_selected=6, sharp=30.0), [2]),
        (problem(40, 400, (8, 1), (80, 33), batch=2, block=64, sharp=90.0), [2, 2]),
        (problem(31, 31, (16, 1), alike=0.0, sharp=40.0), [1]),  # sees no compressed key
    ],
    ids=["sharp", "paper", "short", "before_the_first_block"],
)
def test_tiles_that_the_pipeline_cannot_do_are_done_again_on_the_device(values, again):
    runs = judged_in_one_launch(values)
    assert done_again(runs[1]) == again
    assert done_again(runs[2]) == again[:1]


@pytest.mark.parametrize(
    ("values", "crowded", "again"),
    [
        (problem(80, 3600, (8, 2), alike=0.0), [3, 3], []),
        (problem(64, 3360, (16, 1), (192, 128), alike=0.0, num_local=3), [2], []),
        (problem(64, 4096, (1, 1), (130, 33), alike=0.0, block=64, scale=-0.1), [2], []),
        (problem(40, 4000, (4, 1), alike=0.0, sharp=40.0, num_selected=20), [], [2]),
        (sharp_at(problem(70, 3600, (2, 1), alike=0.0, num_initial=3), 40), [2], [1]),
        (problem(64, 3840, (2, 1), alike=0.0, num_selected=32, num_local=20), [2], []),
    ],
    ids=["kv_heads", "paper", "one_head", "unsafe", "one_unsafe", "many_local"],
)
def test_unions_longer_than_their_lists(values, crowded, again):
    """Their selected branch is done once more, unless a row is unsafe: then everything is."""
    for lnc, run in judged_in_one_launch(values).items():
        lanes = slice(None) if lnc == 1 else slice(1)
        assert done_again(run, crowded=True) == crowded[lanes]
        assert done_again(run) == again[lanes]


def test_calls_for_which_there_is_no_one_kernel():
    def rule(dtype: torch.dtype = torch.bfloat16, mode: str = "sim", **other: Any) -> str:
        values = judged.complete("nsa_attention", problem(8, 80, **other), dtype)
        verdict = neuron.BACKEND.supports(get("nsa_attention").bind(values), mode)
        return verdict.plan.apart.rule if verdict.plan.apart else ""

    assert rule() == ""
    assert rule(torch.float32) == "dtype"
    assert rule(select_block=32) == "geometry"
    assert rule(heads=(3, 1)) == "group"
    assert rule(dims=(193, 16)) == "head_dim" and rule(dims=(16, 129)) == "head_dim"
    assert rule(num_initial=0) == "forced" and rule(num_selected=33) == "selected"
    assert rule(window=4097) == "window"


def test_only_tiles_that_need_it_are_done_again():
    """One sharp query among 70 at position 130: its tile, the second, of its kv head, 1. Of two
    cores the other one does as many, so that their programs are equal."""
    values = problem(70, 200, (8, 2))
    values["q"][0, 40, 5] *= 100.0
    runs = judged_in_one_launch(values)
    assert done_again(runs[1]) == [1]
    assert [len(outermost(core.loops)) for core in runs[2].cores] == [1, 1]


def test_how_long_the_program_is():
    """What decides whether AWS's compiler takes it."""
    counts = []
    for queries in (32, 96):
        values = problem(queries, 26_000, (16, 1), (192, 128), alike=1.0)
        bound = get("nsa_attention").bind(values)
        (run,) = launched(values)[1]
        counts.append((len(run.instructions), whole.instructions(bound, 1)))
    (few, told_few), (many, told_many) = counts
    assert 0.9 < (told_many - told_few) / (many - few) < 1.15


def test_a_program_that_no_compiler_takes_is_refused_on_hardware_only(monkeypatch):
    monkeypatch.setitem(neuron.DEVICES_OF_MODE, "hw", ("cpu",))
    monkeypatch.setattr(whole, "MOST_INSTRUCTIONS", 4_000)
    bound = get("nsa_attention").bind(problem(96, 300))
    found = [whole.hindrance(bound, mode, 2) for mode in ("hw", "sim")]
    assert found[0].rule == "program" and "about" in found[0].reason and found[1] is None


@pytest.fixture
def looped(monkeypatch):
    """Calls that can are in hardware loops, however short."""
    monkeypatch.setitem(
        plans.load("nsa_attention"), "looped", {"most_unrolled": -1, "least_ranked": 0}
    )


def turns_of_groups(run: Any) -> list[int]:
    """Turns of the loop over groups of 128 tokens, of each kv head of a core."""
    core = run.cores[0]
    found = []
    for turns in outermost(core.loops):
        some = core.instructions[turns[0].first : turns[0].last]
        if sum(i.opcode == "nonzero_with_count" for i in some) == 8:
            found.append(len(turns))
    return found


@pytest.mark.parametrize(
    ("values", "turns", "again"),
    [
        (problem(700, 700, num_selected=4, window=100), 3, 0),
        (problem(150, 900, (8, 2), (80, 33), num_selected=5, window=64), 4, 0),
        (problem(33, 1100, (16, 1), (192, 128), alike=0.0, num_selected=8, window=256), 2, 0),
        (problem(70, 1000, (1, 1), block=64, window=1, num_selected=7, scale=-0.2), 2, 0),
        (problem(40, 17_500, (2, 1), (130, 16), alike=0.0, num_selected=9, num_local=3), 2, 0),
        (problem(33, 33_000, (1, 1), alike=0.5, num_selected=9, num_initial=3), 2, 0),
        (problem(129, 4812, (4, 1), alike=0.0, num_selected=9, window=1, block=16), 3, 0),
        (sharp_at(problem(80, 800, (4, 1), num_selected=5, window=90), 70), 3, 1),
    ],
    ids=[
        "from_0",
        "kv_heads",
        "paper",
        "block_64",
        "two_chunks",
        "three_chunks",
        "lists",
        "unsafe",
    ],
)
def test_in_hardware_loops(looped, values, turns, again):
    """As above, and the turns of the loop: one more than there are groups ends its pipeline."""
    with recording() as runs:
        judged.judge("nsa_attention", values, torch.bfloat16)
    assert [run.kernel for run in runs] == ["forward_looped"] * 3
    for run in (runs[0], runs[2]):
        assert set(turns_of_groups(run)) == {turns}
        assert done_again(run) == [again] * (again > 0)
        for core in run.cores:
            assert core.relaxed == []
            for instruction in core.instructions:
                assert_static(instruction)
    assert_equal_programs(*runs[2].cores)


def test_lengths_that_fill_sbuf_are_done_in_pieces(looped, monkeypatch):
    """Beyond 256K tokens: the scores of one tile at a time, flags and long lists by sections."""
    kernels = package()
    lists = kernels.load("nsa_attention.looped.lists")
    monkeypatch.setattr(lists, "MOST_AT_ONCE", 0)
    monkeypatch.setattr(lists, "AT_A_TIME", 128)
    for name in ("nsa_attention.flagged", "nsa_attention.looped"):
        monkeypatch.setattr(kernels.load(name), "AT_ONCE", 8)
    again = kernels.load("nsa_attention.again")
    monkeypatch.setattr(again, "WIDE", 128)
    monkeypatch.setattr(again, "RUNS", 1)
    values = problem(230, 4000, (4, 1), alike=0.0, num_selected=9, window=90)
    judged.judge("nsa_attention", sharp_at(values, 200), torch.bfloat16)
