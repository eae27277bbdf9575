"""Vector Engine: copies, element-wise arithmetic, reductions."""

from ...dtypes import bits
from ...operands import Spec
from ...semantics import alu, elementwise, reduction
from ..binding import core_of, instruction, load, load_scalar, op_name, save
from .constants import engine as engines

ANY = ("sbuf", "psum")


def on_chip(c, *roles):
    """Require operands in SBUF or PSUM; GpSimd reaches no PSUM, which `engine_for` checks."""
    for role in roles:
        c.buffers(role, *ANY)


def engine_for(c, asked, default, *allowed):
    """Choose the engine and refuse PSUM operands on GpSimd."""
    chosen = c.choose_engine(asked, default, *allowed)
    if chosen == "gpsimd":
        for role in (*c.spec.writes, *c.spec.reads):
            c.buffers(role, "sbuf")
    return chosen


def one_psum_input(c, first, second):
    """Refuse two inputs in PSUM."""
    both = c[first].buffer == "psum" == c[second].buffer
    c.require(not both, "psum-inputs", f"{first} and {second} are both in PSUM", second)


def _check_copy(c):
    c.tensors("src")
    on_chip(c, "dst", "src")
    c.same_partitions("dst", "src")
    c.same_elements("dst", "src")
    return engine_for(c, c.params[0], "vector", "vector", "scalar", "gpsimd")


def _run_copy(core, payload, writes, reads, params):
    (dst,), (src,) = writes, reads
    same = dst.dtype is src.dtype
    save(core, dst, src.array() if same else load(src))


COPY = Spec("tensor_copy", ("dst",), ("src",), _check_copy, _run_copy)


@instruction
def tensor_copy(dst, src, engine=engines.unknown, name=None):
    """dst = src; bit-exact between equal dtypes, through fp32 otherwise."""
    return core_of("tensor_copy").issue(COPY, (dst,), (src,), (engine,), name)


def _check_memset(c):
    on_chip(c, "dst")
    integer = isinstance(c["value"].value, int)
    c.require(
        integer or not c["dst"].dtype.is_integer,
        "value",
        "an integer tensor takes an integer",
        "value",
        value=c["value"].value,
        limit="int",
    )
    return engine_for(c, c.params[0], "vector", "vector", "gpsimd")


def _run_memset(core, payload, writes, reads, params):
    dst = writes[0]
    out = dst.array()
    value = reads[0]
    out[...] = value if dst.dtype.is_integer else out.dtype.type(value)


MEMSET = Spec("memset", ("dst",), ("value",), _check_memset, _run_memset)


@instruction
def memset(dst, value, engine=engines.unknown, name=None):
    """Fill dst with a constant."""
    return core_of("memset").issue(MEMSET, (dst,), (value,), (engine,), name)


def _check_tensor_tensor(c):
    op, asked = c.params
    c.tensors("data1", "data2")
    on_chip(c, "dst", "data1", "data2")
    c.same_partitions("dst", "data1", "data2")
    c.same_elements("dst", "data1", "data2")
    one_psum_input(c, "data1", "data2")
    c.require(
        op in alu.BINARY or op in alu.BITVEC_BINARY,
        "operator",
        f"{op} does not take two tensors",
        "op",
        value=op,
    )
    c.require(
        op not in alu.GEN4_ONLY, "generation", f"{op} exists from NeuronCore-v4 on", "op", value=op
    )
    operands = (c["dst"], c["data1"], c["data2"])
    if op in alu.BITVEC:
        for o in operands:
            c.require(
                o.dtype.is_integer, "dtype", f"{op} works on integers", o.role, value=o.dtype.name
            )
        return engine_for(c, asked, "vector", "vector"), "bits"
    exact = all(o.dtype.name in ("int32", "uint32") for o in operands) and op in (
        "add",
        "subtract",
        "multiply",
    )
    sbuf = all(o.buffer == "sbuf" for o in operands)
    default = "gpsimd" if op == "power" or (exact and sbuf) else "vector"
    chosen = engine_for(c, asked, default, "vector", "gpsimd")
    c.require(
        op != "power" or chosen == "gpsimd", "engine", "power runs on gpsimd", "op", value=chosen
    )
    return chosen, "integer" if exact and chosen == "gpsimd" else "fp32"


def _run_tensor_tensor(core, how, writes, reads, params):
    (dst,), (a, b), op = writes, reads, params[0]
    if how == "fp32":
        save(core, dst, elementwise.tensor_tensor(load(a), load(b), op))
        return
    x, y = a.array(), b.array()
    if how == "integer":
        y = y.reshape(x.shape)
        save(core, dst, alu.integer(op, x, y, dst.array().dtype))
    else:
        save(core, dst, alu.bitvec(op, x, y.reshape(x.shape)).view(dst.array().dtype))


TENSOR_TENSOR = Spec(
    "tensor_tensor", ("dst",), ("data1", "data2"), _check_tensor_tensor, _run_tensor_tensor
)


@instruction
def tensor_tensor(dst, data1, data2, op, engine=engines.unknown, name=None):
    """dst = data1 op data2, element by element."""
    params = (op_name(op, "tensor_tensor", "op"), engine)
    return core_of("tensor_tensor").issue(TENSOR_TENSOR, (dst,), (data1, data2), params, name)


