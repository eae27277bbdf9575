"""Attention over listed key blocks: each block is a transfer whose address is read from a list.

The structure that a public NKI 0.6 kernel documents (reecedantin/vllm-omni-neuron, docs/design/
block_sparse_attention_trn2.md), written anew for its published times: two or three queues fetch
two passes ahead, scores of one pass are computed before the softmax and values of the one before.
"""

from ..nki import isa as nisa
from ..nki import language as nl

P = 128
CHUNK = 512  # keys per score matmul: a PSUM bank
BUFFERS = 3
LOWEST = -3.4028235e38


def packed_blocks(q, blocks, lists, rows, queues, sub_tiles=1, per_pass=22):
    """Blocks of `rows` keys held as [K^T | V] per partition: one transfer each.

    Args:
        q: [128, items * sub_tiles * 128], transposed.
        blocks: [n, 128, 2 * rows], packed.
        lists: [items, blocks of each], int32.
        rows: keys of a block, a multiple of 128.
        queues: 2 (sync, scalar) or 3 (software descriptors too).
        sub_tiles: tiles of 128 queries that share an item's blocks.
        per_pass: blocks that are fetched and used together.
    """

    def fetch(index, held, t):
        tile = held[0][:, t, :]
        view = blocks.ap([[2 * rows, P], [1, 2 * rows]], scalar_offset=index, indirect_dim=0)
        _copy(tile, view, t % queues)

    def keys(held, t):
        return held[0][:, t, 0:rows]

    def values(held, part):
        t, j = divmod(part, rows // P)
        return held[0][:, t, rows + j * P : rows + (j + 1) * P]

    shapes = [(P, per_pass, 2 * rows)]
    return _attend(q, lists, (fetch, keys, values), shapes, rows, sub_tiles, per_pass, None)


def split_blocks(q, keys_t, values_of, lists, per_pass=16, mask=None):
    """Blocks of 64 keys: K^T on one queue and V on another, two transfers each.

    Args:
        q: [128, items * 128], transposed.
        keys_t: [n, 128, 64].
        values_of: [n, 64, 128].
        lists: [items, blocks of each], int32.
        per_pass: blocks that are fetched and used together.
        mask: [items, 2, keys of each]; both rows are added to the scores of all queries. The
            public kernel adds one row to either half of them, which takes as long.
    """
    rows = keys_t.shape[2]

    def fetch(index, held, t):
        view = keys_t.ap([[rows, P], [1, rows]], scalar_offset=index, indirect_dim=0)
        _copy(held[0][:, t, :], view, 0)
        half = slice(t % 2 * rows, (t % 2 + 1) * rows)
        view = values_of.ap([[P, rows], [1, P]], scalar_offset=index, indirect_dim=0)
        _copy(held[1][half, t // 2, :], view, 1)

    def keys(held, t):
        return held[0][:, t, :]

    def values(held, part):
        return held[1][:, part, :]

    shapes = [(P, per_pass, rows), (P, per_pass // 2, P)]
    return _attend(q, lists, (fetch, keys, values), shapes, rows, 1, per_pass, mask)


def _copy(dst, src, queue):
    if queue == 2:
        nisa.dma_copy(dst, src, dge_mode=nisa.dge_mode.swdge)
        return
    engine = (nisa.engine.sync, nisa.engine.scalar)[queue]
    nisa.dma_copy(dst, src, dge_mode=nisa.dge_mode.hwdge, engine=engine)


def _attend(q, lists, access, shapes, rows, sub_tiles, per_pass, mask):
    """One software pipeline over (item, pass, tile of queries)."""
    items, listed = lists.shape
    passes = listed // per_pass
    width = per_pass * rows
    out = nl.ndarray((items * sub_tiles * P, P), q.dtype, buffer=nl.shared_hbm)
    ones = nl.ndarray((2, P), q.dtype)
    bounds = [nl.ndarray((P, 1), nl.float32) for _ in range(2)]
    for tile, value in ((ones, 1.0), (bounds[0], 0.0), (bounds[1], float(width))):
        nisa.memset(tile, value)
    held = [[nl.ndarray(s, q.dtype) for s in shapes] for _ in range(BUFFERS)]
    masks = [nl.ndarray((2, width), q.dtype) for _ in range(BUFFERS)] if mask is not None else []
    index = [nl.ndarray((1, listed), nl.int32) for _ in range(BUFFERS)]
    queries = [nl.ndarray((P, sub_tiles * P), q.dtype) for _ in range(2)]
    state = _State(sub_tiles)

    def fetch(step):
        item, number = divmod(step, passes)
        where = index[item % BUFFERS]
        if number == 0:
            nisa.dma_copy(where, lists[item : item + 1], dge_mode=nisa.dge_mode.hwdge)
        if masks:
            part = slice(number * width, (number + 1) * width)
            nisa.dma_copy(masks[step % BUFFERS], mask[item, :, part])
        for t in range(per_pass):
            slot = number * per_pass + t
            access[0](where[0:1, slot : slot + 1], held[step % BUFFERS], t)

    steps = items * passes
    for step in range(min(BUFFERS - 1, steps)):
        fetch(step)
    pending = None
    for step in range(steps):
        item, number = divmod(step, passes)
        if number == 0:
            columns = slice(item * sub_tiles * P, (item + 1) * sub_tiles * P)
            nisa.dma_copy(queries[item % 2], q[:, columns])
        for sub in range(sub_tiles):
            kv = held[step % BUFFERS]
            score = _scores(
                queries[item % 2][:, sub * P : (sub + 1) * P],
                lambda t, kv=kv: access[1](kv, t),
                rows,
                width,
                bounds,
                (ones, masks[step % BUFFERS]) if masks else None,
                state.lowest[item % 2 * sub_tiles + sub],
                number == 0,
            )
            if pending is not None:
                _finish(*pending, access[2], out, state)
            pending = (score, kv, item, number, sub, passes)
            if sub == 0 and step + BUFFERS - 1 < steps:
                fetch(step + BUFFERS - 1)
    _finish(*pending, access[2], out, state)
    return out


class _State:
    """Running output, sum and negative maximum of each tile of queries."""

    def __init__(self, tiles):
        self.tiles = tiles
        self.output = [nl.ndarray((P, P), nl.float32) for _ in range(2 * tiles)]
        self.sums = [nl.ndarray((P, 1), nl.float32) for _ in range(2 * tiles)]
        self.lowest = [nl.ndarray((P, 1), nl.float32) for _ in range(2 * tiles)]


def _scores(query, keys, rows, width, bounds, masked, running, first):
    """Masked scores [128, width], the negative maximum so far, and what it changes by."""
    chunks = -(-width // CHUNK)
    scores, most = nl.ndarray((P, width), nl.float32), nl.ndarray((P, chunks), nl.float32)
    for c in range(chunks):
        start, end = c * CHUNK, min((c + 1) * CHUNK, width)
        psum = nl.ndarray((P, end - start), nl.float32, buffer=nl.psum)
        for t in range(start // rows, -(-end // rows)):
            low, high = max(start, t * rows), min(end, (t + 1) * rows)
            part = keys(t)[:, low - t * rows : high - t * rows]
            nisa.nc_matmul(psum[:, low - start : high - start], query, part)
        if masked is not None:
            nisa.nc_matmul(psum, masked[0], masked[1][:, start:end], accumulate=True)
        nisa.range_select(
            scores[:, start:end],
            psum,
            nl.greater_equal,
            nl.less,
            bounds[0],
            bounds[1],
            reduce_res=most[:, c : c + 1],
            range_start=start,
            on_false_value=LOWEST,
        )
    lowest = nl.ndarray((P, 1), nl.float32)
    nisa.tensor_reduce(lowest, nl.maximum, most, 1, negate=True, keepdims=True)
    factor = nl.ndarray((P, 1), nl.float32)
    if not first:
        nisa.tensor_tensor(lowest, lowest, running, nl.minimum)
        nisa.activation(factor, nl.exp, running, bias=lowest, scale=-1.0)
    nisa.tensor_copy(running, lowest)
    return scores, lowest, factor


def _finish(score, held, item, number, sub, passes, values, out, state):
    """Exponentials, their transposes by DMA, and the product with the values of one pass."""
    scores, lowest, factor = score
    width, slot = scores.shape[1], item % 2 * state.tiles + sub
    total, output = state.sums[slot], state.output[slot]
    chunks = -(-width // CHUNK)
    p, sums = nl.ndarray((P, width), nl.bfloat16), nl.ndarray((P, chunks), nl.float32)
    nisa.memset(sums, 0.0, engine=nisa.engine.gpsimd)
    turned = nl.ndarray((P, width // P, P), nl.bfloat16)
    for c in range(chunks):
        part = slice(c * CHUNK, min((c + 1) * CHUNK, width))
        nisa.activation_reduce(
            p[:, part], nl.exp, scores[:, part], nl.add, sums[:, c : c + 1], bias=lowest
        )
        tiles = (part.stop - part.start) // P
        pattern = [[width, P], [1, 1], [P, tiles], [1, P]]
        offset = part.start
        nisa.dma_transpose(turned.ap(pattern, offset=offset), p.ap(pattern, offset=offset))
    psum = nl.ndarray((P, P), nl.float32, buffer=nl.psum)
    for j in range(width // P):
        nisa.nc_matmul(psum, turned[:, j, :], values(held, j))
    summed = nl.ndarray((P, 1), nl.float32)
    nisa.tensor_reduce(summed, nl.add, sums, 1, keepdims=True)
    if number:
        nisa.scalar_tensor_tensor(total, total, nl.multiply, factor, nl.add, summed)
        nisa.scalar_tensor_tensor(output, output, nl.multiply, factor, nl.add, psum)
    else:
        nisa.tensor_copy(total, summed)
        nisa.tensor_copy(output, psum)
    if number == passes - 1:
        inverse, rows = nl.ndarray((P, 1), nl.float32), nl.ndarray((P, P), out.dtype)
        nisa.reciprocal(inverse, total)
        nisa.tensor_scalar(rows, output, nl.multiply, inverse)
        row = (item * state.tiles + sub) * P
        nisa.dma_copy(out[row : row + P], rows)
