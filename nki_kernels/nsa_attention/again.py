"""Tiles of queries once more that have an unsafe row, right for any logits and any union.

Rows (query, head) are on partitions, so that each row has its exact maximum so far (`running`); the
choice is made of probabilities that are already divided by their sum; a union of any length is
gathered sixteen blocks at a time. What hangs on positions is data, and so are turns of loops:

    count = how many tiles ask for it                              0 as a rule: nothing happens
    for each of them:                                              hardware loop
        for each 512 compressed keys:                              hardware loop
            top, sum, acc with S = q^T.T @ K^T                     PE, VectorE, ScalarE
        for each 512 compressed keys:                              hardware loop
            p = exp(scale S - lse); sum over heads; shares         PE, float32
        the best n of all blocks, in one search of each query      VectorE
        the own block; for each sixteen others of the union:       hardware loop
            S with what hides them added by PE, top, sum, acc
        for each 128 keys of the window:                           hardware loop
        o = sum over branches of gate / sum * acc

Two cores take as many turns: of the lengths of their unions the larger counts (`flagged`).
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.nsa_attention.choose import HIDDEN, LANES, NOTHING, TAKEN
from nki_kernels.nsa_attention.flagged import for_flagged
from nki_kernels.nsa_attention.geometry import BLOCK, BLOCKS_OF_KEYS, KEYS, PIECE, QUERIES
from nki_kernels.nsa_attention.running import CHUNK, Branch, KeyRun, Queries, larger, of_tile

SEEN, OWN, NEAR, WITHIN, LOW, HIGH, START = 0, 1, 2, 3, 4, 5, 6
"""Columns of `marks`: compressed keys that a query sees; its own block; the block before the local
ones; tokens of its own block that it sees; first key of its window, and the one behind the last;
first key of its tile's window tiles."""
FORCED_SCORE = 1e30
SHARES = BLOCKS_OF_KEYS + 2
AT_ONCE = 2 * LANES  # blocks gathered before they are used
WIDE = 2048  # blocks that are marked at a time
RUNS = 16  # of keys whose shares are cleared at a time


class Tables(nl.NKIObject):
    """What hangs on positions, in HBM.

    Attributes:
        marks: [32 * tiles, 8] float32, see above.
        trips: [tiles, 4] int32: runs of 512 compressed keys; first tile of keys of the window, and
            the one behind the last; own block.
    """

    def __init__(self, marks, trips):
        self.marks, self.trips = marks, trips


