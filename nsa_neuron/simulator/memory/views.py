"""Shape and stride algebra of tensor views (docs/trainium2.md 2.3): pure functions, no storage.

Strides and offsets are in elements. Every function raises `ViewError` with the rule it breaks; the
tensor adds the kernel's line.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Dims = tuple[int, ...]


class ViewError(Exception):
    """A view that cannot exist: rule id, message, offending value, limit, what to write."""

    def __init__(
        self, rule: str, message: str, value: Any = None, limit: Any = None, hint: str = ""
    ) -> None:
        super().__init__(message)
        self.rule = rule
        self.message = message
        self.value = value
        self.limit = limit
        self.hint = hint


@lru_cache
def row_major(shape: Dims) -> Dims:
    """Strides of a dense tensor of this shape."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def normal_dim(dim: Any, ndim: int) -> int:
    """Return `dim` counted from the front."""
    if not isinstance(dim, int) or not -ndim <= dim < ndim:
        raise ViewError("view", "no such dim", dim, f"{-ndim}..{ndim - 1}")
    return dim % ndim


def slice_range(size: int, start: Any, stop: Any, step: Any) -> tuple[int, int, int]:
    """Resolve a slice of a dim of `size` elements.

    Returns:
        start, step and count.

    Raises:
        ViewError: unless 0 <= start < stop <= size and step >= 1 (negative indices count from the
            end). Unlike Python's, a slice past the end is an error: the device has no such bytes.
    """
    step = 1 if step is None else _integer(step, "step")
    first = 0 if start is None else _integer(start, "start")
    last = size if stop is None else _integer(stop, "end")
    first = first + size if first < 0 else first
    last = last + size if last < 0 else last
    if step < 1:
        raise ViewError("index", "the step of a slice must be positive", step, ">= 1")
    if not 0 <= first < last <= size:
        raise ViewError(
            "index", "the slice is empty or leaves the dim", f"{start}:{stop}", f"0..{size}"
        )
    return first, step, -(-(last - first) // step)


def _integer(value: Any, what: str) -> int:
    if type(value) is int:
        return value
    try:
        return int(value.__index__())
    except AttributeError:
        raise ViewError(
            "index",
            f"the {what} of a slice must be an integer known at compile time "
            "(use .ap(scalar_offset=...) or .select() for a run-time one)",
            type(value).__name__,
            "int",
        ) from None


def expand(keys: tuple[Any, ...], ndim: int) -> tuple[Any, ...]:
    """Replace one Ellipsis by full slices."""
    places = [i for i, k in enumerate(keys) if k is Ellipsis]
    if not places:
        return keys
    if len(places) > 1:
        raise ViewError("index", "one Ellipsis per index", len(places), 1)
    missing = ndim - (len(keys) - 1)
    return keys[: places[0]] + (slice(None),) * missing + keys[places[0] + 1 :]


def index_in(item: Any, size: int) -> int:
    """An integer index of a dim, counted from the front."""
    if type(item) is int and 0 <= item < size:
        return item
    try:
        value = int(item.__index__())
    except (AttributeError, TypeError):
        what = "an index is an int, a slice, nl.ds or Ellipsis"
        raise ViewError("index", what, type(item).__name__, "int") from None
    if not -size <= value < size:
        raise ViewError("index", "the index leaves the dim", value, f"0..{size - 1}")
    return value % size


def without_ranges(keys: tuple[Any, ...]) -> str:
    """An index as a kernel writes it, with slices for the ranges that NKI 0.1 indexed with."""
    return ", ".join(_as_slice(k) if isinstance(k, slice | range) else repr(k) for k in keys)


def _as_slice(key: slice | range) -> str:
    first, stop = ("" if n is None else n for n in (key.start, key.stop))
    step = "" if key.step in (None, 1) else f":{key.step}"
    return f"{first}:{stop}{step}"


def permute(shape: Dims, strides: Dims, dims: Sequence[int], fixed: bool) -> tuple[Dims, Dims]:
    """Reorder dims; `fixed` keeps dim 0 outermost (on chip, or after a vector select)."""
    order = tuple(dims)
    if sorted(order) != list(range(len(shape))):
        raise ViewError("view", "dims must be a permutation", order, tuple(range(len(shape))))
    if fixed and order[0] != 0:
        raise ViewError("view", "the partition dim must stay outermost", order, "dims[0] == 0")
    return tuple(shape[d] for d in order), tuple(strides[d] for d in order)


def split(shape: Dims, strides: Dims, dim: int, sizes: Sequence[int]) -> tuple[Dims, Dims]:
    """Split one dim into `sizes`, of which one may be -1."""
    parts = infer(tuple(sizes), shape[dim])
    steps = tuple(s * strides[dim] for s in row_major(parts))
    return shape[:dim] + parts + shape[dim + 1 :], strides[:dim] + steps + strides[dim + 1 :]


def infer(sizes: Dims, total: int) -> Dims:
    """Replace one -1 so that the product is `total`."""
    if sizes.count(-1) > 1:
        raise ViewError("view", "at most one size may be -1", sizes, "one -1")
    known = prod(s for s in sizes if s != -1)
    if -1 in sizes:
        if known <= 0 or total % known:
            raise ViewError("view", "the sizes do not divide the dim", sizes, total)
        sizes = tuple(total // known if s == -1 else s for s in sizes)
    if prod(sizes) != total or any(s < 1 for s in sizes):
        raise ViewError("view", "the element count must stay the same", sizes, total)
    return sizes


def merge(shape: Dims, strides: Dims, first: int, last: int) -> tuple[Dims, Dims]:
    """Merge dims first..last, which must be mutually contiguous."""
    size, stride = 1, None
    for d in range(last, first - 1, -1):
        if shape[d] == 1:
            continue
        if stride is None:
            stride = strides[d]
        elif strides[d] != stride * size:
            raise ViewError(
                "view", f"dims {first}..{last} are not contiguous", strides[first : last + 1]
            )
        size *= shape[d]
    step = strides[last] if stride is None else stride
    new_strides = (*strides[:first], step, *strides[last + 1 :])
    return (*shape[:first], size, *shape[last + 1 :]), new_strides


def reshape(shape: Dims, strides: Dims, new: Dims) -> Dims:
    """Strides that show the same elements in shape `new` without a copy.

    Raises:
        ViewError: where the layout cannot express it.
    """
    out = [0] * len(new)
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    i = 0
    for j in range(len(new)):
        if new[j] == 1:
            continue
        if i >= len(old):
            raise ViewError("view", "the element count must stay the same", new, shape)
    i, j = 0, 0
    while j < len(new):
        if new[j] == 1:
            j += 1
            continue
        size, stride = old[i]
        i += 1
        group, want = [j], new[j]
        run, last = size, stride
        while want != run:
            if want < run:
                j += 1
                group.append(j)
                want *= new[j]
            else:
                size, stride = old[i]
                if last != stride * size:
                    raise ViewError(
                        "view",
                        "the layout cannot express that shape without a copy",
                        f"{shape} with strides {strides}",
                        new,
                    )
                last = stride
                run *= size
                i += 1
        step = last
        for k in reversed(group):
            out[k] = step
            step *= new[k]
        j += 1
    step = 1
    for k in range(len(new) - 1, -1, -1):
        if new[k] == 1:
            out[k] = step
        step = out[k] * new[k]
    return tuple(out)


def rearrange(
    shape: Dims, strides: Dims, src: Sequence[Any], dst: Sequence[Any], sizes: Mapping[str, int]
) -> tuple[Dims, Dims]:
    """Einops-like split, permute and merge; tuples of names are groups."""
    if len(src) != len(shape):
        raise ViewError("view", "the source pattern must name every dim", tuple(src), len(shape))
    names: list[str] = []
    flat_shape: Dims = ()
    flat_strides: Dims = ()
    for item, size, stride in zip(src, shape, strides, strict=True):
        group = (item,) if isinstance(item, str) else tuple(item)
        known = tuple(sizes.get(n, -1) for n in group) if len(group) > 1 else (size,)
        parts = infer(known, size)
        names += group
        flat_shape += parts
        flat_strides += tuple(s * stride for s in row_major(parts))
    groups = [(item,) if isinstance(item, str) else tuple(item) for item in dst]
    wanted = [n for g in groups for n in g]
    if sorted(wanted) != sorted(names) or len(set(names)) != len(names):
        raise ViewError("view", "both patterns must hold the same names once", tuple(dst), names)
    order = [names.index(n) for n in wanted]
    out_shape = tuple(flat_shape[d] for d in order)
    out_strides = tuple(flat_strides[d] for d in order)
    for position, group in enumerate(groups):
        out_shape, out_strides = merge(out_shape, out_strides, position, position + len(group) - 1)
    return out_shape, out_strides


def reinterpret(
    shape: Dims, strides: Dims, offset: int, old: int, new: int, fixed: bool
) -> tuple[Dims, Dims, int]:
    """Shape, strides and offset in elements of `new` bytes instead of `old` bytes."""
    if old == new:
        return shape, strides, offset
    if shape[-1] != 1 and strides[-1] != 1:
        raise ViewError("view", "the last dim must be contiguous to reinterpret it", strides[-1], 1)
    if fixed and len(shape) == 1:
        raise ViewError("view", "the partition dim cannot be reinterpreted", shape)
    if old > new:
        ratio = old // new
        steps = tuple(s * ratio for s in strides[:-1])
        return (*shape[:-1], shape[-1] * ratio), (*steps, 1), offset * ratio
    ratio = new // old
    if shape[-1] % ratio or offset % ratio or any(s % ratio for s in strides[:-1]):
        raise ViewError(
            "view",
            "the last dim, offset and strides must be multiples of the size ratio",
            shape[-1],
            f"multiple of {ratio}",
        )
    steps = tuple(s // ratio for s in strides[:-1])
    return (*shape[:-1], shape[-1] // ratio), (*steps, 1), offset // ratio
