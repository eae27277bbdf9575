"""What people fill in: a bad field of a dataclass, or number, is refused by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.spec import MAX_INT

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}
SEEDS = range(-(2**63), 2**63)  # numbers that torch's generators take


def check_int(op: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    """Makes sure that an argument is a whole number within limits.

    Args:
        op: what it is an argument of.
        name: its name.
        value: it.
        least, most: the limits; default: as many as 32 bits count.

    Raises:
        InvalidType: it is no int, or a bool.
        InvalidArgument: it is below or above.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(op, name, f"{value!r} ({type(value).__name__})", "an int")
    if not least <= value <= (MAX_INT if most is None else most):
        at_all = f"at least {least}" if value < least else f"at most {MAX_INT}"
        expected = at_all if most is None else f"from {least} to {most}"
        raise InvalidArgument(op, name, value, expected)


def check_types(values: Any) -> None:
    """Makes sure that each field annotated as int, float, str or bool holds one. Numbers are no
    bools, and whole ones are floats, too; fields of other types are the class's own business.

    Args:
        values: an instance of a dataclass.

    Raises:
        InvalidType: of the first field that does not.
    """
    for f in dataclasses.fields(values):
        kind, value = str(f.type), getattr(values, f.name)
        if kind not in _KINDS:
            continue
        if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
            found = f"{value!r} ({type(value).__name__})"
            raise InvalidType(type(values).__name__, f.name, found, f"of type {kind}")


def check_rules(values: Any, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Makes sure that rules hold.

    Args:
        values: whose attributes they are about.
        rules: an attribute's name, whether its rule holds, and what it must be.

    Raises:
        InvalidArgument: of the first rule that does not hold.
    """
    for name, holds, expected in rules:
        if not holds:
            found = repr(getattr(values, name))
            raise InvalidArgument(type(values).__name__, name, found, expected)
