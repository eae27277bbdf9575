"""Vector Engine: arithmetic with one scalar per partition."""

from collections import namedtuple

from ...issue.spec import Spec
from ...issue.timing import GpSimd, Scalar, Vector, timing
from ...machine.dtypes import float32, store_bits
from ...memory.tensor import NkiTensor
from ...rules.session import running, violation
from ...semantics import alu, elementwise
from ..binding import (
    Interned,
    core_of,
    finish,
    instruction,
    load,
    load_scalar,
    op_name,
    result_array,
)
from .constants import engine as engines
from .shared import (
    arithmetic,
    engine_for,
    engine_of,
    gen3,
    integers,
    no_operand,
    on_vector,
    one_psum_input,
    operand,
    same_tiles,
    warn_simulated,
)

TensorScalarParams = namedtuple("TensorScalarParams", "op0 reverse0 op1 reverse1 engine")
ScalarTensorTensorParams = namedtuple("ScalarTensorTensorParams", "op0 reverse0 op1 reverse1")
_scalar_params = Interned(TensorScalarParams)
_two_params = Interned(ScalarTensorTensorParams)

# Operator pairs of the Scalar Engine on trn2 (isa docstring of tensor_scalar).
_SCALAR_ENGINE = (("multiply", "add"), ("multiply", None), ("add", None))
# Operators that run on GpSimd only (docs/trainium2.md 5.1).
_GPSIMD = {"rsqrt", "power"}


def _check_tensor_scalar(c):
    op0, _reverse0, op1, _reverse1, asked = c.params
    c.tensors("data")
    same_tiles(c, "dst", "data")
    kinds = set()
    for role, op in (("op0", op0), ("op1", op1)):
        if op is None:
            continue
        known = op in alu.BINARY or op in alu.UNARY or op in alu.BITVEC
        c.require(known, "operator", f"{op} is not a tensor_scalar operator", role, value=op)
        gen3(c, op, role)
        kinds.add(op in alu.BITVEC)
    c.require(
        len(kinds) == 1,
        "operator",
        "op0 and op1 are both bitvec or both arithmetic",
        "op1",
        value=(op0, op1),
    )
    optional = {"operand0": op0 in alu.UNARY or op0 == "invert", "operand1": op1 is None}
    optional["operand1"] |= op1 in alu.UNARY or op1 == "invert"
    if op0 in alu.BITVEC:
        integers(c, op0, "dst", "data", "operand0", "operand1")
        for role, may_lack in optional.items():
            operand(c, role, optional=may_lack)
            c.require(
                not isinstance(c[role].value, float),
                "dtype",
                f"{op0} takes an integer",
                role,
                value=c[role].value,
                limit="int",
            )
        return engine_for(c, asked, "vector", "vector"), "bits"
    for role, may_lack in optional.items():
        operand(c, role, float32, optional=may_lack)
    default = "gpsimd" if _GPSIMD & {op0, op1} else "vector"
    allowed = ["gpsimd"] if default == "gpsimd" else ["vector"]
    if (op0, op1) in _SCALAR_ENGINE:
        allowed.append("scalar")
    chosen = engine_for(c, asked, default, *allowed)
    if alu.SIMULATION_ONLY & {op0, op1}:
        return c.composed(chosen), "simulated"
    return chosen, "fp32"


def _run_tensor_scalar(core, how, writes, reads, params):
    (dst,), (data, a, b) = writes, reads
    op0, reverse0, op1, reverse1, _ = params
    if how == "bits":
        a, b = (o.array() if type(o) is NkiTensor else o for o in (a, b))
        values = elementwise.tensor_scalar_bitvec(data.array(), op0, a, reverse0, op1, b, reverse1)
        store_bits(dst.array(), values)
        return
    warn_simulated(core, how, op0, op1)
    out = result_array(core, dst, data.shape)
    values = elementwise.tensor_scalar(
        load(data), op0, load_scalar(a), reverse0, op1, load_scalar(b), reverse1, out
    )
    finish(core, dst, values, out)


