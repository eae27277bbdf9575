"""What of a modelled time rests on constants that nobody has published or measured."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .parameters import CONSTANTS

if TYPE_CHECKING:
    from .estimate import Estimate
    from .instructions import Cost
    from .timeline import Timeline


def guesses(estimate: Estimate) -> list[str]:
    """One sentence for each guessed constant that a run used: value, band, source, and the time.

    The time is what the instructions concerned take of their engine or queue, at the low, central
    and high end of all constants; it is not what the kernel would gain.
    """
    used: dict[str, Counter[str]] = {}
    for cost in estimate.central.costs:
        for name in cost.guesses:
            used.setdefault(name, Counter())[cost.opcode] += 1
    return [_sentence(name, count, estimate) for name, count in sorted(used.items())]


def _sentence(name: str, count: Counter[str], estimate: Estimate) -> str:
    c = CONSTANTS[name]
    low, central, high = (getattr(getattr(estimate, level).parameters, name) for level in _LEVELS)
    times = [_time(name, getattr(estimate, level)) / 1e3 for level in _LEVELS]
    what = ", ".join(f"{n} {opcode}" for opcode, n in count.most_common(3))
    more = f" and {len(count) - 3} kinds more" if len(count) > 3 else ""
    return (
        f"guess: {name} = {central:g} ({low:g} to {high:g}) {c.unit}, in {what}{more}: "
        f"{times[1]:.2f} us of their lanes ({min(times):.2f} to {max(times):.2f}); "
        f"source: {c.source}"
    )


_LEVELS = ("low", "central", "high")


def _time(name: str, t: Timeline) -> float:
    return sum(_taken(cost) for cost in t.costs if name in cost.guesses)


def _taken(cost: Cost) -> float:
    """Ns of the engine, or of the queue that a transfer waits in."""
    if cost.transfer is None:
        return max(cost.interval, cost.latency) if cost.meeting else cost.interval
    return max(cost.transfer.trigger_time, cost.transfer.duration - cost.transfer.start)
