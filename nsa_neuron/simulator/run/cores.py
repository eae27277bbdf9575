"""What the two cores of a launch must do alike, as far as it is known once both have run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..rules.session import locate

if TYPE_CHECKING:
    from ..issue.core import NeuronCore
    from ..issue.record import CoreTrace
    from ..rules.errors import Location


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
