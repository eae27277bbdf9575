"""Decode: the newest tokens of each sequence against paged KV caches, all three branches.

Dimensions: B sequences, S new tokens, Hq = G * Hkv heads, Dk, Dv <= 256, S * G <= 128 rows per kv
head. Pools are cut in rows of t tokens, see `caches`.
Layout: 128 / PITCH kv heads at a time, each on PITCH partitions (32, 64 or 128, at least S * G);
keys along the free axis. So softmax is one reduction per row, a mask one VectorE pass, and the four
kv heads of a 64/4 model with one new token take as long as one.

    per sequence, per group of kv heads:
        compressed   gather rows, K turned by DMA or PE; S = q K^T; hide; p = exp(scale (S - max))
        window       the same
        selection    importance = p summed by PE over heads and over overlapping compressed blocks;
                     forced blocks first; the n best by rounds of 8, lowest number on ties
        selected     row numbers of the chosen blocks, looked up on the device; gather; S, p
        each branch  o = p V / sum                              (p turned by PE, 128 keys at a time)
        o = sum of gate * branch

Sequences of a body overlap, see `order`: while one chooses, the next one's keys are on their way.
Only DMA has run-time addresses. Lengths are data: bounds of what each row sees come as
numbers. Logits that do not fit SBUF go to HBM, see `long`.

Bound by DMA: at 64K tokens, 64/4/192/128, bfloat16, it has 48 us per sequence (14.4 MB), beside 38
each of VectorE and of GpSimd's descriptors, 26 of TensorE, 20 of ScalarE. Modelled: 83 us for one
sequence, 70 each for four. Reading all of a dense cache at full rate would take 524. One token of
one or two kv heads in all goes through `single`.
Weighed: a DMA with a run-time address for each page of a branch (221 of 1.6 us, 188 us for each of
four sequences); values cleared by a select (24 us of VectorE instead of 12); overlapping blocks
added by VectorE instead of TensorE (8 us); a table of blocks on each pair's partition, looked up by
GpSimd (7 us instead of 2.6 of DMA); keys turned by PE (VectorE 46 us instead of 38, 75 for each of
four sequences); the layout of `single` for four heads (55 of VectorE, 83 for one sequence). Not
tried: keys beside values in a row, half the descriptors.
"""

import nki
import nki.language as nl

from nki_kernels.common.cores import share
from nki_kernels.decode.call import Call
from nki_kernels.decode.long import run_long
from nki_kernels.decode.order import run_all
from nki_kernels.decode.sequence import Sequence


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


def sequences_per_body(count, most):
    """How many of `count` sequences a body of the loop takes, so that they overlap."""
    per = min(count, most)
    while count % per > 0:
        per -= 1
    return per


def at(tensor, i, j, per):
    """Item i + j, i a run-time number up to the last but per - 1."""
    return tensor[j : tensor.shape[0] - per + 1 + j].select(0, i)
