"""Decode: the newest tokens of each sequence against paged KV caches, all three branches.

Dimensions: B sequences, S new tokens, Hq = G * Hkv heads, Dk, Dv <= 256, S * G <= 128 rows per kv
head. Pools are cut in rows of t tokens, see `caches`.
Layout: 128 / PITCH kv heads at a time, each on PITCH partitions (32, 64 or 128, at least S * G);
keys along the free axis. So softmax is one reduction per row, a mask one VectorE pass, and the four
kv heads of a 64/4 model with one new token take as long as one.

    per sequence, per group of kv heads:
        compressed   gather rows; K turned by PE; S = q K^T; hide; p = exp(scale (S - max))
        window       the same
        selection    importance = p summed by PE over heads and over overlapping compressed blocks;
                     forced blocks first; the n best by rounds of 8, lowest number on ties
        selected     row numbers of the chosen blocks, looked up on the device; gather; S, p
        each branch  o = p V / sum                              (p turned by PE, 128 keys at a time)
        o = sum of gate * branch

Sequences of a body overlap: while one chooses, the next one's keys are on their way. Only DMA has
run-time addresses. Lengths are data: bounds of what each row sees come as numbers.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.queues import fetch
from nki_kernels.common.spans import spans
from nki_kernels.decode.caches import Cache, Tile
from nki_kernels.decode.lanes import (
    Lanes,
    Scores,
    add_values,
    clear_foreign,
    clear_unseen,
    groups_of,
    load_columns,
    multiply,
    turn_keys,
)
from nki_kernels.decode.selection import (
    BANK,
    by_lane,
    choose,
    importance,
    look_up,
    placed,
    preference,
    seen_tokens,
    shared_weights,
)

HIDDEN = -3.0e38
"""What a hidden logit is replaced by; `range_select` has a number of its own, a little below."""

AHEAD = 52_000
"""Bytes of a partition for keys, or values, of the compressed branch that are not needed yet."""

CHOSEN = 85_000
"""The same for keys and values of chosen blocks."""


@nki.jit
def decode(
    q_t, index, kept, numbers, place, table, owners, rows_of, spread, steps, k_cmp, v_cmp, k_slc,
    v_slc, k_win, v_win, apart: tuple, rows: tuple, length: int, ratio: int, chosen: int,
    initial: int, scale: float, step: int, per_body: int,
):  # fmt: skip
    """o [B, groups of kv heads, rows, DV] in q's dtype; see the module's docstring.

    Args:
        q_t: [B, groups, DK, rows], zero where a partition has no row.
        index: [B, 128, tiles] int32: row of the pool on each partition, for each tile of rows of
            the compressed branch, then of the window. kept: [B, 128, tiles * t] integers as wide as
            an element, -1 for tokens that some query sees, else 0, of both alike.
        numbers: [B, groups, rows, 3 + 2 * (t of k_cmp + t of k_win)] float32: gates; for token j of
            a row the first and last row in which the query sees it, first all first ones, then all
            last ones, of the compressed branch, then of the window.
        place: [B, pairs, 4] float32, see `selection.choose`; pairs = kv heads of a group * S.
        table: [B * blocks, 1] int32, the first row of each block in k_slc.
        owners: [rows, pairs], rows_of: [pairs, S, rows] float32, see `selection`.
        spread: [n, n * rows of a block] float32, 1 where a row is one of a block's.
        steps: [128, 1] float32: which row of its block a partition's is.
        k_cmp, ...: pools, see `caches`; apart: of cmp, slc and win.
        rows: of a sequence's compressed branch, and of its window.
        length, ratio: l / d and m / d. chosen: n. step: from a block's row to its next in k_slc.
        per_body: sequences whose instructions stand one after another, so that they overlap, at
            most; 0: one whose logits do not fit into SBUF.
    """
    batch, groups, _, lanes_rows = q_t.shape
    per_group = place.shape[1] // rows_of.shape[1]
    o = nl.ndarray((batch, groups, lanes_rows, v_cmp.shape[-1]), q_t.dtype, buffer=nl.shared_hbm)
    call = Call(lanes_rows, per_group, k_slc.shape[1], spread.shape, apart, rows)
    call.keep_constants(owners, rows_of, spread, steps)
    call.set_scalars(length, ratio, chosen, initial, scale, step)
    call.table, call.blocks = table, table.shape[0] // batch
    call.pools = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
    # Sequences are shared by the cores, or kv heads where sequences are odd and heads are not.
    cores = nl.num_programs(0)
    by_heads = batch % cores > 0 and groups % cores == 0
    first, count = (0, batch) if by_heads else share(batch)
    first_group, own_groups = share(groups) if by_heads else (0, groups)
    per = sequences_per_body(count, max(1, per_body))

    def one_body(i):
        sequences = []
        for j in range(per):
            for g in range(first_group, first_group + own_groups):
                own = []
                for tensor in (q_t, numbers, o):
                    own.append(at(tensor, i, j, per)[g])
                for tensor in (index, kept, place):
                    own.append(at(tensor, i, j, per))
                sequences.append(Sequence(call, own, g * per_group))
        if per_body > 0:
            run_all(sequences)
        else:
            for sequence in sequences:
                run_long(sequence)

    if count == per:
        one_body(first)  # addresses that the compiler knows
    else:
        nl.fori_loop(first, first + count, one_body, step=per)
    return o


def run_all(sequences):
    """All steps of some sequences, in an order in which each engine finds work while one waits.

    Keys of chosen blocks are waited for behind the next sequence's work, if SBUF has room for them.
    """
    last = len(sequences) - 1
    early = sequences[0].call.apart[1] > 0
    start(sequences[0])
    sequences[0].gather_values()
    sequences[0].far.score(0, len(sequences[0].far.tiles))
    sequences[0].score_near()
    if last > 0:
        start(sequences[1])
    for i in range(last + 1):
        own = sequences[i]
        own.start_ranking()
        for k in range(len(own.far.tiles)):
            if i < last:
                sequences[i + 1].far.score(k, 1)
            own.order(k)
        if early and i > 0:
            sequences[i - 1].score_chosen()
        own.rank()
        if i < last:
            sequences[i + 1].score_near()
        if early and i + 1 < last:
            start(sequences[i + 2])
        if i < last:
            own.exponentiate()
        own.choose()
        if early and i > 0:
            finish(sequences[i - 1])
        if i == last:
            own.exponentiate()
        own.weigh_far(0, 1)
        own.find_chosen()
        if early:
            own.gather_chosen()
            if i < last:
                sequences[i + 1].gather_values()
        own.weigh_far(1, len(own.far.tiles) - 1)
        own.weigh_near()
        if not early:
            own.gather_chosen()
            own.score_chosen()
            finish(own)
            if i + 1 < last:
                start(sequences[i + 2])
            if i < last:
                sequences[i + 1].gather_values()
    if early:
        sequences[last].score_chosen()
        finish(sequences[last])


def run_long(sequence):
    """All steps of a sequence whose logits are kept in HBM, tile by tile."""
    sequence.load()
    sequence.score_apart()
    sequence.score_near()
    sequence.rank_apart()
    sequence.choose()
    sequence.find_chosen()
    sequence.weigh_near()
    sequence.gather_chosen()
    sequence.score_chosen()
    finish(sequence)


def start(sequence):
    sequence.load()
    sequence.gather_keys()


def finish(sequence):
    sequence.sum_chosen()
    sequence.store()


def sequences_per_body(count, most):
    """How many of `count` sequences a body of the loop takes, so that they overlap."""
    per = min(count, most)
    while count % per > 0:
        per -= 1
    return per


def at(tensor, i, j, per):
    """Item i + j, i a run-time number up to the last but per - 1."""
    return tensor[j : tensor.shape[0] - per + 1 + j].select(0, i)


class Call(nl.NKIObject):
    """What all sequences of a launch share.

    Attributes:
        per_block: rows of a block; block_rows: of a tile of chosen rows.
        within: [rows, t, rows of a block] float32, each token's place in its block.
    """

    def __init__(self, lanes_rows, per_group, tokens, spread, apart, rows):
        self.lanes = Lanes(per_group, lanes_rows // per_group)
        self.apart, self.rows, self.tokens = apart, rows, tokens
        self.per_block = spread[1] // spread[0]
        self.block_rows = nl.tile_size.pmax // self.per_block * self.per_block
        self.chosen_rows = spread[1]

    def keep_constants(self, owners, rows_of, spread, steps):
        self.owners, self.rows_of = sbuf(owners.shape, nl.float32), sbuf(rows_of.shape, nl.float32)
        self.steps = sbuf(steps.shape, nl.float32)
        for target, source in ((self.owners, owners), (self.rows_of, rows_of), (self.steps, steps)):
            nisa.dma_copy(target, source)
        self.spread = []
        for first, count in spans(spread.shape[0], nl.tile_size.pmax):
            part = sbuf((count, spread.shape[1]), nl.float32)
            nisa.dma_copy(part, spread[first : first + count, :])
            self.spread.append(part)
        shape = (self.lanes.rows, self.tokens, self.per_block)
        self.within = sbuf(shape, nl.float32)
        nisa.iota(
            self.within, [[1, self.tokens], [self.tokens, self.per_block]], offset=0,
            channel_multiplier=0,
        )  # fmt: skip
        self.counted = sbuf((nl.tile_size.pmax, self.tokens), nl.float32)
        nisa.iota(self.counted, [[1, self.tokens]], offset=0, channel_multiplier=0)

    def set_scalars(self, length, ratio, chosen, initial, scale, step):
        self.step = step
        self.length, self.ratio, self.chosen = length, ratio, chosen
        self.initial, self.scale = initial, scale


class Sequence(nl.NKIObject):
    """New tokens of a sequence for some kv heads: rows, and the gated sum of their branches.

    own: q^T, numbers, o, index, kept, place of it.
    """

    def __init__(self, call, own, head):
        self.call, self.own, self.head = call, own, head
        self.total = []

    def cache(self, which):
        """The pools of a branch: 0 compressed, 1 selected, 2 window."""
        call = self.call
        k, v = call.pools[2 * which], call.pools[2 * which + 1]
        return Cache(k, v, call.apart[which], self.head, call.lanes.heads)

    def load(self):
        """What is known of the sequence."""
        q_t, numbers, _, index, kept, place = self.own
        self.index, self.kept = sbuf(index.shape, nl.int32), sbuf(kept.shape, kept.dtype)
        self.numbers, self.place = sbuf(numbers.shape, nl.float32), sbuf(place.shape, nl.float32)
        fetch(self.index, index)
        self.columns = load_columns(q_t)
        fetch(self.numbers, numbers)
        fetch(self.place, place)
        fetch(self.kept, kept)
        self.far = Branch(self, self.cache(0), 0, 0, 0, self.call.rows[0])
        tiles, tokens = len(self.far.tiles), self.far.cache.tokens
        self.near = Branch(
            self, self.cache(2), tiles, tiles * tokens, 2 * tokens, self.call.rows[1]
        )
        self.ranked = preference(self.place, self.call.blocks, self.call.initial)

    def gather_keys(self):
        self.far.gather_keys(AHEAD)
        self.near.gather_keys(AHEAD)

    def gather_values(self):
        self.far.gather_values(AHEAD)
        self.near.gather_values(AHEAD)

    def score_near(self):
        self.near.score(0, len(self.near.tiles))

    def start_ranking(self):
        """Room for exponentials of the compressed branch in the order of its keys."""
        call = self.call
        keys = self.far.keys
        before, columns = call.length - 1, max(keys, call.ratio * call.blocks)
        self.ordered = sbuf((call.lanes.rows, before + columns), nl.float32)
        if before > 0:
            nisa.memset(self.ordered[:, 0:before], 0.0, engine=nisa.engine.gpsimd)
        if columns > keys:
            nisa.memset(self.ordered[:, before + keys :], 0.0, engine=nisa.engine.gpsimd)
        self.far.scores.shift_by_maximum(call.scale)

    def order(self, i):
        """Exponentials of tile i of the compressed branch, in the order of its keys."""
        before = self.call.length - 1
        ordered = self.ordered[:, before : before + self.far.keys]
        self.far.order(i, ordered, self.call.scale)

    def exponentiate(self):
        """Weights of the compressed branch."""
        for i in range(len(self.far.tiles)):
            self.far.scores.weigh(i, self.own[0].dtype, self.call.scale, False)

    def rank(self):
        """What blocks are worth."""
        call = self.call
        self.far.scores.invert()
        shares = shared_weights(call.owners, self.far.scores.inverse, call.length, call.ratio)
        for first, count in spans(call.blocks, BANK):
            found = importance(shares, self.ordered, 1 - call.length, first, count, call.ratio)
            if first == 0:  # VectorE need not wait for that
                self.far.clear_values()
            part = self.ranked[:, first : first + count]
            nisa.tensor_tensor(part, part, found, nl.add)
        self.ordered = None

    def score_apart(self):
        """Logits of the compressed branch, which go to HBM, and the sums of their exponentials.

        A tile's sum is relative to its own maximum; `apart` [tiles, rows, columns] is in HBM.
        """
        call, far = self.call, self.far
        lanes, count = call.lanes, len(far.tiles)
        shape = (count, lanes.rows, far.tiles[0].columns)
        self.apart = nl.ndarray(shape, dtype=nl.float32, buffer=nl.private_hbm)
        tops, sums = sbuf((lanes.rows, count), nl.float32), sbuf((lanes.rows, count), nl.float32)
        for i in range(count):
            far.score(i, 1)
            scores, columns = far.scores, far.tiles[i].columns
            scores.shift_by_maximum(call.scale)
            nisa.tensor_copy(tops[:, i : i + 1], scores.shift)
            ignored = sbuf((lanes.rows, columns), nl.bfloat16)
            scores.exponentiate(ignored, scores.values[i], call.scale, True)
            nisa.tensor_copy(sums[:, i : i + 1], scores.sums[:, 0:1])
            nisa.dma_copy(self.apart[i, :, 0:columns], scores.values[i])
            scores.begin_again(i)
        scores.merge(tops, sums)

    def rank_apart(self):
        """What blocks are worth, and the compressed branch, from logits in HBM."""
        call, far = self.call, self.far
        scores, rows = far.scores, call.lanes.rows
        shares = shared_weights(call.owners, scores.inverse, call.length, call.ratio)
        before = call.length + call.ratio - 2  # blocks that reach into the next tile need these
        kept, done = [], 0
        for i in range(len(far.tiles)):
            tile = far.tiles[i]
            first, end = tile.first * tile.tokens, tile.first * tile.tokens + tile.columns
            last = call.blocks if i + 1 == len(far.tiles) else end // call.ratio
            columns = max(end, call.ratio * last) - first
            ordered = sbuf((rows, before + columns), nl.float32)
            nisa.memset(ordered, 0.0, engine=nisa.engine.gpsimd)
            if before > 0 and len(kept) > 0:
                size = kept[0].shape[1]
                nisa.tensor_copy(
                    ordered[:, before - min(before, size) : before],
                    kept[0][:, size - min(before, size) : size],
                )
            scores.values[i] = sbuf((rows, tile.columns), nl.float32)
            nisa.dma_copy(scores.values[i], self.apart[i, :, 0 : tile.columns])
            far.order_into(i, ordered[:, before : before + tile.columns], call.scale, False)
            for start, count in spans(last - done, BANK):
                found = importance(shares, ordered, first - before, done + start, count, call.ratio)
                part = self.ranked[:, done + start : done + start + count]
                nisa.tensor_tensor(part, part, found, nl.add)
            scores.weigh(i, self.own[0].dtype, call.scale, False)
            self.weigh_far(i, 1)
            kept, done = [ordered[:, 0 : before + tile.columns]], last

    def choose(self):
        """Which blocks the queries choose; asks where their rows lie."""
        call = self.call
        size = call.per_block * call.tokens
        numbers, real = choose(self.ranked, self.place, call.chosen)
        seen = seen_tokens(numbers, real, self.place, size)
        self.chosen = look_up(numbers, seen, self.place, call.table, call.blocks)
        self.seen = by_lane(seen, call.rows_of)

    def find_chosen(self):
        """Rows of the chosen blocks, of each query."""
        call = self.call
        self.chosen_tiles, self.chosen = [], placed(self.chosen)
        for s in range(call.rows_of.shape[1]):
            for first, rows in spans(call.chosen_rows, call.block_rows):
                tile = Tile(first, self.rows_of_chosen(s, first, rows), call.tokens, None)
                tile.query = s
                tile.kept = self.kept_of_chosen(rows)
                self.chosen_tiles.append(tile)

    def gather_chosen(self):
        """Asks for all chosen keys and values, if they fit."""
        cache, heads = self.cache(1), self.call.lanes.heads
        if (
            len(self.chosen_tiles)
            * (cache.bytes(cache.k) + cache.bytes(cache.v))
            * (heads if cache.apart == 0 else 1)
            > CHOSEN
        ):
            return
        for tile in self.chosen_tiles:
            tile.k = cache.gather_by_head(cache.k, tile.index)
        for tile in self.chosen_tiles:
            tile.v = cache.gather_by_head(cache.v, tile.index)

    def rows_of_chosen(self, s, first, rows):
        """Row numbers [rows, heads] of the blocks of query s, from one of the chosen rows on; keeps
        in `left` how many tokens from a row on the query sees."""
        call = self.call
        heads, queries = call.lanes.heads, call.rows_of.shape[1]
        bank = psum((rows, 2, heads))
        for i in range(len(self.chosen)):
            own = self.chosen[i][:, :, s : (heads - 1) * queries + s + 1 : queries]
            weights = call.spread[i][:, first : first + rows]
            nisa.nc_matmul(bank, weights, own, accumulate=i > 0)
        index = sbuf((rows, heads), nl.int32)
        self.left = sbuf((rows, heads), nl.float32)
        nisa.scalar_tensor_tensor(
            index, call.steps[0:rows, :].broadcast(1, heads), nl.multiply, float(call.step), nl.add,
            bank[:, 0, :],
        )  # fmt: skip
        nisa.scalar_tensor_tensor(
            self.left, call.steps[0:rows, :].broadcast(1, heads), nl.multiply,
            -float(call.tokens), nl.add, bank[:, 1, :],
        )  # fmt: skip
        return index

    def kept_of_chosen(self, rows):
        """As `Tile.kept`, of the rows that `left` is of."""
        heads, tokens = self.call.lanes.heads, self.call.tokens
        some = sbuf((rows, heads, tokens), nl.float32)
        kept = sbuf((rows, heads, tokens), self.kept.dtype)
        nisa.tensor_tensor(
            some,
            self.call.counted[0:rows, :].expand_dim(1).broadcast(1, heads),
            self.left.expand_dim(2).broadcast(2, tokens),
            nl.less,
        )
        nisa.tensor_scalar(kept, some, nl.multiply, -1.0)
        return kept

    def weigh_far(self, first_tile, count):
        """Some tiles of the compressed branch; the branch joins the sum after the last."""
        self.far.sum_values(first_tile, count)
        if count > 0 and first_tile + count == len(self.far.tiles):
            self.add(self.far.scores, self.far.out, 0)

    def weigh_near(self):
        scale, near = self.call.scale, self.near
        near.scores.shift_by_maximum(scale)
        for i in range(len(near.tiles)):
            near.scores.weigh(i, self.own[0].dtype, scale, True)
        near.scores.invert()
        near.clear_values()
        near.sum_values(0, len(near.tiles))
        self.add(near.scores, near.out, 2)

    def score_chosen(self):
        """Weights of the selected branch, and its values without what may not be used."""
        call, lanes, tiles = self.call, self.call.lanes, self.chosen_tiles
        parts = 0
        for tile in tiles:
            parts += len(groups_of(tile.rows, tile.tokens))
        scores = Scores(lanes, parts)
        for tile in tiles:
            k = tile.k
            if k is None:
                k = self.cache(1).gather_by_head(self.cache(1).k, tile.index)
            tile.k = None
            turned = turn_keys(k, lanes)
            values = scores.next_values(tile.columns)
            for first, count in groups_of(tile.rows, tile.tokens):
                logits = multiply(lanes, self.columns, turned, tile.rows, first, count, tile.tokens)
                part = values[:, first * tile.rows : (first + count) * tile.rows]
                hide_unseen(part, logits, self.shown(tile, first, count), scores.next_top())
        scores.shift_by_maximum(call.scale)
        for i in range(len(tiles)):
            scores.weigh(i, self.own[0].dtype, call.scale, True)
            if tiles[i].v is not None:
                clear_unseen(tiles[i].v, tiles[i].kept)
        scores.invert()
        self.chosen_scores = scores

    def sum_chosen(self):
        lanes, scores = self.call.lanes, self.chosen_scores
        out = psum((lanes.rows, self.own[2].shape[1]))
        for i in range(len(self.chosen_tiles)):
            tile = self.chosen_tiles[i]
            v = tile.v
            if v is None:
                v = self.cache(1).gather_by_head(self.cache(1).v, tile.index)
                clear_unseen(v, tile.kept)
            tile.v = None
            add_values(out, lanes, scores.weights[i], tile, v, i == 0)
        self.add(scores, out, 1)

    def shown(self, tile, first, count):
        """Which tokens of chosen rows each row of lanes sees, uint8 [rows, count * rows]."""
        call = self.call
        places = tile.rows // call.per_block
        place = tile.first // call.per_block
        shape = (call.lanes.rows, count, places, call.per_block)
        shown = sbuf(shape, nl.uint8)
        within = call.within[:, first : first + count, :].expand_dim(2).broadcast(2, places)
        seen = self.seen[:, tile.query, place : place + places]
        seen = seen.expand_dim(1).broadcast(1, count).expand_dim(3).broadcast(3, call.per_block)
        nisa.tensor_tensor(shown, within, seen, nl.less)
        return shown.reshape((call.lanes.rows, count * tile.rows))

    def add(self, scores, out, which):
        """Adds a branch whose exponentials are made and whose values are summed."""
        factor = sbuf((self.call.lanes.rows, 1), nl.float32)
        total = sbuf(out.shape, nl.float32)
        gate = self.numbers[:, which : which + 1]
        nisa.tensor_tensor(factor, scores.inverse, gate, nl.multiply)
        if len(self.total) == 0:
            nisa.tensor_scalar(total, out, nl.multiply, factor)
        else:
            nisa.scalar_tensor_tensor(total, out, nl.multiply, factor, nl.add, self.total[0])
        self.total = [total]

    def store(self):
        out = sbuf(self.total[0].shape, self.own[2].dtype)
        nisa.tensor_copy(out, self.total[0])
        fetch(self.own[2], out)


def hide_unseen(values, logits, shown, top):
    """Logits where `shown`, else `HIDDEN`, and the largest of each row."""
    nisa.select_reduce(
        values, shown, logits.reshape(values.shape), HIDDEN, reduce_res=top,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip


class Branch(nl.NKIObject):
    """Rows of a sequence that are known beforehand: compressed blocks, or those of the window."""

    def __init__(self, sequence, cache, first_tile, first_kept, first_bound, rows):
        self.sequence, self.cache, self.keys = sequence, cache, rows * cache.tokens
        self.tiles = []
        tokens = cache.tokens
        for first, count in spans(rows, nl.tile_size.pmax):
            i = len(self.tiles)
            index = sequence.index[0:count, first_tile + i : first_tile + i + 1]
            at = first_kept + i * tokens
            kept = sequence.kept[0:count, at : at + tokens]
            self.tiles.append(Tile(first, index, tokens, kept))
        numbers = sequence.numbers[:, 3 + first_bound : 3 + first_bound + 2 * tokens]
        self.bounds = (numbers[:, 0:tokens], numbers[:, tokens : 2 * tokens])

    def fits(self, pool, most_bytes):
        """Whether all tiles of a pool together take at most so many bytes of a partition."""
        return len(self.tiles) * self.cache.bytes(pool) <= most_bytes

    def gather_keys(self, most_bytes):
        """Asks for all keys, if they fit."""
        if self.fits(self.cache.k, most_bytes):
            for tile in self.tiles:
                tile.k = self.cache.gather(self.cache.k, tile.index)

    def gather_values(self, most_bytes):
        if self.fits(self.cache.v, most_bytes):
            for tile in self.tiles:
                tile.v = self.cache.gather(self.cache.v, tile.index)

    def score(self, first_tile, count):
        """Logits of some tiles, hidden where a row does not see a token."""
        sequence, lanes = self.sequence, self.sequence.call.lanes
        if first_tile == 0:
            self.scores = Scores(lanes, len(self.tiles) * self.cache.tokens)
        for tile in self.tiles[first_tile : first_tile + count]:
            k = tile.k if tile.k is not None else self.cache.gather(self.cache.k, tile.index)
            tile.k = None
            turned = turn_keys(by_head(k), lanes)
            values = self.scores.next_values(tile.columns)
            for first, tokens in groups_of(tile.rows, tile.tokens):
                logits = multiply(
                    lanes, sequence.columns, turned, tile.rows, first, tokens, tile.tokens
                )
                for i in range(tokens):
                    start = (first + i) * tile.rows
                    part = values[:, start : start + tile.rows]
                    self.hide(part, logits[:, i, :], tile, first + i)

    def hide(self, values, logits, tile, j):
        nisa.range_select(
            values, logits, nl.greater_equal, nl.less_equal, self.bounds[0][:, j : j + 1],
            self.bounds[1][:, j : j + 1], reduce_res=self.scores.next_top(), range_start=tile.first,
        )  # fmt: skip

    def order(self, i, ordered, scale):
        """Exponentials of tile i in the order of the keys, among `ordered` [rows, keys] float32."""
        first = self.tiles[i].first * self.tiles[i].tokens
        self.order_into(i, ordered[:, first : first + self.tiles[i].columns], scale, True)

    def order_into(self, i, by_row, scale, add_up):
        """The same into [rows, keys of the tile]; `add_up`: as of `Scores.exponentiate`."""
        tile, scores = self.tiles[i], self.scores
        rows = scores.lanes.rows
        by_row = by_row.reshape((rows, tile.rows, tile.tokens))
        by_token = scores.values[i].reshape((rows, tile.tokens, tile.rows))
        for first, count in groups_of(tile.rows, tile.tokens):
            target = by_row[:, :, first : first + count].permute((0, 2, 1))
            scores.exponentiate(target, by_token[:, first : first + count, :], scale, add_up)

    def clear_values(self):
        """Values that are there already lose what may not be used."""
        for tile in self.tiles:
            if tile.v is not None:
                clear_foreign(tile.v, tile.kept)

    def sum_values(self, first_tile, count):
        """Adds weights times values of some tiles to `out` [rows, DV] in PSUM."""
        lanes, weights = self.scores.lanes, self.scores.weights
        if first_tile == 0:
            self.out = psum((lanes.rows, self.cache.v.shape[-1]))
        for i in range(first_tile, first_tile + count):
            tile = self.tiles[i]
            v = tile.v
            if v is None:
                v = self.cache.gather(self.cache.v, tile.index)
                clear_foreign(v, tile.kept)
            tile.v = None
            add_values(self.out, lanes, weights[i], tile, by_head(v), i == 0)
            weights[i] = None


def by_head(x):
    """[rows, t, heads, D] as a list of views [rows, t, D]."""
    found = []
    for h in range(x.shape[2]):
        found.append(x[:, :, h, :])
    return found
