"""Time of a kernel too long to run, from runs at smaller sizes whose loops have settled.

The steady state of a loop costs the same every time, so the total is a polynomial of the size: of
degree 1 where the number of tiles grows with it, 2 for causal attention over it. The polynomial is
checked before it is used: fitted without the largest size that was run, it must predict it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..machine.trn2 import machine_for
from .estimate import estimate
from .parameters import DEFAULT_SET
from .timeline import Band

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..issue.record import Run

LIMIT = 0.02


@dataclass(frozen=True)
class Extrapolation:
    """A modelled time that was not scheduled, but continued from smaller sizes.

    Attributes:
        target: the size asked for.
        band: ns at that size.
        sizes: sizes that were run; totals: ns at each.
        degree: of the polynomial.
        error: relative error at the largest size run, predicted from the others.
    """

    target: int
    band: Band
    sizes: tuple[int, ...]
    totals: tuple[Band, ...]
    degree: int
    error: float

    def describe(self) -> str:
        """The sentence a report repeats."""
        return (
            f"extrapolated to {self.target} from sizes {', '.join(map(str, self.sizes))} "
            f"(degree {self.degree}); the largest was predicted with {self.error:.2%} error"
        )


def extrapolate(
    run_at: Callable[[int], Run],
    sizes: Sequence[int],
    target: int,
    degree: int = 1,
    params: str = DEFAULT_SET,
) -> Extrapolation:
    """Continue the time of a kernel to a size that is not run.

    Args:
        run_at: gives the record at a size.
        sizes: at least degree + 2 increasing sizes, all past the kernel's start-up.
        target: the size to continue to.
        degree: how the number of instructions grows with the size.
        params: parameter set.

    Raises:
        ValueError: too few sizes; loads that still run ahead into unused SBUF; an error above 2 %
            at the largest: its loops have not settled, or the degree is wrong.
    """
    if len(sizes) < degree + 2 or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"degree {degree} needs {degree + 2} increasing sizes, got {list(sizes)}")
    runs = [run_at(size) for size in sizes]
    _check_filled(runs, sizes, target, degree)
    totals = tuple(estimate(run, params).band for run in runs)
    central = [b.central for b in totals]
    guess = _continue(sizes[:-1], central[:-1], sizes[-1], degree)
    error = abs(guess / central[-1] - 1)
    if error > LIMIT:
        raise ValueError(
            f"size {sizes[-1]} predicted from the smaller ones is off by {error:.1%}, more than "
            f"{LIMIT:.0%}: take larger sizes, or another degree than {degree}"
        )
    band = Band(
        *(
            _continue(sizes, [getattr(b, level) for b in totals], target, degree)
            for level in ("low", "central", "high")
        )
    )
    return Extrapolation(target, band, tuple(sizes), totals, degree, error)


def _check_filled(runs: Sequence[Run], sizes: Sequence[int], target: int, degree: int) -> None:
    """Refuse sizes at which tensors never had to wait for room, if at the target they will.

    Until SBUF has been used up twice, loads run ahead further than they later can.
    """
    room = machine_for(runs[0].target).sbuf_bytes
    used = [
        max(sum(a.pitch_bytes for a in c.allocations if a.buffer == "sbuf") for c in run.cores)
        for run in runs
    ]
    smallest = used[-degree - 1]
    if smallest < 2 * room < _continue(sizes, used, target, degree):
        raise ValueError(
            f"at size {sizes[-degree - 1]} the tiles have not filled SBUF twice ({smallest} of "
            f"{2 * room} bytes per partition), at {target} they will: take larger sizes"
        )


def _continue(sizes: Sequence[int], totals: Sequence[float], target: int, degree: int) -> float:
    """Value at `target` of the polynomial through the last degree + 1 points."""
    x = np.array(sizes[-degree - 1 :], np.float64) / target
    coefficients = np.polyfit(x, totals[-degree - 1 :], degree)
    return float(np.polyval(coefficients, 1.0))
