"""The n best of a row whose scores come in pieces: lowest index first on ties, any n."""

import nki.isa as nisa
import nki.language as nl

LANES = 8  # what max8 and nc_match_replace8 find at once
# Scores are >= 0 where a block may be chosen. Below, so that none is mistaken for another:
EMPTY = -6.0  # a place of the list that nothing has taken yet
TAKEN = -8.0  # what a chosen score becomes
NOTHING = -9.0  # a value that no row has


def fp32(parts, width):
    """A float32 tile [parts, width] in SBUF."""
    return nl.ndarray((parts, width), dtype=nl.float32, buffer=nl.sbuf)


def descending(keys, count):
    """The `count` largest of keys [P, N >= 8], all >= 0, in order: [P, count rounded up to 8]."""
    parts, width = keys.shape
    rounds = (count + LANES - 1) // LANES
    found = fp32(parts, rounds * LANES)
    current = keys
    for r in range(rounds):
        top = found[:, r * LANES : (r + 1) * LANES]
        nisa.max8(top, current)
        if r < rounds - 1:
            following = fp32(parts, width)
            nisa.nc_match_replace8(following, current, top, 0.0)
            current = following
    return found


def reversed_into(target, values, limit):
    """target = limit - values."""
    nisa.tensor_scalar(target, values, nl.multiply, -1.0, op1=nl.add, operand1=float(limit))


def best_positions(scores, count):
    """Positions of the `count` best scores [P, N >= 8] as uint32 [P, count], ascending.

    Each round takes eight values, of equal ones those at the lowest positions; in the last round
    the values beyond `count` are replaced by one that matches nothing.
    """
    parts, width = scores.shape
    rounds = (count + LANES - 1) // LANES
    found = nl.ndarray((parts, rounds * LANES), dtype=nl.uint32, buffer=nl.sbuf)
    current = scores
    for r in range(rounds):
        top = fp32(parts, LANES)
        nisa.max8(top, current)
        if count - r * LANES < LANES:
            nisa.memset(top[:, count - r * LANES : LANES], NOTHING)
        following = fp32(parts, width)
        where = found[:, r * LANES : (r + 1) * LANES]
        nisa.nc_match_replace8(following, current, top, TAKEN, dst_idx=where)
        current = following
    keys = fp32(parts, max(LANES, count))
    if count < LANES:
        nisa.memset(keys, 0.0)
    reversed_into(keys[:, 0:count], found[:, 0:count], width)
    positions = nl.ndarray((parts, count), dtype=nl.uint32, buffer=nl.sbuf)
    reversed_into(keys[:, 0:count], descending(keys, count)[:, 0:count], width)
    # A row of NaN matches nothing: its positions are any, but must be some.
    nisa.tensor_scalar(positions, keys[:, 0:count], nl.minimum, float(width - 1))
    return positions


def start_list(scores, ids, count):
    """Empties the list, the first `count` columns of scores and ids [P, count + piece]."""
    nisa.memset(scores[:, 0:count], EMPTY)
    nisa.memset(ids[:, 0:count], 0.0)


def merge(scores, ids, count):
    """Makes the first `count` columns the best of all, ascending by id, given that they are so.

    The list has lower ids than the piece behind it, so positions are in the order of ids. GpSimd,
    which gathers, also puts the list back, so that VectorE need not wait for it.
    """
    parts, width = scores.shape
    if width < LANES:
        wide = fp32(parts, LANES)
        nisa.memset(wide, TAKEN)
        nisa.tensor_copy(wide[:, 0:width], scores)
        positions = best_positions(wide, count)
    else:
        positions = best_positions(scores, count)
    for table in (scores, ids):
        chosen = fp32(parts, count)
        nisa.nc_n_gather(chosen, table, positions)
        nisa.tensor_copy(table[:, 0:count], chosen, engine=nisa.engine.gpsimd)


def chosen_ids(scores, ids, base, count, limit):
    """The list's ids minus `base` as int32 [P, count], ascending, -1 where nothing was chosen.

    Args:
        base: float32 [P, 1]. limit: more than any id.
    """
    parts = scores.shape[0]
    valid, keys = fp32(parts, count), fp32(parts, max(LANES, count))
    nisa.tensor_scalar(valid, scores[:, 0:count], nl.greater_equal, 0.0)
    local = fp32(parts, count)
    nisa.tensor_scalar(local, ids[:, 0:count], nl.subtract, base)
    if count < LANES:
        nisa.memset(keys, 0.0)
    reversed_into(local, local, limit)
    nisa.tensor_tensor(keys[:, 0:count], local, valid, nl.multiply)
    ordered = descending(keys, count)[:, 0:count]
    ends, result = fp32(parts, count), nl.ndarray((parts, count), dtype=nl.int32, buffer=nl.sbuf)
    nisa.tensor_scalar(ends, ordered, nl.equal, 0.0, op1=nl.multiply, operand1=-float(limit + 1))
    reversed_into(local, ordered, limit)
    nisa.tensor_tensor(result, local, ends, nl.add)
    return result
