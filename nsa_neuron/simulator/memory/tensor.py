"""NkiTensor: a view of a storage; making one never copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..machine.dtypes import resolve
from ..rules.registers import NkiScalar, RunTimeScalar
from ..rules.session import current_session
from ..rules.versions import require
from . import views
from .allocation import Access
from .nki_object import NKIObject
from .tensor_base import BaseTensor, Dynamic, same_width
from .views import ViewError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .storage import Memory

_INDEX = object()  # after an index, where a slice has its end

__all__ = ["Dynamic", "DynamicSlice", "NKIObject", "NkiTensor", "resolved", "whole"]


class DynamicSlice:
    """`nl.ds(start, size)`: elements start .. start + size - 1 of a dim."""

    __slots__ = ("size", "start")

    def __init__(self, start: Any, size: Any) -> None:
        self.start = start
        self.size = size

    def __repr__(self) -> str:
        return f"nl.ds({self.start}, {self.size})"


class NkiTensor(BaseTensor):
    """A view of a tensor, and the methods that make others of the same storage."""

    __slots__ = ()

    def _fixed(self) -> bool:
        """True when dim 0 must stay where it is: partitions, or rows of a vector select."""
        return self.on_chip or (self.dynamic is not None and self.dynamic.kind == "vector")

    def _free_dim(self, dim: Any, what: str) -> int:
        index = views.normal_dim(dim, self.ndim)
        if index == 0 and self._fixed():
            raise ViewError("view", f"{what} cannot act on the partition dim", dim, "dim > 0")
        return index

    def __getitem__(self, key: Any) -> NkiTensor:
        """Every dim as `:`, `first:stop` or an index: looked up; all else: `_general`.

        Kernels slice for nearly every operand, and tensors made alike in the same few ways, so
        what comes of a slice is kept with the place that it is taken of.
        """
        access = self._access
        if access is None:
            if self.dynamic is not None or 0 in self.shape:
                return self._general(key)
            access = self.access()
        known = _asked(key)
        if known is None:
            return self._general(key)
        sliced = access.place.views
        found = sliced.get(known)
        if found is None:
            found = self._sliced(key)
            if found is None:
                return self._general(key)
            sliced[known] = found
        new: NkiTensor = NkiTensor()
        new.shape, new.strides, new.offset, place = found
        new.dtype = self.dtype
        new.memory = self.memory
        new.name = self.name
        new.dynamic = new._array = None
        new._access = own = Access()  # as `access_at`: every slice would pay for the call
        own.allocation = access.allocation
        own.place = place
        return new

    def _sliced(self, key: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Shape, strides, offset and place of a slice inside the tensor; None for all others."""
        shape = self.shape
        if len(key) != len(shape):
            return None
        offset = self.offset
        out_shape: list[int] = []
        out_strides: list[int] = []
        for item, size, stride in zip(key, shape, self.strides, strict=True):
            if type(item) is slice:
                first, stop = (0, size) if item.start is None else (item.start, item.stop)
                if not 0 <= first < stop <= size:
                    return None
                offset += first * stride
                out_shape.append(stop - first)
                out_strides.append(stride)
            elif 0 <= item < size and (out_shape or not self.on_chip):
                offset += item * stride
            else:
                return None
        if len(out_shape) < 2 and (not out_shape or self.on_chip):
            return None
        view = self._view(tuple(out_shape), tuple(out_strides), offset)
        return view.shape, view.strides, offset, view.access().place

    def _general(self, key: Any) -> NkiTensor:
        keys = key if type(key) is tuple else (key,)
        try:
            return self._getitem(keys)
        except ViewError as error:
            if any(isinstance(k, range) for k in keys):
                error.hint = f"{self.name or 't'}[{views.without_ranges(keys)}]"
            raise self._error(error, "[]") from None

    def _getitem(self, keys: tuple[Any, ...]) -> NkiTensor:
        shape, strides, offset = self.shape, self.strides, self.offset
        ndim = len(shape)
        if len(keys) > ndim:
            keys = views.expand(keys, ndim)
            if len(keys) > ndim:
                raise ViewError("index", "too many indices", len(keys), ndim)
        dynamic = self.dynamic
        fixed = self.memory.allocation.on_chip
        out_shape: list[int] = []
        out_strides: list[int] = []
        last_int = -1
        for d, item in enumerate(keys):
            size, stride = shape[d], strides[d]
            kind = type(item)
            if kind is slice:
                first, stop, step = item.start, item.stop, item.step
                if first is None and stop is None and step is None:
                    out_shape.append(size)
                    out_strides.append(stride)
                    continue
                plain = step is None and type(first) is int and type(stop) is int
                if plain and 0 <= first < stop <= size:
                    step, count = 1, stop - first
                else:
                    first, step, count = views.slice_range(size, first, stop, step)
            elif kind is DynamicSlice:
                begin = views._integer(item.start, "start")
                if item.size == 0 and 0 <= begin <= size:  # a core without a share; never used
                    first, step, count = begin, 1, 0
                else:
                    first, step, count = views.slice_range(size, begin, begin + item.size, 1)
            elif item is Ellipsis:
                return self._getitem(views.expand(keys, ndim))
            elif kind is not int and isinstance(item, RunTimeScalar | NkiTensor):
                what = "a run-time index needs .select() or .ap(scalar_offset=...)"
                raise ViewError("index", what, kind.__name__, "int")
            else:
                first = views.index_in(item, size)
                step, count = 1, 1
                if not (d == 0 and fixed):
                    if dynamic is not None:
                        self._guard(d)
                    offset += first * stride
                    last_int = d
                    continue
            if dynamic is not None and (first or step != 1 or count != size):
                self._guard(d)
            offset += first * stride
            out_shape.append(count)
            out_strides.append(stride * step)
        out_shape.extend(shape[len(keys) :])
        out_strides.extend(strides[len(keys) :])
        if len(out_shape) < (2 if fixed else 1):
            out_shape.append(1)
            out_strides.append(strides[last_int] if last_int >= 0 else 1)
        return self._view(tuple(out_shape), tuple(out_strides), offset)

    def _guard(self, dim: int) -> None:
        """Refuse to slice or select the dim that a vector select froze."""
        if self.dynamic is not None and self.dynamic.kind == "vector" and dim == 0:
            raise ViewError("view", "the dim of a vector_select cannot be sliced or selected", dim)

    @property
    def data(self) -> NkiTensor:
        """The tensor: what `data` is to a grid; NKI 0.7."""
        require("NkiTensor.data", "tiles")
        return self

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        """Elements start .. end - 1 of one dim, every `step`-th."""
        try:
            d = views.normal_dim(dim, self.ndim)
            self._guard(d)
            first, step, count = views.slice_range(self.shape[d], start, end, step)
            stride = self.strides[d]
            return self._view(
                (*self.shape[:d], count, *self.shape[d + 1 :]),
                (*self.strides[:d], stride * step, *self.strides[d + 1 :]),
                self.offset + first * stride,
            )
        except ViewError as error:
            raise self._error(error, "slice") from None

    def select(self, dim: int, index: Any) -> NkiTensor:
        """Drop one dim at a static or run-time index."""
        try:
            d = views.normal_dim(dim, self.ndim)
            self._guard(d)
            shape = self.shape[:d] + self.shape[d + 1 :]
            strides = self.strides[:d] + self.strides[d + 1 :]
            if isinstance(index, RunTimeScalar | NkiTensor):
                if self.dynamic is not None:
                    raise ViewError("view", "one dynamic select per view", "second", 1)
                if d == 0 and self.on_chip:
                    raise ViewError("view", "a dynamic select cannot act on partitions", dim)
                _scalar_index(index, self.on_chip)
                dynamic = Dynamic("scalar", index, self.strides[d], d, self.shape[d])
                return self._view(shape or (1,), strides or (1,), dynamic=dynamic)
            first = views.index_in(index, self.shape[d])
            if d == 0 and self.on_chip:
                return self.slice(0, first, first + 1)
            return self._view(shape or (1,), strides or (1,), self.offset + first * self.strides[d])
        except ViewError as error:
            raise self._error(error, "select") from None

    def vector_select(self, dim: int, vector_offset: NkiTensor) -> NkiTensor:
        """Row i of the result is row `vector_offset[i]` of this HBM tensor."""
        try:
            if dim != 0:
                raise ViewError("view", "vector_select acts on dim 0 only", dim, 0)
            if self.on_chip:
                raise ViewError("view", "vector_select needs a tensor in HBM", self.buffer.name)
            if self.dynamic is not None:
                raise ViewError("view", "one dynamic select per view", "second", 1)
            rows = _vector_index(vector_offset)
            if vector_offset.size != rows:
                raise ViewError(
                    "view",
                    "vector_offset has one index per partition",
                    vector_offset.shape,
                    "(P, 1)",
                )
            dynamic = Dynamic("vector", vector_offset, self.strides[0], 0, self.shape[0])
            return self._view((rows, *self.shape[1:]), self.strides, dynamic=dynamic)
        except ViewError as error:
            raise self._error(error, "vector_select") from None

    def permute(self, dims: Sequence[int]) -> NkiTensor:
        """Reorder the dims."""
        try:
            return self._view(*views.permute(self.shape, self.strides, dims, self._fixed()))
        except ViewError as error:
            raise self._error(error, "permute") from None

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        """Repeat a size-1 dim by a stride of 0."""
        try:
            d = self._free_dim(dim, "broadcast")
            if self.shape[d] != 1:
                raise ViewError("view", "only a dim of size 1 can be broadcast", self.shape[d], 1)
            if size < 1:
                raise ViewError("view", "the size must be positive", size, ">= 1")
            return self._view(
                (*self.shape[:d], size, *self.shape[d + 1 :]),
                (*self.strides[:d], 0, *self.strides[d + 1 :]),
            )
        except ViewError as error:
            raise self._error(error, "broadcast") from None

    def expand_dim(self, dim: int) -> NkiTensor:
        """Insert a dim of size 1."""
        try:
            ndim = self.ndim
            if not isinstance(dim, int) or not -ndim - 1 <= dim <= ndim:
                raise ViewError("view", "no such place for a dim", dim, f"0..{ndim}")
            d = dim % (ndim + 1)
            if d == 0 and self._fixed():
                raise ViewError("view", "nothing goes before the partition dim", dim, "dim > 0")
            step = self.strides[d] * self.shape[d] if d < ndim else 1
            return self._view(
                (*self.shape[:d], 1, *self.shape[d:]), (*self.strides[:d], step, *self.strides[d:])
            )
        except ViewError as error:
            raise self._error(error, "expand_dim") from None

    def squeeze_dim(self, dim: int) -> NkiTensor:
        """Remove a dim of size 1."""
        try:
            d = self._free_dim(dim, "squeeze_dim")
            if self.shape[d] != 1:
                raise ViewError("view", "only a dim of size 1 can be removed", self.shape[d], 1)
            return self._view(
                self.shape[:d] + self.shape[d + 1 :], self.strides[:d] + self.strides[d + 1 :]
            )
        except ViewError as error:
            raise self._error(error, "squeeze_dim") from None

    def reshape_dim(self, dim: int, shape: Sequence[int]) -> NkiTensor:
        """Split one dim; one size may be -1."""
        try:
            d = views.normal_dim(dim, self.ndim)
            if d == 0 and self._fixed() and len(tuple(shape)) > 1:
                raise ViewError("view", "the partition dim cannot be split", tuple(shape))
            return self._view(*views.split(self.shape, self.strides, d, shape))
        except ViewError as error:
            raise self._error(error, "reshape_dim") from None

    def flatten_dims(self, start_dim: int, end_dim: int) -> NkiTensor:
        """Merge dims start_dim..end_dim, both included."""
        try:
            first = self._free_dim(start_dim, "flatten_dims")
            last = views.normal_dim(end_dim, self.ndim)
            if last < first:
                raise ViewError("view", "end_dim is before start_dim", end_dim, f">= {first}")
            return self._view(*views.merge(self.shape, self.strides, first, last))
        except ViewError as error:
            raise self._error(error, "flatten_dims") from None

    def reshape(self, shape: Any, *more: int) -> NkiTensor:
        """Show the same elements in another shape, without a copy."""
        new = (shape, *more) if isinstance(shape, int) else tuple(shape)
        try:
            new = views.infer(new, self.size)
            if self._fixed():
                if new[0] != self.shape[0]:
                    raise ViewError("view", "the partition dim must be kept", new, self.shape)
                free = views.reshape(self.shape[1:], self.strides[1:], new[1:])
                return self._view(new, (self.strides[0], *free))
            return self._view(new, views.reshape(self.shape, self.strides, new))
        except ViewError as error:
            raise self._error(error, "reshape") from None

    def rearrange(
        self, src_pattern: Any, dst_pattern: Any, fixed_sizes: dict[str, int] | None = None
    ) -> NkiTensor:
        """Split, permute and merge dims by name."""
        try:
            shape, strides = views.rearrange(
                self.shape, self.strides, src_pattern, dst_pattern, fixed_sizes or {}
            )
            if self._fixed() and (shape[0] != self.shape[0] or strides[0] != self.strides[0]):
                raise ViewError("view", "the partition dim must stay outermost", shape, self.shape)
            return self._view(shape, strides)
        except ViewError as error:
            raise self._error(error, "rearrange") from None

    def view(self, dtype: Any) -> NkiTensor:
        """The same bytes as another dtype."""
        try:
            new = resolve(dtype)
            if self.dynamic is not None:
                raise ViewError("view", "view(dtype) is not possible after a dynamic select")
            same_width(self, new)
            shape, strides, offset = views.reinterpret(
                self.shape,
                self.strides,
                self.offset,
                self.dtype.itemsize,
                new.itemsize,
                self.on_chip,
            )
            return self._view(shape, strides, offset, new)
        except ViewError as error:
            raise self._error(error, "view") from None

    reinterpret_cast = view

    def indirect(self, index: NkiTensor, num_elem: int | None = None) -> NkiTensor:
        """Tensor indirection exists from NeuronCore-v4 on."""
        raise self._error(
            ViewError("generation", ".indirect() needs NeuronCore-v4", "trn2", "trn3"), "indirect"
        )

    def ap(
        self,
        pattern: Any,
        offset: int | None = None,
        scalar_offset: Any = None,
        vector_offset: NkiTensor | None = None,
        indirect_dim: int = 0,
        dtype: Any = None,
    ) -> NkiTensor:
        """An explicit access pattern [[step, count], ...] over the storage.

        Args:
            pattern: outermost first, in elements of `dtype`; on chip the first pair is the
                partition pair.
            offset: elements from the start of the storage; None keeps this view's.
            scalar_offset: (1, 1) SBUF tensor, register or NkiScalar; moves the start by its value
                times the stride of `indirect_dim` of this tensor.
            vector_offset: (P, 1) SBUF tensor of row numbers; HBM tensors and DMA only.
            indirect_dim: dim of this tensor that the index counts.
            dtype: reinterpret the storage.

        Raises:
            SimulationError: rules "view", "partition-step", "free-dims".
        """
        try:
            return self._ap(pattern, offset, scalar_offset, vector_offset, indirect_dim, dtype)
        except ViewError as error:
            raise self._error(error, "ap") from None

    def _ap(
        self, pattern: Any, offset: Any, scalar: Any, vector: Any, indirect_dim: int, dtype: Any
    ) -> NkiTensor:
        new = self.dtype if dtype is None else resolve(dtype)
        old_size, new_size = self.dtype.itemsize, new.itemsize
        pairs = [tuple(p) for p in pattern]
        if any(len(p) != 2 or p[1] < 1 for p in pairs) or not pairs:
            raise ViewError("view", "a pattern is [[step, count], ...] with counts >= 1", pattern)
        strides, shape = (tuple(x) for x in zip(*pairs, strict=True))
        start = self.offset * old_size // new_size if offset is None else offset
        if offset is not None and self.offset:
            _warn_of_offset(self.offset, offset)
        if self.on_chip:
            same_width(self, new)
            pitch = self.memory.allocation.pitch_bytes // new_size
            if shape[0] > 1 and strides[0] != pitch:
                raise ViewError(
                    "partition-step",
                    "the partition step must be the storage's free element count",
                    strides[0],
                    pitch,
                    f"[[{pitch}, {shape[0]}], ...]: of a slice, too, steps count the storage",
                )
            if len(pairs) > 5:
                raise ViewError("free-dims", "at most 5 pairs on chip", len(pairs), 5)
            strides = (pitch, *strides[1:])
        if scalar is not None and vector is not None:
            raise ViewError("view", "scalar_offset and vector_offset exclude each other", "both")
        dynamic = None
        if scalar is not None or vector is not None:
            d = views.normal_dim(indirect_dim, self.ndim)
            step = self.strides[d] * old_size // new_size
            if scalar is not None:
                _scalar_index(scalar, self.on_chip)
                dynamic = Dynamic("scalar", scalar, step, d, None)
            else:
                if self.on_chip or d != 0:
                    raise ViewError(
                        "view", "vector_offset needs an HBM tensor and indirect_dim=0", d, 0
                    )
                _vector_index(vector)
                rows = vector.size
                if rows < shape[0]:
                    raise ViewError(
                        "view", "fewer indices than rows of the pattern", rows, shape[0]
                    )
                dynamic = Dynamic("vector", vector, step, 0, None)
        view = self._view(shape, strides, start, new)
        view.dynamic = dynamic
        return view