TENSOR_SCALAR = Spec(
    "tensor_scalar",
    ("dst",),
    ("data", "operand0", "operand1"),
    _check_tensor_scalar,
    _run_tensor_scalar,
    timing(Vector.ONE_INPUT, Scalar.STREAM, GpSimd.ARITHMETIC),
)


@instruction
def tensor_scalar(
    dst,
    data,
    op0,
    operand0,
    reverse0=False,
    op1=None,
    operand1=None,
    reverse1=False,
    engine=engines.unknown,
    name=None,
):
    """dst = (data op0 operand0) op1 operand1 with constants or (P, 1) operands."""
    first = op_name(op0, "tensor_scalar", "op0")
    second = None if op1 is None else op_name(op1, "tensor_scalar", "op1")
    no_operand(first, operand0, "tensor_scalar", "operand0")
    if second is None or second in alu.UNARY:
        _unused(operand1, second)
    params = _scalar_params[
        first,
        bool(reverse0),
        second,
        bool(reverse1),
        engine_of(engine, "tensor_scalar"),
    ]
    core = running() or core_of("tensor_scalar")
    return core.issue(TENSOR_SCALAR, (dst,), (data, operand0, operand1), params, name)


def _unused(operand1, op):
    """Refuse an operand1 that no operator would read."""
    if op is None:
        if operand1 is not None:
            raise violation(
                "value",
                "must be None without op1",
                instruction="tensor_scalar",
                operand="operand1",
                value=operand1,
                limit=None,
            )
    else:
        no_operand(op, operand1, "tensor_scalar", "operand1")


def _check_scalar_tensor_tensor(c):
    op0, _, op1, _ = c.params
    c.tensors("data", "operand1")
    same_tiles(c, "dst", "data", "operand1")
    operand(c, "operand0", optional=op0 in alu.UNARY)
    one_psum_input(c, "data", "operand1")
    arithmetic(c, op0, "op0")
    arithmetic(c, op1, "op1", unary=False)
    return on_vector(c, op0, op1)


def _run_scalar_tensor_tensor(core, how, writes, reads, params):
    (dst,), (data, a, b) = writes, reads
    op0, reverse0, op1, reverse1 = params
    warn_simulated(core, how, op0, op1)
    out = result_array(core, dst, data.shape)
    first = load_scalar(a)
    values = elementwise.scalar_tensor_tensor(
        load(data), op0, 0.0 if first is None else first, op1, load(b), reverse0, reverse1, out
    )
    finish(core, dst, values, out)


SCALAR_TENSOR_TENSOR = Spec(
    "scalar_tensor_tensor",
    ("dst",),
    ("data", "operand0", "operand1"),
    _check_scalar_tensor_tensor,
    _run_scalar_tensor_tensor,
    timing(Vector.TWO_INPUTS),
)


@instruction
def scalar_tensor_tensor(
    dst, data, op0, operand0, op1, operand1, reverse0=False, reverse1=False, name=None
):
    """dst = (data op0 operand0) op1 operand1 with operand1 a tile like data."""
    what = "scalar_tensor_tensor"
    first, second = op_name(op0, what, "op0"), op_name(op1, what, "op1")
    no_operand(first, operand0, what, "operand0")
    params = _two_params[first, bool(reverse0), second, bool(reverse1)]
    core = running() or core_of(what)
    return core.issue(SCALAR_TENSOR_TENSOR, (dst,), (data, operand0, operand1), params, name)


def _check_reciprocal(c):
    c.tensors("data")
    same_tiles(c, "dst", "data")
    return "vector"


def _run_reciprocal(core, payload, writes, reads, params):
    (dst,), (data,) = writes, reads
    out = result_array(core, dst, data.shape)
    finish(core, dst, elementwise.reciprocal(load(data), out), out)


RECIPROCAL = Spec(
    "reciprocal", ("dst",), ("data",), _check_reciprocal, _run_reciprocal, timing(Vector.RECIPROCAL)
)


@instruction
def reciprocal(dst, data, name=None):
    """dst = 1 / data."""
    return core_of("reciprocal").issue(RECIPROCAL, (dst,), (data,), (), name)
