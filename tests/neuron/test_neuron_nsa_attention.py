"""`nsa_attention` in one kernel: geometry, exact choices, what it leaves to the parts."""

from __future__ import annotations

from typing import Any

import judged
import pytest
import torch
from test_neuron_records import assert_equal_programs, assert_static

from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import whole
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


def launched(values: dict[str, Any], lnc: int = 1) -> tuple[torch.Tensor, list[Any]]:
    """The result, and the records of all kernels."""
    with recording() as runs:
        (o,) = judged.call("nsa_attention", values, lnc)
    return o, list(runs)


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
    judged.judge("nsa_attention", values, torch.bfloat16)
    _, runs = launched(values, 2)
    assert [run.kernel for run in runs] == [KERNEL]
    assert_equal_programs(*runs[0].cores)
    for core in runs[0].cores:
        assert core.relaxed == []
        for instruction in core.instructions:
            assert_static(instruction)


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


@pytest.mark.parametrize(
    "values",
    [
        problem(40, 700, num_selected=4, sharp=60.0),  # rows far below the bound of their tile
        problem(80, 3600, (8, 2), alike=0.0),  # unions of more blocks than a list has
    ],
    ids=["sharp", "long_lists"],
)
def test_tiles_that_the_kernel_cannot_do_are_done_by_the_parts(values):
    judged.judge("nsa_attention", values, torch.bfloat16)
    _, runs = launched(values)
    assert runs[0].kernel == KERNEL and len(runs) > 4


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


def test_only_tiles_that_need_it_are_done_again(monkeypatch):
    """One sharp query among 70 at position 130: its tile, the second, of its kv head."""
    values = problem(70, 200, (8, 2))
    values["q"][0, 40, 5] *= 100.0
    asked = []

    def noted(o, parts, given, lane, tiles):
        asked.append((lane, tiles))
        again(o, parts, given, lane, tiles)

    again = whole.again
    monkeypatch.setattr(whole, "again", noted)
    judged.judge("nsa_attention", values, torch.bfloat16)
    assert asked == [(1, (1, 2))] * 3


def test_runs():
    marks = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    assert whole.runs(marks) == [(0, 0, 2), (0, 3, 4), (2, 1, 3)]
