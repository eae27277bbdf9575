"""Storage of HBM, SBUF and PSUM: bytes that live as long as they are used."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from .written import Written

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..machine.dtypes import DType
    from ..machine.trn2 import Machine
    from .allocation import Access, Allocation


class Memory:
    """The bytes of one allocation (or of a part of an arena) and what of them is written.

    Attributes:
        allocation: metadata.
        buffer: flat uint8 array that owns the bytes; None in a shape-only run.
        base: byte of `buffer` where partition 0 starts.
        pitch: bytes of `buffer` from one partition to the next.
        written: elements written so far.
        matmul: elements whose last write was a matmul of the current group; PSUM only.
        foreign: elements whose last write was not a matmul; PSUM only.
        siblings: memories of one arena, whose bytes may be the same as these.
        verdict: made by a function of `nki.language` that compares: `assert` may be asked of it.
    """

    __slots__ = (
        "__weakref__",
        "allocation",
        "base",
        "buffer",
        "foreign",
        "matmul",
        "pitch",
        "precise",
        "siblings",
        "verdict",
        "written",
    )

    def __init__(
        self,
        allocation: Allocation,
        buffer: NDArray[np.uint8] | None,
        base: int,
        pitch: int,
        precise: bool,
        full: bool = False,
        siblings: list[Memory] | None = None,
    ) -> None:
        self.allocation = allocation
        self.buffer = buffer
        self.base = base
        self.pitch = pitch
        self.precise = precise
        self.siblings = siblings
        self.verdict = False
        shape, itemsize = allocation.shape, allocation.dtype.itemsize
        if allocation.on_chip:
            rows, width = shape[0], allocation.pitch_bytes
        else:
            width = (shape[-1] if shape else 1) * itemsize
            rows = allocation.pitch_bytes // width if width else 0
        self.written = Written(rows, width, itemsize, full)
        self.matmul: Written | None = None
        self.foreign: Written | None = None

    def group(self) -> Written:
        """The elements written by matmuls of the current accumulation group."""
        if self.matmul is None:
            self.matmul = Written(self.written.rows, self.written.width, self.written.granule)
        return self.matmul

    def array(
        self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, dtype: DType
    ) -> NDArray[Any]:
        """The elements of a view, without a copy.

        Args:
            shape: dims of the view.
            strides: elements of `dtype`.
            offset: elements of `dtype`.
            dtype: element type of the view.
        """
        kind = dtype.storage(self.precise)
        size = kind.itemsize
        if self.allocation.on_chip:
            width = self.allocation.pitch_bytes // dtype.itemsize
            row, column = divmod(offset, width)
            place = self.base + row * self.pitch + column * size
            steps = (strides[0] // width * self.pitch, *[s * size for s in strides[1:]])
        else:
            place = self.base + offset * size
            steps = tuple([s * size for s in strides])
        return np.ndarray(shape, kind, self.buffer, place, steps)

    def readable(self, access: Access) -> bool:
        """Tell whether all elements of an access were written, here or through an alias."""
        if self.written.full or self.written.covers(access):
            return True
        if not self.siblings or self.allocation.address is None:
            return False
        mask = self.written.mask(access).copy()
        for other in self.siblings:
            if other is not self:
                _mark_alias(mask, access, other)
        return bool(mask.all())


class AbsentMemory(Memory):
    """Memory of a shape-only run: no bytes; the rest is made where somebody asks for it.

    Made without arguments: whoever makes one sets `allocation` and `precise`.
    """

    __slots__ = ()
    __init__ = object.__init__  # Python runs it without a frame

    def __getattr__(self, name: str) -> Any:
        """Called for slots that are not set: set them all."""
        if name not in Memory.__slots__:
            raise AttributeError(name)
        super().__init__(self.allocation, None, 0, self.allocation.pitch_bytes, self.precise)
        return getattr(self, name)


def _mark_alias(mask: NDArray[np.bool_], access: Access, other: Memory) -> None:
    """Set in `mask` the elements of `access` that another memory of the arena has written."""
    here, there = access.allocation.address, other.allocation.address
    assert here is not None and there is not None
    written = other.written
    apart = (
        access.p1 + here[0] <= there[0]
        or there[0] + other.allocation.partitions <= access.p0 + here[0]
        or access.hi + here[1] <= there[1]
        or there[1] + other.allocation.pitch_bytes <= access.lo + here[1]
    )
    if apart or written.empty:
        return
    layout, itemsize = access.layout, access.layout.dtype.itemsize
    row, column = divmod(access.start, layout.pitch)
    missing = np.argwhere(~mask)
    p = here[0] + row + missing[:, 0] * layout.step - there[0]
    free = column + missing[:, 1:] @ np.array(layout.strides[1:], np.int64)
    first = here[1] + free * itemsize - there[1]
    inside = (p >= 0) & (p < written.rows) & (first >= 0) & (first + itemsize <= written.width)
    missing, p, first = missing[inside], p[inside], first[inside]
    if not written.full:
        written._materialise()
        assert written._map is not None
        granules = (first[:, None] + np.arange(itemsize)) // written.granule
        missing = missing[written._map[p[:, None], granules].all(axis=1)]
    mask[tuple(missing.T)] = True


class Pool:
    """Byte buffers by size: a kernel makes the same few tile sizes thousands of times.

    A buffer comes back when the last array that sees it is gone: by a weak reference, since how
    many references an object has at some line is another number in another Python.
    """

    def __init__(self, keep_bytes: int = 64 << 20) -> None:
        self._free: dict[int, list[_Bytes]] = {}
        self._kept = 0
        self._limit = keep_bytes
        self._lent: dict[int, _Lent] = {}

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Return a buffer of exactly `nbytes` bytes with undefined contents."""
        bucket = self._free.get(nbytes)
        if bucket:
            self._kept -= nbytes
            owner = bucket.pop()
        else:
            owner = _Bytes(nbytes, np.uint8)
        buffer: NDArray[np.uint8] = np.ndarray(nbytes, np.uint8, owner)
        lent = _Lent(buffer, self._returned)
        lent.owner = owner
        self._lent[id(lent)] = lent
        return buffer

    def _returned(self, lent: _Lent) -> None:
        """Takes bytes back that nobody sees any more, unless enough is kept."""
        del self._lent[id(lent)]
        nbytes = lent.owner.nbytes
        if self._kept + nbytes <= self._limit:
            self._free.setdefault(nbytes, []).append(lent.owner)
            self._kept += nbytes


class _Bytes(np.ndarray[Any, np.dtype[np.uint8]]):
    """Bytes that a pool owns; uninitialised.

    NumPy makes the owner of the bytes the base of every view, past the views between them, but
    stops where an array is of another class: so every view of a buffer keeps the buffer.
    """


class _Lent(weakref.ref["NDArray[np.uint8]"]):
    """A buffer that somebody sees, and the bytes behind it."""

    __slots__ = ("owner",)
    owner: _Bytes


class Arena:
    """One SBUF or PSUM that tensors with an explicit address share."""

    def __init__(self, machine: Machine, buffer: str) -> None:
        self.limit = machine.sbuf_bytes if buffer == "sbuf" else machine.psum_bytes
        self.partitions = machine.partitions
        self.memories: list[Memory] = []
        self._bytes: NDArray[np.uint8] | None = None

    def bytes(self, scale: int) -> NDArray[np.uint8]:
        """The arena's bytes; pages are committed by the system as they are touched.

        Args:
            scale: host bytes per device byte: 1, or 4 where narrow floats are held as fp32.
        """
        if self._bytes is None:
            self._bytes = np.zeros(self.partitions * self.limit * scale, np.uint8)
        return self._bytes
