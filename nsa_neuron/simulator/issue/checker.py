"""The checks of an instruction that depend only on what its operands look like.

A spec's `check` runs once per signature (shapes, strides, dtypes, buffers, start partitions,
parameters); its result, the plan, is reused by every later instruction of that signature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..machine.dtypes import int64
from ..memory.tensor import NkiTensor
from ..rules.errors import SimulationError
from ..rules.registers import RunTimeScalar
from ..rules.session import locate, violation
from .spec import Plan
from .timing import GpSimd, Vector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..machine.dtypes import DType
    from ..machine.trn2 import Machine
    from ..memory.allocation import Access
    from ..memory.layout import Layout
    from .spec import Spec
    from .timing import Formula


class Operand:
    """One operand during a check.

    Attributes:
        role: its name in the signature.
        tensor: the view, or None for a scalar, register or missing operand.
        value: what was passed.
        p: partitions (1 in HBM); n: elements per partition; p0: start partition on the machine.
    """

    __slots__ = ("access", "layout", "n", "p", "p0", "role", "tensor", "value")

    def __init__(self, role: str, value: Any) -> None:
        self.role = role
        self.value = value
        self.tensor = value if type(value) is NkiTensor else None
        if self.tensor is not None:
            self.access: Access = self.tensor.access()
            self.layout: Layout = self.access.layout
            self.p, self.n = self.layout.partitions, self.layout.free
            self.p0 = self.access.partition

    def __bool__(self) -> bool:
        return self.tensor is not None

    @property
    def dtype(self) -> DType:
        """Element type; tensors only."""
        return self.layout.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Dims; tensors only."""
        return self.layout.shape

    @property
    def buffer(self) -> str:
        """Memory; "" for a scalar."""
        return self.access.allocation.buffer if self.tensor is not None else ""

    def describe(self) -> str:
        """One line of the operand table."""
        if self.tensor is None:
            return f"{self.role} = {self.value!r}"
        a = self.access.allocation
        place = f" partitions {self.p0}..{self.p0 + self.p - 1}" if a.on_chip else ""
        made = locate(a.site)
        at = f", made at {made.filename}:{made.lineno}" if made else ""
        name = f" {self.tensor.name!r}" if self.tensor.name else ""
        return f"{self.role}{name}: {list(self.shape)} {self.dtype} in {a.buffer}{place}{at}"


class Checker:
    """The view a spec's check has of an instruction; indexing by role gives the operand."""

    def __init__(
        self,
        spec: Spec,
        machine: Machine,
        relax: frozenset[str],
        writes: Any,
        reads: Any,
        params: tuple[Any, ...],
    ) -> None:
        self.spec = spec
        self.machine = machine
        self.params = params
        self.relax = relax
        self.violations: list[SimulationError] = []
        self.formula: Formula | None = None  # of this signature, where it is not the spec's
        self.operands = {
            role: Operand(role, value)
            for role, value in zip((*spec.writes, *spec.reads), (*writes, *reads), strict=True)
        }

    def __getitem__(self, role: str) -> Operand:
        return self.operands[role]

    def fail(self, rule: str, message: str, operand: str = "", **details: Any) -> None:
        """Break a rule: raise, or note it where it is relaxed."""
        error = violation(
            rule,
            message,
            instruction=self.spec.opcode,
            operand=operand or None,
            table=tuple(o.describe() for o in self.operands.values()),
            **details,
        )
        if rule not in self.relax:
            raise error
        self.violations.append(error)

    def require(
        self, condition: bool, rule: str, message: str, operand: str = "", **details: Any
    ) -> None:
        """Break a rule unless the condition holds."""
        if not condition:
            self.fail(rule, message, operand, **details)

    def tensors(self, *roles: str) -> None:
        """Require operands to be tensors."""
        for role in roles:
            o = self[role]
            if not o:
                given = "nothing" if o.value is None else type(o.value).__name__
                hint = "nl.load or nisa.dma_copy it into an SBUF tensor first"
                raise violation(
                    "usage",
                    f"must be a tensor, got {given}",
                    instruction=self.spec.opcode,
                    operand=role,
                    value=given,
                    limit="NkiTensor",
                    hint=hint,
                )

    def buffers(self, role: str, *allowed: str) -> None:
        """Require an operand (if it is a tensor) to be in one of these memories."""
        o = self[role]
        if o:
            self.require(
                o.buffer in allowed,
                "buffer",
                f"cannot be in {o.buffer}",
                role,
                value=o.buffer,
                limit=allowed,
            )

    def dtypes(self, role: str, allowed: Iterable[DType]) -> None:
        """Require an operand (if it is a tensor) to be of one of these dtypes."""
        o = self[role]
        if o:
            names = tuple(d.name for d in allowed)
            self.require(
                o.dtype.name in names,
                "dtype",
                f"cannot be {o.dtype}",
                role,
                value=o.dtype.name,
                limit=names,
            )

    def same_partitions(self, *roles: str) -> None:
        """Require equal partition counts."""
        first = self[roles[0]]
        for role in roles[1:]:
            o = self[role]
            if o:
                self.require(
                    o.p == first.p,
                    "partition-match",
                    f"has {o.p} partitions, {first.role} has {first.p}",
                    role,
                    value=o.p,
                    limit=first.p,
                )

    def same_elements(self, *roles: str) -> None:
        """Require equal element counts per partition."""
        first = self[roles[0]]
        for role in roles[1:]:
            o = self[role]
            if o:
                self.require(
                    o.n == first.n,
                    "element-count",
                    f"has {o.n} elements per partition, {first.role} has {first.n}",
                    role,
                    value=o.n,
                    limit=first.n,
                )

    def column(self, role: str) -> None:
        """Require a tensor operand to be (P, 1) with the partitions of the first write."""
        o = self[role]
        if o:
            self.require(
                o.n == 1,
                "shape",
                "must have one element per partition",
                role,
                value=o.shape,
                limit="(P, 1)",
            )
            self.same_partitions(self.spec.writes[0], role)

    def composed(self, engine: str) -> str:
        """Note that no engine has the operation, so that its time is a guess; return `engine`."""
        self.formula = GpSimd.COMPOSED if engine == "gpsimd" else Vector.COMPOSED
        return engine

    def choose_engine(self, asked: Any, default: str, *allowed: str) -> str:
        """The engine of `engine=`, or `default` for unknown.

        Args:
            asked: member of `nisa.engine`.
            default: engine of `engine.unknown`.
            allowed: engines the instruction runs on.
        """
        name: str = getattr(asked, "name", str(asked))
        if name == "unknown":
            return default
        self.require(
            name in allowed, "engine", f"does not run on {name}", value=name, limit=allowed
        )
        return name


