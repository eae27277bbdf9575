"""Where an operand lies: interned layouts and the byte ranges that dependencies are made of.

A kernel's loop makes tensors of a few forms and looks at them in a few ways, so what does not
depend on the tensor itself is worked out once per form (`Form`, `Place`).
"""

from __future__ import annotations

from copy import copy
from math import prod
from typing import TYPE_CHECKING, Any

from .views import row_major

if TYPE_CHECKING:
    from ..machine.dtypes import DType

Shape = tuple[int, ...]
ON_CHIP = ("sbuf", "psum")


class Layout:
    """Shape, strides and dtype of an operand, without its place; interned, so `is` is equality.

    Attributes:
        shape: dims; on chip dim 0 is the partition dim.
        strides: elements of `dtype`; on chip strides[0] counts partitions times `pitch`.
        dtype: element type.
        pitch: elements of `dtype` per partition; 0 in HBM, which has no partitions.
        partitions: shape[0] on chip, 1 in HBM.
        free: elements per partition (all elements in HBM).
        size: number of elements.
        low, high: first and last element offset of the free pattern, relative to its start.
        dense: True when the free pattern covers [low, high] exactly once.
        step: distance in partitions between successive rows (0 for a broadcast).
    """

    __slots__ = (
        "dense",
        "dtype",
        "free",
        "high",
        "low",
        "partitions",
        "pitch",
        "shape",
        "size",
        "step",
        "strides",
    )

    def __init__(self, shape: Shape, strides: Shape, dtype: DType, pitch: int) -> None:
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.pitch = pitch
        self.size = prod(shape)
        self.partitions = shape[0] if pitch else 1
        self.step = strides[0] // pitch if pitch else 0
        inner = list(zip(shape, strides, strict=True))[1 if pitch else 0 :]
        self.free = prod(n for n, _ in inner)
        self.low = sum((n - 1) * s for n, s in inner if s < 0)
        self.high = sum((n - 1) * s for n, s in inner if s > 0)
        self.dense = self._is_dense(inner)

    def _is_dense(self, inner: list[tuple[int, int]]) -> bool:
        if self.high - self.low + 1 != self.free:
            return False
        expected = 1
        for step, count in sorted((abs(s), n) for n, s in inner if n > 1):
            if step != expected:
                return False
            expected *= count
        return True


_LAYOUTS: dict[tuple[Shape, Shape, DType, int], Layout] = {}


def layout_of(shape: Shape, strides: Shape, dtype: DType, pitch: int) -> Layout:
    """Return the interned layout of these dims."""
    key = (shape, strides, dtype, pitch)
    found = _LAYOUTS.get(key)
    if found is None:
        found = _LAYOUTS[key] = Layout(shape, strides, dtype, pitch)
    return found


_NOWHERE = (0, 0)
_SIGNATURES: dict[tuple[Layout, str, tuple[int, int], bool, bool], object] = {}


class Place:
    """Where in a tensor an operand lies, whichever tensor: one object for all made alike.

    Attributes:
        layout: interned layout.
        p0, p1: partition range [p0, p1) in the allocation; [0, 1) in HBM.
        lo, hi: byte range [lo, hi) in each partition; in the whole tensor for HBM. Exact when
            `layout.dense`, otherwise the hull of the pattern.
        start: element offset of the view.
        dynamic: True when the place came from a run-time index.
        inside: True when the access stays in its tensor.
        signature: stands for what cached checks depend on; equal ones are one object, so that a
            lookup hashes it at once.
        views: shape, strides, offset and place of the slices that were taken of it.
    """

    __slots__ = (
        "dynamic",
        "hi",
        "inside",
        "layout",
        "lo",
        "p0",
        "p1",
        "signature",
        "start",
        "views",
    )

    def __init__(self, form: Form, layout: Layout, start: int, dynamic: bool) -> None:
        self.layout = layout
        self.start = start
        self.dynamic = dynamic
        self.views: dict[tuple[Any, ...], tuple[Shape, Shape, int, Place]] = {}
        itemsize = layout.dtype.itemsize
        if layout.pitch:
            p0, column = divmod(start, layout.pitch)
            p1 = p0 + (layout.partitions - 1) * layout.step + 1
            lo = (column + layout.low) * itemsize
            hi = (column + layout.high + 1) * itemsize
            first, byte = form.address or (0, 0)
            # Which bank a matmul writes depends on the byte, whoever's tensor begins where.
            spot = first + p0, byte + lo if form.buffer == "psum" else 0
        else:
            p0, p1 = 0, 1
            lo = (start + layout.low) * itemsize
            hi = (start + layout.high + 1) * itemsize
            spot = _NOWHERE
        self.p0, self.p1, self.lo, self.hi = p0, p1, lo, hi
        self.inside = lo >= 0 and hi <= form.pitch_bytes and p0 >= 0 and p1 <= form.partitions
        key = (layout, form.buffer, spot, dynamic, self.inside)
        self.signature = _SIGNATURES.get(key) or _SIGNATURES.setdefault(key, object())

    def anywhere(self, form: Form) -> Place:
        """The same pattern, but as far as bytes go all of the tensor."""
        new = copy(self)
        new.p0, new.p1, new.lo, new.hi, new.inside = 0, form.partitions, 0, form.pitch_bytes, True
        return new


class Form:
    """What tensors made alike have in common; a loop makes the same few again and again.

    Attributes:
        buffer, shape, dtype, address, on_chip, partitions, pitch_bytes: as of `Allocation`.
        strides: of the whole tensor, in elements.
        places: places of operands, by layout or by view, as they are first met.
        whole: the place of the tensor as it was made, once it was met.
    """

    __slots__ = (
        "address",
        "buffer",
        "dtype",
        "on_chip",
        "partitions",
        "pitch_bytes",
        "places",
        "shape",
        "strides",
        "whole",
    )

    def __init__(
        self, buffer: str, shape: Shape, dtype: DType, address: tuple[int, int] | None
    ) -> None:
        self.buffer = buffer
        self.shape = shape
        self.strides = row_major(shape)
        self.dtype = dtype
        self.address = address
        self.on_chip = on_chip = buffer in ON_CHIP
        self.partitions = shape[0] if on_chip else 1
        self.pitch_bytes = prod(shape[1:] if on_chip else shape) * dtype.itemsize
        self.places: dict[object, Place] = {}
        self.whole: Place | None = None

    def place(self, layout: Layout, start: int, dynamic: bool) -> Place:
        """The place of a layout at an element offset."""
        key = (layout, start, dynamic)
        found = self.places.get(key)
        if found is None:
            found = self.places[key] = Place(self, layout, start, dynamic)
        return found
