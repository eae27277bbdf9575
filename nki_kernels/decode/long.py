"""A sequence whose logits do not fit into SBUF: those of the compressed branch are kept in HBM."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.common.spans import spans
from nki_kernels.decode.order import finish
from nki_kernels.decode.selection import BANK, importance, shared_weights
from nki_kernels.decode.sequence import AHEAD


def run_long(sequence):
    """All steps of a sequence whose logits are kept in HBM, tile by tile."""
    sequence.load()
    score_apart(sequence)
    sequence.score_near()
    rank_apart(sequence)
    sequence.exponentiate_near()
    sequence.near.gather_values(AHEAD)
    sequence.near.clear_values()
    sequence.weigh_near()
    sequence.chosen.choose(sequence.ranked, sequence.place)
    sequence.add_known()
    sequence.chosen.find()
    sequence.chosen.gather()
    sequence.chosen.score()
    finish(sequence)


def score_apart(sequence):
    """Logits of the compressed branch, which go to HBM, and the sums of their exponentials.

    A tile's sum is relative to its own maximum; `apart` [tiles, rows, columns] is in HBM.
    """
    call, far = sequence.call, sequence.far
    lanes, count = call.lanes, len(far.tiles)
    shape = (count, lanes.rows, far.tiles[0].columns)
    sequence.apart = nl.ndarray(shape, dtype=nl.float32, buffer=nl.private_hbm)
    tops, sums = sbuf((lanes.rows, count), nl.float32), sbuf((lanes.rows, count), nl.float32)
    for i in range(count):
        far.score(i, 1)
        far.flush()
        scores, columns = far.scores, far.tiles[i].columns
        scores.shift_by_maximum(call.scale)
        nisa.tensor_copy(tops[:, i : i + 1], scores.shift)
        ignored = sbuf((lanes.rows, columns), nl.bfloat16)
        scores.exponentiate(ignored, scores.values[i], call.scale, True)
        nisa.tensor_copy(sums[:, i : i + 1], scores.sums[:, 0:1])
        nisa.dma_copy(sequence.apart[i, :, 0:columns], scores.values[i])
        scores.begin_again(i)
    scores.merge(tops, sums)


def rank_apart(sequence):
    """What blocks are worth, and the compressed branch, from logits in HBM."""
    call, far = sequence.call, sequence.far
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
        nisa.dma_copy(scores.values[i], sequence.apart[i, :, 0 : tile.columns])
        far.order_into(i, ordered[:, before : before + tile.columns], call.scale, False)
        for start, count in spans(last - done, BANK):
            found = importance(shares, ordered, first - before, done + start, count, call.ratio)
            part = sequence.ranked[:, done + start : done + start + count]
            nisa.tensor_tensor(part, part, found, nl.add)
        scores.weigh(i, sequence.own[0].dtype, call.scale, False)
        sequence.weigh_far(i, 1)
        kept, done = [ordered[:, 0 : before + tile.columns]], last
