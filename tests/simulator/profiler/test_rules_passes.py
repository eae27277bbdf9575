"""Each rule of advice about passes over tiles: its limits, and the most that it promises."""

from __future__ import annotations

import pytest
from profile_helpers import ask, hbm, nisa, nl, profile_of, psum, sbuf, shapes

from nsa_neuron.simulator.profiler import rules_passes
from nsa_neuron.simulator.profiler.what_if import Baseline


def shared_out(on_vector, on_scalar, width=512, opcode="copy"):
    """So many passes on VectorE and on ScalarE, none of which waits for another."""

    def body():
        for _ in range(on_vector):
            made, given = sbuf((128, width)), sbuf((128, width))
            if opcode == "sum":
                nisa.tensor_reduce(made[:, 0:1], nl.add, given, axis=1)
            elif opcode == "maximum":
                nisa.tensor_reduce(made[:, 0:1], nl.maximum, given, axis=1)
            elif opcode == "shift":
                nisa.tensor_scalar(made, given, nl.subtract, 1.0)
            elif opcode == "bound":
                nisa.tensor_scalar(made, given, nl.maximum, 1.0)
            else:
                nisa.tensor_copy(made, given, engine=nisa.engine.vector)
        for _ in range(on_scalar):
            nisa.activation(sbuf((128, width)), nl.copy, sbuf((128, width)))

    return body


@pytest.mark.parametrize(
    ("on_scalar", "opcode", "width", "told"),
    [
        (0, "copy", 512, True), (4, "copy", 512, True), (7, "copy", 512, False),
        (0, "sum", 512, True), (0, "maximum", 512, False), (0, "shift", 512, True),
        (0, "bound", 512, False), (0, "copy", 32, True), (0, "copy", 31, False),
    ],
)  # fmt: skip
def test_an_engine_with_half_the_work_of_the_other_is_not_idle(on_scalar, opcode, width, told):
    found, _ = ask(rules_passes.idle_engine, shared_out(8, on_scalar, width, opcode))
    assert bool(found) is told


def test_an_engine_that_waits_most_of_the_time_has_no_work_to_give_away():
    def body(a):
        tile = sbuf((128, 4096))
        nisa.dma_copy(tile, a)
        nisa.tensor_copy(sbuf((128, 512)), tile[:, :512], engine=nisa.engine.vector)

    assert ask(rules_passes.idle_engine, body, *shapes((128, 4096)))[0] == []


def test_all_or_every_second_pass_is_moved_what_balances_better_first():
    found, base = ask(rules_passes.idle_engine, shared_out(8, 0))
    assert [c.indices for c in found] == [[1, 3, 5, 7], list(range(8))]
    assert "for every second one" in found[0].message and "for all of them" in found[1].message
    assert found[0].bound == pytest.approx(4 * 572 / 0.96)
    again = base._again(found[0].change)
    assert [again.lanes[again.lane[k]] for k in range(8)] == ["vector", "scalar"] * 4
    assert again.total == pytest.approx(max(3 * 572 + 664, 0) / 0.96, rel=1e-6)


def test_a_sum_that_moves_to_scalar_engine_is_read_out_of_its_accumulator():
    found, base = ask(rules_passes.idle_engine, shared_out(8, 0, opcode="sum"))
    again = base._again(found[-1].change)
    assert again.costs[0].interval == pytest.approx((512 + 64 + 60) / 1.2)


def from_scalar(function, **more):
    def body():
        for _ in range(8):
            nisa.activation(sbuf((128, 512)), function, sbuf((128, 512)), **more)

    return body


@pytest.mark.parametrize(("function", "told"), [(nl.copy, 1), (nl.square, 1), (nl.exp, 0)])
def test_functions_that_vector_engine_has(function, told):
    assert bool(ask(rules_passes.idle_engine, from_scalar(function))[0]) == told


def test_a_function_that_sums_as_well_stays():
    def body():
        for _ in range(8):
            nisa.activation(
                sbuf((128, 512)), nl.copy, sbuf((128, 512)), reduce_op=nl.add,
                reduce_res=sbuf((128, 1)), reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )  # fmt: skip

    assert ask(rules_passes.idle_engine, body)[0] == []


def halves(kept, dtype=nl.bfloat16):
    """bf16 in and out; between them fp32 tiles, of which `kept` says what else they are for."""

    def body(a):
        out = hbm(a.shape, dtype)
        tile, result = sbuf(a.shape, a.dtype), sbuf(a.shape, dtype)
        one, two = sbuf(a.shape), sbuf(a.shape)
        nisa.dma_copy(tile, a)
        nisa.tensor_scalar(one, tile, nl.add, 1.0)
        if kept == "running":
            nisa.tensor_tensor(one, one, tile, nl.add)
        if kept == "gpsimd":
            nisa.affine_select(one, [[1, a.shape[1]]], 1, one, 0.0)
        if kept == "bits":
            nisa.tensor_copy(sbuf(a.shape, nl.uint32), one.view(nl.uint32))
        nisa.tensor_tensor(two, one, tile, nl.multiply)
        nisa.tensor_copy(result, two)
        nisa.dma_copy(out, result)
        return out

    return body


