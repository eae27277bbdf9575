"""Loops of a kernel: unrolled ranges, and hardware loops over registers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..rules.registers import NkiScalar, RunTimeScalar, VirtualRegister, scalar
from ..rules.session import current_session, violation
from ..rules.versions import deprecation, require
from .current import require_core
from .record import LoopMark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .record import CoreTrace, Instruction


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """An unrolled loop."""
    _deprecated("static_range")
    return range(start) if stop is None else range(start, stop, step)


def affine_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """An unrolled loop."""
    _deprecated("affine_range")
    return range(start) if stop is None else range(start, stop, step)


def sequential_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """An unrolled loop."""
    _deprecated("sequential_range")
    return range(start) if stop is None else range(start, stop, step)


def _deprecated(name: str) -> None:
    """Note a name of this module that the version being run deprecates."""
    session = current_session()
    instead = deprecation(name, session.nki) if session is not None else ""
    if session is not None and instead:
        session.deprecated(f"nl.{name}", instead)


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[VirtualRegister]:
    """A hardware loop whose bounds may be registers; yields frozen registers. NKI 0.6.

    Raises:
        SimulationError: rule "loop" for a step that is not a positive integer; rule "version" from
            NKI 0.7 on.
    """
    require("nl.dynamic_range", "dynamic_range")
    _deprecated("dynamic_range")
    lower, upper = (0, start) if stop is None else (start, stop)
    _check_step(step)
    return (
        VirtualRegister(value, frozen=True)
        for value in _iterate(lower, upper, step, "dynamic_range")
    )


def _iterate(lower: Any, upper: Any, step: int, what: str) -> Iterator[int]:
    """The values of a hardware loop's index, each iteration noted in the record."""
    core = require_core(what)
    trace = core.trace
    loop = core.state["loops"] = core.state.get("loops", 0) + 1
    _refuse_in_no_reorder(core)
    made = len(trace.allocations)
    values: Sequence[int] = range(scalar(lower), scalar(upper), step)
    waits = _loads(lower, upper)
    shown = core.options.iterations
    if shown and len(values) > shown:
        trace.trips[loop] = len(values)
        values = [*values[: shown - 1], values[-1]]  # the last, whose addresses reach furthest
    try:
        for iteration, value in enumerate(values):
            begin = len(trace.instructions), len(trace.allocations)
            yield value
            _mark(trace, loop, iteration, *begin, () if iteration else waits)
    finally:
        _close(core, made)


def _loads(*values: Any) -> tuple[Instruction, ...]:
    """What loaded the run-time scalars among some values."""
    return tuple([load for v in values if isinstance(v, RunTimeScalar) for load in v.loads])


def _mark(
    trace: CoreTrace,
    loop: int,
    iteration: int,
    first: int,
    made: int,
    waits: tuple[Instruction, ...],
) -> None:
    """Note an iteration that has ended."""
    last, after = len(trace.instructions), len(trace.allocations)
    trace.loops.append(LoopMark(loop, iteration, first, last, (made, after), waits))


def _close(core: Any, made: int) -> None:
    """Tensors made in the body of a hardware loop are invisible after it."""
    core.closes = True
    for allocation in core.trace.allocations[made:]:
        allocation.closed = True


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Any], Any], step: int = 1) -> None:
    """Call `body_fun(i)` for i in range(lower, upper, step); i comes by value.

    Args:
        lower, upper: ints, registers or (NKI 0.7) 32-bit scalars.
        body_fun: takes an `NkiScalar`; a register in NKI 0.6, and where a bound is a register.
        step: a positive int.

    Raises:
        SimulationError: rule "loop": a step that is not a positive integer, a 64-bit bound, or a
            body that returns something.
    """
    _check_step(step)
    kind = _index_kind(lower, upper)
    for value in _iterate(lower, upper, step, "fori_loop"):
        result = body_fun(kind(value))
        if result is not None:
            raise violation(
                "loop",
                "the body of fori_loop must return None",
                instruction="fori_loop",
                value=type(result).__name__,
            )


def _index_kind(lower: Any, upper: Any) -> type[RunTimeScalar]:
    """What a body gets: a register where a bound is one, else a scalar; in NKI 0.6 a register."""
    for role, bound in (("lower", lower), ("upper", upper)):
        if isinstance(bound, NkiScalar) and bound.dtype == "int64":
            raise violation(
                "loop",
                "a bound has 32 bits: the device compares and branches on no more",
                instruction="fori_loop",
                operand=role,
                value="int64",
                limit="int32",
                hint="nisa.scalar_load of an int32 tensor; compute 64-bit offsets in the body",
            )
    old = require_core("fori_loop").nki == "0.6"
    registers = any(isinstance(bound, VirtualRegister) for bound in (lower, upper))
    return VirtualRegister if old or registers else NkiScalar


def while_loop(init: VirtualRegister, body_fun: Callable[[VirtualRegister], Any]) -> None:
    """While the register is not 0 call `body_fun(register)`, which returns the next one.

    Raises:
        SimulationError: rule "loop" for anything but registers.
    """
    core = require_core("while_loop")
    _refuse_in_no_reorder(core)
    register: Any = init
    trace = core.trace
    loop = core.state["loops"] = core.state.get("loops", 0) + 1
    iteration = 0
    made = len(trace.allocations)
    while True:
        if not isinstance(register, VirtualRegister):
            left_open = isinstance(register, NkiScalar)
            raise violation(
                "loop",
                "the condition of while_loop must be a register"
                + (": whether it may be an NkiScalar, the public pages leave open" * left_open),
                instruction="while_loop",
                value=type(register).__name__,
                hint="return the register that holds the next condition",
            )
        if register.read() == 0:
            _close(core, made)
            return
        begin, waits = (len(trace.instructions), len(trace.allocations)), _loads(register)
        register = body_fun(VirtualRegister(register.value))
        _mark(trace, loop, iteration, *begin, waits)
        iteration += 1


@contextmanager
def no_reorder() -> Iterator[None]:
    """Keep program order inside; dynamic loops are not allowed there."""
    core = require_core("no_reorder")
    core.state["no_reorder"] = core.state.get("no_reorder", 0) + 1
    try:
        yield
    finally:
        core.state["no_reorder"] -= 1


def _refuse_in_no_reorder(core: Any) -> None:
    if core.state.get("no_reorder"):
        raise violation("loop", "a dynamic loop cannot be inside no_reorder")


def _check_step(step: Any) -> None:
    if not isinstance(step, int) or step < 1:
        raise violation(
            "loop",
            "the step is a compile-time positive integer",
            operand="step",
            value=step if isinstance(step, int) else type(step).__name__,
            limit=">= 1",
        )