def make_plan(
    spec: Spec,
    machine: Machine,
    relax: frozenset[str],
    writes: Any,
    reads: Any,
    params: tuple[Any, ...],
) -> Plan:
    """Run the general checks and the spec's own; return the plan to reuse."""
    checker = Checker(spec, machine, relax, writes, reads, params)
    for role in spec.writes:
        if role not in spec.optional or checker[role].value is not None:
            checker.tensors(role)
    if not spec.dma:
        for operand in checker.operands.values():
            if operand and operand.access.allocation.on_chip:
                _check_placement(checker, operand)
    if not spec.wide:
        _check_width(checker)
    try:
        result = spec.check(checker)
        engine, payload = result if isinstance(result, tuple) else (result, None)
        formula = checker.formula or spec.timing.on(engine)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        if not checker.violations or isinstance(error, SimulationError):
            raise
        # What a relaxed rule forbids may be beyond what the rest of the check can look at.
        raise checker.violations[-1] from error
    registers = sum(isinstance(value, RunTimeScalar) for value in reads)
    accumulator = spec.timing.accumulator and sum(value is not None for value in writes) > 1
    inside = all(o.access.place.inside for o in checker.operands.values() if o)
    return Plan(
        engine, spec.timing, formula, accumulator, payload, checker.violations, registers, inside
    )


def _check_width(c: Checker) -> None:
    """Engines compute with elements of at most 32 bits."""
    for o in c.operands.values():
        c.require(
            not o or o.dtype is not int64,
            "dtype",
            "no engine computes with int64: it can be copied, loaded as a scalar and stored",
            o.role,
            value="int64",
            limit="32 bits",
            hint="nl.int32, or nisa.scalar_load and + - * on the NkiScalar",
        )


def _check_placement(c: Checker, o: Operand) -> None:
    """Partition count, step, start and free pattern of an on-chip operand."""
    m = c.machine
    c.require(
        1 <= o.p <= m.partitions,
        "partition-limit",
        f"uses {o.p} partitions",
        o.role,
        value=o.p,
        limit=m.partitions,
    )
    c.require(
        o.p == 1 or o.layout.step == 1,
        "partition-step",
        f"steps {o.layout.step} partitions",
        o.role,
        value=o.layout.step,
        limit=1,
    )
    step = (
        m.quadrant
        if o.p <= m.quadrant
        else 2 * m.quadrant
        if o.p <= 2 * m.quadrant
        else (m.partitions)
    )
    allowed = tuple(range(0, m.partitions, step))
    c.require(
        o.p0 in allowed,
        "start-partition",
        f"{o.p} partitions cannot start at {o.p0}",
        o.role,
        value=o.p0,
        limit=allowed,
    )
    dims = _merged(o.layout)
    c.require(
        len(dims) <= m.max_free_dims,
        "free-dims",
        f"needs {len(dims)} free dims",
        o.role,
        value=len(dims),
        limit=m.max_free_dims,
    )
    for size, stride in dims:
        c.require(
            size <= m.max_dim_size and -m.max_dim_stride - 1 <= stride <= m.max_dim_stride,
            "free-dim-range",
            f"steps {stride} elements {size} times in one free dim",
            o.role,
            value=(size, stride),
            limit=f"{m.max_dim_size} times, {m.max_dim_stride} elements",
        )


def _merged(layout: Layout) -> list[tuple[int, int]]:
    """(count, stride) of the free dims after contiguous ones are merged and size 1 dropped."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(layout.shape[1:], layout.strides[1:], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == stride * size:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims
