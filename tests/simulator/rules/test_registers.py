"""Run-time scalars: width and wrap-around, which operators, what may use them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl
from nsa_neuron.simulator.rules.registers import NkiScalar, VirtualRegister

SMALL = np.array([[5]], np.int32)
TABLE = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)


def computed(number, how):
    """`how(scalar)` of a scalar loaded from `number`, through the device's memory and back."""

    def kernel(x):
        tile = nl.ndarray((1, 1), x.dtype)
        nisa.dma_copy(tile, x)
        result = nl.ndarray((1, 1), x.dtype)
        nisa.scalar_store(result, how(nisa.scalar_load(tile)))
        out = nl.ndarray((1, 1), x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(out, result)
        return out

    return simulator.simulate(kernel)(number)[0, 0]


def refused(kernel, *args, **options):
    with pytest.raises(SimulationError) as caught:
        simulator.simulate(kernel, **options)(*args)
    return caught.value


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    "how", [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: b - a, lambda a, b: a * b]
)
def test_arithmetic_wraps_at_its_width(dtype, how):
    """As NumPy's integers do; the page's own numbers are among them."""
    info = np.iinfo(dtype)
    for a in (100_000, info.max, info.min, -3):
        for b in (100_000, 1, -1):
            with np.errstate(over="ignore"):
                want = how(dtype(a), dtype(b))
            assert computed(np.array([[a]], dtype), lambda s, b=b: how(s, b)) == want
    assert computed(np.array([[100_000]], np.int32), lambda s: s * s) == 1_410_065_408


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_an_expression_of_scalars_is_that_of_int32(a, b):
    left, right = NkiScalar(a), NkiScalar(b)
    with np.errstate(over="ignore"):
        x, y = np.int32(a), np.int32(b)
        assert (left * 4 + right - 7).value == int(x * np.int32(4) + y - np.int32(7))
        assert (-left).value == int(-x) and (3 - left).value == int(np.int32(3) - x)


