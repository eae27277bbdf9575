"""Addresses and values known only at run time: what they cost, however they are spelled."""

from __future__ import annotations

from itertools import pairwise

import pytest
from cost_helpers import P, hbm, nisa, nl, of, only, psum, record, sbuf

SPELLINGS = {
    "scalar_offset of an SBUF scalar": lambda index: index,
    "register_alloc(tensor)": lambda index: nisa.register_alloc(index),
    "register_load": lambda index: loaded(index),
    "register_move of a loaded one": lambda index: moved(index),
}


def loaded(index):
    register = nisa.register_alloc()
    nisa.register_load(register, index)
    return register


def moved(index):
    register = nisa.register_alloc()
    nisa.register_move(register, loaded(index))
    return register


def at(table, index, width):
    """[128, width] of a table, starting at a run-time column."""
    return table.ap([[table.shape[1], 128], [1, width]], scalar_offset=index)


def on_tensor(spell, index):
    weights, data, out = (
        sbuf((128, 512), nl.bfloat16),
        sbuf((128, 512), nl.bfloat16),
        psum((64, 512)),
    )
    for _ in range(4):
        nisa.nc_matmul(out, at(weights, spell(index), 64), data)


def on_vector(spell, index):
    table, out = sbuf((128, 512)), sbuf((128, 8))
    for _ in range(4):
        nisa.tensor_copy(out, at(table, spell(index), 8), engine=nisa.engine.vector)


def on_scalar(spell, index):
    table, out = sbuf((128, 512)), sbuf((128, 8))
    for _ in range(4):
        nisa.activation(out, nl.exp, at(table, spell(index), 8))


def on_gpsimd(spell, index):
    table, out = sbuf((128, 512)), sbuf((128, 8))
    for _ in range(4):
        nisa.tensor_copy(out, at(table, spell(index), 8), engine=nisa.engine.gpsimd)


def on_a_queue(spell, index):
    table, out = hbm((64, 128, 64)), sbuf((128, 64))
    for _ in range(4):
        view = table.ap([[64, 128], [1, 64]], scalar_offset=spell(index), indirect_dim=0)
        nisa.dma_copy(out, view, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.sync)


def on_software_descriptors(spell, index):
    table, out = hbm((64, 128, 64)), sbuf((128, 64))
    for _ in range(4):
        view = table.ap([[64, 128], [1, 64]], scalar_offset=spell(index), indirect_dim=0)
        nisa.dma_copy(out, view, dge_mode=nisa.dge_mode.swdge)


USES = (on_tensor, on_vector, on_scalar, on_gpsimd, on_a_queue, on_software_descriptors)


def run(use, spelling):
    def body():
        index = sbuf((1, 1), nl.int32)
        nisa.iota(index, [[1, 1]])
        use(SPELLINGS[spelling], index)

    return record(body)


@pytest.mark.parametrize("use", USES, ids=lambda f: f.__name__)
def test_every_spelling_costs_the_same(use):
    totals = {spelling: of(run(use, spelling)).total for spelling in SPELLINGS}
    first = totals.pop("scalar_offset of an SBUF scalar")
    assert all(total == pytest.approx(first, rel=1e-9) for total in totals.values()), totals


@pytest.mark.parametrize("use", USES[:4], ids=lambda f: f.__name__)
def test_a_run_time_operand_takes_time_of_its_engine(use):
    made = run(use, "register_load")
    dear, free = of(made), of(made, run_time_operand=0.0)
    engine = use.__name__.removeprefix("on_")
    assert dear.busy(engine) - free.busy(engine) == pytest.approx(4 * P.run_time_operand)
    assert dear.total - free.total == pytest.approx(4 * P.run_time_operand)


def test_a_register_as_a_scalar_operand_costs_too():
    def body(register):
        table = sbuf((128, 64))
        value = nisa.register_alloc(3) if register else 3.0
        nisa.tensor_scalar(sbuf((128, 64)), table, nl.add, value)

    plain, run_time = (of(record(lambda r=r: body(r))) for r in (False, True))
    i = only(run_time, "tensor_scalar")
    assert run_time.total - plain.total == pytest.approx(P.run_time_operand)
    assert run_time.costs[i].guesses == ("run_time_operand",)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_run_time_operand_of_an_instruction_is_billed(count):
    """500 ns each: two inputs, the result, and a register as the scalar; [128, 8] on VectorE."""

    def body():
        index, table, out = sbuf((1, 1), nl.int32), sbuf((128, 512)), sbuf((128, 512))
        nisa.iota(index, [[1, 1]])
        data = at(table, index, 8)
        other = at(table, index, 8) if count > 1 else table[:, 0:8]
        to = at(out, index, 8) if count > 2 else out[:, 0:8]
        value = nisa.register_alloc(3) if count > 3 else 3.0
        nisa.scalar_tensor_tensor(to, data, nl.multiply, value, nl.add, other)

    t = of(record(body), run_time_operand=500.0)
    i = only(t, "scalar_tensor_tensor")
    assert t.free[i] - t.issue[i] == pytest.approx((64 + 60) / 0.96 + count * 500)
    assert t.end[i] - t.issue[i] == pytest.approx((8 + 152) / 0.96 + count * 500)


def test_a_loop_index_is_a_run_time_address():
    def body():
        table, out = hbm((8, 128, 64)), sbuf((128, 64))

        def step(i):
            view = table.ap([[64, 128], [1, 64]], scalar_offset=i, indirect_dim=0)
            nisa.dma_copy(out, view, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.scalar)

        nl.fori_loop(0, 4, step)

    t = of(record(body), loop_iteration=0.0)
    transfers = [i for i, x in enumerate(t.instructions) if x.opcode == "dma_copy"]
    assert [t.free[i] - t.issue[i] for i in transfers] == pytest.approx([P.dma_run_time] * 4)


@pytest.mark.parametrize("use", USES[4:], ids=lambda f: f.__name__)
def test_a_run_time_transfer_takes_its_queue_and_engine(use):
    t = of(run(use, "register_load"))
    transfers = [i for i, x in enumerate(t.instructions) if x.opcode == "dma_copy"]
    apart = [t.issue[b] - t.issue[a] for a, b in pairwise(transfers)]
    made = P.dma_trigger_swdge + 128 * P.dma_descriptor_swdge
    least = max(P.dma_run_time, made) if use is on_software_descriptors else P.dma_run_time
    assert min(apart) >= least - 1e-6
    assert t.costs[transfers[0]].guesses


def test_what_uses_a_register_waits_for_its_source():
    """And for no later write of the tensor it came from."""

    def body():
        index, table, out = sbuf((1, 1), nl.int32), sbuf((128, 512)), sbuf((128, 8))
        nisa.iota(index, [[1, 1]])
        register = loaded(index)
        slow = sbuf((128, 4096))
        nisa.memset(slow, 0.0, engine=nisa.engine.gpsimd)
        nisa.memset(index, 0, engine=nisa.engine.gpsimd)
        nisa.tensor_copy(out, at(table, register, 8), engine=nisa.engine.vector)

    t = of(record(body))
    copy, source = only(t, "tensor_copy"), only(t, "iota")
    assert t.issue[copy] == pytest.approx(t.end[source] + P.semaphore)
