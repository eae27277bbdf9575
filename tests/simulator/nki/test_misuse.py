"""What people write by mistake: each is refused with the kernel's own line and what to write."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator import nki as facade
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl
from nsa_neuron.simulator.nki.isa import constants
from nsa_neuron.simulator.rules import legacy

X = np.ones((128, 64), np.float32)


def tile(x):
    """An SBUF copy of the argument."""
    out = nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(out, x)
    return out


# what is wrong: rule, a regular expression in the message, one line of a kernel of argument x
TABLE = {
    # calls of NKI 0.1
    "mask=": ("legacy-api", "masks went with", lambda x: nisa.tensor_copy(tile(x), x, mask=1)),
    "nl.arange": ("legacy-api", r"t\[0:128, 0:512\]", lambda x: nl.arange(128)),
    "nl.mgrid": ("legacy-api", r"t\[0:128, 0:512\]", lambda x: nl.mgrid[0:128]),
    "nl.par_dim": (
        "legacy-api",
        "list of tensors",
        lambda x: nl.ndarray((2, nl.par_dim(128), 4), nl.float32),
    ),
    "nl.spmd_dim": ("legacy-api", r"kernel\[2\]", lambda x: nl.spmd_dim(nl.nc(2), 4)),
    "nl.atomic_rmw": ("legacy-api", "dma_compute", lambda x: nl.atomic_rmw(x, x, nl.add)),
    "nki.simulate_kernel": ("legacy-api", "nki.simulate", lambda x: facade.simulate_kernel(x)),
    "dynamic copy": (
        "legacy-api",
        "scalar_offset",
        lambda x: nisa.tensor_copy_dynamic_src(tile(x), tile(x)),
    ),
    "tile returned": (
        "usage",
        "got Instruction",
        lambda x: nisa.tensor_copy(tile(x), nisa.reciprocal(tile(x), tile(x))),
    ),
    "no dst": (
        "legacy-api",
        r"dst= since NKI 0.2(.|\n)*write instead: nisa.tensor_tensor\(dst, data1, data2, op",
        lambda x: nisa.tensor_tensor(data1=tile(x), data2=tile(x), op=nl.add),
    ),
    "dtype= of an instruction": (
        "legacy-api",
        "dst tensor decides",
        lambda x: nisa.tensor_copy(tile(x), tile(x), dtype=nl.float32),
    ),
    "psumAccumulateFlag": (
        "legacy-api",
        "accumulate=True/False",
        lambda x: nisa.nc_matmul(tile(x), tile(x), tile(x), psumAccumulateFlag=3),
    ),
    "dst_rmw_op": ("legacy-api", "dma_compute", lambda x: nisa.dma_copy(x, x, dst_rmw_op=nl.add)),
    "assignment": ("legacy-api", "dst=", lambda x: tile(x).__setitem__(slice(None), 1.0)),
    "arithmetic": ("legacy-api", r"nl.add\(a, b\)", lambda x: tile(x) + tile(x)),
    "arithmetic with a number": ("legacy-api", "nl.multiply", lambda x: 2.0 * tile(x)),
    "comparison": ("legacy-api", "nl.less", lambda x: tile(x) < 1.0),
    "result of an instruction used": (
        "legacy-api",
        "returns no tile",
        lambda x: nisa.reciprocal(tile(x), tile(x))[0:64],
    ),
    # calls of NKI 0.2
    "buffer string": ("usage", "nl.sbuf", lambda x: nl.ndarray((8, 8), nl.float32, buffer="sbuf")),
    "enum integer": ("enum", "nisa.dge_mode.hwdge", lambda x: nisa.dma_copy(x, x, dge_mode=2)),
    "engine integer": (
        "enum",
        "nisa.engine.vector",
        lambda x: nisa.tensor_copy(tile(x), tile(x), engine=3),
    ),
    "float memset of int": (
        "value",
        "integer",
        lambda x: nisa.memset(nl.ndarray((8, 8), nl.int32), 2.0),
    ),
    "platform_target=": (
        "usage",
        "NEURON_PLATFORM_TARGET_OVERRIDE",
        lambda x: facade.jit(platform_target="trn2"),
    ),
    # calls that fit no signature
    "unknown keyword": (
        "usage",
        r"'foo'(.|\n)*nisa.tensor_copy\(dst, src, engine",
        lambda x: nisa.tensor_copy(tile(x), tile(x), foo=1),
    ),
    "missing src": ("usage", "'src'", lambda x: nisa.tensor_copy(tile(x))),
    "missing op": ("usage", r"activation\(dst, op, data", lambda x: nisa.activation(tile(x), x)),
    "too many": ("usage", "positional", lambda x: nisa.reciprocal(tile(x), tile(x), 0, 0, 0, 0)),
    "unknown keyword of nl": (
        "usage",
        r"nl.ndarray\(shape, dtype",
        lambda x: nl.ndarray(shape=(8, 8), type=nl.float32),
    ),
    "no dtype": ("usage", r"'dtype'(.|\n)*nl.ndarray\(", lambda x: nl.ndarray((8, 8))),
    "missing dims of a view": ("usage", r"permute\(", lambda x: tile(x).permute()),
    "unknown name": (
        "usage",
        r"has no 'tensor_copyy'(.|\n)*tensor_copy",
        lambda x: nisa.tensor_copyy,
    ),
    "unknown name of nl": ("usage", "nki.language.float32", lambda x: nl.flaot32),
    "unknown tensor method": ("usage", r"nc_transpose", lambda x: tile(x).T),
    "misspelt tensor method": ("usage", r"instead: .reshape", lambda x: tile(x).reshap((8, 8))),
    # operands of the wrong kind
    "array operand": ("usage", "got ndarray", lambda x: nisa.tensor_copy(tile(x), X)),
    "tuple as dst": ("usage", "got tuple", lambda x: nisa.memset((128, 4), 0.0)),
    "None as src": ("usage", "got nothing", lambda x: nisa.tensor_copy(tile(x), None)),
    "NumPy operator": (
        "operator",
        "NumPy or Python function",
        lambda x: nisa.tensor_tensor(tile(x), tile(x), tile(x), np.add),
    ),
    "operator string": (
        "operator",
        r"nl.<operator>",
        lambda x: nisa.tensor_tensor(tile(x), tile(x), tile(x), "add"),
    ),
    "constant string": ("usage", "number", lambda x: nisa.memset(tile(x), "0")),
    "constant None": ("usage", "number", lambda x: nisa.memset(tile(x), None)),
    "operand string": (
        "usage",
        "number",
        lambda x: nisa.tensor_scalar(tile(x), tile(x), nl.add, "1"),
    ),
    "operand list": (
        "usage",
        "number",
        lambda x: nisa.tensor_scalar(tile(x), tile(x), nl.add, [1.0]),
    ),
    "operand None": ("usage", "", lambda x: nisa.tensor_scalar(tile(x), tile(x), nl.add, None)),
    "accumulate string": (
        "usage",
        "accumulate",
        lambda x: nisa.nc_matmul(
            nl.ndarray((64, 64), nl.float32, buffer=nl.psum), tile(x), tile(x), accumulate="yes"
        ),
    ),
    "name integer": ("usage", "name", lambda x: nisa.tensor_copy(tile(x), tile(x), name=4)),
    "axis string": (
        "usage",
        "axis",
        lambda x: nisa.tensor_reduce(tile(x)[:, 0:1], nl.add, tile(x), "1"),
    ),
    "pattern integer": ("usage", r"iota\(dst, pattern", lambda x: nisa.iota(tile(x), 5)),
    "nl.store of a number": ("usage", "nl.load it first", lambda x: nl.store(x, 1)),
    "nl.load of a tile": ("usage", "in HBM", lambda x: nl.load(tile(x))),
    # dtypes and shapes
    "64-bit dtype": ("dtype", "no such 64-bit", lambda x: nl.ndarray((8, 8), np.uint64)),
    "number as dtype": ("dtype", "3.5 is not an NKI dtype", lambda x: nl.ndarray((8, 8), 3.5)),
    "misspelt dtype": ("dtype", "nl.bfloat16", lambda x: nl.ndarray((8, 8), "flaot32")),
    "view of no dtype": ("dtype", "not an NKI dtype", lambda x: tile(x).view("int128")),
    "float dim": ("shape", "positive integers", lambda x: nl.ndarray((8, 8.0), nl.float32)),
    "no shape": ("usage", "", lambda x: nl.ndarray(None, nl.float32)),
    "address integer": ("usage", "", lambda x: nl.ndarray((8, 8), nl.float32, address=5)),
    # Python where values are not known
    "truth of a comparison": ("tensor-truth", "8192 of 8192", lambda x: bool(nl.less(tile(x), 1))),
    "equality of a tensor": ("legacy-api", r"nl\.equal\(a, b\)", lambda x: tile(x) == 1),
    "inequality of a tensor": ("legacy-api", "nl.not_equal", lambda x: 1.0 != tile(x)),
    "equality of tensors": ("legacy-api", "`a is b`", lambda x: tile(x) == tile(x)),
    "equality of a register": ("register", "comparison", lambda x: nisa.register_alloc(1) == 1),
    "float of a tensor": ("legacy-api", "float", lambda x: float(tile(x))),
    "NumPy of a tensor": ("view", "", lambda x: np.exp(tile(x))),
    "loop over a tensor": ("view", "iterated", lambda x: list(tile(x))),
    "arithmetic of a register": (
        "register",
        "scalar_offset=reg",
        lambda x: nisa.register_alloc(0) + 1,
    ),
    "range of a register": (
        "register-value",
        "nl.fori_loop",
        lambda x: range(nisa.register_alloc(3)),
    ),
    "index register": ("index", "select", lambda x: tile(x)[nisa.register_alloc(0)]),
    "index float": ("index", "an index is an int", lambda x: tile(x)[:, 0.5]),
    "index array": ("index", "an index is an int", lambda x: tile(x)[:, np.arange(3)]),
    "loop bound string": ("usage", "", lambda x: nl.affine_range("3")),
}


@pytest.mark.parametrize("what", TABLE)
def test_kernel_is_refused_at_its_own_line(what):
    rule, pattern, body = TABLE[what]

    def kernel(x):
        body(x)

    with pytest.raises(SimulationError) as caught:
        simulator.simulate(kernel)(X)
    error = caught.value
    text = str(error)
    assert error.rule == rule, text
    assert re.search(pattern, text), text
    assert error.location.filename == __file__, text
    first = body.__code__.co_firstlineno
    assert first <= error.location.lineno <= first + 4, text


def call(kernel, *args, **options):
    with pytest.raises(SimulationError) as caught:
        simulator.simulate(kernel, **options)(*args)
    return caught.value


def returns(value):
    def kernel(x):
        return value(x) if callable(value) else value

    return kernel


def empty(x, scale=1.0):
    pass


@pytest.mark.parametrize(
    ("args", "rule", "pattern"),
    [
        ((), "usage", r"missing a required argument: 'x'; signature is empty\(x, scale=1.0\)"),
        ((X, 1.0, 2.0), "usage", "too many positional arguments"),
        (([1, 2],), "argument-kind", r"lists are not kernel arguments(.|\n)*pass a tuple"),
        ((X, 2**40), "argument-kind", "integers are 32-bit"),
        ((X, {1: 2}), "argument-kind", "keys are strings"),
        ((X, object()), "argument-kind", "a object is not a kernel argument"),
        ((X, {1, 2}), "argument-kind", "a set is not a kernel argument"),
        ((X.astype(np.float64),), "argument-kind", "no such 64-bit type: convert to nl.float32"),
        ((np.array(["a"]),), "argument-kind", "not an NKI dtype"),
        ((np.ones((0, 4), np.float32),), "argument-kind", "no elements"),
        ((simulator.ShapeDtype((4, 4), "float32"),), "argument-kind", "needs an array"),
    ],
)
def test_arguments(args, rule, pattern):
    error = call(empty, *args)
    assert error.rule == rule and re.search(pattern, str(error)), error
    assert error.location.lineno == empty.__code__.co_firstlineno


@pytest.mark.parametrize(
    ("value", "rule", "pattern"),
    [
        (None, "output-kind", "returns nothing"),
        (3, "output-kind", "is a int"),
        (tile, "output-buffer", "dma_copy it to an nl.shared_hbm tensor"),
        (lambda x: (x, 1.5), "output-kind", "result 1: is a float"),
        (
            lambda x: nl.ndarray((4, 4), nl.float32, buffer=nl.shared_hbm),
            "output-unwritten",
            "16 of",
        ),
    ],
)
def test_results(value, rule, pattern):
    error = call(returns(value), X)
    assert error.rule == rule and re.search(pattern, str(error)), error
    assert error.location.filename == __file__


@pytest.mark.parametrize("thing", [3, "kernel", None, X])
def test_what_is_no_kernel(thing):
    with pytest.raises(simulator.UsageError, match=r"a function or @nki\.jit kernel"):
        simulator.simulate(thing)


def test_a_plain_function_runs_and_a_plain_call_does_not():
    def kernel(x):
        nisa.dma_copy(x, tile(x))

    simulator.simulate(kernel)(X.copy())
    with pytest.raises(simulator.UsageError, match="called outside a kernel") as caught:
        kernel(X.copy())
    assert "decorate the function with @nki.jit" in str(caught.value)


@pytest.mark.parametrize("lnc", [0, 3, "2", True, (1, 2), 2.0])
def test_launch_brackets(lnc):
    with pytest.raises(simulator.UsageError, match="number of cores") as caught:
        facade.jit(empty)[lnc]
    assert caught.value.rule == "lnc"


@pytest.mark.parametrize("error", [KeyError("mine"), ZeroDivisionError("mine"), TypeError("mine")])
def test_exceptions_of_the_kernels_own_pass_unchanged(error):
    def kernel(x):
        raise error

    with pytest.raises(type(error)) as caught:
        simulator.simulate(kernel)(X)
    assert caught.value is error


def test_type_errors_of_the_kernels_own_functions_pass_unchanged():
    def helper(a):
        return a

    with pytest.raises(TypeError, match=r"helper\(\) missing 1") as caught:
        simulator.simulate(lambda x: helper())(X)
    assert not isinstance(caught.value, SimulationError)


def test_python_sees_missing_names_as_before():
    """`hasattr` and `getattr` with a default go on working in kernels."""

    def kernel(x):
        assert not hasattr(nl, "arange") and not hasattr(tile(x), "T")
        assert getattr(nisa, "absent", 7) == 7
        nisa.dma_copy(x, tile(x))

    simulator.simulate(kernel)(X.copy())


def test_imports_of_the_0_1_era():
    with simulator.activate(), pytest.raises(ImportError, match=r"import nki\.language as nl"):
        import neuronxcc.nki  # noqa: F401


def test_no_legacy_name_exists():
    for name in legacy.NAMES:
        for module in (facade, nl, nisa, constants):
            assert not hasattr(module, name), f"{module.__name__}.{name} exists"
    assert "neuronxcc" not in sys.modules


@pytest.mark.parametrize(
    ("module", "name", "rule", "pattern"),
    [
        (facade, "simulate_kernel", "legacy-api", r"write instead: nki\.simulate\(kernel\)"),
        (facade, "baremetal", "legacy-api", "@nki.jit with NumPy arguments"),
        (facade, "benchmark", "legacy-api", "nsa profile"),
        (nl, "par_dim", "legacy-api", r"nki\.language\.par_dim no longer(.|\n)*list of tensors"),
        (nl, "dynamic_range", "version", r"removed in NKI 0\.7(.|\n)*nl\.fori_loop\("),
        (nisa, "tensor_coppy", "usage", r"write instead: nki\.isa\.tensor_copy"),
    ],
)
def test_names_are_missed_outside_a_kernel_too(module, name, rule, pattern):
    with pytest.raises(AttributeError, match=pattern) as caught:
        getattr(module, name)
    assert isinstance(caught.value, SimulationError) and caught.value.rule == rule
    assert caught.value.location.filename == __file__


def test_three_names_are_proposed_at_most():
    misspelt = "tensor_scala"
    with pytest.raises(AttributeError) as caught:
        getattr(nisa, misspelt)
    assert isinstance(caught.value, SimulationError)
    proposed = caught.value.hint.split(", ")
    assert len(proposed) == 3 and proposed[0] == "nki.isa.tensor_scalar"
    assert all(hasattr(nisa, name.removeprefix("nki.isa.")) for name in proposed)


@pytest.mark.parametrize("name", ["static_range", "affine_range", "sequential_range"])
def test_each_range_is_refused_under_its_own_name(name):
    def kernel(x):
        getattr(nl, name)(2, precise_schedule=True)

    error = call(kernel, X)
    assert error.instruction == f"nl.{name}"
    assert error.hint == f"nl.{name}(start, stop=None, step=1)"
    assert list(getattr(nl, name)(1, 7, 2)) == [1, 3, 5]


def test_indexing_by_a_range_says_the_slice():
    error = call(lambda a: a[nl.affine_range(128), 0:64], X)
    assert error.rule == "index" and error.operand == "a[...]" and error.instruction is None
    assert error.hint == "a[0:128, 0:64]"
    both = call(lambda a: a[nl.affine_range(1, 9, 2), nl.affine_range(64)], X)
    assert both.hint == "a[1:9:2, 0:64]"
    assert call(lambda a: a[:64, nl.affine_range(64)], X).hint == "a[:64, 0:64]"


def test_a_hint_shows_defaults_as_a_kernel_writes_them():
    error = call(lambda x: nisa.tensor_copy(dst=tile(x)), X)
    assert error.hint == "nisa.tensor_copy(dst, src, engine=nisa.engine.unknown, name=None)"


def test_a_limit_that_is_not_known_is_not_shown():
    text = str(call(lambda x: tile(x).reshape_dim(0, (64, 2)), X))
    assert "  got (64, 2)\n" in text and "allowed" not in text


@pytest.mark.parametrize(
    ("rows", "source", "hint"),
    [
        ((1, 64), lambda x: x, "x.broadcast(0, 128)"),
        ((128, 1), lambda x: x, "x.broadcast(1, 64)"),
        ((1, 1), lambda x: x, "x.broadcast(0, 128).broadcast(1, 64)"),
        ((128, 1), tile, "src.broadcast(1, 64)"),
        ((1, 64), tile, ""),
        ((2, 64), lambda x: x, ""),
    ],
)
def test_a_copy_of_too_little_says_how_to_broadcast(rows, source, hint):
    def kernel(x):
        nisa.dma_copy(nl.ndarray((128, 64), nl.float32), source(x))

    error = call(kernel, X[: rows[0], : rows[1]])
    assert error.rule == "element-count" and error.hint == hint


def test_the_broadcast_that_is_advised_works():
    def kernel(x):
        t = nl.ndarray((128, 64), nl.float32)
        nisa.dma_copy(t, x.broadcast(0, 128))
        out = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(out, t)
        return out

    row = np.arange(64, dtype=np.float32)[None]
    np.testing.assert_array_equal(simulator.simulate(kernel)(row), np.repeat(row, 128, 0))


def test_a_pattern_on_a_slice_counts_the_storage():
    def steps(step):
        def kernel(x):
            half = tile(x)[:, 0:32]
            out = nl.ndarray((128, 32), nl.float32, buffer=nl.shared_hbm)
            nisa.dma_copy(out, half.ap([[step, 128], [1, 32]], 0))
            return out

        return kernel

    error = call(steps(32), X)
    assert error.rule == "partition-step" and error.hint.startswith("[[64, 128], ...]")
    np.testing.assert_array_equal(simulator.simulate(steps(64))(X), X[:, 0:32])


def test_a_kernels_own_function_of_an_instructions_name_is_not_taken_for_it():
    def tensor_copy(a, b):
        """Not `nisa.tensor_copy`."""

    tensor_copy.__qualname__ = "tensor_copy"  # as at the top of a module

    def own(x):
        tensor_copy(x)

    def theirs(x):
        nisa.tensor_copy(x)

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'"):
        simulator.simulate(own)(X)
    with pytest.raises(SimulationError, match=r"missing 1(.|\n)*nisa\.tensor_copy\(dst, src, "):
        simulator.simulate(theirs)(X)


def test_a_name_is_a_string():
    def numbered(x):
        nisa.tensor_copy(tile(x), tile(x), name=3)

    with pytest.raises(SimulationError, match="name= is a string") as caught:
        simulator.simulate(numbered)(X)
    assert caught.value.location.function == "numbered"


@pytest.mark.parametrize("argument", ["op", "engine"])
def test_an_argument_without_a_hash_is_named(argument):
    @facade.jit
    def kernel(x):
        given = {"op": nl.add, argument: [1]}
        nisa.tensor_tensor(tile(x), tile(x), tile(x), **given)

    with pytest.raises(SimulationError, match=rf"tensor_tensor\.{argument}: .*list"):
        simulator.simulate(kernel)(X)


@pytest.mark.parametrize("instruction", ["copy", "activation"])
def test_a_relaxed_integer_for_an_enum_is_noted_each_time_and_later_refused(instruction):
    """Parameters are kept by the arguments that they were made of; those that break a rule not."""

    @facade.jit
    def kernel(x):
        t, out = tile(x), nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        for _ in range(2):
            if instruction == "copy":
                nisa.tensor_copy(t, t, engine=5)
            else:
                nisa.activation(t, nl.exp, t, reduce_cmd=1)
        nisa.dma_copy(out, t)
        return out

    for _ in range(2):
        relaxed = simulator.simulate(kernel, relax=["enum"])
        relaxed(X)
        assert [e.rule for e in relaxed.run.cores[0].relaxed] == ["enum", "enum"]
    with pytest.raises(SimulationError, match="must be a member of nisa"):
        simulator.simulate(kernel)(X)
