"""Selected attention, backward: by query tile as forward; dk and dv added block by block.

Dimensions and layout as in `forward`. p = exp(scale S - lse) is recomputed;
ds = scale p (dO v^T - delta), delta = sum(dO o) - grad_lse; a hidden key has p = 0.

    per tile, its first U blocks; then for longer unions, trip by trip:
        gather U pages; K^T, V^T                                DMA; PE
        per 128 rows, per 512 keys:
            S, dP = q^T.T @ K^T + mask, dO^T.T @ V^T            PE
            p, ds                                               ScalarE, VectorE
            dq += ds K                                          PE (ds turned there)
        per 128 keys: dk, dv = sum over rows ds^T q, p^T dO     PE: rows on partitions already
            sums[rows of these keys] += dk, dv                  DMA that adds in float32
    then, per 128 keys: dk, dv = sum of all sums                backward_sum

A core's additions to one tensor come one after another, in the order of its tiles. To keep several
under way there are `CHAINS` tensors, key tile t adding to tensor t % CHAINS, for each half of the
query tiles; which half and which chain an addition belongs to hangs on no core, so one core and two
give the same bits, and two runs do.

Bound at U = 44, G = 16, 192/128, per tile of 32 queries, by GpSimd, which makes the descriptors of
22 additions of 128 rows, 3.9 us each (86 us); PE has 46 us, ScalarE 38 us. Modelled: 105 us. The
other way, per block the list of the tiles that have it, needs no sums in HBM, but S and dP a second
time and 650 KB of q and dO per block and tile: modelled at 1,000 us per tile as first written.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.queues import fetch
from nki_kernels.selected_attention import tile as parts
from nki_kernels.selected_attention.gather import Blocks
from nki_kernels.selected_attention.gradients import Keys, Tensors, Tile
from nki_kernels.selected_attention.sums import clear, rows_of

CHAINS = 2
"""Sums per half of the query tiles that may be under way at once."""


@nki.jit
def backward(
    q_t, do_t, q, do, o, stats, pages, ids, place, heads, near, lists, starts, longer, amounts,
    count, queues: str, scale: float,
):  # fmt: skip
    """dq [GROUPS, BODY, ROWS, DK] in q's dtype, and 2 * CHAINS sums [PAGES * m, DK + DV] float32.

    Args:
        q_t, do_t: [GROUPS, BODY, D, ROWS], GROUPS even; q_t has `heads` behind it where there is
            room, see `tile.Mask`. q, do, o: [GROUPS, BODY, ROWS, D].
        stats: [GROUPS, BODY, ROWS, 3] float32: ln(scale) - lse and -lse (both 0 of rows that see
            nothing), and grad_lse.
        pages: [PAGES, m, DK + DV].
        ids, place, heads, near, lists, starts, longer, amounts, count, queues: as for `forward`;
            null pages that fill a list up differ within 128 keys.
    """
    groups, rows, dk = q_t.shape[0], q_t.shape[3], q.shape[3]
    dq = nl.ndarray((*q_t.shape[0:2], rows, dk), dtype=q_t.dtype, buffer=nl.shared_hbm)
    sums = []
    for _ in range(2 * CHAINS):
        shape = (pages.shape[0] * pages.shape[1], pages.shape[2])
        sums.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.shared_hbm))
    mask = parts.Mask(heads, pages.shape[1], q_t.shape[2] - dk)

    def first_trips(own_sums):
        def one_group(g):
            tensors = Tensors(
                q_t.select(0, g), do_t.select(0, g), q.select(0, g), do.select(0, g),
                o.select(0, g), stats.select(0, g),
            )  # fmt: skip
            queries = parts.Queries(ids.select(0, g), place.select(0, g))
            body, slots = near.shape[1:]
            numbers = sbuf((1, body * slots), nl.int32)
            fetch(numbers, near.select(0, g))
            listed = queries.listed(near.select(0, g))
            row = near.select(0, g).reshape((1, body * slots))
            places = rows_of(row, pages.shape[1])
            per = places.shape[1] // body
            ahead = Blocks(pages, numbers[:, 0:slots], queues)
            keys = Keys(ahead, queries, 0, listed[:, 0, :], mask, dk)
            for j in range(body):
                if j + 1 < body:
                    ahead = Blocks(pages, numbers[:, (j + 1) * slots : (j + 2) * slots], queues)
                tile = Tile(tensors, j, dk)
                tile.differentiate(keys, mask, scale)
                before = keys
                if j + 1 < body:
                    keys = Keys(ahead, queries, j + 1, listed[:, j + 1, :], mask, dk)
                tile.add_to(own_sums, before, places[:, j * per : (j + 1) * per])
                tile.store(dq.select(0, g)[j])

        return one_group

    def all_trips(own_sums, tiles):
        def one_tile(i):
            chosen = sbuf((1, 1), nl.int32)
            fetch(chosen, tiles.select(0, i).expand_dim(0))
            tensors = Tensors(
                parts.flat(q_t, chosen), parts.flat(do_t, chosen), parts.flat(q, chosen),
                parts.flat(do, chosen), parts.flat(o, chosen), parts.flat(stats, chosen),
            )  # fmt: skip
            queries = parts.Queries(parts.flat(ids, chosen), parts.flat(place, chosen))
            pointer, amount = sbuf((1, 1), nl.int32), sbuf((1, 1), nl.int32)
            fetch(pointer, starts.select(0, chosen).expand_dim(0))
            fetch(amount, amounts.select(0, i).expand_dim(0))
            times = nisa.register_alloc()
            nisa.register_load(times, amount)
            tile = Tile(tensors, 0, dk)
            tile.clear()

            def trip(again):
                row = lists.select(0, pointer).expand_dim(0)
                numbers = sbuf((1, lists.shape[1]), nl.int32)
                fetch(numbers, row)
                listed = queries.listed(row)
                places = rows_of(row, pages.shape[1])
                nisa.tensor_scalar(pointer, pointer, nl.add, 1)
                blocks = Blocks(pages, numbers, queues)
                keys = Keys(blocks, queries, 0, listed[:, 0, :], mask, dk)
                tile.differentiate(keys, mask, scale)
                if again:
                    tile.add_to(own_sums, keys, places)

            def one_trip(_):
                trip(True)

            # The first trip's dk and dv have been added already.
            trip(False)
            nl.fori_loop(1, times, one_trip)
            tile.store(parts.flat(dq, chosen)[0])

        return one_tile

    many = nisa.register_alloc()
    nisa.register_load(many, count)
    first, number = share(2)
    for half in range(first, first + number):
        own = sums[half * CHAINS : (half + 1) * CHAINS]
        for total in own:
            clear(total)
        nl.fori_loop(half * groups // 2, (half + 1) * groups // 2, first_trips(own))
        nl.fori_loop(0, many, all_trips(own, longer[half]))
    return dq, sums[0], sums[1], sums[2], sums[3]
