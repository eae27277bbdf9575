"""What is known of the cores of a launch once they have run: loops, their PSUM, the program."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..rules.session import locate

if TYPE_CHECKING:
    from ..issue.core import NeuronCore
    from ..issue.record import CoreTrace
    from ..rules.errors import Location


# "Typical limit of 5000000", says the compiler's error by a third party's notes.
PROGRAM = 5_000_000


def check_cores(cores: list[NeuronCore]) -> None:
    """Warn of what runs here and may not on a device.

    Raises:
        SimulationError: rule "doubtful", in a strict run.
    """
    check_loops(cores)
    for core in cores:
        _check_accumulators(core)
        _check_size(core)


def check_loops(cores: list[NeuronCore]) -> None:
    """Warn where the cores run a hardware loop unequally often, or not the same loops.

    Simulated cores run such kernels; the page of `nl.fori_loop` asks for equal trip counts, and the
    compiler fails where the two programs have different blocks (aws-neuron-sdk issue 1388).

    Raises:
        SimulationError: rule "doubtful", in a strict run.
    """
    first, *others = cores
    for other in others:
        mine, theirs = _trips(first.trace), _trips(other.trace)
        for loop in sorted(mine.keys() | theirs.keys()):
            if mine[loop] != theirs[loop]:
                trace = first.trace if mine[loop] else other.trace
                first.warn(
                    f"hardware loop {loop} runs {mine[loop]} times on core {first.index} and "
                    f"{theirs[loop]} times on core {other.index}: on the device both need equal "
                    "trip counts and blocks, or it fails (NCC_IXGM002) or hangs",
                    _line(trace, loop),
                )
                break  # later loops may be counted one off


def _trips(trace: CoreTrace) -> Counter[int]:
    """How often each hardware loop ran; what a shape-only run left out counts, too."""
    counts = Counter(mark.loop for mark in trace.loops)
    counts.update({loop: n - counts[loop] for loop, n in trace.trips.items()})
    return counts


def _line(trace: CoreTrace, loop: int) -> Location | None:
    """The kernel's line of the first instruction in a loop, where it has any."""
    for mark in trace.loops:
        if mark.loop == loop and mark.last > mark.first:
            return locate(trace.instructions[mark.first].site)
    return None


def _check_accumulators(core: NeuronCore) -> None:
    """Warn where a matmul in a hardware loop writes a PSUM tensor made before the loop."""
    trace = core.trace
    for mark in trace.loops:
        if mark.iteration:
            continue
        inside = set(trace.allocations[slice(*mark.made)])
        for instruction in trace.instructions[mark.first : mark.last]:
            if instruction.engine != "tensor":
                continue
            if not any(w.allocation in inside for w in instruction.writes):
                core.warn(
                    f"{instruction.opcode} in a hardware loop writes a PSUM tensor made before the "
                    "loop: runs in AWS's simulator, but its compiler is reported to refuse it "
                    "(NCC_IBIR092; a third party, on trn1): make the tensor in the body",
                    instruction.location,
                )


def _check_size(core: NeuronCore) -> None:
    """Warn of a program of more instructions than the compiler takes."""
    trace = core.trace
    if len(trace.instructions) <= PROGRAM:
        return
    again = sum(m.last - m.first for m in trace.loops if m.iteration)
    size = len(trace.instructions) - again
    if size > PROGRAM:
        core.warn(
            f"the program has {size:,} instructions: the compiler refuses more than about "
            f"{PROGRAM:,} (NCC_EBVF030; a third party): loop with nl.fori_loop"
        )
