"""Which elements of a storage have been written, exactly, at the price of a few rectangles.

A tile is nearly always filled by rectangles that join up (columns left to right, rows top to
bottom), so up to `MAX_RECTS` disjoint-or-joined rectangles are kept; only other patterns need a
map, of one byte per element, which is dropped once it is full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .allocation import Access

Rect = tuple[int, int, int, int]  # p0, p1, lo, hi: partitions and bytes, half open
MAX_RECTS = 6


def _join(a: Rect, b: Rect) -> Rect | None:
    """The union of two rectangles where it is one, else None."""
    ap0, ap1, al, ah = a
    bp0, bp1, bl, bh = b
    if ap0 <= bp0 and bp1 <= ap1:
        if al <= bl and bh <= ah:
            return a
        if ap0 == bp0 and ap1 == bp1 and bl <= ah and al <= bh:
            return ap0, ap1, min(al, bl), max(ah, bh)
    if bp0 <= ap0 and ap1 <= bp1 and bl <= al and ah <= bh:
        return b
    if al == bl and ah == bh and bp0 <= ap1 and ap0 <= bp1:
        return min(ap0, bp0), max(ap1, bp1), al, ah
    return None


class Written:
    """The set of written bytes of a storage of `rows` rows by `width` bytes.

    Attributes:
        full: True once every element is written; nothing else is kept then.
        rows, width: the storage as a grid: partitions by bytes on chip; in HBM all leading dims
            by the bytes of the last.
    """

    __slots__ = ("_map", "_rects", "_since", "full", "granule", "rows", "width")

    def __init__(self, rows: int, width: int, granule: int, full: bool = False) -> None:
        self.rows = rows
        self.width = width
        self.granule = granule
        self.full = full
        self._rects: list[Rect] = []
        self._map: NDArray[np.bool_] | None = None
        self._since = 0

    @property
    def empty(self) -> bool:
        """True when nothing has been written."""
        return not self.full and not self._rects and self._map is None

    def add(self, access: Access) -> None:
        """Mark the elements of an access as written."""
        if self.full:
            return
        rect = self._rect(access) if self._map is None else None
        if rect is not None:
            self._add_rect(rect)
            return
        self._view(access)[...] = True
        self._since += access.nbytes
        if self._since >= self.rows * self.width:
            self._since = 0
            if self._map is not None and bool(self._map.all()):
                self.fill()

    def add_mask(self, access: Access, mask: NDArray[np.bool_]) -> None:
        """Mark the elements of an access where `mask`, of as many elements, is set."""
        if self.full:
            return
        if mask.all():
            self.add(access)
            return
        view = self._view(access)
        shaped = mask.reshape(access.layout.shape)
        view |= shaped[..., None] if view.ndim > shaped.ndim else shaped

    def fill(self) -> None:
        """Mark everything as written."""
        self.full = True
        self._rects = []
        self._map = None

    def remove(self, access: Access) -> None:
        """Unmark the elements of an access (used for accumulation groups)."""
        if self.empty:
            return
        rect = self._rect(access)
        if rect is not None and self._map is None and not self.full:
            kept = [r for r in self._rects if _join(rect, r) != rect]
            if all(_disjoint(rect, r) for r in kept):
                self._rects = kept
                return
        self._materialise()
        self._view(access)[...] = False

    def covers(self, access: Access) -> bool:
        """Tell whether every element of an access is written."""
        if self.full:
            return True
        if self._map is None:
            if not self._rects:
                return False
            rect = self._rect(access)
            if rect is not None:
                if any(_join(r, rect) == r for r in self._rects):
                    return True
                if len(self._rects) == 1:
                    return False
        return bool(self._view(access).all())

    def touches(self, access: Access) -> bool:
        """Tell whether any element of an access is written."""
        if self.full:
            return True
        if self._map is None:
            if not self._rects:
                return False
            rect = self._rect(access)
            if rect is not None:
                return not all(_disjoint(rect, r) for r in self._rects)
        return bool(self._view(access).any())

    def mask(self, access: Access) -> NDArray[np.bool_]:
        """Which elements of an access are written, in the access's shape."""
        if self.full:
            return np.ones(access.layout.shape, np.bool_)
        mask = self._view(access)
        if mask.shape != access.layout.shape:
            mask = np.asarray(mask.all(axis=-1))
        return mask

    def _add_rect(self, rect: Rect) -> None:
        rects = self._rects
        for index in range(len(rects) - 1, -1, -1):
            union = _join(rects[index], rect)
            if union is not None:
                if union == rects[index]:
                    return
                del rects[index]
                self._add_rect(union)
                return
        if rect == (0, self.rows, 0, self.width):
            self.fill()
            return
        rects.append(rect)
        if len(rects) > MAX_RECTS:
            self._materialise()

    def _rect(self, access: Access) -> Rect | None:
        """The access as one rectangle of the grid, or None where it is not one."""
        place = access.place
        layout = place.layout
        if layout.pitch:
            if layout.dense and layout.step <= 1:
                return place.p0, place.p1, place.lo, place.hi
            return None
        lo, hi, width = place.lo, place.hi, self.width
        if layout.dense:
            row, column = divmod(lo, width)
            if column + hi - lo <= width:
                return row, row + 1, column, column + hi - lo
            if column == 0 and (hi - lo) % width == 0:
                return row, hi // width, 0, width
            return None
        itemsize = layout.dtype.itemsize
        dims = [(n, s) for n, s in zip(layout.shape, layout.strides, strict=True) if n > 1]
        if len(dims) == 2 and dims[1][1] == 1 and dims[0][1] * itemsize == width:
            row, column = divmod(lo, width)
            if column + dims[1][0] * itemsize <= width:
                return row, row + dims[0][0], column, column + dims[1][0] * itemsize
        return None

    def _materialise(self) -> None:
        if self._map is not None:
            return
        g = self.granule
        self._map = np.zeros((self.rows, self.width // g), np.bool_)
        if self.full:
            self._map[...] = True
            self.full = False
        for p0, p1, lo, hi in self._rects:
            self._map[p0:p1, lo // g : hi // g] = True
        self._rects = []

    def _view(self, access: Access) -> NDArray[Any]:
        """The map as the access sees it; with a last dim of granules for wider elements."""
        self._materialise()
        assert self._map is not None
        layout = access.layout
        itemsize = layout.dtype.itemsize
        if itemsize < self.granule:
            factor = self.granule // itemsize
            self._map = np.repeat(self._map, factor, axis=1)
            self.granule = itemsize
        per = itemsize // self.granule
        width = self._map.shape[1]
        if layout.pitch:
            p0, column = divmod(access.start, layout.pitch)
            offset = p0 * width + column * per
            strides = [layout.step * width, *(s * per for s in layout.strides[1:])]
        else:
            offset = access.start * per
            strides = [s * per for s in layout.strides]
        shape = layout.shape
        if per > 1:
            shape = (*shape, per)
            strides.append(1)
        return np.ndarray(shape, np.bool_, self._map, offset, strides)


def _disjoint(a: Rect, b: Rect) -> bool:
    return a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
