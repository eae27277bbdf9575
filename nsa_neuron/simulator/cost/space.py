"""Room in SBUF and PSUM that the compiler shares out among tensors."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..run.coverage import QUARTERS, quarters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..machine.trn2 import Machine
    from ..memory.layout import Form


class Sizes(dict["Form", int]):
    """Bytes in whole granules by form; less where a tile leaves quarters of the partitions free."""

    def __init__(self, granule: int, machine: Machine) -> None:
        super().__init__()
        self.granule = granule
        self.machine = machine

    def __missing__(self, form: Form) -> int:
        bytes_ = -(-form.pitch_bytes // self.granule) * self.granule
        size = self[form] = -(-bytes_ * quarters(form, self.machine) // QUARTERS)
        return size


class Space:
    """Bytes per partition of one memory that the compiler shares out, on average over partitions.

    Args:
        limit: what there is.
        granule: a PSUM bank, else 1.
        machine: sizes.
    """

    def __init__(self, limit: int, granule: int, machine: Machine) -> None:
        self.free = limit
        self.size = Sizes(granule, machine)
        # Bytes, their last users, and who knows of those that may yet come.
        self.released: deque[tuple[int, Sequence[int], Callable[[], list[int]] | None]] = deque()

    def reclaim(self) -> list[int]:
        """Make up for taking more than there was; return the instructions that must have ended."""
        users: list[int] = []
        free, released = self.free, self.released
        while free < 0 and released:
            size, known, others = released.popleft()
            free += size
            if free > 0:  # the rest can be had once the same instructions have ended
                released.appendleft((free, known, others))
                free = 0
            users += known
            if others is not None:
                users += others()
        self.free = free
        return users
