"""Range attention beyond the shared cases: shapes, packed batches, scales, cores, golden."""

from __future__ import annotations

from functools import partial

import masked_oracle as oracle
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from interpreted import examples

from nsa_neuron.backends.neuron import run
from nsa_neuron.backends.neuron.launch import attention, sliding_window_attention
from nsa_neuron.records import recording

pytestmark = pytest.mark.sim

# Several chunks, loaded again for every tile; and all of them kept.
SIZES = {"most_unrolled": 10**9, "most_packed": 10**9, "tiles": 1, "large": 256, "small": 128}
SMALL = {
    "forward": {"chunk": 512, "resident": 0},
    "backward_dq": {"chunk": 512, "resident": 0},
    "looped": SIZES,
}
HELD = {**SMALL, "forward": {"chunk": 512, "resident": 4096}}
HELD["backward_dq"] = HELD["forward"]
# Hardware loops, whatever the length.
LOOPED = {**SMALL, "looped": {**SIZES, "most_unrolled": -1, "most_packed": -1}}


class Launcher:
    """The kernels of one of the two ops on `lnc` cores, as functions of tensors and a scale."""

    def __init__(self, window: int = 0, plan=SMALL, lnc: int = 1, **options):
        module = sliding_window_attention if window else attention
        kernels = run.simulated(module.__name__.split(".")[-1], lnc)
        options |= {"window": window} if window else {}
        self.forward = partial(module.forward, kernels, plan, **options)
        self.backward = partial(module.backward, kernels, plan, **options)

    def everything(self, p: oracle.Problem) -> tuple[torch.Tensor, ...]:
        """o, lse, dq, dk, dv of a problem."""
        o, lse = self.forward(p.q, p.k, p.v, scale=p.scale)
        grads = self.backward(p.grad_o, p.q, p.k, p.v, o, lse, p.grad_lse, scale=p.scale)
        return (o, lse, *grads)


def check(problem: oracle.Problem, window: int = 0, plan=SMALL) -> None:
    """One core and two against float64, and against each other bit by bit."""
    queries, keys = problem.q.shape[1], problem.k.shape[1]
    masks = [(slice(None), slice(None), oracle.causal(queries, keys, window))]
    check_masked(problem, masks, Launcher(window, plan), Launcher(window, plan, lnc=2))


def check_masked(problem: oracle.Problem, masks, one: Launcher, two: Launcher) -> None:
    # 1e-5 as the golden files ask of float32: a window of 1 subtracts two equal sums of Dv terms.
    tolerance = max(1e-5, oracle.TOLERANCE[problem.q.dtype])
    oracle.check(problem, masks, one.forward, one.backward, tolerance)
    results = one.everything(problem), two.everything(problem)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@examples(8)
@example(queries=1, past=0, group=1, dims=(16, 16), window=0)
@example(queries=5, past=0, group=131, dims=(16, 16), window=0)  # more heads than rows of a tile
@example(queries=3, past=1100, group=2, dims=(16, 16), window=600)  # chunks of keys, one skipped
@example(queries=9, past=0, group=2, dims=(256, 256), window=1)
@given(
    queries=st.integers(1, 60),
    past=st.sampled_from([0, 1, 127, 128, 515]),
    group=st.sampled_from([1, 2, 3, 5, 16, 65]),
    dims=st.sampled_from([(16, 16), (80, 24), (144, 32)]),
    window=st.sampled_from([0, 1, 33, 300]),
)
def test_any_shape(queries, past, group, dims, window):
    problem = oracle.Problem.random(1, queries, queries + past, 2, group, *dims, seed=queries)
    check(problem, window)


@pytest.mark.parametrize(("plan", "window"), [(SMALL, 700), (HELD, 0)])
def test_long_rows_of_several_tiles(plan, window):
    """1,100 keys: several chunks, whole tiles that need no mask, three tiles of queries."""
    problem = oracle.Problem.random(1, 300, 1100, 1, 1, 32, 32, torch.bfloat16)
    check(problem, window, plan)


@pytest.mark.parametrize(("group", "window"), [(1, 13), (3, 0), (4, 130)])
def test_packed(window, group):
    """Sequences shorter and longer than a tile, some with a past, none sees another."""
    lengths_q, lengths_k = [1, 150, 3, 16], [1, 150, 200, 17]
    cu_q, cu_k, parts = oracle.sequences(lengths_q, lengths_k)
    problem = oracle.Problem.random(1, sum(lengths_q), sum(lengths_k), 1, group, 16, 32)
    lengths = zip(parts, lengths_q, lengths_k, strict=True)
    masks = [(*part, oracle.causal(s, t, window)) for part, s, t in lengths]
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    check_masked(problem, masks, Launcher(window, **options), Launcher(window, lnc=2, **options))


@pytest.mark.parametrize(
    ("queries", "past", "group", "dims", "window", "dtype"),
    [
        (300, 0, 16, (32, 16), 0, torch.float32),  # ten groups, both sizes of chunks
        (100, 600, 3, (144, 32), 0, torch.bfloat16),
        (5, 4, 131, (16, 16), 0, torch.float32),  # more heads than rows of a tile
        (120, 0, 16, (192, 128), 0, torch.bfloat16),
        (70, 3, 16, (32, 16), 0, torch.float16),
        (600, 130, 1, (16, 16), 300, torch.float32),  # edges on both sides, and none
        (70, 833, 16, (16, 16), 700, torch.float32),  # and both sizes between them
    ],
)
def test_hardware_loops(queries, past, group, dims, window, dtype):
    problem = oracle.Problem.random(1, queries, queries + past, 1, group, *dims, dtype)
    check(problem, window, LOOPED)


