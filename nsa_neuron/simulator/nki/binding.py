"""From the vendor's calls to specs: operators, enums, loads and stores."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..issue.current import require_core
from ..machine.dtypes import bool_, load_f32, round_tf32, store, tfloat32
from ..memory.tensor import NkiTensor
from ..rules.registers import VirtualRegister
from ..rules.session import running, violate, violation


class Operator:
    """Default of an `op=` argument: stands for the `nki.language` function of that name."""

    def __init__(self, name):
        self.nki_op = name

    def __repr__(self):
        return f"nl.{self.nki_op}"


MAXIMUM = Operator("maximum")
EQUAL = Operator("equal")


# The functions of `nki.isa` by name; `misuse` explains calls that do not fit them.
INSTRUCTIONS: dict[str, Callable[..., Any]] = {}


def instruction(function):
    """Decorate a `nisa` function: Python's errors name it, so that `misuse` knows it from others.

    No wrapper: every instruction of a run would pay for it.
    """
    INSTRUCTIONS[function.__name__] = function
    function.__qualname__ = f"nisa.{function.__name__}"
    return function


class Interned(dict):
    """Parameters of a kind by arguments: one object for equal ones, which is hashed by identity.

    A look-up is cheaper than another named tuple, and parameters are part of what every
    instruction's checked plan is found by. For kinds of which a program has few: none is forgotten.
    """

    def __init__(self, kind, read=None):
        """Makes none yet.

        Args:
            kind: a named tuple.
            read: what makes its fields of arguments that are new; None: they are the fields.
        """
        super().__init__()
        self.kind = kind
        self.read = read
        self.made = {}  # by fields
        kind.__hash__ = object.__hash__

    def __missing__(self, given):
        fields = given if self.read is None else self.read(*given)
        made = self.made.get(fields) or self.made.setdefault(fields, self.kind(*fields))
        if self.read is None or int not in map(type, given):
            self[given] = made  # an integer for an enum breaks a rule, each time
        return made


def core_of(name):
    """The current core, or an error that names the instruction.

    The commonest instructions ask for the core that is `running` first, which saves a call.
    """
    return running() or require_core(f"nisa.{name}")


def op_name(op, instruction_name, role):
    """Name of an operator object such as `nl.add`.

    Raises:
        UsageError: `op` is none.
    """
    name = getattr(op, "nki_op", None)
    if name is None:
        given = getattr(op, "__name__", repr(op))
        raise violation(
            "operator",
            "is not an operator of nki.language",
            operand=role,
            instruction=instruction_name,
            value=given,
            limit="nl.add, nl.exp, ...",
            hint="pass nl.<operator>, not a NumPy or Python function",
        )
    return name


def enum_of(kind, value, instruction_name, role):
    """A member of an enum; strings of its values are accepted, integers break rule "enum"."""
    if type(value) is kind:
        return value
    if isinstance(value, str):
        for member in kind:
            if value == member.name:
                return member
    message = f"must be a member of nisa.{kind.__name__}"
    details = {
        "operand": role,
        "instruction": instruction_name,
        "value": value,
        "limit": ", ".join(f"nisa.{kind.__name__}.{m.name}" for m in kind),
    }
    number = [m for m in kind if type(value) is int and m.value == value]
    if not number:
        raise violation("usage", message, **details)
    violate("enum", message, **details)
    return number[0]


def load(tensor):
    """The elements of a view as fp32."""
    values = load_f32(tensor.array())
    return round_tf32(values) if tensor.dtype is tfloat32 else values


def load_scalar(operand):
    """A scalar operand: Python number, register's value, or a (P, 1) tensor as fp32."""
    if type(operand) is NkiTensor:
        return load(operand)
    if isinstance(operand, VirtualRegister):
        return operand.read()
    return operand


def save(core, tensor, values):
    """Store an instruction's result into a view, rounding to its dtype."""
    dtype = tensor.dtype
    store(tensor.array(), values, dtype if core.options.precise or dtype is bool_ else None)


def result_array(core, tensor, shape):
    """Storage that an fp32 result of `shape` may be computed in, or None where it must be stored.

    Pass it as `out=` to a function of `semantics` and its result to `finish`.
    """
    if tensor.shape != shape or tensor.dtype is tfloat32:
        return None
    array = tensor.array()
    return array if array.dtype == np.float32 and tensor.access().layout.dense else None


def finish(core, tensor, values, out):
    """Store a result, unless it was computed in place."""
    if values is not out:
        save(core, tensor, values)
