"""The calls at which each kernel is compiled, so that every row of every tile plan is.

A plan row serves a range of head dims, dtypes and group sizes. Its widest call shows most: tiles
and accumulators only shrink below it. `points` lists for one kernel the usual head dims in
bfloat16, every other dtype once, and the widest call of each plan row; for the packed variant of a
kernel the usual head dims only, unless everything is asked for.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nsa_neuron.backends.cuda import plans

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nsa_neuron.backends.cuda.kernel_table import KernelEntry

HEAD_DIMS = ((192, 128), (128, 128))
"""Head dims of keys and values: the paper's model, and most others."""

DTYPES = ("bfloat16", "float16", "float32")
GROUPS = (16, 1)
NOT_KERNELS = frozenset({"dispatch"})
"""Names in plan files that hold choices of a launcher, not constants of a kernel."""

_WIDEST = 256
_MORE_DIMS = ((256, 256), (64, 64))
_MORE_GROUPS = (4, 8, 32, 64)

RowName = tuple[str, str, int]
"""Op, kernel and number of a plan row."""


@dataclass(frozen=True)
class Point:
    """One call, as a tile plan sees it."""

    dk: int
    dv: int
    dtype: str
    group: int

    def row(self, device: str, entry: KernelEntry) -> int | None:
        """The number of the plan row that serves this call; None: there is none."""
        rows = plans.load(device, entry.op)[entry.planned]
        return next((i for i, row in enumerate(rows) if plans.fits(row, **asdict(self))), None)


def points(entry: KernelEntry, device: str, *, full: bool = False) -> list[Point]:
    """Where a kernel is compiled.

    Args:
        device: whose plans.
        full: every dtype and group at every pair of head dims, instead of what reaches every row.
    """
    if full:
        return _legal(entry, HEAD_DIMS + _MORE_DIMS, DTYPES, GROUPS + _MORE_GROUPS)
    found = _legal(entry, HEAD_DIMS, DTYPES[:1], GROUPS)
    if entry.packed:  # the same products as its unpacked twin, other loops around them
        return found
    for number, row in enumerate(plans.load(device, entry.op)[entry.planned]):
        widest = (p for p in _widest_first(entry, device, row) if p.row(device, entry) == number)
        found += itertools.islice(widest, 1)
    for dtype in [d for d in DTYPES if d not in {point.dtype for point in found}]:
        found += _legal(entry, HEAD_DIMS[:1], [dtype], GROUPS)[:1]
    return list(dict.fromkeys(found))


def rows_of(device: str) -> set[RowName]:
    """Every plan row of a device that holds constants of a kernel."""
    return {
        (path.stem, kernel, number)
        for path in (plans.PLANS_FOLDER / device).glob("*.json")
        for kernel, rows in plans.load(device, path.stem).items()
        if kernel not in NOT_KERNELS
        for number in range(len(rows))
    }


def rows_reached(entries: Iterable[KernelEntry], device: str) -> set[RowName]:
    """The plan rows of a device at which at least one of `entries` is compiled."""
    return {
        (entry.op, entry.planned, number)
        for entry in entries
        for point in points(entry, device)
        if (number := point.row(device, entry)) is not None
    }


def _legal(entry: KernelEntry, dims: Any, dtypes: Any, groups: Any) -> list[Point]:
    return [
        Point(dk, dv, dtype, group)
        for (dk, dv), dtype, group in itertools.product(dims, dtypes, groups)
        if entry.min_group <= group <= entry.max_group
    ]


def _widest_first(entry: KernelEntry, device: str, row: dict[str, Any]) -> list[Point]:
    """Calls within a row's bounds, widest head dims first; earlier rows may serve some of them.

    What an earlier row takes ends at its own bounds, so those are the only other dims to try.
    """
    rows = plans.load(device, entry.op)[entry.planned]
    dims = [
        sorted({d for d in (row.get(bound, _WIDEST), *(r.get(bound, _WIDEST) for r in rows))
                if d <= row.get(bound, _WIDEST)})
        for bound in ("max_dk", "max_dv")
    ]  # fmt: skip
    pairs = sorted(itertools.product(*dims), key=sum, reverse=True)
    low, high = row.get("min_g", 1), row.get("max_g", entry.max_group)
    groups = dict.fromkeys([*GROUPS, low, *_MORE_GROUPS, high])
    return [
        point
        for point in _legal(entry, pairs, row.get("dtypes", DTYPES), groups)
        if low <= point.group <= high
    ]
