"""What the cores of one launch share: tensors in shared HBM, meetings, race detection."""

from __future__ import annotations

from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine.dtypes import bits
from ..rules.session import violate, violation
from .ranks import World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ..machine.dtypes import DType
    from ..memory.allocation import Access
    from ..memory.storage import Memory
    from ..rules.options import Options


# A racing write: its view, the racing elements and their bits before it.
Pending = tuple[Any, Any, Any]


class Launch:
    """One call of a kernel on one or two cores.

    Attributes:
        lnc: number of cores.
        races: detector of unsynchronised access to shared HBM, or None with one core.
        meeting: where two cores meet, or None with one core.
        world: the ranks of the run.
        rank: rank of this launch among them.
        ids: fresh numbers of allocations.
    """

    def __init__(
        self, options: Options, lnc: int, world: World | None = None, rank: int = 0
    ) -> None:
        self.options = options
        self.lnc = lnc
        self.world = World(1, lnc) if world is None else world
        self.rank = rank
        self.meeting = Meeting(self.world, rank) if lnc > 1 else None
        self.races = Races() if lnc > 1 and options.data else None
        self.ids = count()
        self._shared: list[Memory] = []
        self._made = [0] * lnc

    def join_shared(self, core: int, shape: tuple[int, ...], dtype: DType) -> Memory | None:
        """The shared tensor the other core already made at this point of the program.

        Both cores run the same program, so the k-th shared_hbm tensor of one is that of the other.
        """
        k = self._made[core]
        if k >= len(self._shared):
            return None
        memory = self._shared[k]
        a = memory.allocation
        if a.shape != shape or a.dtype.name != dtype.name:
            raise violation(
                "lnc-sync",
                "the cores make different shared_hbm tensors at the same point",
                value=(shape, dtype.name),
                limit=(a.shape, a.dtype.name),
                hint="control flow must be identical on both cores",
            )
        self._made[core] += 1
        return memory

    def add_shared(self, core: int, memory: Memory) -> None:
        """Register a shared tensor for the other core to join."""
        if self.lnc > 1:
            self._shared.append(memory)
            self._made[core] += 1


class Message:
    """One half of an exchange: what a core hands over, and what to do with what it gets.

    Attributes:
        payload: for the other core.
        deliver: called with the other core's payload.
        done: True once both were exchanged.
    """

    __slots__ = ("deliver", "done", "payload")

    def __init__(self, payload: Any, deliver: Callable[[Any], None]) -> None:
        self.payload = payload
        self.deliver = deliver
        self.done = False


class Meeting:
    """Where the two cores of a launch synchronise.

    Args:
        world: whose scheduler runs the cores.
        rank: rank of the launch.
    """

    def __init__(self, world: World, rank: int) -> None:
        self._scheduler = world.scheduler
        self._base = rank * world.lnc
        self._posted: dict[tuple[int, Any], deque[Message]] = {}
        self.on_meet: list[Callable[[], None]] = []

    def exchange(
        self, core: int, key: Any, payload: Any, deliver: Callable[[Any], None], what: str
    ) -> Message | None:
        """Hand a payload over and receive the other core's under the same key.

        The k-th exchanges of both cores under one key belong together. This core waits while the
        other one can run; held up elsewhere, it goes on and this one does too.

        Args:
            core: this core.
            key: what both must agree on, such as ("sendrecv", pipe_id).
            payload: for the other core.
            deliver: called with the other's payload, on the thread that comes second.
            what: description for the deadlock report.

        Returns:
            None, or the message still under way.
        """
        waiting = self._posted.get((1 - core, key))
        if waiting:
            other = waiting.popleft()
            other.done = True
            other.deliver(payload)
            deliver(other.payload)
            self.met()
            return None
        message = Message(payload, deliver)
        self._posted.setdefault((core, key), deque()).append(message)
        self._scheduler.park(self._base + core, lambda: message.done, what, soft=True)
        return None if message.done else message

    def wait(self, core: int, message: Message, what: str) -> None:
        """Wait until a message under way has arrived."""
        self._scheduler.park(self._base + core, lambda: message.done, what, soft=False)

    def meet(self, core: int, key: Any, payload: Any, what: str) -> Any:
        """Wait until the other core arrives with the same key; return its payload.

        Args:
            core: this core.
            key: what both must agree on, such as ("sendrecv", pipe_id).
            payload: handed to the other core.
            what: description for the deadlock report.
        """
        base = self._base
        received = self._scheduler.meet(base + core, (base, base + 1), key, payload, what)
        self.met()
        return received[base + 1 - core]

    def take_turns(self, core: int) -> None:
        """Let the other core issue its next instruction."""
        self._scheduler.take_turns(self._base + core)

    def met(self) -> None:
        """Everything before is ordered against everything after, on both cores."""
        for call in self.on_meet:
            call()


