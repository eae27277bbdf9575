"""Decode of one new token of one or two kv heads on a core: the shortest chain of steps.

Dimensions: G query heads <= 128, Dk, Dv <= 256; pools in rows of t tokens, see `caches`; n chosen
blocks in at most 128 rows.
Layout: (token of a row, query head) on the partitions, see `spread`; blocks as in `ranking`.

    index -> gather K_cmp turned by DMA, K_win, V_cmp, V_win
    compressed   S = q K^T as tiles of 128 rows arrive; hide; exact maximum over a head's lanes; exp
    worth        exp, stationary, times (shares of strides / sums): one matmul per token of a lane
    selection    the best 8 * ceil(n / 8) of each of 8 parts by VectorE; each of these candidates is
                 compared with all others, PE counts its rank, a matmul picks the rows of the n best
    selected     gather K turned, V; S, hide, maximum, exp; PE turns the weights; o += P V
    meanwhile    window; weights turned and values cleared and added up for both known branches

Bound by the chain of its steps, not by an engine: of 24.5 us at 64K tokens (modelled, 64/4/192/128,
bfloat16, one of four kv heads on a core; 21.2 with all constants low, 47.6 high) VectorE and PE
work 15 each, ScalarE and GpSimd 4, and bytes take 9. The chain, us, waits included: row numbers
1.3; compressed keys 5.8 (4.5 of bytes at 0.9 of the copy rate, `dma_transpose`; `dma_start` 0.8,
and 0.4 to tell of their end); logits 0.7, hidden 0.7; maximum 0.7; exp of 1032 columns 1.1; sums
0.9; worth of blocks 1.3, in parts 0.7; candidates 1.6; where they begin 1.0 (`nc_n_gather`, 8
cycles for each of 128 columns: a guess, 2 to 32); rows of the n best 1.3; chosen keys 2.5 (1.2 of
bytes); logits 0.4, hidden 0.5, maximum 0.7, exp 0.5; weights turned 0.7; values 0.7; the result 0.3
and 1.1 of DMA.

A lower bound of this chain with these prices: four DMAs wait for one another (row numbers, keys,
chosen keys, the result), 0.82 to start, 0.085 and 0.344 to end and their bytes, 10.5 us; 35 steps
of engines wait for one another, each 0.2 at least (0.16 beyond its work, 0.04 to tell another), 7:
17.5 us if arithmetic took nothing. So 16.4, four times a dense step, wants fewer steps, not faster
ones.

Weighed, us: logits with keys on the partitions, PE turning keys and weights of 128 rows by heads on
the free axis, all ranks in one row of 1024: 35.6. As that with heads on the partitions: 70. Keys
turned by DMA, first version in this layout, all small inputs before the keys 34.2; those in three
DMAs 32.4; what hangs on sizes only made on chip 32.0; the window and the sums of known branches
spread over the waits 25.9; compressed values asked for before the window's 24.5. Not done: two
groups of 16 heads on each 32 lanes would save 1.1, but q = 0 of one group meets NaN of the other's
unwritten keys; pages looked up instead of blocks 0.2; two cores for a head halve the bytes of keys,
2.2, and meet twice, 2.0 each; exp of the first tile before the second has come, 0.1. Two heads on a
core, step by step in turn: 43 us, one after the other 47.

Prices: `nsa_neuron/simulator/cost/parameters.py`. No source prices a transposing DMA with row
numbers as data by itself: it is taken as a transposing one with GpSimd's 14 ns per row.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import share
from nki_kernels.common.queues import move
from nki_kernels.decode.caches import Cache
from nki_kernels.decode.fields import Constants, Place
from nki_kernels.decode.head import Head, run_all
from nki_kernels.decode.spread import Cleared, groups_of
from nki_kernels.decode.turned import Turned, gather_keys

PARTITIONS = 128

WARM_UP = 9
"""Matmuls of 512 columns, 0.43 us each while PE is cold."""


@nki.jit
def decode_single(
    q_t, index, place, of_parts, gates, constants, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win,
    strides: tuple, rows: tuple, length: int, ratio: int, size: int, chosen: int, heads: int,
    by_dma: bool, scale: float,
):  # fmt: skip
    """o [B, Hkv, G, DV] in q's dtype; see the module's docstring.

    Args:
        q_t: [B, Hkv, 128, places, pitch], see `turned`, zeros behind the G heads; pitch 32, 64 or
            128 lanes of PE.
        index: [B, 128, tiles + 1] int32: row of the pool on each partition, for each 128 rows of
            the compressed branch, then for the window.
        place: [B, 128, ...] float32, see `fields.Place`. of_parts: [B, parts, 2, blocks of a part]
            float32, see `ranking`. gates: [B, Hkv, G, 3] float32.
        constants: [128, ...] float32, see `fields.Constants`.
        k_cmp, ...: pools, see `caches`; strides: `Cache.apart` of cmp, slc and win.
        rows: of the window, and of chosen blocks, rounded up to a multiple of 16.
        length, ratio: l / d and m / d. size: m. chosen: n. heads: G. by_dma: whether DMA turns
            keys.
    """
    batch, kv_heads = q_t.shape[0:2]
    o = nl.ndarray((batch, kv_heads, heads, v_cmp.shape[-1]), q_t.dtype, buffer=nl.shared_hbm)
    call = Call(q_t, index, of_parts, rows, by_dma)
    call.set_sizes(length, ratio, size, chosen, heads, scale)
    call.set_pools(
        (k_cmp, v_cmp, strides[0]), (k_slc, v_slc, strides[1]), (k_win, v_win, strides[2])
    )
    first, count = share(batch * kv_heads)
    sequences, known = [], []
    for b in range(first // kv_heads, (first + count - 1) // kv_heads + 1):
        low, high = max(first, b * kv_heads), min(first + count, (b + 1) * kv_heads)
        own = Sequence(call, low - b * kv_heads, high - low, o[b])
        own.load_first(index[b], q_t[b], place[b])
        own.gather_keys()
        if len(known) == 0:
            warm_up(q_t.dtype)
            known.append(load(constants, "a"))
        own.load_rest(of_parts[b], gates[b])
        own.gather_rest()
        sequences.append(own)
    call.constants = Constants(known[0], call)
    items = []
    for own in sequences:
        items += own.all_heads()
    run_all(items)
    return o


def load(source, queue=""):
    """A tile of HBM."""
    target = sbuf(source.shape, source.dtype)
    move(target, source, queue)
    return target


def warm_up(dtype):
    """PE runs at half its rate until it has been busy for 4.6 us: it multiplies something while
    keys are on their way."""
    some = sbuf((PARTITIONS, 512), dtype)
    nisa.memset(some, 0.0)
    for _ in range(WARM_UP // (2 if dtype == nl.float32 else 1)):
        nisa.nc_matmul(psum((PARTITIONS, 512)), some[:, 0:PARTITIONS], some, accumulate=False)


class Call(nl.NKIObject):
    """What all sequences have in common: sizes and pools, named as the arguments of
    `decode_single`."""

    def __init__(self, q_t, index, of_parts, rows, by_dma):
        self.dtype, self.kv_heads, self.pitch = q_t.dtype, q_t.shape[1], q_t.shape[4]
        self.tiles, self.parts = index.shape[2] - 1, of_parts.shape[1]
        self.rows, self.by_dma = rows, by_dma

    def set_sizes(self, length, ratio, size, chosen, heads, scale):
        """See `decode_single`."""
        self.length, self.ratio, self.size, self.chosen = length, ratio, size, chosen
        self.heads, self.scale = heads, scale

    def set_pools(self, cmp, slc, win):
        """Of each keys, values and `Cache.apart`."""
        self.cmp, self.slc, self.win = cmp, slc, win
        self.far_tokens, self.near_tokens = cmp[0].shape[1], win[0].shape[1]
        self.chosen_tokens = slc[0].shape[1]


class Sequence(nl.NKIObject):
    """A sequence, of which a core has `heads` kv heads from number `first` on.

    Attributes:
        far: of each tile of compressed keys, and near: of the window, `Gathered`.
        queries: [128, heads, places, pitch]. gates: [G, heads, 3]. place: see `fields`.
        of_parts: see `ranking`. out: [Hkv, G, DV] in HBM.
    """

    def __init__(self, call, first, heads, out):
        self.call, self.first, self.heads, self.out = call, first, heads, out

    def load_first(self, index, q_t, place):
        """What keys hang on."""
        call, own = self.call, slice(self.first, self.first + self.heads)
        self.index = load(index)
        self.queries = load(q_t[own].permute((1, 0, 2, 3)))
        each = call.chosen_tokens // groups_of(call.chosen_tokens, call.pitch)
        self.place = Place(load(place), call.tiles, each)

    def gather_keys(self):
        """Asks for the keys of the compressed branch."""
        self.far = []
        for i in range(self.call.tiles):
            own = Gathered(self, self.call.cmp, self.index[:, i : i + 1])
            own.gather_keys()
            self.far.append(own)

    def load_rest(self, of_parts, gates):
        """What comes after them."""
        own = slice(self.first, self.first + self.heads)
        self.of_parts = load(of_parts, "a")
        self.gates = load(gates[own].permute((1, 0, 2)), "a")

    def gather_rest(self):
        """Asks for the window and the values."""
        call, kept = self.call, self.place.kept
        self.near = Gathered(self, call.win, self.index[:, call.tiles : call.tiles + 1])
        self.near.gather_keys()
        tokens = call.far_tokens
        for i in range(call.tiles):
            own = kept[:, i * tokens : (i + 1) * tokens]
            self.far[i].gather_values(PARTITIONS, own, i % 2 > 0)
        self.near.gather_values(call.rows[0], kept[:, call.tiles * tokens :], False)

    def all_heads(self):
        """Its `Head`s."""
        found = []
        for i in range(self.heads):
            found.append(Head(self, self.first + i, i))
        return found


class Gathered(nl.NKIObject):
    """Up to 128 rows of a cache, for all heads at once where a row holds them all, else for each.

    Args:
        pools: keys, values and `Cache.apart`. index: [128, 1] int32.
    """

    def __init__(self, sequence, pools, index):
        k, v, apart = pools
        self.index, self.by_dma, self.apart = index, sequence.call.by_dma, apart
        self.caches, self.k, self.v, self.uncleared = [], [], [], []
        if apart == 0:
            self.caches.append(Cache(k, v, apart, 0, k.shape[2]))
        else:
            for i in range(sequence.heads):
                self.caches.append(Cache(k, v, apart, sequence.first + i, 1))

    def gather_keys(self):
        """Asks for keys."""
        for cache in self.caches:
            self.k.append(gather_keys(cache, cache.k, self.index, self.by_dma))

    def gather_values(self, rows, kept, by_gpsimd):
        """Asks for values of the first `rows`. kept, by_gpsimd: see `spread.Cleared`."""
        for cache in self.caches:
            self.v.append(cache.gather(cache.v, self.index[0:rows]))
            self.uncleared.append(Cleared(self.v[-1], kept[0:rows], by_gpsimd))

    def keys(self, h, number):
        """Of head h, which is the `number`-th of its core."""
        own = 0 if self.apart == 0 else number
        cache = Cache(self.caches[own].k, self.caches[own].v, self.apart, h, 1)
        return Turned(cache, self.k[own], self.index.shape[0], self.by_dma)

    def values(self, h, number):
        """[rows, t, DV] of head h."""
        return self.v[0][:, :, h, :] if self.apart == 0 else self.v[number][:, :, 0, :]

    def clear(self, number):
        """Values become zero where no token may be used, once of all heads that came together."""
        if self.apart > 0:
            self.uncleared[number].clear()
        elif number == 0:
            self.uncleared[0].clear()
