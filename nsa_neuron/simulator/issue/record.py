"""What a run leaves behind: every instruction with its operands' places, and the tensors made."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..rules.session import locate

if TYPE_CHECKING:
    from types import CodeType

    from ..memory.allocation import Access, Allocation
    from ..rules.errors import Location, SimulationError
    from .spec import Plan


class Instruction:
    """One issued instruction; no `__init__`, without which Python makes it in half the time.

    Attributes:
        index: position in the core's program order.
        opcode: name of the `nisa` function.
        engine: "tensor", "vector", "scalar", "gpsimd", "sync" or "dma".
        writes, reads: operands' places, in the order of the spec's roles; scalars are left out.
        params: compile-time parameters, a named tuple of the instruction's module (or ()).
        name: the kernel's `name=`, or None.
        site: code object and instruction offset of the kernel line.
        after: explicit producers (`depends_on`, schedules).
        extra: what only the run knows (DMA rows moved, loop iteration, partner core), or None.
        plan: the checked signature, one object for all instructions that look the same.
    """

    __slots__ = (
        "after",
        "engine",
        "extra",
        "index",
        "name",
        "opcode",
        "params",
        "plan",
        "reads",
        "site",
        "writes",
    )

    index: int
    opcode: str
    engine: str
    writes: tuple[Access, ...]
    reads: tuple[Access, ...]
    params: Any
    name: str | None
    site: tuple[CodeType, int] | None
    after: tuple[Instruction, ...]
    extra: Any
    plan: Plan

    def depends_on(self, *producers: Instruction) -> Instruction:
        """Add ordering edges from `producers` to this instruction."""
        self.after = (*self.after, *producers)
        return self

    @property
    def location(self) -> Location | None:
        """The kernel line that issued it."""
        return locate(self.site)

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(a.nbytes for a in self.writes)

    def __repr__(self) -> str:
        return f"<{self.index} {self.engine}.{self.opcode} at {self.location}>"


@dataclass
class LoopMark:
    """An iteration of a hardware loop.

    Attributes:
        loop: number of the loop, one each time that it is entered.
        iteration: from 0.
        first, last: its instructions, last exclusive.
        made: its allocations, likewise.
        waits: loads of the registers that decide whether it runs.
    """

    loop: int
    iteration: int
    first: int
    last: int
    made: tuple[int, int]
    waits: tuple[Instruction, ...] = ()


@dataclass
class CoreTrace:
    """What one core did.

    Attributes:
        core: index of the core in the launch.
        instructions: in program order.
        allocations: every tensor made by this core (arguments are in `Run.arguments`).
        loops: iterations of hardware loops, each noted at its end.
        trips: how many iterations a loop has of which not all were run.
        relaxed: rules broken but relaxed by name.
        warnings: doubtful but legal use, one line each.
        indexed: tensors read for the address of an operand, which does not count as their use.
    """

    core: int
    instructions: list[Instruction] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    loops: list[LoopMark] = field(default_factory=list)
    trips: dict[int, int] = field(default_factory=dict)
    relaxed: list[SimulationError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    indexed: set[Allocation] = field(default_factory=set)

    @property
    def dma_bytes(self) -> int:
        """Bytes written by DMA."""
        return sum(i.nbytes for i in self.instructions if i.engine == "dma")


@dataclass
class Run:
    """The record of one launch.

    Attributes:
        kernel: name of the kernel.
        lnc: number of cores.
        cores: one trace per core.
        arguments: storage of the tensor arguments.
        data: False for a shape-only run.
        peaks: per core, bytes per partition live at most: {"sbuf": n, "psum": n}; set at the end.
        target: machine name.
    """

    kernel: str
    lnc: int
    cores: list[CoreTrace]
    arguments: list[Allocation] = field(default_factory=list)
    data: bool = True
    peaks: list[dict[str, int]] = field(default_factory=list)
    target: str = "trn2"

    @property
    def instructions(self) -> list[Instruction]:
        """All instructions, core after core."""
        return [*chain.from_iterable(core.instructions for core in self.cores)]

    @property
    def dma_bytes(self) -> int:
        """Bytes written by DMA on all cores."""
        return sum(c.dma_bytes for c in self.cores)
