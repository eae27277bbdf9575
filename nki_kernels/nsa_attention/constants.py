"""What all tiles of a call share: its arguments, and tensors in SBUF that are made once."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.geometry import (
    AT_ONCE,
    KEYS,
    QUADRANT,
    QUERIES,
    STRIDE,
    TOKENS,
)


class Constants(nl.NKIObject):
    """Attributes:
    weights: [128, 34] float32: shares of a tile's keys in its 32 blocks, in the next tile's first
        block, and 1.
    heads: [rows, queries of a part] float32, 1 where a row belongs to a query.
    same: [128, 32] float32, 1 where lane 32 * c + q belongs to query q.
    slot_keys: [slots, pairs, 128] bfloat16, 1 at a slot's keys in its pair.
    slot_lanes: [128, 8, 128] float32, 1 where slot = 16 * u + lane // 8.
    slot_rows: [64, 2, 128] bfloat16, 1 where slot % 32 = 16 * u + lane // 8.
    lane_token: [128, 1] float32, lane % 8.
    zeros: [32, 512] bfloat16.
    near, far: [128, 32] float32: query - key; query - 16 * key.
    """

    def __init__(self, weights, heads, same, slot_keys, slot_lanes):
        self.weights = loaded(weights)
        self.heads = loaded(heads)
        self.same = loaded(same)
        self.slot_keys = loaded(slot_keys)
        self.slot_lanes = loaded(slot_lanes)
        self.slot_rows = sbuf((2 * QUADRANT, 2, KEYS), slot_keys.dtype)
        for p0 in range(0, 2 * QUADRANT, QUADRANT):
            some, u = slice(p0, p0 + QUADRANT), p0 // AT_ONCE
            nisa.tensor_copy(self.slot_rows[some, :, :], self.slot_lanes[some, u : u + 2, :])
        lane, place = sbuf((KEYS, 1), nl.float32), psum((KEYS, 1))
        nisa.iota(lane, [[1, 1]], offset=0, channel_multiplier=1)
        nisa.nc_matmul(place, self.slot_lanes[:, 0, :], lane, accumulate=False)
        self.lane_token = sbuf((KEYS, 1), nl.float32)
        nisa.scalar_tensor_tensor(self.lane_token, place, nl.multiply, -float(TOKENS), nl.add, lane)
        self.zeros = sbuf((QUERIES, nl.tile_size.gemm_moving_fmax), nl.bfloat16)
        nisa.memset(self.zeros, 0.0)
        self.near = sbuf((KEYS, QUERIES), nl.float32)
        nisa.iota(self.near, [[1, QUERIES]], offset=0, channel_multiplier=-1)
        self.far = sbuf((KEYS, QUERIES), nl.float32)
        nisa.iota(self.far, [[1, QUERIES]], offset=0, channel_multiplier=-STRIDE)

    def number_rows(self, rows, blocks):
        """Rows of HBM [128, ...], int32, that lanes are for, of their blocks' numbers."""
        nisa.tensor_scalar(
            rows, blocks, nl.multiply, float(TOKENS), op1=nl.add, operand1=self.lane_token
        )


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
