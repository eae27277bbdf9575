"""Collectives across simulated ranks against NumPy; groups, deadlocks, limits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import DeadlockError, PerRank, SimulationError, nki
from nsa_neuron.simulator.nki import collectives as ncc
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

PAIRS = ncc.ReplicaGroup([[0, 2], [3, 1]])
ALL = ncc.ReplicaGroup([[0, 1, 2, 3]])


def inputs(shape, dtype=np.float32, ranks=4):
    rng = np.random.default_rng(3)
    return [rng.integers(-8, 9, shape).astype(dtype) for _ in range(ranks)]


def with_hbm(function, shape, *args, dtype=None, lnc=1, ranks=4, data):
    """Run `function(srcs, dsts, *args)` on copies in HBM; return dst of each rank."""

    @nki.jit
    def kernel(x):
        src = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        dst = nl.ndarray(shape, x.dtype, buffer=nl.shared_hbm)
        out = nl.ndarray(shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(src, x)
        function([src], [dst], *args)
        nisa.dma_copy(out, dst)
        return out

    return simulator.simulate(kernel[lnc], ranks=ranks)(PerRank(data))


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32])
@pytest.mark.parametrize(
    "op, want", [(nl.add, np.add), (nl.maximum, np.maximum), (nl.minimum, np.minimum)]
)
def test_all_reduce(op, want, dtype, lnc):
    data = inputs((128, 6), dtype)
    got = with_hbm(ncc.all_reduce, (128, 6), PAIRS, op, lnc=lnc, data=data)
    for rank, peer in ((0, 2), (2, 0), (1, 3), (3, 1)):
        np.testing.assert_array_equal(got[rank], want(data[rank], data[peer]))


def test_all_gather_reduce_scatter_all_to_all():
    data = inputs((8, 3))
    order = (2, 0, 3, 1)
    group = ncc.ReplicaGroup([order])
    gathered = with_hbm(ncc.all_gather, (32, 3), group, 0, data=data)
    scattered = with_hbm(ncc.reduce_scatter, (2, 3), group, 0, nl.add, data=data)
    swapped = with_hbm(ncc.all_to_all, (8, 3), group, 0, data=data)
    ordered = [data[r] for r in order]
    for place, r in enumerate(order):
        part = slice(2 * place, 2 * place + 2)
        np.testing.assert_array_equal(gathered[r], np.concatenate(ordered))
        np.testing.assert_array_equal(scattered[r], sum(data)[part])
        np.testing.assert_array_equal(swapped[r], np.concatenate([d[part] for d in ordered]))


@pytest.mark.parametrize("dim", [0, 1])
def test_all_gather_between_sbufs_follows_the_order_of_the_group(dim):
    data = inputs((16, 5))
    shape = (32, 5) if dim == 0 else (16, 10)

    def kernel(x):
        src, dst = nl.load(x), nl.ndarray(shape, x.dtype)
        ncc.all_gather([src], [dst], PAIRS, collective_dim=dim)
        out = nl.ndarray(shape, x.dtype, buffer=nl.shared_hbm)
        nl.store(out, dst)
        return out

    got = simulator.simulate(kernel, ranks=4)(PerRank(data))
    np.testing.assert_array_equal(got[2], np.concatenate([data[0], data[2]], dim))
    np.testing.assert_array_equal(got[1], np.concatenate([data[3], data[1]], dim))


def test_collective_permute_leaves_ranks_that_are_no_target_alone():
    data = inputs((4, 4))

    def kernel(x):
        src = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        dst = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(src, x)
        nisa.dma_copy(dst, x)
        ncc.collective_permute([src], [dst], [(0, 1), (1, 3), (3, 0)])
        return dst

    got = simulator.simulate(kernel, ranks=4)(PerRank(data))
    for rank, source in enumerate([3, 0, 2, 1]):
        np.testing.assert_array_equal(got[rank], data[source])


def test_ring_of_permutes_gathers_by_processing_rank():
    data = inputs((4, 8))

    def kernel(x):
        out = nl.ndarray((4, *x.shape), x.dtype, buffer=nl.shared_hbm)
        have = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(have, x)
        for step in range(4):
            rank = ncc.collective_permute_implicit_current_processing_rank_id(step, ALL)
            nisa.dma_copy(out.select(0, rank), have)
            if step < 3:
                following = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
                ncc.collective_permute_implicit([[have]], [[following]], ALL)
                have = following
        return out

    for got in simulator.simulate(kernel, ranks=4)(PerRank(data)):
        np.testing.assert_array_equal(got, np.stack(data))


def test_ring_reduce_step():
    data = inputs((4, 8))

    def kernel(x):
        a, b = nl.load(x), nl.full(x.shape, 10, x.dtype)
        dst = nl.ndarray(x.shape, x.dtype)
        ncc.collective_permute_implicit_reduce([[a]], [[b]], [[dst]], ALL, nl.add)
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nl.store(out, dst)
        return out

    got = simulator.simulate(kernel, ranks=4)(PerRank(data))
    for rank in range(4):
        np.testing.assert_array_equal(got[rank], data[rank - 1] + 10)


def variable(function, counts, starts, data, known=False):
    """Run a `_v` collective on kernel[2]; return dst (filled with -1 before) and metadata."""

    @nki.jit
    def kernel(x, meta, blank):
        src, dst = (nl.ndarray(t.shape, t.dtype, buffer=nl.shared_hbm) for t in (x, blank))
        table = nl.ndarray(meta.shape, meta.dtype, buffer=nl.shared_hbm)
        for to, since in ((src, x), (dst, blank), (table, meta)):
            nisa.dma_copy(to, since)
        function([src], [dst], ALL, table, recv_counts_known=known)
        return dst, table

    meta = [np.stack([counts[r], starts[r], np.full(4, 77)]).astype(np.uint32) for r in range(4)]
    blank = np.full(16, -1, np.float32)
    return simulator.simulate(kernel[2], ranks=4)(PerRank(data), PerRank(meta), blank)


@pytest.mark.parametrize("known", [False, True])
def test_all_to_all_v(known):
    data = [np.arange(20, dtype=np.float32) + 100 * r for r in range(4)]
    counts = np.array([[(r + k) % 4 for k in range(4)] for r in range(4)])
    starts = np.array([[2 * k + r for k in range(4)] for r in range(4)])
    got = variable(ncc.all_to_all_v, counts, starts, data, known)
    for rank, (dst, table) in enumerate(got):
        want = np.full(16, -1, np.float32)
        for s in range(4):
            n, at = counts[s][rank], starts[s][rank]
            want[4 * s : 4 * s + n] = data[s][at : at + n]
        np.testing.assert_array_equal(dst, want)
        np.testing.assert_array_equal(table[2], [77] * 4 if known else counts[:, rank])


def test_all_gather_v():
    data = [np.arange(20, dtype=np.float32) + 100 * r for r in range(4)]
    counts, starts = (
        np.array([[r + 1] * 4 for r in range(4)]),
        np.array([[r] * 4 for r in range(4)]),
    )
    for dst, table in variable(ncc.all_gather_v, counts, starts, data):
        for s in range(4):
            np.testing.assert_array_equal(dst[4 * s : 4 * s + s + 1], data[s][s : 2 * s + 1])
        np.testing.assert_array_equal(table[2], [1, 2, 3, 4])


def test_all_gather_v_only_where_documented():
    def kernel(x):
        meta = nl.full((3, 1), 0, nl.uint32, buffer=nl.shared_hbm)
        ncc.all_gather_v([x], [x], ncc.ReplicaGroup([[0]]), meta)
        return x

    with pytest.raises(SimulationError, match="four ranks"):
        simulator.simulate(kernel)(np.ones((4, 4), np.float32))


def test_rank_id_selects_by_register():
    table = np.arange(12, dtype=np.float32).reshape(4, 3)

    def kernel(x):
        out = nl.ndarray((1, 3), x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(out, x.ap([[3, 1], [1, 3]], scalar_offset=ncc.rank_id(), indirect_dim=0))
        return out

    got = simulator.simulate(kernel, ranks=4)(table)
    np.testing.assert_array_equal(np.concatenate(got), table)


def test_a_rank_that_stays_away_is_a_deadlock_with_its_line():
    def kernel(x, take_part):
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(out, x)
        if take_part:
            ncc.all_reduce([x], [out], ALL, nl.add)
        return out

    flags = PerRank([True, True, False, True])
    with pytest.raises(DeadlockError, match="rank 2 has ended") as error:
        simulator.simulate(kernel, ranks=4)(np.ones((2, 2), np.float32), flags)
    assert "ncc.all_reduce at" in str(error.value) and "test_collectives_functions.py" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("ranks", "lnc", "rule", "waits", "ended"),
    [
        (1, 2, "lnc-deadlock", "core 0", "core 1"),
        (2, 1, "collective-deadlock", "rank 0", "rank 1"),
        (2, 2, "collective-deadlock", "rank 0 core 0", "rank 1 core 1"),
    ],
)
def test_a_deadlock_names_who_waits_and_who_has_ended(ranks, lnc, rule, waits, ended):
    def kernel(x, first):
        if first and nl.program_id(0) == 0:
            if ranks == 1:
                nisa.core_barrier(x, (0, 1))
            else:
                ncc.all_reduce([x], [x], ncc.ReplicaGroup([[0, 1]]), nl.add)
        nl.store(x[0:1], nl.load(x[0:1])) if nl.program_id(0) else None
        return x

    first = PerRank([True, False]) if ranks == 2 else True
    run = simulator.simulate(simulator.Kernel(kernel, lnc), ranks=ranks)
    with pytest.raises(DeadlockError) as error:
        run(np.ones((2, 2), np.float32), first)
    assert error.value.rule == rule
    assert error.value.message.startswith(f"{waits} waits in ")
    assert error.value.message.endswith(f"{ended} has ended")


def test_an_error_on_one_rank_ends_the_run():
    def kernel(x, fail):
        if fail:
            raise ZeroDivisionError("here")
        ncc.all_reduce([x], [x], ALL, nl.add)
        return x

    with pytest.raises(ZeroDivisionError):
        simulator.simulate(kernel, ranks=4)(
            np.ones((2, 2), np.float32), PerRank([False, False, True, False])
        )


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda x, y: ncc.all_reduce([x], [y], ncc.ReplicaGroup([[0, 7]]), nl.add), "rank 7"),
        (lambda x, y: ncc.all_reduce([x], [y], ncc.ReplicaGroup([[1]]), nl.add), "in no group"),
        (lambda x, y: ncc.all_reduce([x], [y], ncc.ReplicaGroup([[0, 0]]), nl.add), "repeat"),
        (lambda x, y: ncc.all_reduce([x], [y], ALL, nl.multiply), "add, minimum or maximum"),
        (lambda x, y: ncc.all_reduce(x, y, ALL, nl.add), "list of tensors"),
        (lambda x, y: ncc.all_reduce([x], [nl.load(y)], ALL, nl.add), "in HBM"),
        (lambda x, y: ncc.all_gather([x], [y], ALL, 0), "wrong shape"),
        (lambda x, y: ncc.all_gather([x], [y], ALL, 1), "collective_dim"),
        (lambda x, y: ncc.all_to_all([nl.load(x)], [nl.load(y)], ALL, 0), "in HBM"),
        (lambda x, y: ncc.reduce_scatter([x], [y], ALL, 0, nl.add), "does not divide"),
        (lambda x, y: ncc.collective_permute([x], [y], [(0, 1), (0, 0)]), "at most one pair"),
        (lambda x, y: ncc.collective_permute_implicit([[x]], [[y]], ALL, [1]), "channels"),
        (lambda x, y: ncc.all_reduce([x], [y], ALL, nl.add, priority=1), "v4"),
    ],
)
def test_misuse(call, text):
    def kernel(x):
        y = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(y, x)
        call(x, y)
        return y

    with pytest.raises(SimulationError) as caught:
        simulator.simulate(kernel, ranks=4)(np.ones((3, 3), np.float32))
    # Not in all of the error: that quotes the kernel's line, which here holds the text, too.
    assert text in f"{caught.value.operand}: {caught.value.message}"


def test_ranks_do_not_share_arguments_and_per_rank_arrays_are_updated():
    def kernel(x, y):
        tile = nl.load(x)
        nisa.tensor_scalar(tile, tile, nl.add, 1.0)
        nl.store(x, tile)
        nl.store(y, tile)

    shared, own = np.zeros((2, 2), np.float32), [np.zeros((2, 2), np.float32) for _ in range(2)]
    run = simulator.simulate(kernel, ranks=2)
    run(shared, PerRank(own))
    assert len(run.runs) == 2 and not shared.any()
    assert all((a == 1).all() for a in own)