# Bits of the race map: who did what since the cores last met.
_READ, _WRITE = (1, 4), (2, 8)


class Races:
    """Finds elements of shared HBM that both cores touch, one of them writing, without meeting."""

    def __init__(self) -> None:
        self._maps: dict[int, NDArray[np.uint8]] = {}
        self._touched: set[int] = set()

    def clear(self) -> None:
        """The cores met: what came before is ordered."""
        for key in self._touched:
            self._maps[key][...] = 0
        self._touched.clear()

    def begin(
        self, core: int, spec: Any, writes: Sequence[Any], reads: Sequence[Any]
    ) -> list[Pending]:
        """Note an instruction's accesses before it runs; refuse a racing read.

        A read of what this core wrote itself since the last meeting is no race. A write that
        races is returned for `end`: storing what is there already (both cores doing the same
        work) is harmless.

        Args:
            core: the core that issues it.
            spec: the instruction.
            writes, reads: static operands; anything but tensors in shared HBM is passed over.
        """
        other = 1 - core
        for tensor in reads:
            view = self._flags(tensor)
            if view is not None:
                clash = ((view & _WRITE[other]) != 0) & ((view & _WRITE[core]) == 0)
                if clash.any():
                    self._refuse(core, spec, tensor, clash)
                view |= np.uint8(_READ[core])
        pending: list[Pending] = []
        for tensor in writes:
            view = self._flags(tensor)
            if view is not None:
                clash = (view & (_WRITE[other] | _READ[other])) != 0
                if clash.any():
                    array = tensor.array()
                    if clash.shape != array.shape:
                        clash = np.ones(array.shape, np.bool_)
                    pending.append((tensor, clash, bits(array)[clash]))
                view |= np.uint8(_WRITE[core])
        return pending

    def end(self, core: int, spec: Any, pending: list[Pending]) -> None:
        """Refuse racing writes that changed something."""
        for tensor, clash, before in pending:
            if not np.array_equal(bits(tensor.array())[clash], before):
                self._refuse(core, spec, tensor, clash)

    def _flags(self, tensor: Any) -> NDArray[np.uint8] | None:
        """The race map as an operand sees it; its hull where the element size differs."""
        memory = getattr(tensor, "memory", None)
        if memory is None or memory.allocation.buffer != "shared_hbm":
            return None
        access: Access = tensor.access()
        a = access.allocation
        flags = self._maps.get(a.id)
        if flags is None:
            flags = self._maps[a.id] = np.zeros(a.pitch_bytes // a.dtype.itemsize, np.uint8)
        self._touched.add(a.id)
        layout, size = access.layout, a.dtype.itemsize
        if layout.dtype.itemsize == size:
            return np.ndarray(layout.shape, np.uint8, flags, access.start, layout.strides)
        return flags[access.lo // size : -(-access.hi // size)]

    def _refuse(self, core: int, spec: Any, tensor: Any, clash: NDArray[np.bool_]) -> None:
        a = tensor.memory.allocation
        where = tuple(int(i[0]) for i in clash.nonzero())
        violate(
            "lnc-race",
            f"core {core} and core {1 - core} both touch shared tensor {a.name or a.shape} "
            f"without meeting, first at {where} of this view",
            instruction=spec.opcode,
            operand=a.name or "tensor",
            value=where,
            hint="nisa.core_barrier(tensor, (0, 1)) between the two accesses",
        )
