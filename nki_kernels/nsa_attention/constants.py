"""What all tiles of a call share: its arguments, and tensors in SBUF that are made once."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import sbuf
from nki_kernels.nsa_attention.geometry import KEYS, QUERIES, STRIDE


class Constants(nl.NKIObject):
    """Attributes:
    weights: [128, 34] float32: shares of a tile's keys in its 32 blocks, in the next tile's first
        block, and 1.
    heads: [rows, queries of a part] float32, 1 where a row belongs to a query.
    same: [128, 32] float32, 1 where lane 32 * c + q belongs to query q.
    slot_keys: [slots, pairs, 128] bfloat16, 1 at a slot's keys in its pair.
    zeros: [32, 512] bfloat16.
    near, far: [128, 32] float32: query - key; query - 16 * key.
    """

    def __init__(self, weights, heads, same, slot_keys):
        self.weights = loaded(weights)
        self.heads = loaded(heads)
        self.same = loaded(same)
        self.slot_keys = loaded(slot_keys)
        self.zeros = sbuf((QUERIES, nl.tile_size.gemm_moving_fmax), nl.bfloat16)
        nisa.memset(self.zeros, 0.0)
        self.near = sbuf((KEYS, QUERIES), nl.float32)
        nisa.iota(self.near, [[1, QUERIES]], offset=0, channel_multiplier=-1)
        self.far = sbuf((KEYS, QUERIES), nl.float32)
        nisa.iota(self.far, [[1, QUERIES]], offset=0, channel_multiplier=-STRIDE)


def loaded(source):
    """A tensor in HBM as a tile in SBUF."""
    tile = sbuf(source.shape, source.dtype)
    nisa.dma_copy(tile, source)
    return tile


def keep_where(weights, distance, compare, bound):
    """Zeroes P^T [keys, 32 * heads] but where `compare(distance, bound)`, [keys, 32]."""
    keep_from(weights, distance, compare, float(bound))


def keep_from(weights, distance, compare, bound):
    """The same for a bound in SBUF, [keys, 1]."""
    keys, columns = weights.shape
    by_head = weights.reshape((keys, QUERIES, columns // QUERIES))
    whole = distance[0:keys, :].expand_dim(2).broadcast(2, columns // QUERIES)
    nisa.scalar_tensor_tensor(by_head, whole, compare, bound, nl.multiply, by_head)
