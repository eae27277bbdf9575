"""Results and gradients against the float64 run of the whole model, and of targets against each
other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nsa_neuron.agree.report import BACKWARD, Point
from nsa_neuron.numerics import Budget

GRADIENT_FLOOR = 1e-6
"""Gradients are judged down to this magnitude, and to the policy's floor (which is for values near
1) times the model's largest gradient: what is 0 because terms cancel, as of a query with one key,
is the rounding of those terms, which are as large as other gradients."""


def gradient_floor(exact: Iterable[Tensor]) -> float:
    """Down to which magnitude a model's gradients are judged; see `GRADIENT_FLOOR`."""
    finite = (x[x.isfinite()].abs() for x in exact)
    largest = max((float(x.max()) for x in finite if x.numel()), default=0.0)
    return max(GRADIENT_FLOOR, Budget.floor * largest)


def point(
    phase: str,
    name: str,
    visit: int,
    got: Sequence[Tensor],
    exact: Sequence[Tensor] | None,
    plain: Sequence[Tensor] | None,
    calls: int,
    floor: float = Budget.floor,
) -> Point:
    """The worst of some tensors against the truth.

    Args:
        calls: nsa calls before; each may have added one rounding of its result.
    """
    if exact is None or plain is None or not len(got) == len(exact) == len(plain):
        what = "gradient" if phase == BACKWARD else "output"
        has = "another number of them" if got and exact else "one" if exact else "none"
        detail = f"{len(got) or 'no'} {what}; the reference's run has {has}"
        return Point(phase, name, visit, False, 0.0, 0.0, detail)
    compare = Budget(floor=floor, roundings=1 + calls)
    worst = Point(phase, name, visit, True, 0.0, 0.0)
    share = -1.0
    for mine, oracle, eager in zip(got, exact, plain, strict=True):
        diff = compare(mine, oracle, eager, {})
        if not diff.ok:
            return Point(phase, name, visit, False, diff.error, diff.budget, diff.detail)
        used = diff.error / diff.budget if diff.budget else 0.0
        if used > share:
            share, worst = used, Point(phase, name, visit, True, diff.error, diff.budget)
    return worst


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Largest difference of two runs' final outputs; infinite where they cannot be compared."""
    if [x.shape for x in one] != [x.shape for x in other]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a.numel()]
    # Equal infinities are no distance apart, NaN is from everything.
    gaps = [
        torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf) for a, b in pairs
    ]
    return max((float(gap.max()) for gap in gaps), default=0.0)