def _asked(key: Any) -> tuple[Any, ...] | None:
    """A key of plain integers as something to look up; None for all others."""
    if type(key) is not tuple:
        return None
    index: Any = _INDEX
    if len(key) == 2:
        row, column = key
    elif len(key) == 3:
        row, index, column = key
        if type(index) is not int:
            return _asked_of_each(key)
    else:
        return _asked_of_each(key)
    if type(row) is not slice or type(column) is not slice:
        return _asked_of_each(key)
    a, b, c, d = row.start, row.stop, column.start, column.stop
    # 1.0 would be found as 1.
    if not ((type(a) is int and type(b) is int) or (a is None and b is None)):
        return None
    if not ((type(c) is int and type(d) is int) or (c is None and d is None)):
        return None
    if row.step is not None or column.step is not None:
        return None
    return a, b, index, c, d


def _asked_of_each(key: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """`_asked`, dim by dim."""
    asked: list[Any] = []
    for item in key:
        if type(item) is slice:
            first, stop = item.start, item.stop
            plain = type(first) is int and type(stop) is int
            if item.step is not None or not (plain or (first is None and stop is None)):
                return None
            asked.append(first)
            asked.append(stop)
        elif type(item) is int:
            asked.append(item)
            asked.append(_INDEX)
        else:
            return None
    return tuple(asked)


def whole(memory: Memory, name: str) -> NkiTensor:
    """The view of all of a memory, in the shape it was made with."""
    allocation = memory.allocation
    form = allocation.form
    new: NkiTensor = NkiTensor()
    new.shape = form.shape
    new.strides = form.strides
    new.offset = 0
    new.dtype = form.dtype
    new.memory = memory
    new.name = name
    new.dynamic = new._array = None
    place = form.whole
    if place is None:
        new._access = None
    else:
        new._access = own = Access()  # as `access_at`: every tensor would pay for the call
        own.allocation = allocation
        own.place = place
    return new


def _warn_of_offset(own: int, given: int) -> None:
    """Two of AWS's pages disagree about an offset given for a view that has one."""
    session = current_session()
    if session is not None:
        session.warn(
            f".ap(offset={given}) of a view that starts at element {own}: counted from the start "
            "of the storage here and in AWS's nki-aps.rst, from the view's by AWS's page of "
            "NkiTensor.ap; call .ap of the whole tensor"
        )


def _scalar_index(index: Any, on_chip: bool) -> None:
    if isinstance(index, RunTimeScalar):
        if on_chip and isinstance(index, NkiScalar) and index.dtype == "int64":
            raise ViewError(
                "scalar", "an offset into SBUF or PSUM has 32 bits", "int64", "int32",
                "load it from an int32 tensor",
            )  # fmt: skip
        return
    if not isinstance(index, NkiTensor):
        raise ViewError("view", "an index is a register or a (1, 1) tensor", type(index).__name__)
    if index.size != 1 or not index.dtype.is_integer or index.memory.allocation.buffer != "sbuf":
        raise ViewError(
            "view",
            "a scalar index is one integer in SBUF",
            f"{index.shape} {index.dtype} {index.memory.allocation.buffer}",
            "(1, 1) integer sbuf",
        )


def _vector_index(index: Any) -> int:
    if not isinstance(index, NkiTensor):
        raise ViewError("view", "vector_offset is an SBUF tensor", type(index).__name__)
    if not index.dtype.is_integer or index.memory.allocation.buffer != "sbuf":
        raise ViewError(
            "view",
            "vector_offset holds integers in SBUF",
            f"{index.dtype} {index.memory.allocation.buffer}",
            "integer sbuf",
        )
    rows: int = index.shape[0]
    return rows


def resolved(tensor: NkiTensor, value: int) -> NkiTensor:
    """The static view that a scalar-dynamic view denotes for one index value."""
    assert tensor.dynamic is not None
    view = tensor._view(tensor.shape, tensor.strides, tensor.offset + value * tensor.dynamic.stride)
    view.dynamic = None
    return view
