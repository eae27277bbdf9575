"""Plain Python errors of a kernel's call into NKI, as refusals that say what to write.

A kernel that adds two tensors or leaves out an argument makes Python raise a TypeError that knows
neither rule nor remedy. `translate` recognises those that come from using NKI wrongly; every other
exception is the kernel's own and passes as it is.
"""

from __future__ import annotations

import difflib
import inspect
import re
from typing import TYPE_CHECKING, Any

from ..issue.current import current_core
from ..machine.dtypes import UnknownDTypeError
from ..rules.errors import Location, SimulationError
from ..rules.legacy import KEYWORDS, TENSOR_ATTRIBUTES
from ..rules.session import PACKAGE, violation
from .binding import INSTRUCTIONS
from .remedies import missing_name, signature_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

_FACADE = __package__
_PLAIN = (TypeError, ValueError, IndexError, AttributeError, ImportError, KeyError, ArithmeticError)
_OPERATORS = {
    "+": "nl.add(a, b)",
    "-": "nl.subtract(a, b)",
    "*": "nl.multiply(a, b)",
    "/": "nl.multiply(a, nl.reciprocal(b))",
    "@": "nl.matmul(a, b)",
    "**": "nl.power(a, b)",
    "<": "nl.less(a, b)",
    ">": "nl.greater(a, b)",
    "<=": "nl.less_equal(a, b)",
    ">=": "nl.greater_equal(a, b)",
}


def translate(error: Exception) -> SimulationError | None:
    """The refusal that an exception out of a kernel stands for, or None if it is the kernel's own.

    Args:
        error: what the kernel raised.
    """
    if isinstance(error, SimulationError) or not isinstance(error, _PLAIN):
        return None
    frames = list(_frames(error.__traceback__))
    kernel = [i for i, (frame, _) in enumerate(frames) if not _internal(frame)]
    if not kernel:
        return None
    frame, line = frames[kernel[-1]]
    where = Location(frame.f_code.co_filename, line, frame.f_code.co_name)
    inside = frames[kernel[-1] + 1 :]
    called = bool(inside) and inside[0][0].f_code.co_filename.startswith(PACKAGE)
    if called and not isinstance(error, ImportError):
        return _inside(error, inside[0][0], where)
    return _in_kernel(str(error), where)


