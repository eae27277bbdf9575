"""A tile of queries on its way: its operands, then the sums of its branches."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.nsa_attention.geometry import BLOCKS_OF_KEYS, PIECE

SMALLEST_SUM = 1e-30
SAFE_SUM = 1e-25
"""A row whose exponentials sum to less is done again: below, some would have lost bits."""

COMPRESSED, SELECTED, NEAR = 0, 1, 2
SECTION = 12  # tiles of compressed keys whose shares are one tensor
PIECES_OF_SECTION = SECTION * BLOCKS_OF_KEYS // PIECE


class Work(nl.NKIObject):
    """Attributes:
    tile: see `geometry.Tile`. index: its place in the order of work.
    q: q^T, [D chunk, columns]; a second chunk on both halves of the partitions.
    gates: [rows, parts, 3] float32. shifts: [128, 3] float32, what is added to scaled logits.
    sums: [rows, 3, parts] float32, row sums by branch.
    total: [rows, parts, DV] float32, the gated sum so far; a list that is empty at first.
    scores: a tensor [rows, parts, tiles, 32] for each SECTION tiles of compressed keys. extra,
        inverse: see `compressed`. ranking: see `choose`. page_numbers, hidden: see `unite`.
    """

    def __init__(self, tile, index):
        self.tile = tile
        self.index = index
        self.q = []
        self.total = []
        self.mask = []
        self.listed = False

    def load(self, geometry, lane):
        """Operands from HBM."""
        number = self.tile.number
        source = lane.q_t[number]
        dk = source.shape[0]
        lower = sbuf((min(dk, 128), geometry.columns), source.dtype)
        nisa.dma_copy(lower, source[0 : min(dk, 128), :])
        self.q = [lower]
        self.rest = dk - 128
        if dk > 128:
            both = sbuf((128, geometry.columns), source.dtype)
            for half in range(2):
                nisa.dma_copy(both[64 * half : 64 * half + dk - 128, :], source[128:dk, :])
            self.q.append(both)
        self.gates = sbuf((geometry.rows, geometry.parts, 3), nl.float32)
        nisa.dma_copy(self.gates, lane.gates[number])
        self.shifts = sbuf((128, 3), nl.float32)
        nisa.dma_copy(self.shifts, lane.shifts[number : number + 1, :].broadcast(0, 128))
        self.sums = sbuf((geometry.rows, 3, geometry.parts), nl.float32)

    def open(self, geometry, zeros, dv):
        """Sums of P @ [v | 1], [rows, 2 parts, DV + 1] for each two parts, made 0.

        Two parts share a bank, in which one group of accumulating matmuls must not begin within
        another: so each bank has one group, which begins with a product of zeros.
        """
        self.banks = []
        rows = geometry.rows
        for p in range(0, geometry.parts, 2):
            bank = psum((rows, min(2, geometry.parts - p), dv + 1))
            self.banks.append(bank)
            nisa.nc_matmul(
                bank, zeros[:, 0:rows], zeros[:, 0 : bank.shape[1] * (dv + 1)], accumulate=False,
                tile_position=(0, 0), tile_size=(zeros.shape[0], nl.tile_size.pmax),
            )  # fmt: skip

    def shares_of(self, part, piece, length):
        """Shares of the first `length` blocks of a piece, [rows, length], of a part's rows."""
        section = self.scores[piece // PIECES_OF_SECTION]
        rows, parts, tiles, blocks = section.shape
        first = piece % PIECES_OF_SECTION * PIECE
        return section.reshape((rows, parts, tiles * blocks))[:, part, first : first + length]

    def bank(self, part):
        """Sums of a part, [rows, DV + 1]."""
        return self.banks[part // 2][:, part % 2, :]

    def close(self, geometry, branch):
        """Adds a branch, divided by its sums and times its gates, to the total.

        Returns:
            the total, [rows, parts, DV].
        """
        last, dv = branch == SELECTED, self.banks[0].shape[2] - 1
        shape = (geometry.rows, geometry.parts, dv)
        result = sbuf(shape, self.q[0].dtype if last else nl.float32)
        self.close_into(geometry, branch, result)
        self.total = [result]
        return result

    def close_into(self, geometry, branch, result):
        """Writes the total with a branch to `result`."""
        rows, parts = geometry.rows, geometry.parts
        sums = self.sums[:, branch, :]
        dv = self.banks[0].shape[2] - 1
        for b in range(len(self.banks)):
            bank = self.banks[b]
            into = sums[:, 2 * b : 2 * b + bank.shape[1]]
            nisa.tensor_scalar(into, bank[:, :, dv], nl.maximum, SMALLEST_SUM)
        factor = sbuf((rows, parts), nl.float32)
        nisa.reciprocal(factor, sums)
        nisa.tensor_tensor(factor, factor, self.gates[:, :, branch], nl.multiply)
        for p in range(parts):
            values, scale = self.bank(p)[:, 0:dv], factor[:, p : p + 1]
            if len(self.total) == 0:
                nisa.tensor_scalar(result[:, p, :], values, nl.multiply, scale)
            else:
                before = self.total[0][:, p, :]
                nisa.scalar_tensor_tensor(
                    result[:, p, :], values, nl.multiply, scale, nl.add, before
                )


def multiply_keys(scores, work, lower, upper, half, begun):
    """S^T [keys, columns] = K q^T, added to what is there if it is `begun`.

    lower: K^T [<= 128, keys]; upper: its rows after 128, at partition 64 * half, or an empty list.
    """
    nisa.nc_matmul(scores, lower, work.q[0], accumulate=begun)
    for rest in upper:
        p0, width = 64 * half, rest.shape[0]
        nisa.nc_matmul(
            scores, rest, work.q[1][p0 : p0 + width, :], accumulate=True,
            tile_position=(p0, 0), tile_size=(64, 128),
        )  # fmt: skip
