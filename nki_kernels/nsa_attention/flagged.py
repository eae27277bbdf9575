"""Tiles of queries once more, by flags that the device has set: a hardware loop.

Two cores do the same tiles, each for its kv head, with as many turns: of their flags the larger
count. What only the other core asked for goes nowhere: a place behind the last tile.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.nsa_attention.geometry import QUERIES
from nki_kernels.nsa_attention.running import larger

AT_ONCE = 8192  # tiles whose flags SBUF holds beside what is done with them


def for_flagged(geometry, lane_flags, do_tile):
    """`do_tile(number, place)` for each tile whose flag in HBM, float32 [1, tiles], is not 0; of
    more than AT_ONCE tiles, in a loop over so many.

    number, place: int32 [1, 1] in SBUF, the tile, and the tile of `o` that its result goes to.
    """
    base = sbuf((1, 1), nl.float32)
    nisa.memset(base, 0.0)
    if lane_flags.shape[1] <= AT_ONCE:
        some_flagged(geometry, lane_flags[:, 0 : geometry.tiles], base, do_tile)
        return
    sections = lane_flags.shape[1] // AT_ONCE
    by_section = lane_flags[:, 0 : sections * AT_ONCE].reshape_dim(1, (sections, AT_ONCE))

    def section(s):
        some_flagged(geometry, by_section.select(1, s), base, do_tile)
        nisa.tensor_scalar(base, base, nl.add, float(AT_ONCE))

    nl.fori_loop(0, sections, section)


def some_flagged(geometry, lane_flags, base, do_tile):
    """The same of tiles from `base` on, float32 [1, 1]."""
    tiles = lane_flags.shape[1]
    names = sbuf((1, tiles), nl.float32)
    flags = sbuf((1, tiles), nl.float32)
    fetch(flags, lane_flags)
    nisa.iota(names, [[1, tiles]], offset=1, channel_multiplier=0)
    own = sbuf((1, tiles), nl.float32)
    nisa.tensor_tensor(own, names, flags, nl.multiply)
    flags = larger(flags)
    nisa.tensor_tensor(names, names, flags, nl.multiply)
    count, times = sbuf((1, 1), nl.float32), sbuf((1, 1), nl.int32)
    nisa.tensor_reduce(count, nl.add, flags, axis=1)
    nisa.tensor_copy(times, count)
    many = nisa.register_alloc()
    nisa.register_load(many, times)

    def one(_):
        top, number = sbuf((1, 1), nl.float32), sbuf((1, 1), nl.int32)
        nisa.tensor_reduce(top, nl.maximum, names, axis=1)
        nisa.scalar_tensor_tensor(number, top, nl.subtract, 1.0, nl.add, base)
        nisa.scalar_tensor_tensor(names, names, nl.less, top, nl.multiply, names)
        # Where it goes: number if it is one of `own`, else `behind`.
        same, mine = sbuf(own.shape, nl.float32), sbuf((1, 1), nl.float32)
        nisa.tensor_scalar(same, own, nl.equal, top)
        nisa.tensor_reduce(mine, nl.maximum, same, axis=1)
        place = sbuf((1, 1), nl.int32)
        behind = float(geometry.behind)
        nisa.tensor_tensor(top, top, base, nl.add)
        nisa.tensor_scalar(top, top, nl.subtract, 1.0 + behind, op1=nl.multiply, operand1=mine)
        nisa.tensor_scalar(place, top, nl.add, behind)
        do_tile(number, place)

    nl.fori_loop(0, many, one)


def clear_behind(geometry, o):
    """Writes what lies behind the last tile of o, so that it is never unwritten."""
    clear(o[QUERIES * geometry.behind :])


def clear(last):
    """Writes zeros to up to 128 rows of o."""
    nothing = sbuf(last.shape, last.dtype)
    nisa.memset(nothing, 0.0)
    nisa.dma_copy(last, nothing)