@pytest.mark.parametrize(
    ("body", "rule", "text"),
    [
        (lambda s: s // 2, "scalar", "leave open"),
        (lambda s: s % 2, "scalar", "leave open"),
        (lambda s: s << 1, "scalar", "leave open"),
        (lambda s: s & 1, "scalar", "leave open"),
        (lambda s: s + 1.0, "scalar", "takes a Python int or another NkiScalar"),
        (lambda s: s + True, "scalar", "takes a Python int"),
        (lambda s: s + 2**31, "scalar", "does not fit int32"),
        (lambda s: int(s), "register-value", "no int"),
        (lambda s: range(s), "register-value", "fori_loop"),
        (lambda s: list(s), "register-value", "no value while the kernel is built"),
        (lambda s: 1 if s else 0, "register-value", "no int"),
        (lambda s: 1 if s < 5 else 0, "scalar", "cannot be used"),
        (lambda s: 1 if s == 5 else 0, "scalar", "cannot be used"),
        (lambda s: nl.while_loop(s, lambda r: r), "loop", "leave open"),
        (lambda s: nisa.scalar_store(nl.ndarray((1, 1), nl.int32), 5), "scalar", "nisa.memset"),
        (lambda s: nisa.scalar_store(nl.ndarray((1, 1), nl.float32), s), "scalar", "dtype"),
        (lambda s: nisa.scalar_load(nl.zeros((1, 1), nl.uint32)), "scalar", "signed"),
        (lambda s: nisa.scalar_load(nl.zeros((1, 2), nl.int32)), "scalar", "one element"),
        (
            lambda s: nisa.tensor_scalar(t := nl.zeros((8, 8), nl.float32), t, nl.add, s),
            "scalar",
            "leave open",
        ),
    ],
)
def test_what_a_scalar_cannot_do(body, rule, text):
    error = refused(lambda x: body(nisa.scalar_load(x)) and x, SMALL)
    assert error.rule == rule and text in str(error), error
    assert isinstance(error, TypeError) == (rule == "register-value")


def test_a_comparison_is_traced_and_cannot_be_used_and_64_bits_have_none():
    """The page of NkiScalar: 32-bit comparisons trace."""

    def kernel(x):
        made = [nisa.scalar_load(x) < 3, nisa.scalar_load(x) != nisa.scalar_load(x)]
        nisa.dma_copy(x, x)
        assert len(made) == 2

    simulator.simulate(kernel)(SMALL.copy())
    wide = refused(lambda x: nisa.scalar_load(x) < 3, SMALL.astype(np.int64))
    assert wide.rule == "scalar" and "no comparison" in str(wide)
    mixed = refused(
        lambda x, y: nisa.scalar_load(x) + nisa.scalar_load(y), SMALL, SMALL.astype(np.int64)
    )
    assert "dtypes must match" in str(mixed)


def test_a_loop_counts_with_scalars_and_a_register_where_a_bound_is_one():
    kinds = []

    def kernel(x, n):
        out = nl.zeros(x.shape, x.dtype, buffer=nl.shared_hbm)
        bound = nisa.scalar_load(n)
        register = nisa.register_alloc(2)

        def body(i):
            kinds.append(type(i))
            if isinstance(i, NkiScalar):
                nisa.dma_copy(out.select(0, i * 2 + 1), x.select(0, i * 2 + 1))

        nl.fori_loop(0, bound - 1, body)
        nl.fori_loop(0, 2, body)
        nl.fori_loop(0, register, body)
        return out

    got = simulator.simulate(kernel)(TABLE, SMALL)
    assert kinds == [NkiScalar] * 6 + [VirtualRegister] * 2
    np.testing.assert_array_equal(got[1:8:2], TABLE[1:8:2])
    assert not got[::2].any()
    kinds.clear()

    def old(x):
        nl.fori_loop(0, 2, lambda i: kinds.append(type(i)))
        nisa.dma_copy(x, x)

    simulator.simulate(old, nki="0.6")(TABLE.copy())
    assert kinds == [VirtualRegister] * 2


def test_64_bits_address_hbm_and_bound_no_loop():
    def gather(x, n):
        out = nl.ndarray((1, 8), x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(out, x.ap([[8, 1], [1, 8]], scalar_offset=nisa.scalar_load(n) + 2))
        return out

    wide = SMALL.astype(np.int64)
    np.testing.assert_array_equal(simulator.simulate(gather)(TABLE, wide), TABLE[7:8])

    def on_chip(x, n):
        return nl.load(x).ap([[8, 16], [1, 1]], scalar_offset=nisa.scalar_load(n), indirect_dim=1)

    error = refused(on_chip, TABLE, wide)
    assert error.rule == "scalar" and "has 32 bits" in str(error)
    error = refused(lambda x, n: nl.fori_loop(0, nisa.scalar_load(n), print), TABLE, wide)
    assert error.rule == "loop" and "32 bits" in str(error)


def test_what_uses_a_scalar_waits_for_all_that_it_was_computed_from():
    def kernel(x, n):
        total = nisa.scalar_load(n) + nisa.scalar_load(n)
        out = nl.ndarray((1, 8), x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(out, x.select(0, total).expand_dim(0))
        return out

    for data in (True, False):
        run = simulator.simulate(kernel, data=data, unknown=lambda r: 0)
        run(TABLE, SMALL)
        *loads, copy = run.run.instructions
        assert [i.opcode for i in loads] == ["scalar_load"] * 2
        assert copy.after == tuple(loads)


def test_a_register_is_a_truth_in_0_6_only():
    def kernel(x):
        register = nisa.register_alloc(0)
        while register:
            pass
        nisa.dma_copy(x, x)

    with pytest.warns(simulator.SimulationWarning, match=r"deprecated in NKI 0\.6.*nl\.while_loop"):
        simulator.simulate(kernel, nki="0.6")(TABLE.copy())
    assert refused(kernel, TABLE).rule == "register-value"
