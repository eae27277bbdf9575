"""Grids of tiles and blocks: AWS's own examples, boundaries, and what is left open."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_neuron import simulator
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

X = np.arange(512 * 300, dtype=np.float32).reshape(512, 300)


def within(check, x=X):
    """Run `check(x)` in a kernel."""

    def kernel(x):
        check(x)
        nisa.dma_copy(x[0:1, 0:1], x[0:1, 0:1])

    simulator.simulate(kernel)(x.copy())


def copied(grids):
    """A kernel that copies x cell by cell through SBUF; `grids(x, y)` gives both grids."""

    def kernel(x):
        y = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        source, target = grids(x, y)
        for i in range(source.shape[0]):
            for j in range(source.shape[1]):
                cell = source[i, j]
                tile = nl.ndarray(cell.element_shape, x.dtype, buffer=nl.sbuf)
                nisa.dma_copy(dst=tile.data, src=cell.data)
                nisa.dma_copy(dst=target[i, j].data, src=tile.data)
        return y

    return kernel


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 90), st.integers(1, 64), st.integers(1, 64),
       st.integers(1, 2), st.integers(1, 3))  # fmt: skip
def test_cells_cover_a_tensor_once(rows, columns, height, width, tall, wide):
    x = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    tile, block = (height, width), (tall, wide)

    def blocks(a, b):
        return tuple(nl.blocks(t, tile_shape=tile, block_shape=block) for t in (a, b))

    def tiles(a, b):
        return tuple(nl.tiles(t, tile_shape=tile) for t in (a, b))

    for grids in (tiles, blocks):
        np.testing.assert_array_equal(simulator.simulate(copied(grids))(x), x)


def test_shapes_of_the_pages():
    def check(x):
        grid = nl.tiles(x, tile_shape=(128, 256))
        assert isinstance(grid, nl.NkiTileGrid) and isinstance(grid, nl.NkiGrid)
        assert grid.shape == (4, 2) and grid.tile_shape == (128, 256)
        assert grid.index_step_elements == (128, 256) and grid.element_shape == (512, 300)
        assert grid[1, :].shape == (2,) and grid[1, :].element_shape == (128, 300)
        assert grid[3, 1].shape == () and grid[3, -1].element_shape == (128, 44)
        assert (grid.dtype, grid.buffer) == (nl.float32, nl.shared_hbm)
        blocks = nl.blocks(grid, block_shape=(2, 2))
        assert isinstance(blocks, nl.NkiBlockGrid)
        assert (blocks.shape, blocks.block_shape) == ((2, 1), (2, 2))
        assert blocks.index_step_elements == (256, 512)
        inside = nl.tiles(blocks[1, 0])
        assert inside.shape == (2, 2) and inside[1, 1].element_shape == (128, 44)
        assert inside[1, 0].data.shape == (128, 256)
        assert inside[1, 0].data.offset == 384 * 300

    within(check)


def test_new_grids():
    def check(x):
        made = nl.alloc_tiles(
            tile_shape=(128, 64), element_shape=(128, 200), buffer=nl.sbuf, dtype=x.dtype
        )
        assert made.shape == (1, 4) and made[0, 3].data.shape == (128, 8)
        blocks = nl.alloc_blocks(tile_shape=(128, 64), block_shape=(1, 2),
                                 element_shape=(512, 200), buffer=nl.shared_hbm,
                                 dtype=nl.bfloat16, name="b")  # fmt: skip
        assert blocks.shape == (4, 2) and blocks.data.shape == (512, 200)

    within(check)


def _alloc(element_shape, buffer="sbuf"):
    return nl.alloc_tiles(tile_shape=(128, 64), element_shape=element_shape,
                          buffer=getattr(nl, buffer), dtype=nl.float32)  # fmt: skip


@pytest.mark.parametrize(
    ("body", "rule", "text"),
    [
        (lambda x: nl.tiles(x, tile_shape=(128, 64))[::2].data, "grid", "separate cells"),
        (lambda x: nl.tiles(x, tile_shape=(128, 64)).is_remainder, "grid", "do not say"),
        (lambda x: nl.tiles(x), "grid", "which tile shape"),
        (lambda x: nl.tiles(x.reshape((2, 256, 300)), tile_shape=(128, 64)), "grid", "leading"),
        (lambda x: nl.tiles(nl.tiles(x, tile_shape=(128, 64)), tile_shape=(64, 64)), "grid", "ano"),
        (lambda x: _alloc((256, 64)), "grid", "several rows of tiles"),
        (lambda x: nl.tiles(x, tile_shape=(128,)), "grid", "at least two dims"),
        (lambda x: nl.tiles(x, tile_shape=(0, 64)), "grid", "all positive"),
        (lambda x: nl.tiles(x, tile_shape=[128, 64]), "usage", "tuple of integers"),
        (lambda x: nl.tiles(X, tile_shape=(128, 64)), "usage", "a tensor or a grid"),
        (lambda x: nl.blocks(x, tile_shape=(128, 64), block_shape=(2, 2, 2)), "grid", "has 3 dims"),
        (lambda x: nl.tiles(x, tile_shape=(128, 64))[4, 0], "grid", "0..3"),
        (lambda x: nl.tiles(x, tile_shape=(128, 64))[0, 0, 0], "grid", "too many"),
        (lambda x: nl.tiles(x, tile_shape=(128, 64))[3:2], "grid", "chooses no cell"),
        (lambda x: nl.tiles(x, tile_shape=(128, 64))[::-1], "grid", "steps are positive"),
        (lambda x: nisa.dma_copy(nl.tiles(x, tile_shape=(128, 64)), x), "usage", ""),
    ],
)
def test_what_a_grid_cannot_do(body, rule, text):
    with pytest.raises(simulator.SimulationError) as caught:
        within(body)
    assert caught.value.rule == rule and text in str(caught.value), caught.value
