"""Capacity of SBUF, PSUM and HBM, from which tensors are live at the same time.

The compiler places a tensor for its first use and frees it after its last. So a tensor occupies its
bytes from the first instruction that touched it to the last one, in program order. Tensors with
`address=` occupy exactly theirs; those that the compiler places lie where there is room, in SBUF
also beside one another: a tile of at most 64 partitions fits on either half, one of at most 32 on
any quarter (the start partitions an instruction can use). PSUM is shared out in whole banks, since
two accumulation groups in one bank destroy each other.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from ..machine.regions import REGIONS
from ..rules.session import locate, violate
from . import overlap
from .coverage import QUARTERS, Coverage, quarters, quarters_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from ..issue.record import CoreTrace, Run
    from ..machine.trn2 import Machine
    from ..memory.allocation import Allocation
    from ..memory.layout import Form

_LOOKS = 32  # instants looked at one by one before all are swept through


def peak(trace: CoreTrace, buffer: str, machine: Machine) -> tuple[int, list[Allocation]]:
    """Bytes per partition needed at most, and what was live then, largest first.

    PSUM tensors count in whole banks of 2 KiB; HBM has no partitions.
    """
    return _peak(_used(trace.allocations)[buffer], machine)


def _used(allocations: Iterable[Allocation]) -> dict[str, list[Allocation]]:
    """The tensors of each memory that an instruction touched."""
    found: dict[str, list[Allocation]] = {r: [] for r in REGIONS}
    for a in allocations:
        if a.last_use >= 0:
            found[a.buffer].append(a)
    return found


def _peak(used: list[Allocation], machine: Machine) -> tuple[int, list[Allocation]]:
    """`peak` of the tensors of one memory."""
    if not used:
        return 0, []
    tiles = _Tiles(used, machine)
    need, when = tiles.peak()
    there = [used[k] for k in tiles.live_at(when)]
    there.sort(key=lambda a: (-a.pitch_bytes, a.first_use))
    return need, there


class _Tiles:
    """The tensors of one memory: lifetimes, bytes, and the quarters they may lie on."""

    def __init__(self, used: list[Allocation], machine: Machine) -> None:
        self.used = used
        self.machine = machine
        self.first = np.array([a.first_use for a in used])
        self.after = np.array([a.last_use for a in used]) + 1
        forms = [a.form for a in used]
        number = {form: k for k, form in enumerate(dict.fromkeys(forms))}
        alike = np.array([number[form] for form in forms])
        self.size = np.array([_footprint(form, machine) for form in number])[alike]
        self.placed = np.array([form.address is not None for form in number])[alike]
        self.width = np.array([quarters(form, machine) for form in number])[alike]

    def live_at(self, when: int) -> NDArray[np.intp]:
        """Indices of the tensors live before an instruction ends."""
        return np.flatnonzero((self.first <= when) & (self.after > when))

    def peak(self) -> tuple[int, int]:
        """Bytes needed at most, and when.

        No instant needs more than `above` says, so the instants are looked at from the highest on,
        until none left can need more: one look, unless tensors share addresses or halves.
        """
        above = self._bound()
        few = min(_LOOKS, len(above))
        order = np.argpartition(-above, few - 1)
        order[:few] = order[:few][np.argsort(-above[order[:few]])]
        best, when = -1, 0
        for when_ in order[:few].tolist():
            if above[when_] <= best:
                return best, when
            need = self.need(when_)
            if need > best:
                best, when = need, when_
        if len(order) <= few or above[order[few:]].max() <= best:
            return best, when
        swept = self._sweep()
        return max((best, when), (self.need(swept), swept))

    def need(self, when: int) -> int:
        """Bytes needed at an instant: placed tensors, then the compiler's, largest first."""
        there = self.live_at(when)
        fixed = [k for k in there if self.placed[k]]
        loads = [_union(spans) for spans in self._spans(fixed)]
        free = sorted((k for k in there if not self.placed[k]), key=lambda k: -self.size[k])
        for width in (4, 2, 1):
            for k in free:
                if self.width[k] == width:
                    _put(loads, width, int(self.size[k]))
        return max(loads)

    def _spans(self, fixed: Iterable[int]) -> Iterator[list[tuple[int, int]]]:
        """Byte ranges on each quarter."""
        fixed = list(fixed)
        for quarter in range(QUARTERS):
            yield [
                self._span(k) for k in fixed if quarter in quarters_of(self.used[k], self.machine)
            ]

    def _span(self, k: int) -> tuple[int, int]:
        address = self.used[k].address
        assert address is not None
        return address[1], address[1] + int(self.size[k])

    def _bound(self) -> NDArray[np.float64]:
        """What no instant can need more than: placed bytes as if none were shared."""
        share = np.where(self.placed, 1.0, self.width / QUARTERS)
        bytes_ = self.size * share
        change = np.zeros(int(self.after.max()) + 1)
        np.add.at(change, self.first, bytes_)
        np.subtract.at(change, self.after, bytes_)
        live = change.cumsum()
        uneven = [
            int(self.size[~self.placed & (self.width == w)].max(initial=0)) * (1 - w / QUARTERS)
            for w in (1, 2)
        ]
        return np.ceil(live + sum(uneven))

    def _sweep(self) -> int:
        """The instant of the highest need where tensors share addresses, from all of them."""
        starts = [(int(t), 1, k) for k, t in enumerate(self.first)]
        events = sorted(starts + [(int(t), 0, k) for k, t in enumerate(self.after)])
        spans = [self._span(k) for k in range(len(self.used)) if self.placed[k]]
        covers = [Coverage(spans) for _ in range(QUARTERS)]
        users: Counter[tuple[int, int, int]] = Counter()
        area = 0.0
        best, when = -1.0, 0
        for t, start, k in events:
            step = 1 if start else -1
            if self.placed[k]:
                for quarter in quarters_of(self.used[k], self.machine):
                    span = self._span(k)
                    key = (quarter, span[0], span[1])
                    users[key] += step
                    if users[key] == start:
                        covers[quarter].change(*span, step)
            else:
                area += step * float(self.size[k]) * self.width[k] / QUARTERS
            if start:
                need = max(c.covered for c in covers) + area
                if need > best:
                    best, when = need, t
        return when


def _put(loads: list[int], width: int, size: int) -> None:
    """Place a tile on the least loaded quarters that it fits on."""
    groups = [range(q, q + width) for q in range(0, QUARTERS, width)]
    group = min(groups, key=lambda g: max(loads[q] for q in g))
    top = max(loads[q] for q in group) + size
    for quarter in group:
        loads[quarter] = top


def _union(spans: Iterable[tuple[int, int]]) -> int:
    """Bytes that byte ranges [first, last) cover together."""
    total = end = 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def _footprint(form: Form, machine: Machine) -> int:
    if form.buffer == "psum":
        bank = machine.psum_bank_bytes
        return -(-form.pitch_bytes // bank) * bank
    return form.pitch_bytes


def check(trace: CoreTrace, machine: Machine) -> dict[str, int]:
    """Refuse a run that needs more SBUF or PSUM than there is; return the peaks.

    Raises:
        CapacityError: the largest live tensors and the lines that made them.
    """
    peaks, used = {}, _used([a for a in trace.allocations if a.on_chip])
    for buffer, limit in (("sbuf", machine.sbuf_bytes), ("psum", machine.psum_bytes)):
        peaks[buffer], live = _peak(used[buffer], machine)
        if peaks[buffer] > limit:
            violate(
                f"{buffer}-capacity",
                f"{len(live)} tensors in {buffer.upper()} are live at once, in bytes per partition",
                value=peaks[buffer],
                limit=limit,
                table=_rows(live, "bytes per partition"),
                location=locate(live[0].site),
            )
        overlap.check(trace, [a for a in used[buffer] if a.address])
    return peaks


def _rows(live: Iterable[Allocation], unit: str) -> tuple[str, ...]:
    """The largest tensors, those that one line made alike together."""
    alike = Counter((a.pitch_bytes, a.name, a.shape, a.dtype.name, a.site) for a in live)
    return tuple(
        f"{count} x {size:,} {unit}: {name or 'tensor'} {list(shape)} {dtype}, "
        + (f"made at {locate(site)}" if site else "an argument")
        for (size, name, shape, dtype, site), count in list(alike.items())[:8]
    )


def check_hbm(run: Run, machine: Machine) -> int:
    """Refuse a run whose arguments and HBM tensors exceed the stack its cores share; bytes live.

    What two cores share is live all the while: their instructions have no common order.

    Raises:
        CapacityError: the largest tensors and the lines that made them.
    """
    live = list(run.arguments)
    for core in run.cores:
        used = _used([a for a in core.allocations if not a.on_chip])
        shared = used["shared_hbm"]
        live += _peak(shared, machine)[1] if run.lnc == 1 else shared
        live += _peak(used["private_hbm"], machine)[1]
    live.sort(key=lambda a: -a.pitch_bytes)
    total = sum(a.pitch_bytes for a in live)
    if total > machine.hbm_bytes:
        violate(
            "hbm-capacity",
            f"{len(live)} tensors in HBM are live at once, in bytes",
            value=total,
            limit=machine.hbm_bytes,
            table=_rows(live, "bytes"),
            location=locate(next((a.site for a in live if a.site), None)),
        )
    return total
