"""Tensors with `address=` that destroy each other's data.

Two tensors may share bytes: as aliases, or one after the other (AWS's allocators rotate a few
buffers through many tensors made beforehand). What is refused is reading through one tensor bytes
that it wrote and another tensor has overwritten since.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from ..rules.session import locate, violate

if TYPE_CHECKING:
    from ..issue.record import CoreTrace, Instruction
    from ..memory.allocation import Access, Allocation

_STRETCHES = 64
# Partitions [p0, p1) and bytes [lo, hi) of the machine.
Box = tuple[int, int, int, int]


def check(trace: CoreTrace, placed: list[Allocation]) -> None:
    """Refuse reads of data that a tensor at an overlapping address has overwritten.

    Args:
        trace: what a core did.
        placed: the tensors of one memory that have an address and were used.

    Raises:
        CapacityError: rule "address-overlap".
    """
    rivals = _rivals(placed)
    if not rivals:
        return
    state = {a: _Contents() for a in rivals}
    for instruction in trace.instructions:
        for access in instruction.reads:
            contents = state.get(access.allocation)
            if contents is not None and contents.lost:
                by = contents.reads(_box(access))
                if by is not None:
                    _refuse(instruction, access.allocation, by)
                    del state[access.allocation]
        for access in instruction.writes:
            a = access.allocation
            if a not in rivals:
                continue
            box = _box(access)
            if a in state:
                state[a].write(box)
            for rival in rivals[a]:
                if rival in state:
                    state[rival].overwritten(box, a)


class _Contents:
    """What of one tensor was written through it, and which parts others have overwritten."""

    __slots__ = ("lost", "mine")

    def __init__(self) -> None:
        self.mine: set[Box] = set()
        self.lost: dict[Box, Allocation] = {}

    def write(self, box: Box) -> None:
        self.mine = {b for b in self.mine if not _inside(b, box)} | {box}
        if self.lost:
            self.lost = {b: by for b, by in self.lost.items() if not _inside(b, box)}

    def overwritten(self, box: Box, by: Allocation) -> None:
        for mine in self.mine:
            shared = _common(mine, box)
            if shared is not None:
                self.lost[shared] = by

    def reads(self, box: Box) -> Allocation | None:
        return next((by for b, by in self.lost.items() if _common(b, box)), None)


def _rivals(placed: list[Allocation]) -> dict[Allocation, list[Allocation]]:
    """For each tensor those that share bytes with it and whose lifetimes meet its own.

    Tensors are looked for by stretches of bytes, so those that lie apart never meet here.
    """
    found: dict[Allocation, list[Allocation]] = {}
    placed.sort(key=lambda a: a.first_use)
    width = max(1, max((_whole(a)[3] for a in placed), default=0) // _STRETCHES)
    stretches: defaultdict[int, list[Allocation]] = defaultdict(list)
    for a in placed:
        box = _whole(a)
        near: dict[Allocation, None] = {}
        for k in range(box[2] // width, (box[3] - 1) // width + 1):
            active = stretches[k] = [b for b in stretches[k] if b.last_use > a.first_use]
            near.update(dict.fromkeys(active))
            active.append(a)
        for b in near:
            if _common(box, _whole(b)) is not None:
                found.setdefault(a, []).append(b)
                found.setdefault(b, []).append(a)
    return found


def _whole(a: Allocation) -> Box:
    assert a.address is not None
    partition, byte = a.address
    return partition, partition + a.partitions, byte, byte + a.pitch_bytes


def _box(access: Access) -> Box:
    address = access.allocation.address
    assert address is not None
    partition, byte = address
    return partition + access.p0, partition + access.p1, byte + access.lo, byte + access.hi


def _common(a: Box, b: Box) -> Box | None:
    p0, p1, lo, hi = max(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), min(a[3], b[3])
    return (p0, p1, lo, hi) if p0 < p1 and lo < hi else None


def _inside(a: Box, b: Box) -> bool:
    return b[0] <= a[0] and a[1] <= b[1] and b[2] <= a[2] and a[3] <= b[3]


def _refuse(reader: Instruction, a: Allocation, by: Allocation) -> None:
    violate(
        "address-overlap",
        f"{a.name or a.shape} at {a.address} is read after {by.name or by.shape} at {by.address} "
        "overwrote a part of it",
        instruction=reader.opcode,
        value=a.address,
        location=reader.location,
        table=(
            f"{a.name or 'the one'} was made at {locate(a.site)}",
            f"{by.name or 'the other'} was made at {locate(by.site)}",
        ),
    )
