"""Checks that several engines' instructions share."""

import numpy as np

from ...memory.tensor import NkiTensor
from ...rules.registers import NkiScalar, RunTimeScalar, VirtualRegister
from ...rules.session import violation
from ...semantics import alu
from ..binding import enum_of
from .constants import engine as engines
from .constants import reduce_cmd as commands

ANY = ("sbuf", "psum")


def engine_of(value, name):
    """The `engine=` argument as a member of `nisa.engine`."""
    return value if type(value) is engines else enum_of(engines, value, name, "engine")


def command_of(value, name):
    """The name of the `reduce_cmd=` argument."""
    return enum_of(commands, value, name, "reduce_cmd")._name_  # .name is a slow descriptor


def on_chip(c, *roles):
    """Require operands in SBUF or PSUM; GpSimd reaches no PSUM, which `engine_for` checks."""
    for role in roles:
        c.buffers(role, *ANY)


def same_tiles(c, first, *roles):
    """Require on-chip operands with equal partition counts and elements per partition."""
    on_chip(c, first, *roles)
    c.same_partitions(first, *roles)
    c.same_elements(first, *roles)


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


def operand(c, role, *dtypes, optional=False):
    """Require a constant, a register or a (P, 1) tensor, the latter of one of `dtypes` if given."""
    o = c[role]
    if o:
        on_chip(c, role)
        c.column(role)
        if dtypes:
            c.dtypes(role, dtypes)
        return
    value = o.value
    number = hasattr(value, "__float__") and not isinstance(value, np.ndarray)
    good = number or isinstance(value, VirtualRegister) or (optional and value is None)
    if isinstance(value, NkiScalar):
        raise violation(
            "scalar",
            "whether an engine takes an NkiScalar as an operand, the public pages leave open",
            instruction=c.spec.opcode,
            operand=role,
            hint="nisa.scalar_store(t, scalar), and t as the operand",
        )
    if not good:
        raise violation(
            "usage",
            "must be a number or a (P, 1) tensor",
            instruction=c.spec.opcode,
            operand=role,
            value=value,
            limit="number or (P, 1) tensor",
        )


def arithmetic(c, op, role, *, unary=True, tensor=False):
    """Require an arithmetic operator of this generation."""
    known = op in alu.BINARY or (unary and op in alu.UNARY)
    kind = "two-tensor" if tensor else "arithmetic"
    c.require(known, "operator", f"{op} is not an {kind} operator", role, value=op)
    gen3(c, op, role)


def on_vector(c, *ops):
    """VectorE, with a guess for its time where no engine has an operator: divide, mod, fmod."""
    if alu.SIMULATION_ONLY.isdisjoint(ops):
        return "vector"
    return c.composed("vector"), "simulated"


def warn_simulated(core, how, *ops):
    """Say of an instruction with such an operator that it runs here only."""
    if how == "simulated":
        core.warn(f"{', '.join(filter(None, ops))}: divide, mod and fmod have no lowering to "
                  "hardware: they exist in simulation only")  # fmt: skip


def gen3(c, op, role):
    """Refuse operators of NeuronCore-v4."""
    c.require(
        op not in alu.GEN4_ONLY,
        "generation",
        f"{op} exists from NeuronCore-v4 on",
        role,
        value=op,
    )


def one_of(c, value, allowed, rule, role, what):
    """Require an argument to be one of a few values."""
    c.require(value in allowed, rule, what, role, value=value, limit=tuple(allowed))


def integers(c, op, *roles):
    """Require integer tensors, as bit operators take."""
    for role in roles:
        o = c[role]
        if o:
            c.require(
                o.dtype.is_integer, "dtype", f"{op} works on integers", role, value=o.dtype.name
            )


def same_dtype(c, first, *roles):
    """Require equal dtypes."""
    want = c[first].dtype
    for role in roles:
        c.require(
            c[role].dtype.name == want.name,
            "dtype-match",
            f"is {c[role].dtype}, {first} is {want}",
            role,
            value=c[role].dtype.name,
            limit=want.name,
        )


def elements(c, role, count):
    """Require a number of elements per partition."""
    c.require(
        c[role].n == count,
        "element-count",
        f"must hold {count} elements per partition",
        role,
        value=c[role].n,
        limit=count,
    )


def no_operand(op, value, instruction, role):
    """Refuse an operand of a unary operator other than None and 0."""
    if op in alu.UNARY or op == "invert":
        tensor = isinstance(value, NkiTensor | RunTimeScalar)
        if tensor or (value is not None and value != 0):
            raise violation(
                "value",
                f"{op} takes one operand: this one must be None or 0",
                instruction=instruction,
                operand=role,
                value=value,
                limit=(None, 0),
            )
