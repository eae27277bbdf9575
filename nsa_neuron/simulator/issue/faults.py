"""Checks outside a plan: new tensors, and what depends on addresses and data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..memory.written import Written
from ..rules.session import locate, violate, violation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..machine.trn2 import Machine
    from ..memory.allocation import Access, Allocation
    from ..memory.storage import Memory
    from ..memory.tensor import NkiTensor
    from .spec import Spec


def check_shape(shape: Any, buffer: str, machine: Machine) -> tuple[int, ...]:
    """Return the dims of a new tensor as a tuple of positive ints."""
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    converted = False
    for d in dims:
        if type(d) is int and d > 0:
            continue
        if not hasattr(d, "__index__") or isinstance(d, bool) or int(d) < 1:
            raise violation("shape", "dims are positive integers", operand="shape", value=dims)
        converted = True
    if converted:
        dims = tuple([int(d) for d in dims])
    if buffer in ("sbuf", "psum"):
        if len(dims) < 2:
            raise violation(
                "on-chip-rank",
                f"a tensor in {buffer} has a partition and a free dim",
                operand="shape",
                value=dims,
                limit=">= 2 dims",
            )
        if dims[0] > machine.partitions:
            violate(
                "partition-limit",
                f"a tensor in {buffer} has at most 128 partitions",
                operand="shape",
                value=dims[0],
                limit=machine.partitions,
            )
    return dims


def check_name(spec: Spec, name: Any) -> None:
    """Refuse a `name=` that is no string."""
    if not isinstance(name, str):
        raise violation(
            "usage",
            "name= is a string",
            instruction=spec.opcode,
            operand="name",
            value=name,
            limit="str",
        )


def check_address(allocation: Allocation, machine: Machine) -> None:
    """Refuse an explicit address that leaves the memory or starts inside a PSUM bank."""
    if not allocation.on_chip:
        raise violation(
            "address",
            "only SBUF and PSUM tensors take an address",
            operand="address",
            value=allocation.address,
        )
    assert allocation.address is not None
    partition, byte = allocation.address
    limit = machine.sbuf_bytes if allocation.buffer == "sbuf" else machine.psum_bytes
    inside = 0 <= partition and partition + allocation.partitions <= machine.partitions
    if not inside or byte < 0 or byte + allocation.pitch_bytes > limit:
        raise violation(
            "address",
            f"{allocation.shape} {allocation.dtype} does not fit there",
            operand="address",
            value=allocation.address,
            limit=f"{machine.partitions} partitions, {limit} bytes",
        )


def check_fits_hbm(allocation: Allocation, machine: Machine) -> None:
    """Refuse at once, before any memory is asked for, a tensor larger than an HBM stack."""
    if not allocation.on_chip and allocation.pitch_bytes > machine.hbm_bytes:
        raise violation(
            "hbm-capacity",
            f"{allocation.shape} {allocation.dtype} is larger than an HBM stack",
            operand=allocation.name or "shape",
            value=allocation.pitch_bytes,
            limit=machine.hbm_bytes,
        )


def misplaced(spec: Spec, accesses: Iterable[Access]) -> None:
    """Break the rules of accesses to tensors that are no more, or that leave their tensor."""
    for access in accesses:
        if access.allocation.closed:
            _out_of_scope(spec, access)
        if not access.place.inside:
            _out_of_bounds(spec, access)


def _out_of_bounds(spec: Spec, access: Access) -> None:
    """Break rule "bounds" for an access that leaves its tensor."""
    a = access.allocation
    violate(
        "bounds",
        "the access pattern leaves the tensor",
        instruction=spec.opcode,
        operand=a.name or "operand",
        value=f"partitions {access.p0}..{access.p1 - 1}, bytes {access.lo}..{access.hi - 1}",
        limit=f"{a.partitions} partitions, {a.pitch_bytes} bytes",
    )


def _out_of_scope(spec: Spec, access: Access) -> None:
    """Break rule "loop-scope" for a tensor made in the body of a hardware loop that has ended."""
    a = access.allocation
    made = locate(a.site)
    violate(
        "loop-scope",
        f"the tensor was made in the body of a hardware loop, at {made}",
        instruction=spec.opcode,
        operand=a.name or "operand",
        hint="make it before the loop",
    )


def uninitialized(spec: Spec, writes: Any, reads: Any, tensor: NkiTensor) -> None:
    """Break rule "uninitialized-read": name the first element nothing wrote."""
    roles = dict(zip((*spec.writes, *spec.reads), (*writes, *reads), strict=False))
    role = next((r for r, t in roles.items() if t is tensor and r in spec.reads), tensor.name)
    mask = tensor.memory.written.mask(tensor.access())
    first = tuple(int(i[0]) for i in (~mask).nonzero())
    made = locate(tensor.memory.allocation.site)
    violate(
        "uninitialized-read",
        f"{int((~mask).sum())} of {mask.size} elements were never written, first {first}",
        instruction=spec.opcode,
        operand=role or tensor.name,
        value=first,
        table=(f"{tensor!r} made at {made}",),
    )


def mark_foreign(memory: Memory, access: Access) -> None:
    """Note a PSUM write by another engine than PE: it ends the accumulation there."""
    if memory.matmul is not None:
        memory.matmul.remove(access)
    if memory.foreign is None:
        w = memory.written
        memory.foreign = Written(w.rows, w.width, memory.allocation.dtype.itemsize)
    memory.foreign.add(access)
