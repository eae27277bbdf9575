"""Calling kernels: argument kinds, results, in-place inputs, activation, usage errors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import ShapeDtype, SimulationError, nki
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

RNG = np.random.default_rng(0)


@nki.jit
def add(a, b):
    out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    nl.store(out, nl.add(nl.load(a), nl.load(b)))
    return out


@nki.jit
def increment(a):
    tile = nl.load(a)
    nisa.tensor_scalar(tile, tile, nl.add, 1.0)
    nl.store(a, tile)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_numpy_in_numpy_out(dtype):
    a, b = (RNG.standard_normal((128, 64)).astype(dtype) for _ in range(2))
    for result in (nki.simulate(add)(a, b), add(a, b), simulator.simulate(add.fn)(a, b=b)):
        assert result.dtype == dtype
        want = (a.astype(np.float32) + b.astype(np.float32)).astype(dtype)
        np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_torch_in_torch_out(name):
    torch = pytest.importorskip("torch")
    a = torch.randn(128, 32, dtype=getattr(torch, name))
    result = add(a, a)
    assert result.dtype == a.dtype
    torch.testing.assert_close(result, a + a)
    before = a.clone()
    increment(a)
    torch.testing.assert_close(a, (before.float() + 1).to(a.dtype))


def test_inputs_are_updated_in_place_whatever_their_strides():
    base = np.zeros((128, 64), np.float32)
    dense, strided = base.copy(), base.T.copy().T
    increment(dense)
    increment(strided)
    assert (dense == 1).all() and (strided == 1).all()
    frozen = base.copy()
    frozen.flags.writeable = False
    increment(frozen)
    assert (frozen == 0).all()


def test_the_same_array_twice_is_one_tensor():
    a = np.ones((4, 4), np.float32)

    @nki.jit
    def kernel(x, y):
        nl.store(x, nl.add(nl.load(x), nl.load(y)))
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.load(y))
        return out

    assert (kernel(a, a) == 2).all()


def test_import_takes_no_torch():
    code = (
        "import sys, nsa_neuron.simulator, nsa_neuron.simulator.nki; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_activation_restores_everything(monkeypatch):
    sentinel = type(sys)("nki")
    monkeypatch.setitem(sys.modules, "nki", sentinel)
    before, finders = dict(sys.modules), list(sys.meta_path)
    with simulator.activate(target="trn2", relax=("bounds",)):
        import nki as active
        import nki.isa.constants as constants

        assert active is nki and constants.engine is nisa.engine
        with pytest.raises(ImportError, match=r"0\.1"):
            __import__("neuronxcc.nki")
    assert sys.modules["nki"] is sentinel
    assert not [m for m in sys.modules if m.startswith("nki.") and m not in before]
    assert sys.meta_path == finders


def test_unknown_targets_and_rules_are_refused():
    with pytest.raises(ValueError, match="trn3"):
        simulator.activate(target="trn3")
    with pytest.raises(ValueError, match="no rule is named"):
        simulator.simulate(add, relax=("nonsense",))


@dataclass
class Config(nl.NKIObject):
    scale: float
    table: object = None


def test_argument_kinds():
    seen = []

    @nki.jit
    def kernel(x, flag, number, text, kind, pair, named, config, function, nothing=None):
        seen.append(
            (flag, number, text, kind, pair, named["k"], config.scale, function(2), nothing)
        )
        assert isinstance(config.table, nl.NkiTensor) and isinstance(pair[1], nl.NkiTensor)
        nl.store(x, nl.load(config.table))

    x, t = np.zeros((4, 4), np.float32), np.ones((4, 4), np.float32)
    config = Config(0.5, t)
    kernel(x, True, 3, "s", nl.bfloat16, (1, t), {"k": 2.5}, config, lambda v: v + 1)
    assert seen[0][:4] == (True, 3, "s", nl.bfloat16)
    assert seen[0][5:] == (2.5, 0.5, 3, None)
    assert (x == 1).all() and config.table is t


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([1], "tuple"),
        ({1: 2}, "str"),
        (2**40, "32-bit"),
        (object(), "not a kernel argument"),
        (np.zeros(3), "64-bit"),
        (np.zeros((0, 3), np.float32), "no elements"),
    ],
)
def test_refused_arguments(value, match):
    @nki.jit
    def kernel(x):
        return x

    with pytest.raises(SimulationError, match=match) as caught:
        kernel(value)
    assert caught.value.rule == "argument-kind" and caught.value.operand == "x"


def _nothing(a):
    nl.load(a)


def _chip(a):
    return nl.load(a)


def _half(a):
    out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(out[0:2], a[0:2])
    return out


def _number(a):
    return 3


@pytest.mark.parametrize(
    ("fn", "rule"),
    [
        (_nothing, "output-kind"),
        (_chip, "output-buffer"),
        (_half, "output-unwritten"),
        (_number, "output-kind"),
    ],
)
def test_refused_results(fn, rule):
    with pytest.raises(SimulationError) as caught:
        simulator.simulate(fn)(np.ones((4, 4), np.float32))
    assert caught.value.rule == rule


def _mask(t, a):
    nisa.tensor_copy(t, t, mask=None)


def _returns(t, a):
    nisa.tensor_copy(src=t)


def _unknown(t, a):
    nisa.tensor_copy(t, t, speed=3)


def _ufunc(t, a):
    nisa.tensor_tensor(t, t, t, np.add)


def _array(t, a):
    nisa.tensor_copy(t, np.ones(3))


def _assign(t, a):
    t[...] = 1


def _string_buffer(t, a):
    nl.ndarray((4, 4), nl.float32, buffer="sbuf")


def _integer_enum(t, a):
    nisa.dma_copy(t, a, dge_mode=2)


@pytest.mark.parametrize(
    ("body", "rule", "match"),
    [
        (_mask, "legacy-api", "slice the operands"),
        (_returns, "legacy-api", "dst="),
        (_unknown, "usage", "speed"),
        (_ufunc, "operator", "nl.<operator>"),
        (_array, "usage", "ndarray"),
        (_assign, "legacy-api", "dst="),
        (_string_buffer, "usage", "nl.sbuf"),
        (_integer_enum, "enum", "hwdge"),
    ],
)
def test_usage_errors_name_the_kernel_line(body, rule, match):
    def kernel(a):
        body(nl.load(a), a)

    with pytest.raises(SimulationError, match=match) as caught:
        simulator.simulate(kernel)(np.ones((4, 4), np.float32))
    error = caught.value
    assert error.rule == rule and error.source
    assert error.location.filename == __file__ and error.location.function == body.__name__


def test_exceptions_of_the_kernel_pass_through():
    @nki.jit
    def kernel(a):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        kernel(np.ones((4, 4), np.float32))
    with pytest.raises(SimulationError, match="outside a kernel"):
        nl.ndarray((4, 4), nl.float32)


def test_nested_kernels_are_inlined():
    @nki.jit(mode="trace")
    def inner(tile):
        nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)

    @nki.jit
    def outer(a):
        tile = nl.load(a)
        inner(tile)
        nl.store(a, tile)

    a = np.ones((4, 4), np.float32)
    outer(a)
    assert (a == 2).all()


def test_high_precision_rounds_nothing():
    a = np.full((4, 4), 1.0, ml_dtypes.bfloat16)

    def kernel(a):
        tile = nl.load(a)
        nisa.tensor_scalar(tile, tile, nl.add, 1e-4)
        out = nl.ndarray(a.shape, nl.bfloat16, buffer=nl.shared_hbm)
        nl.store(out, tile)
        return out

    assert (simulator.simulate(kernel)(a).astype(np.float32) == 1).all()
    precise = simulator.simulate(kernel, precise=False)(a)
    np.testing.assert_allclose(precise, 1.0001, rtol=1e-6)


def test_shape_only_records_the_same_instructions():
    a = RNG.standard_normal((128, 64)).astype(np.float32)
    full, shapes = simulator.simulate(add), simulator.simulate(add, data=False)
    full(a, a)
    result = shapes(ShapeDtype((128, 64), "float32"), a)
    assert result == ShapeDtype((128, 64), nl.float32)

    def facts(run):
        return [
            (
                i.opcode,
                i.engine,
                [(w.p0, w.p1, w.lo, w.hi) for w in (*i.writes, *i.reads)],
                i.location,
            )
            for i in run.instructions
        ]

    assert facts(full.run) == facts(shapes.run)
    assert full.run.dma_bytes == shapes.run.dma_bytes == 3 * 128 * 64 * 4


def test_capacity_names_the_largest_live_tensors():
    def kernel(a):
        tiles = [nl.zeros((128, 8192), nl.float32) for _ in range(7)]
        out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
        for t in tiles:
            nisa.dma_copy(out, t[:, 0:4])
        return out

    with pytest.raises(simulator.CapacityError, match="7 tensors in SBUF are live") as caught:
        simulator.simulate(kernel)(np.ones((128, 4), np.float32))
    assert caught.value.rule == "sbuf-capacity" and caught.value.table[0].startswith(
        "7 x 32,768 bytes per partition"
    )

    def frees(a):
        out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
        for _ in range(7):
            nisa.dma_copy(out, nl.zeros((128, 8192), nl.float32)[:, 0:4])
        return out

    run = simulator.simulate(frees)
    run(np.ones((128, 4), np.float32))
    assert run.run.peaks[0]["sbuf"] == 8192 * 4


@pytest.mark.parametrize("shape", [(1,), (7, 3), (5000,), (300, 2049)])
def test_filled_hbm_tensors(shape):
    def kernel():
        return nl.full(shape, 3, nl.bfloat16, buffer=nl.shared_hbm)

    result = simulator.simulate(kernel)()
    assert result.shape == shape and (result.astype(np.float32) == 3).all()