def _frames(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _internal(frame: FrameType) -> bool:
    """Whether a frame is below a call into the simulator: its own, or a library's it uses."""
    code = frame.f_code
    if code.co_filename.startswith((PACKAGE, "<")):
        return True
    home = str(frame.f_globals.get("__name__", ""))
    return home.partition(".")[0] in ("numpy", "ml_dtypes", "functools", "contextlib", "threading")


def _inside(error: Exception, entry: FrameType, where: Location) -> SimulationError:
    """An exception raised while the simulator worked on a call's arguments."""
    relaxed = _just_relaxed(where)
    if relaxed is not None:
        return relaxed
    code = entry.f_code
    name = code.co_name
    function = INSTRUCTIONS.get(name)
    if getattr(function, "__code__", None) is not code:
        function = None
    if isinstance(error, UnknownDTypeError):
        return violation(
            "dtype", str(error), instruction=name, operand="dtype", location=where,
            hint="dtype=nl.bfloat16, nl.float32, ...",
        )  # fmt: skip
    given = ", ".join(code.co_varnames[: code.co_argcount])
    signature = signature_of(function) if function is not None else f"({given})"
    return violation(
        "usage",
        f"cannot use these arguments ({type(error).__name__}: {error})",
        instruction=name,
        operand=_without_hash(entry) if str(error).startswith("unhashable") else None,
        location=where,
        hint=f"{name}{signature}",
    )


def _without_hash(entry: FrameType) -> str | None:
    """The first argument of a call that is a list or the like, where it must be one of a few."""
    names = entry.f_code.co_varnames[: entry.f_code.co_argcount]
    return next((n for n in names if type(entry.f_locals.get(n)).__hash__ is None), None)


def _just_relaxed(where: Location) -> SimulationError | None:
    """The relaxed violation of this very line: what it forbids cannot be carried out at all."""
    core = current_core()
    notes = core.trace.relaxed if core is not None else []
    if not notes or notes[-1].location != where:
        return None
    note = notes[-1]
    note.add_note(f"rule {note.rule} is relaxed, but what it forbids cannot be carried out")
    return note


def _in_kernel(text: str, where: Location) -> SimulationError | None:
    """An exception that Python raised at the kernel's own line."""
    found = re.search(r"module '(?P<home>[\w.]+)' has no attribute '(?P<name>\w+)'", text)
    found = found or re.match(r"cannot import name '(?P<name>\w+)' from '(?P<home>[\w.]+)'", text)
    if found and found["home"].startswith(_FACADE):
        return missing_name(found["home"], found["name"], where)
    if text.startswith("neuronxcc"):
        return violation("legacy-api", text, location=where)
    found = re.search(r"'NkiTensor' object has no attribute '(\w+)'", text)
    if found:
        return _missing_attribute(found[1], where)
    found = re.search(r"(?:type\(s\) for|between instances of)? ?([-+*/@<>=&|^%]+:|'[<>=]+')", text)
    if "'NkiTensor'" in text or "'Instruction'" in text:
        hint = _OPERATORS.get(found[1].strip(":'")) if found else None
        return violation(
            "legacy-api",
            f"Python cannot compute with a tensor's elements ({text})"
            if "'NkiTensor'" in text
            else f"an instruction returns no tile ({text})",
            location=where,
            hint=hint or "nl.<function>(a, b), or nisa.tensor_tensor(dst, data1, data2, op)",
        )
    found = re.match(r"([\w.]+)\(\) (?:missing|got|takes)", text)
    if found:
        home, _, name = found[1].rpartition(".")
        if home == "nisa":
            return _wrong_instruction(INSTRUCTIONS[name], text, where)
        return _wrong_call(name, text, where)
    return None


def _missing_attribute(name: str, where: Location) -> SimulationError:
    from ..memory.tensor import NkiTensor

    known = [n for n in dir(NkiTensor) if not n.startswith("_")]
    close = difflib.get_close_matches(name, known, 3)
    return violation(
        "usage",
        f"a tensor has no {name!r}",
        location=where,
        value=name,
        limit=", ".join(known),
        hint=TENSOR_ATTRIBUTES.get(name) or ", ".join(f".{n}" for n in close),
    )


def _wrong_instruction(function: Any, text: str, where: Location) -> SimulationError:
    """A call of an instruction that does not fit its signature, often one of an older NKI."""
    name = function.__name__
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unexpected and unexpected[1] in KEYWORDS:
        return violation(
            "legacy-api", f"{unexpected[1]}= no longer exists", instruction=name,
            operand=unexpected[1], hint=KEYWORDS[unexpected[1]], location=where,
        )  # fmt: skip
    hint = f"nisa.{name}{signature_of(function)}"
    if "missing" in text and "'dst'" in text:
        return violation(
            "legacy-api", "instructions write into dst= since NKI 0.2 and return no tile",
            instruction=name, operand="dst", hint=hint, location=where,
        )  # fmt: skip
    return violation("usage", text, instruction=name, hint=hint, location=where)


def _wrong_call(name: str, text: str, where: Location) -> SimulationError | None:
    """A call of an NKI function or view method that does not fit its signature."""
    from ..memory.tensor import NkiTensor
    from . import collectives, isa, language

    for prefix, home in (
        ("nl.", language), ("nisa.", isa), ("ncc.", collectives), (".", NkiTensor)
    ):  # fmt: skip
        function: Any = getattr(home, name, None)
        if inspect.isroutine(function) and INSTRUCTIONS.get(name) is not function:
            return violation(
                "usage", text, instruction=f"{prefix}{name}", location=where,
                hint=f"{prefix}{name}{signature_of(function)}",
            )  # fmt: skip
    return None
