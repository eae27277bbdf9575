"""Tile and block grids of NKI 0.7: views of a tensor, navigated in tiles or in blocks of tiles.

What the public pages do not say is refused: leading dims without tiles, several rows of tiles in
SBUF or PSUM, another tile shape for a grid, `data` of cells that do not lie together.
"""

from math import prod

from ...memory.tensor import NkiTensor
from ...rules.session import violation
from ...rules.versions import require
from .making import is_on_chip, ndarray

_OPEN = "the public pages do not say "


def _refuse(name, message, operand=None, **details):
    return violation("grid", message, instruction=f"nl.{name}", operand=operand, **details)


class NkiGrid:
    """Cells of a tensor: tiles, or blocks of tiles; the last of a dim is clamped to the tensor.

    Attributes:
        tile_shape: elements of a tile.
    """

    _cell: tuple[int, ...] = ()  # elements of a cell

    def __init__(self, tensor, tile_shape, chosen=None):
        self._tensor = tensor
        self.tile_shape = tile_shape
        # Per dim of the tensor: the cells chosen, and whether an integer chose one.
        self._chosen = chosen or [
            (range(-(-n // size)), False) for n, size in zip(tensor.shape, self._cell, strict=True)
        ]

    @property
    def buffer(self):
        """The region of the tensor."""
        return self._tensor.buffer

    @property
    def dtype(self):
        """Of the elements."""
        return self._tensor.dtype

    @property
    def shape(self):
        """Cells along each dim that no integer has consumed."""
        return tuple(len(cells) for cells, consumed in self._chosen if not consumed)

    @property
    def element_shape(self):
        """Elements chosen along each dim of the tensor."""
        spans = zip(self._chosen, self._cell, self._tensor.shape, strict=True)
        return tuple(
            sum(min((c + 1) * size, n) - c * size for c in cells) for (cells, _), size, n in spans
        )

    @property
    def index_step_elements(self):
        """Elements from one cell to the next, along each dim of `shape`."""
        steps = zip(self._chosen, self._cell, strict=True)
        return tuple(cells.step * size for (cells, consumed), size in steps if not consumed)

    @property
    def is_data_representable(self):
        """Whether the chosen cells lie together, so that `data` is one operand."""
        return all(cells.step == 1 or len(cells) == 1 for cells, _ in self._chosen)

    @property
    def is_remainder(self):
        """Refused: the page's text on it could not be read."""
        raise _refuse(
            "NkiGrid", _OPEN + "when is_remainder is true", "is_remainder",
            hint="compare element_shape with tile_shape",
        )  # fmt: skip

    @property
    def data(self):
        """The elements chosen, as an operand."""
        if not self.is_data_representable:
            raise _refuse(
                "NkiGrid", _OPEN + "which shape the data of separate cells has", "data",
                value=self.shape, hint="choose the cells one by one",
            )  # fmt: skip
        spans = zip(self._chosen, self._cell, self._tensor.shape, strict=True)
        return self._tensor[
            tuple(
                slice(cells[0] * size, min((cells[-1] + 1) * size, n))
                for (cells, _), size, n in spans
            )
        ]

    def __getitem__(self, key):
        keys = key if isinstance(key, tuple) else (key,)
        left = [d for d, (_, consumed) in enumerate(self._chosen) if not consumed]
        if len(keys) > len(left):
            raise _refuse("NkiGrid", "too many indices", "[...]", value=len(keys), limit=len(left))
        chosen = list(self._chosen)
        for d, item in zip(left, keys, strict=False):
            chosen[d] = self._choose(chosen[d][0], item)
        return self._with(chosen)

    def _choose(self, cells, item):
        """Some cells of a dim, and whether an integer chose them."""
        if isinstance(item, slice):
            if item.step is not None and item.step < 1:
                raise _refuse("NkiGrid", "steps are positive", "[...]", value=item.step)
            some = cells[item]
            if not some:
                raise _refuse("NkiGrid", "chooses no cell", "[...]", value=item, limit=len(cells))
            return some, False
        if type(item) is not int or not -len(cells) <= item < len(cells):
            raise _refuse(
                "NkiGrid", "a coordinate is an integer of the grid or a slice", "[...]",
                value=item, limit=f"0..{len(cells) - 1}",
            )  # fmt: skip
        place = item % len(cells)
        return cells[place : place + 1], True

    def _with(self, chosen):
        """The same grid with other cells chosen."""
        raise NotImplementedError

    def __repr__(self):
        return f"{type(self).__name__}(shape={self.shape}, tile_shape={self.tile_shape})"


class NkiTileGrid(NkiGrid):
    """Tiles of a tensor."""

    def __init__(self, tensor, tile_shape, chosen=None):
        self._cell = tile_shape
        super().__init__(tensor, tile_shape, chosen)

    def _with(self, chosen):
        return NkiTileGrid(self._tensor, self.tile_shape, chosen)


class NkiBlockGrid(NkiGrid):
    """Blocks of tiles of a tensor.

    Attributes:
        block_shape: tiles of a block.
    """

    def __init__(self, tensor, tile_shape, block_shape, chosen=None):
        self.block_shape = block_shape
        self._cell = tuple(t * b for t, b in zip(tile_shape, block_shape, strict=True))
        super().__init__(tensor, tile_shape, chosen)

    def _with(self, chosen):
        return NkiBlockGrid(self._tensor, self.tile_shape, self.block_shape, chosen)


def _counts(name, role, value, rank=None):
    """A tuple of at least two positive integers."""
    good = isinstance(value, tuple) and all(type(n) is int for n in value)
    if not good:
        raise violation(
            "usage", "is a tuple of integers", instruction=f"nl.{name}", operand=role, value=value
        )
    if len(value) < 2 or prod(value) < 1 or min(value) < 1:
        raise _refuse(name, "has at least two dims, all positive", role, value=value)
    if rank is not None and len(value) != rank:
        raise _refuse(name, f"has {len(value)} dims, not {rank}", role, value=value)
    return value


def _view_of(name, source, tile_shape):
    """Tensor and tile shape that a grid is made of."""
    if isinstance(source, NkiGrid):
        if tile_shape not in (None, source.tile_shape):
            raise _refuse(
                name, _OPEN + "what another tile shape means for a grid", "tile_shape",
                value=tile_shape, limit=source.tile_shape,
            )  # fmt: skip
        return source.data, source.tile_shape
    if not isinstance(source, NkiTensor):
        raise violation(
            "usage",
            "is a tensor or a grid",
            instruction=f"nl.{name}",
            operand="source",
            value=type(source).__name__,
        )
    if tile_shape is None:
        raise _refuse(name, _OPEN + "which tile shape a tensor has by itself", "tile_shape",
                      hint="tile_shape=(128, 512)")  # fmt: skip
    _counts(name, "tile_shape", tile_shape)
    _same_rank(name, source.shape, tile_shape, "source")
    return source, tile_shape


def _same_rank(name, shape, tile_shape, role):
    if len(shape) != len(tile_shape):
        raise _refuse(
            name, _OPEN + "which shape the data of untiled leading dims has", role,
            value=shape, limit=f"{len(tile_shape)} dims", hint="index the leading dims first",
        )  # fmt: skip


def tiles(source, *, tile_shape=None):
    """A grid of the tiles of a tensor or grid; no storage, no instruction."""
    require("nl.tiles", "tiles")
    return NkiTileGrid(*_view_of("tiles", source, tile_shape))


def blocks(source, *, tile_shape=None, block_shape):
    """A grid of blocks, so many tiles along each dim; no storage, no instruction."""
    require("nl.blocks", "blocks")
    tensor, tile = _view_of("blocks", source, tile_shape)
    return NkiBlockGrid(tensor, tile, _counts("blocks", "block_shape", block_shape, len(tile)))


def alloc_tiles(*, tile_shape, element_shape, buffer, dtype, address=None, name=""):
    """A new tensor as a grid of tiles."""
    require("nl.alloc_tiles", "alloc_tiles")
    made = _made("alloc_tiles", tile_shape, element_shape, buffer, dtype, address, name)
    return NkiTileGrid(made, tile_shape)


def alloc_blocks(*, tile_shape, block_shape, element_shape, buffer, dtype, address=None, name=""):
    """A new tensor as a grid of blocks of tiles."""
    require("nl.alloc_blocks", "alloc_blocks")
    made = _made("alloc_blocks", tile_shape, element_shape, buffer, dtype, address, name)
    _counts("alloc_blocks", "block_shape", block_shape, len(tile_shape))
    return NkiBlockGrid(made, tile_shape, block_shape)


def _made(what, tile_shape, element_shape, buffer, dtype, address, name):
    _counts(what, "tile_shape", tile_shape)
    _counts(what, "element_shape", element_shape)
    _same_rank(what, element_shape, tile_shape, "element_shape")
    if is_on_chip(buffer) and (len(tile_shape) > 2 or element_shape[0] > tile_shape[0]):
        raise _refuse(
            what, _OPEN + "how several rows of tiles lie in SBUF or PSUM", "element_shape",
            value=element_shape, limit=(tile_shape[0], "..."),
            hint="one grid for each row of tiles, in a list",
        )  # fmt: skip
    return ndarray(element_shape, dtype, buffer, name, address)
