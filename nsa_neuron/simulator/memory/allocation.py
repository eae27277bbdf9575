"""What a record keeps of a tensor and of an operand: their places, without data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import CodeType

    from ..machine.dtypes import DType
    from .layout import Form, Layout, Place


class Allocation:
    """What is known of one tensor's storage without its data.

    Attributes:
        id: number in the order of creation, per launch.
        core: index of the owning core.
        buffer: "sbuf", "psum", "private_hbm" or "shared_hbm".
        on_chip: True for SBUF and PSUM.
        shape: dims of the tensor as made; dim 0 is the partition dim on chip.
        dtype: element type.
        name: the kernel's name for it, or "".
        address: (partition, byte) where the kernel chose it, else None.
        created: index of the next instruction at the time it was made.
        first_use: index of the first instruction that touched it, -1 before any.
        last_use: index of the last instruction that touched it, -1 before any.
        closed: True after the hardware loop in whose body it was made.
        site: code object and instruction offset of the kernel line that made it.
        role: "input", "output" (handed back; known at the end of the run) or "scratch".
        written: True once an instruction writes it.
        pitch_bytes: bytes per partition on chip; of the whole tensor in HBM.
        form: what it shares with tensors made alike.
    """

    __slots__ = (
        "address",
        "buffer",
        "closed",
        "core",
        "created",
        "dtype",
        "first_use",
        "form",
        "id",
        "last_use",
        "name",
        "on_chip",
        "partitions",
        "pitch_bytes",
        "role",
        "shape",
        "site",
        "written",
    )

    id: int
    core: int
    form: Form
    buffer: str
    shape: tuple[int, ...]
    dtype: DType
    address: tuple[int, int] | None
    on_chip: bool
    partitions: int
    pitch_bytes: int
    name: str
    created: int
    first_use: int
    last_use: int
    closed: bool
    written: bool
    site: tuple[CodeType, int] | None
    role: str

    @property
    def partition(self) -> int:
        """Start partition on the machine; 0 where the compiler chooses."""
        return self.address[0] if self.address else 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.partitions * self.pitch_bytes


class Access:
    """One operand of one instruction: an allocation and the bytes of it that are touched.

    A record holds millions, so all but the allocation is the place's; see `Place` for what the
    properties mean.

    Attributes:
        allocation: metadata of the storage (no data).
        place: what of it is touched; one object for tensors made alike.
    """

    __slots__ = ("allocation", "place")

    allocation: Allocation
    place: Place

    @property
    def layout(self) -> Layout:
        """Interned layout."""
        return self.place.layout

    @property
    def start(self) -> int:
        """Element offset of the view."""
        return self.place.start

    @property
    def dynamic(self) -> bool:
        """True when the place came from a run-time index."""
        return self.place.dynamic

    @property
    def p0(self) -> int:
        """First partition in the allocation; 0 in HBM."""
        return self.place.p0

    @property
    def p1(self) -> int:
        """Partition after the last; 1 in HBM."""
        return self.place.p1

    @property
    def lo(self) -> int:
        """First byte in each partition; of the tensor in HBM. Hulls where not `layout.dense`."""
        return self.place.lo

    @property
    def hi(self) -> int:
        """Byte after the last."""
        return self.place.hi

    @property
    def inside(self) -> bool:
        """True when the access stays in its tensor."""
        return self.place.inside

    @property
    def nbytes(self) -> int:
        """Bytes moved by this access."""
        return self.layout.size * self.layout.dtype.itemsize

    @property
    def partition(self) -> int:
        """First partition of the machine that is touched."""
        return self.p0 + self.allocation.partition

    def overlaps(self, other: Access) -> bool:
        """Tell whether the byte ranges (hulls, for strided patterns) meet.

        Addressed tensors of one memory are compared by machine address.
        """
        a, b = self.allocation, other.allocation
        p, q = self.place, other.place
        if a is b:
            return p.p0 < q.p1 and q.p0 < p.p1 and p.lo < q.hi and q.lo < p.hi
        if a.buffer != b.buffer or a.address is None or b.address is None:
            return False
        (pa, fa), (pb, fb) = a.address, b.address
        return (
            p.p0 + pa < q.p1 + pb
            and q.p0 + pb < p.p1 + pa
            and p.lo + fa < q.hi + fb
            and q.lo + fb < p.hi + fa
        )


# Python makes an object of a class without `__init__` in half the time, and a run makes millions.
def allocation_of(
    form: Form,
    id: int,
    core: int,
    name: str,
    created: int,
    site: tuple[CodeType, int] | None,
    role: str,
) -> Allocation:
    """A tensor that nothing has touched yet."""
    new = Allocation()
    new.form = form
    new.buffer = form.buffer
    new.shape = form.shape
    new.dtype = form.dtype
    new.address = form.address
    new.on_chip = form.on_chip
    new.partitions = form.partitions
    new.pitch_bytes = form.pitch_bytes
    new.id = id
    new.core = core
    new.name = name
    new.created = created
    new.first_use = new.last_use = -1
    new.closed = new.written = False
    new.site = site
    new.role = role
    return new


def access_at(allocation: Allocation, place: Place) -> Access:
    """The access of a known place."""
    new = Access()
    new.allocation = allocation
    new.place = place
    return new