@pytest.mark.parametrize("window", [0, 130])
def test_hardware_loops_on_packed_sequences(window):
    """Of different pasts, one of them longer than a group; none sees another."""
    lengths_q, lengths_k = [1, 150, 3, 16], [1, 150, 200, 17]
    cu_q, cu_k, parts = oracle.sequences(lengths_q, lengths_k)
    problem = oracle.Problem.random(1, sum(lengths_q), sum(lengths_k), 1, 3, 16, 32)
    lengths = zip(parts, lengths_q, lengths_k, strict=True)
    masks = [(*part, oracle.causal(s, t, window)) for part, s, t in lengths]
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    launchers = [Launcher(window, LOOPED, lnc, **options) for lnc in (1, 2)]
    check_masked(problem, masks, *launchers)


@pytest.mark.parametrize("plan", [SMALL, LOOPED])
@pytest.mark.parametrize("spread", [60.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_logits(dtype, spread, plan):
    """Any spread of logits, also where 16-bit numbers cannot hold them (the row shift is exact)."""
    problem = oracle.Problem.random(1, 70, 70, 1, 2, 64, 16, dtype, scale=1.0, spread=spread)
    want_o, want_lse, *_ = oracle.expected(
        problem, [(slice(None), slice(None), oracle.causal(70, 70))]
    )
    assert want_lse.max() > 16 * spread
    launcher = Launcher(plan=plan)
    o, lse = launcher.forward(problem.q, problem.k, problem.v, scale=1.0)
    oracle.close(o, want_o, 1e-3 if dtype == torch.float32 else 1e-2)
    oracle.close(lse, want_lse, 3e-6)
    grads = launcher.backward(problem.grad_o, problem.q, problem.k, problem.v, o, lse, scale=1.0)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("plan", [SMALL, LOOPED])
def test_very_uneven_rows(plan):
    """One shift for several rows would overflow for some and lose the others."""
    problem = oracle.Problem.random(1, 64, 64, 1, 2, 64, 16, torch.bfloat16, scale=1.0)
    problem.q[:, ::3] *= 1e-3
    problem.q[:, 1::3] *= 300
    check(problem, plan=plan)


@pytest.mark.parametrize("lnc", [1, 2])
def test_the_device_chooses_the_exact_way_where_one_row_asks_for_it(lnc):
    """Logits far below the bound of norms, in one half of a pair of tiles: both cores do it again.

    64 queries x 2 heads are one pair of tiles, one for each of two cores.
    """
    problem = oracle.Problem.random(1, 64, 64, 1, 2, 64, 16, torch.bfloat16, scale=1.0, spread=0.1)
    for sharp, turns in ((1.0, 0), (300.0, 1)):
        problem.q[:, 60] *= sharp
        with recording() as runs:
            Launcher(lnc=lnc).forward(problem.q, problem.k, problem.v, scale=1.0)
        assert [len(core.loops) for core in runs[0].cores] == [turns] * lnc


def test_looped_groups_are_redone_one_by_one():
    """Of two pairs of groups, only the one with a sharp row goes the exact way, on both cores."""
    problem = oracle.Problem.random(1, 256, 256, 1, 8, 32, 16, torch.bfloat16, scale=1.0)
    problem.q.mul_(0.05)
    redone = []
    for sharp in (1.0, 3000.0):
        problem.q[:, 70] *= sharp
        with recording() as runs:
            Launcher(plan=LOOPED, lnc=2).forward(problem.q, problem.k, problem.v, scale=1.0)
        one, two = ([m.loop for m in core.loops] for core in runs[0].cores)
        assert one == two
        redone.append(sum(i.opcode == "range_select" for i in runs[0].cores[0].instructions))
    assert redone[0] == 0 < redone[1]


@pytest.mark.parametrize("scale", [1e-3, 0.11, 1.7, -0.4, 0.0])
def test_any_scale(scale):
    """0.11 and 1.7 are not bfloat16 numbers: rounding q * scale would move lse by 1e-3."""
    problem = oracle.Problem.random(1, 20, 20, 1, 2, 64, 16, torch.bfloat16, scale=scale)
    check(problem)


def test_window_is_exact():
    """v counts the keys that a query sees: w of them, its own included."""
    tokens, window = 40, 9
    q, k = torch.zeros(1, tokens, 1, 16), torch.zeros(1, tokens, 1, 16)
    v = torch.eye(tokens).reshape(1, tokens, 1, tokens)
    prefill, _ = Launcher(window).forward(q, k, v, scale=1.0)
    decode, _ = Launcher(window).forward(q[:, -1:], k, v, scale=1.0)
    assert ((prefill[0, :, 0] > 0).sum(-1) == torch.arange(1, tokens + 1).clamp(max=window)).all()
    assert (decode[0, 0, 0] > 0).nonzero().flatten().tolist() == list(range(31, 40))


@pytest.mark.parametrize("name", sorted(p.name for p in oracle.GOLDEN.glob("window_*.npz")))
def test_golden_windows(name):
    meta, z = oracle.load_golden(name)
    options = {"window": meta["w"]}
    if meta["layout"] == "packed":
        options |= {"cu_seqlens_q": z["cu_seqlens"], "cu_seqlens_k": z["cu_seqlens"]}
    ops = Launcher(**options)
    o, lse = ops.forward(z["q"], z["k"], z["v"], scale=meta["scale"])
    grads = ops.backward(z["do"], z["q"], z["k"], z["v"], o, lse, scale=meta["scale"])
    for output, got in zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *grads), strict=True):
        oracle.close_to_golden(meta, z, f"{output}_win", got)