@pytest.mark.parametrize(("kept", "narrow"), [("", 2), ("running", 0), ("gpsimd", 0), ("bits", 0)])
def test_tiles_that_only_passes_touch_could_be_narrow(kept, narrow):
    """A tile that cannot keeps those made of it wide as well."""
    base = Baseline(profile_of(halves(kept), *shapes((128, 512), dtype="bfloat16")).timeline)
    assert len(rules_passes._could_be_narrow(base)) == narrow
    assert len(list(rules_passes.wide_tiles(base))) == bool(narrow)


def test_tiles_of_fp32_inputs_or_results_are_not_told_to_be_narrow():
    for dtype, given in ((nl.float32, "bfloat16"), (nl.bfloat16, "float32")):
        base = Baseline(profile_of(halves("", dtype), *shapes((128, 512), dtype=given)).timeline)
        assert not rules_passes._could_be_narrow(base)


def test_sums_in_psum_are_no_tiles_to_be_narrow():
    def body(a):
        out, tile, bank = hbm(a.shape, a.dtype), sbuf(a.shape, a.dtype), psum(a.shape)
        one, result = sbuf(a.shape), sbuf(a.shape, a.dtype)
        nisa.dma_copy(tile, a)
        nisa.tensor_copy(bank, tile, engine=nisa.engine.vector)
        nisa.tensor_scalar(one, bank, nl.add, 1.0)
        nisa.tensor_scalar(result, one, nl.multiply, 2.0)
        nisa.dma_copy(out, result)
        return out

    base = Baseline(profile_of(body, *shapes((128, 512), dtype="bfloat16")).timeline)
    assert [a.buffer for a in rules_passes._could_be_narrow(base)] == ["sbuf"]


def test_the_places_of_four_tiles_that_could_be_narrow_are_named_and_the_rest_counted():
    def body(a):
        out, tile, result = hbm(a.shape, a.dtype), sbuf(a.shape, a.dtype), sbuf(a.shape, a.dtype)
        one, two, three, four, five, six = (sbuf(a.shape) for _ in range(6))
        nisa.dma_copy(tile, a)
        nisa.tensor_scalar(one, tile, nl.add, 1.0)
        nisa.tensor_scalar(two, one, nl.add, 2.0)
        nisa.tensor_scalar(three, two, nl.add, 3.0)
        nisa.tensor_scalar(four, three, nl.add, 4.0)
        nisa.tensor_scalar(five, four, nl.add, 5.0)
        nisa.tensor_scalar(six, five, nl.add, 6.0)
        nisa.tensor_copy(result, six)
        nisa.dma_copy(out, result)
        return out

    (c,), base = ask(rules_passes.wide_tiles, body, *shapes((128, 512), dtype="bfloat16"))
    places = [base.lines.short(base.t.instructions[k]) for k in range(1, 5)]
    assert f"({', '.join(f'{where} [128, 512]' for where in places)} and 2 more)" in c.message


@pytest.mark.parametrize("last", [nl.bfloat16, nl.float32])
def test_one_result_of_16_bits_is_enough(last):
    """Whichever is stored last."""

    def body(a):
        halves(" ")(a)
        kept = sbuf(a.shape, last)
        nisa.memset(kept, 0.0)
        nisa.dma_copy(hbm(a.shape, last), kept)

    assert ask(rules_passes.wide_tiles, body, *shapes((128, 512), dtype="bfloat16"))[0]


def test_four_moves_are_tried():
    """Three lines, of each all passes or every second one."""

    def body():
        for _ in range(4):
            nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)), engine=nisa.engine.vector)
        for _ in range(2):
            nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)), engine=nisa.engine.vector)
        for _ in range(2):
            nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)), engine=nisa.engine.vector)

    found, _ = ask(rules_passes.idle_engine, body)
    assert [len(c.indices) for c in found] == [4, 2, 2, 2]


def test_work_of_the_second_core_moves_on_the_second_core():
    """Core 0 has as much on ScalarE as on VectorE, core 1 hardly anything on ScalarE."""

    def body():
        for _ in range(8):
            nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)), engine=nisa.engine.vector)
        for _ in range(8 if nl.program_id(0) == 0 else 1):
            nisa.activation(sbuf((128, 512)), nl.copy, sbuf((128, 512)))

    found, base = ask(rules_passes.idle_engine, body, lnc=2)
    assert [len(c.indices) for c in found] == [4, 8]
    assert {base.t.lane_core[base.t.lane[k]] for c in found for k in c.indices} == {1}