def _check_tensor_scalar(c):
    op0, _reverse0, op1, _reverse1, asked = c.params
    c.tensors("data")
    on_chip(c, "dst", "data", "operand0", "operand1")
    c.same_partitions("dst", "data")
    c.same_elements("dst", "data")
    c.column("operand0")
    c.column("operand1")
    kinds = [op in alu.BITVEC for op in (op0, op1) if op]
    for op in (op0, op1):
        known = op is None or op in alu.BINARY or op in alu.UNARY or op in alu.BITVEC
        c.require(known, "operator", "is not a tensor_scalar operator", "op0", value=op)
        c.require(
            op not in alu.GEN4_ONLY,
            "generation",
            f"{op} exists from NeuronCore-v4 on",
            "op0",
            value=op,
        )
    c.require(
        len(set(kinds)) == 1,
        "operator",
        "op0 and op1 are both bitvec or both arithmetic",
        "op1",
        value=(op0, op1),
    )
    if kinds[0]:
        for o in (c["dst"], c["data"]):
            c.require(
                o.dtype.is_integer, "dtype", f"{op0} works on integers", o.role, value=o.dtype.name
            )
        return engine_for(c, asked, "vector", "vector"), "bits"
    for role in ("operand0", "operand1"):
        o = c[role]
        if o:
            c.require(
                o.dtype.name == "float32",
                "dtype",
                "a (P, 1) operand is float32",
                role,
                value=o.dtype.name,
                limit="float32",
            )
    default = "gpsimd" if "power" in (op0, op1) else "vector"
    allowed = ["vector"]
    if (op0, op1) in (("multiply", "add"), ("multiply", None), ("add", None)):
        allowed.append("scalar")
    if {op0, op1} & {"rsqrt", "power"}:
        allowed.append("gpsimd")
    return engine_for(c, asked, default, *allowed), "fp32"


def _run_tensor_scalar(core, how, writes, reads, params):
    (dst,), (data, a, b) = writes, reads
    op0, reverse0, op1, reverse1, _ = params
    if how == "fp32":
        values = elementwise.tensor_scalar(
            load(data), op0, load_scalar(a), reverse0, op1, load_scalar(b), reverse1
        )
        save(core, dst, values)
        return
    a, b = (o.array() if hasattr(o, "array") else o for o in (a, b))
    values = elementwise.tensor_scalar_bitvec(data.array(), op0, a, reverse0, op1, b, reverse1)
    out = dst.array()
    save(core, dst, values.view(out.dtype) if values.itemsize == out.itemsize else values)


TENSOR_SCALAR = Spec(
    "tensor_scalar",
    ("dst",),
    ("data", "operand0", "operand1"),
    _check_tensor_scalar,
    _run_tensor_scalar,
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
    second = None if op1 is None else op_name(op1, "tensor_scalar", "op1")
    params = (op_name(op0, "tensor_scalar", "op0"), bool(reverse0), second, bool(reverse1), engine)
    core = core_of("tensor_scalar")
    return core.issue(TENSOR_SCALAR, (dst,), (data, operand0, operand1), params, name)


def _check_tensor_reduce(c):
    op, axis, negate, _keepdims = c.params
    c.tensors("data")
    on_chip(c, "dst", "data")
    c.same_partitions("dst", "data")
    data = c["data"]
    rank = len(data.shape)
    axes = tuple(sorted(a % rank for a in axis if -rank <= a < rank))
    trailing = axes == tuple(range(rank - len(axes), rank)) and len(axes) == len(axis)
    c.require(
        bool(axes) and 0 not in axes and trailing,
        "axis",
        "reduces trailing free axes only",
        "axis",
        value=axis,
        limit=f"1..{rank - 1}",
    )
    c.require(
        op in alu.REDUCTIONS,
        "operator",
        f"{op} does not reduce",
        "op",
        value=op,
        limit=sorted(alu.REDUCTIONS),
    )
    if op in alu.BITVEC:
        c.require(
            data.dtype.is_integer and not negate,
            "dtype",
            f"{op} works on integers",
            "data",
            value=data.dtype.name,
        )
    kept = 1
    for size in data.shape[1 : rank - len(axes)]:
        kept *= size
    c.require(
        c["dst"].n == kept,
        "element-count",
        f"must hold {kept} elements per partition",
        "dst",
        value=c["dst"].n,
        limit=kept,
    )
    return "vector", axes


def _run_tensor_reduce(core, axes, writes, reads, params):
    (dst,), (data,) = writes, reads
    op, _, negate, _ = params
    if op in alu.BITVEC:
        out = dst.array()
        values = reduction.tensor_reduce_bitvec(data.array(), op, axes)
        bits(out)[...] = values.reshape(out.shape)
        return
    save(core, dst, reduction.tensor_reduce(load(data), op, axes, negate))


TENSOR_REDUCE = Spec("tensor_reduce", ("dst",), ("data",), _check_tensor_reduce, _run_tensor_reduce)


@instruction
def tensor_reduce(dst, op, data, axis, negate=False, keepdims=False, name=None):
    """dst = reduction of data over trailing free axes."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    params = (op_name(op, "tensor_reduce", "op"), axes, bool(negate), bool(keepdims))
    return core_of("tensor_reduce").issue(TENSOR_REDUCE, (dst,), (data,), params, name)