class Scratch(nl.NKIObject):
    """HBM of a core: `shares` [runs, 128, 4, 34] float32, `masks` [blocks, 128]."""

    def __init__(self, runs, dtype):
        shape = (runs, 128, CHUNK // KEYS, SHARES)
        self.shares = nl.ndarray(shape, dtype=nl.float32, buffer=nl.private_hbm)
        blocks = runs * CHUNK // KEYS * BLOCKS_OF_KEYS
        self.masks = nl.ndarray((blocks, 128), dtype=dtype, buffer=nl.private_hbm)


def do_again(geometry, constants, lane, tables, scratch, scale):
    """Does the tiles of a kv head whose rows are unsafe."""
    once = Again(geometry, constants, lane, tables, scratch, scale)
    for_flagged(geometry, lane.unsafe, once.tile)


class Again(nl.NKIObject):
    """Tiles of one kv head, by their number in SBUF."""

    def __init__(self, geometry, constants, lane, tables, scratch, scale):
        self.geometry, self.constants, self.lane = geometry, constants, lane
        self.tables, self.scratch, self.scale = tables, scratch, scale
        self.dv = lane.v_win.shape[1] - 1
        self.blocks = scratch.masks.shape[0]
        self.weights = sbuf(constants.weights.shape, nl.float32)
        nisa.tensor_copy(self.weights, constants.weights)

    def tile(self, number, place):
        """Writes o of a tile to the place of a tile."""
        g = self.geometry
        self.queries = Queries(g, self.lane, self.tables.marks, number)
        self.trips = sbuf((1, 4), nl.int32)
        fetch(self.trips, self.tables.trips.select(0, number).expand_dim(0))
        near = self.compressed()
        self.rank()
        branches = [near, self.selected(), self.window()]
        result = sbuf((g.rows, g.parts, self.dv), self.lane.o.dtype)
        for p in range(g.parts):
            total = sbuf((g.rows, self.dv), nl.float32)
            nisa.memset(total, 0.0)
            for b in range(len(branches)):
                factor = branches[b].inverse(p)
                gate = self.queries.gates[:, p, b : b + 1]
                nisa.tensor_tensor(factor, factor, gate, nl.multiply)
                into = result[:, p, :] if b == len(branches) - 1 else total
                acc = branches[b].parts[p].acc
                nisa.scalar_tensor_tensor(into, acc, nl.multiply, factor, nl.add, total)
        target = of_tile(self.lane.o, QUERIES, place)
        target = target.reshape_dim(0, (g.parts, g.per_part)).permute((1, 2, 0, 3))
        fetch(target, result)

    def turns(self, which):
        """A register with a column of the tile's `trips`."""
        found = nisa.register_alloc()
        nisa.register_load(found, self.trips[0:1, which : which + 1])
        return found

    def compressed(self):
        """The compressed branch; then the shares of all blocks, in HBM."""
        g, lane, scale = self.geometry, self.lane, self.scale
        branch = Branch(g, self.dv, scale)
        runs = lane.k_cmp_t.shape[1] // CHUNK
        k_t, v = (
            lane.k_cmp_t.reshape_dim(1, (runs, CHUNK)),
            lane.v_cmp.reshape_dim(0, (runs, CHUNK)),
        )
        base = sbuf((128, 1), nl.float32)

        shifts = []

        def visible(keys, p):
            """Scaled by nothing, float32 [rows, 512], very small where not seen."""
            scores = keys.scores(self.queries, p)
            limit = sbuf((g.rows, 1), nl.float32)
            own = self.queries.marks[:, p, SEEN : SEEN + 1]
            nisa.tensor_scalar(limit, own, nl.subtract, base[0 : g.rows, :])
            return branch.within(scores, self.queries.zero, limit)

        def visible_of(keys):
            def of_part(p):
                return visible(keys, p)

            return of_part

        def add(j):
            keys = KeyRun(k_t.select(1, j), v.select(0, j))
            branch.add(visible_of(keys), keys)
            nisa.tensor_scalar(base, base, nl.add, float(CHUNK))

        def share(j):
            keys = KeyRun(k_t.select(1, j), v.select(0, j))
            shares = sbuf((128, CHUNK // KEYS, SHARES), nl.float32)
            nisa.memset(shares, 0.0)
            for p in range(g.parts):
                self.add_shares(shares, p, visible(keys, p), shifts[p])
            nisa.tensor_scalar(base, base, nl.add, float(CHUNK))
            fetch(self.scratch.shares.select(0, j), shares)

        many = self.turns(0)
        nisa.memset(base, 0.0)
        nl.fori_loop(0, many, add)
        for p in range(g.parts):
            shifts.append(branch.negative_lse(p))
        nisa.memset(base, 0.0)
        nothing = sbuf((128, min(runs, RUNS), CHUNK // KEYS * SHARES), nl.float32)
        nisa.memset(nothing, 0.0)
        shares = self.scratch.shares.flatten_dims(2, 3).permute((1, 0, 2))
        for first, some in spans(runs, RUNS):
            nisa.dma_copy(shares[:, first : first + some, :], nothing[:, 0:some, :])
        nl.fori_loop(0, many, share)
        return branch

    def add_shares(self, shares, p, seen, shift):
        """Probabilities of a part's rows, summed over heads and shared out to blocks."""
        g = self.geometry
        weights = sbuf(seen.shape, nl.float32)
        nisa.activation(weights, nl.exp, seen, bias=shift, scale=self.scale)
        lanes = slice(QUERIES * p, QUERIES * p + g.per_part)
        for t in range(CHUNK // KEYS):
            by_key = psum((KEYS, g.per_part))
            keys = weights[:, t * KEYS : (t + 1) * KEYS]
            nisa.nc_matmul(by_key, keys, self.constants.heads, accumulate=False)
            summed = sbuf((KEYS, g.per_part), nl.float32)
            nisa.tensor_copy(summed, by_key, engine=nisa.engine.vector)
            bank = psum((128, SHARES))
            nisa.nc_matmul(
                bank[lanes, :], summed, self.weights, accumulate=False,
                tile_position=(0, QUERIES * p), tile_size=(KEYS, QUERIES),
            )  # fmt: skip
            nisa.tensor_copy(shares[lanes, t, :], bank[lanes, :], engine=nisa.engine.vector)

    def rank(self):
        """`mask` [128, blocks] of the chosen blocks but the own one; lane 32 * p + i is query i of
        part p. A block per row of it goes to HBM."""
        g, blocks = self.geometry, self.blocks
        tiles = blocks // BLOCKS_OF_KEYS
        scores = sbuf((128, tiles, BLOCKS_OF_KEYS), nl.float32)
        extra = sbuf((128, tiles, 2), nl.float32)
        shares = self.scratch.shares.permute((1, 0, 2, 3))
        shape = shares.shape[1:3]
        nisa.dma_copy(scores.reshape_dim(1, shape), shares[:, :, :, 0:BLOCKS_OF_KEYS])
        nisa.dma_copy(extra.reshape_dim(1, shape), shares[:, :, :, BLOCKS_OF_KEYS:])
        if tiles > 1:
            first = scores[:, 1:tiles, 0]
            nisa.tensor_tensor(first, first, extra[:, 0 : tiles - 1, 0], nl.add)
        scores = scores.reshape((128, blocks))
        ranks = self.queries.ranks
        near, own = ranks[:, NEAR : NEAR + 1], ranks[:, OWN : OWN + 1]
        nisa.memset(scores[:, 0 : g.initial], FORCED_SCORE)
        for start, some in spans(blocks, WIDE):
            names, marked = sbuf((128, some), nl.float32), sbuf((128, some), nl.float32)
            part = scores[:, start : start + some]
            nisa.iota(names, [[1, some]], offset=start, channel_multiplier=0)
            nisa.tensor_scalar(
                marked, names, nl.greater, near, op1=nl.multiply, operand1=FORCED_SCORE
            )
            nisa.tensor_tensor(part, part, marked, nl.maximum)
            nisa.tensor_scalar(
                marked, names, nl.greater, own, op1=nl.multiply, operand1=-4.0 * FORCED_SCORE
            )
            nisa.tensor_tensor(part, part, marked, nl.add)
        current, following = scores, sbuf((128, blocks), nl.float32)
        for found in range(0, g.count, LANES):
            top = sbuf((128, LANES), nl.float32)
            nisa.max8(top, current)
            if g.count - found < LANES:
                nisa.memset(top[:, g.count - found : LANES], NOTHING)
            nisa.nc_match_replace8(following, current, top, TAKEN)
            current, following = following, current
        chosen = sbuf((128, blocks), nl.bfloat16)
        for start, some in spans(blocks, WIDE):
            names, marked = sbuf((128, some), nl.float32), sbuf((128, some), nl.float32)
            part = slice(start, start + some)
            nisa.iota(names, [[1, some]], offset=start, channel_multiplier=0)
            nisa.tensor_scalar(marked, current[:, part], nl.equal, TAKEN)
            # What is behind the own one counts for nothing, though there were too few others.
            nisa.scalar_tensor_tensor(chosen[:, part], names, nl.less, own, nl.multiply, marked)
        self.mask = chosen
        for start in range(0, blocks, PIECE):
            turned = psum((PIECE, 128), nl.bfloat16)
            nisa.nc_transpose(turned, chosen[:, start : start + PIECE], engine=nisa.engine.tensor)
            rows = sbuf((PIECE, 128), nl.bfloat16)
            nisa.tensor_copy(rows, turned, engine=nisa.engine.vector)
            nisa.dma_copy(self.scratch.masks[start : start + PIECE, :], rows)

    def union(self):
        """1 + block where some query chose it, else 0, [1, blocks], and a register with how often
        AT_ONCE of them must be taken."""
        names, some = sbuf((1, self.blocks), nl.float32), sbuf((1, self.blocks), nl.float32)
        nisa.iota(names, [[1, self.blocks]], offset=1, channel_multiplier=0)
        ones = sbuf((128, 1), nl.bfloat16)
        nisa.memset(ones, 1.0)
        for start in range(0, self.blocks, CHUNK):
            part = slice(start, min(start + CHUNK, self.blocks))
            counts = psum((1, part.stop - part.start))
            nisa.nc_matmul(counts, ones, self.mask[:, part], accumulate=False)
            nisa.tensor_scalar(some[:, part], counts, nl.greater, 0.0)
        nisa.tensor_tensor(names, names, some, nl.multiply)
        count, turns = sbuf((1, 1), nl.float32), sbuf((1, 1), nl.int32)
        nisa.tensor_reduce(count, nl.add, some, axis=1)
        count = larger(count)
        # However it is rounded, there are enough; what is too much finds nothing.
        nisa.tensor_scalar(
            turns, count, nl.multiply, 1.0 / AT_ONCE, op1=nl.add, operand1=1.0 - 0.5 / AT_ONCE
        )
        many = nisa.register_alloc()
        nisa.register_load(many, turns)
        return names, many

    def selected(self):
        """The selected branch."""
        g, lane = self.geometry, self.lane
        branch = Branch(g, self.dv, self.scale)
        own = sbuf((128, 1, lane.pages.shape[3]), lane.pages.dtype)
        fetch(own[:, 0, :], lane.pages[0].select(0, self.trips[0:1, 3:4]))
        page = Pages(own, self.dv, [])

        def within(p):
            limit = self.queries.marks[:, p, WITHIN : WITHIN + 1]
            return branch.within(page.scores(self.queries, p), self.queries.zero, limit)

        branch.add(within, page)
        names, many = self.union()

        def some(_):
            gathered = [self.gather(names), self.gather(names)]
            for pages in gathered:
                branch.add(scores_of(pages), pages)

        def scores_of(pages):
            def of_part(p):
                return pages.scores(self.queries, p)

            return of_part

        nl.fori_loop(0, many, some)
        return branch

    def gather(self, names):
        """The next eight blocks of `union`, as `Pages`."""
        lane = self.lane
        top, following = sbuf((1, LANES), nl.float32), sbuf(names.shape, nl.float32)
        nisa.max8(top, names)
        nisa.nc_match_replace8(following, names, top, 0.0)
        nisa.tensor_copy(names, following, engine=nisa.engine.vector)
        numbers = sbuf((1, LANES), nl.int32)
        nisa.tensor_scalar(numbers, top, nl.subtract, 1.0, op1=nl.maximum, operand1=0.0)
        buffer = sbuf((128, LANES, lane.pages.shape[3]), lane.pages.dtype)
        for n in range(LANES):
            source = lane.pages[n % 2].select(0, numbers[0:1, n : n + 1])
            fetch(buffer[:, n, :], source, ("y", "g")[n % 2])
        return Pages(buffer, self.dv, [self.hidden(top), self.constants.slot_keys])

    def hidden(self, top):
        """What hides blocks, given by 1 + number [1, 8], from each query, [8, 128]; and what stands
        for no block, from all."""
        turned, column = psum((LANES, 1)), sbuf((LANES, 1), nl.float32)
        nisa.nc_transpose(turned, top, engine=nisa.engine.tensor)
        nisa.tensor_copy(column, turned, engine=nisa.engine.vector)
        places, valid = sbuf((LANES, 1), nl.int32), sbuf((LANES, 1), nl.float32)
        nisa.tensor_scalar(places, column, nl.subtract, 1.0, op1=nl.maximum, operand1=0.0)
        nisa.tensor_scalar(valid, column, nl.greater, 0.0)
        found = sbuf((LANES, 128), nl.bfloat16)
        nisa.dma_copy(found, self.scratch.masks.vector_select(0, places))
        nisa.tensor_scalar(found, found, nl.multiply, valid, op1=nl.subtract, operand1=1.0)
        nisa.tensor_scalar(found, found, nl.multiply, HIDDEN)
        return found

    def window(self):
        """The window branch."""
        g, lane = self.geometry, self.lane
        branch = Branch(g, self.dv, self.scale)
        tiles = lane.k_win_t.shape[1] // KEYS
        k_t, v = (
            lane.k_win_t.reshape_dim(1, (tiles, KEYS)),
            lane.v_win.reshape_dim(0, (tiles, KEYS)),
        )
        start = sbuf((g.rows, 1), nl.float32)
        nisa.tensor_copy(start, self.queries.marks[:, 0, START : START + 1])

        def within(keys):
            def of_part(p):
                low, high = sbuf((g.rows, 1), nl.float32), sbuf((g.rows, 1), nl.float32)
                marks = self.queries.marks[:, p, :]
                nisa.tensor_scalar(low, marks[:, LOW : LOW + 1], nl.subtract, start)
                nisa.tensor_scalar(high, marks[:, HIGH : HIGH + 1], nl.subtract, start)
                return branch.within(keys.scores(self.queries, p), low, high)

            return of_part

        def add(j):
            keys = KeyRun(k_t.select(1, j), v.select(0, j))
            branch.add(within(keys), keys)
            nisa.tensor_scalar(start, start, nl.add, float(KEYS))

        nl.fori_loop(self.turns(1), self.turns(2), add)
        return branch


class Pages(nl.NKIObject):
    """Gathered pages as keys and values, see `selected`.

    Attributes:
        buffer: [128, blocks, columns]; blocks of even places have V on the lower partitions.
        hidden: [] or what hides them from lanes [blocks, 128], and `slot_keys`.
    """

    def __init__(self, buffer, dv, hidden):
        self.buffer, self.dv, self.hidden = buffer, dv, hidden
        self.size = buffer.shape[1] * BLOCK

    def scores(self, queries, p):
        """S [rows, keys] float32 in PSUM."""
        blocks, rows = self.buffer.shape[1], queries.geometry.rows
        scores = psum((rows, self.size))
        q = queries.of_part(p)
        masked = len(self.hidden) > 0
        if masked:
            hidden, slot_keys = self.hidden
            g = queries.geometry
            lanes = hidden[:, QUERIES * p : QUERIES * p + g.per_part]
            by_row = sbuf((blocks, g.per_part, g.group), hidden.dtype)
            nisa.tensor_copy(by_row, lanes.expand_dim(2).broadcast(2, g.group))
            keys = slot_keys[0:blocks, 0 : (blocks + 1) // 2, :]
            nisa.nc_matmul(
                scores, by_row.reshape((blocks, rows)), keys, accumulate=False,
                tile_position=(0, 0), tile_size=(32, 128),
            )  # fmt: skip
        low = q[0].shape[0]
        nisa.nc_matmul(scores, q[0], self.buffer[0:low, :, 0:BLOCK], accumulate=masked)
        by_block = scores.reshape((rows, blocks, BLOCK))
        for rest in q[1:]:
            for half in range(min(2, blocks)):
                p0 = BLOCK * (1 - half)
                channels = slice(p0, p0 + queries.rest)
                nisa.nc_matmul(
                    by_block[:, half::2, :], rest[channels, :],
                    self.buffer[channels, half::2, BLOCK : 2 * BLOCK], accumulate=True,
                    tile_position=(p0, 0), tile_size=(BLOCK, 128),
                )  # fmt: skip
        return scores

    def add_values(self, out, turned):
        """out = P @ V with P^T [keys of two blocks, pairs, rows]."""
        blocks = self.buffer.shape[1]
        for n in range(blocks):
            p0 = BLOCK * (n % 2)
            nisa.nc_matmul(
                out, turned[p0 : p0 + BLOCK, n // 2, :],
                self.buffer[p0 : p0 + BLOCK, n, BLOCK : BLOCK + self.dv], accumulate=n > 0,
                tile_position=(p0, 0), tile_size=(BLOCK, 128),
            )  # fmt: skip
