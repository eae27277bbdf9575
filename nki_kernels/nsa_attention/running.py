"""A tile of queries against keys in any number, with rows (query, head) on partitions."""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import this_core
from nki_kernels.common.queues import fetch
from nki_kernels.nsa_attention.geometry import KEYS, QUERIES
from nki_kernels.selected_attention.softmax import Rows

CHUNK = 512  # compressed keys at a time
AT_ONCE = 2048  # flags that two cores exchange


def of_tile(tensor, size, number):
    """Rows of a tile of a tensor [tiles * size, ...] in HBM, by its number in SBUF."""
    return tensor.reshape_dim(0, (tensor.shape[0] // size, size)).select(0, number)


def larger(values):
    """The larger of two cores' values [1, n]; of one core, its own."""
    core, cores = this_core()
    if cores == 1:
        return values
    found = sbuf(values.shape, values.dtype)
    for first in range(0, values.shape[1], AT_ONCE):
        part = slice(first, min(first + AT_ONCE, values.shape[1]))
        other = sbuf((1, part.stop - part.start), values.dtype)
        nisa.sendrecv(
            src=values[:, part], dst=other, send_to_rank=1 - core, recv_from_rank=1 - core,
            pipe_id=0,
        )  # fmt: skip
        nisa.tensor_tensor(found[:, part], values[:, part], other, nl.maximum)
    return found


class Queries(nl.NKIObject):
    """A tile's operands.

    Attributes:
        q: q^T by at most 128 channels, [D chunk, columns], a second chunk on both halves of the
            partitions. rest: channels of it.
        marks: [rows, parts, 8] float32; ranks: [128, 8], lane 32 * p + i for query i of part p,
            -1 in other lanes. gates: [rows, parts, 3] float32. zero: [rows, 1].
    """

    def __init__(self, geometry, lane, marks, number):
        self.geometry = g = geometry
        source = lane.q_t.select(0, number)
        dk = source.shape[0]
        self.rest = dk - 128
        lower = sbuf((min(dk, 128), g.columns), source.dtype)
        fetch(lower, source[0 : min(dk, 128), :])
        self.q = [lower]
        if dk > 128:
            both = sbuf((128, g.columns), source.dtype)
            for half in range(2):
                fetch(both[64 * half : 64 * half + dk - 128, :], source[128:dk, :])
            self.q.append(both)
        columns = marks.shape[1]
        own = of_tile(marks, QUERIES, number)
        by_part = own.reshape_dim(0, (g.parts, g.per_part))
        self.marks = sbuf((g.rows, g.parts, columns), nl.float32)
        fetch(self.marks, by_part.permute((1, 0, 2)).expand_dim(1).broadcast(1, g.group))
        self.ranks = sbuf((128, columns), nl.float32)
        nisa.memset(self.ranks, -1.0)
        for p in range(g.parts):
            fetch(self.ranks[QUERIES * p : QUERIES * p + g.per_part, :], by_part[p])
        self.gates = sbuf((g.rows, g.parts, 3), nl.float32)
        fetch(self.gates, lane.gates.select(0, number))
        self.zero = sbuf((g.rows, 1), nl.float32)
        nisa.memset(self.zero, 0.0)

    def of_part(self, p):
        """q^T of a part's rows."""
        rows = self.geometry.rows
        found = []
        for chunk in self.q:
            found.append(chunk[:, p * rows : (p + 1) * rows])
        return found


class KeyRun(nl.NKIObject):
    """Keys along the free dim, values with keys on partitions: k_t [DK, keys], v [keys, DV + 1]."""

    def __init__(self, k_t, v):
        dk, self.size = k_t.shape
        self.dv = v.shape[1] - 1
        self.k_t = []
        for first in range(0, dk, 128):
            width = min(128, dk - first)
            part = sbuf((width, self.size), k_t.dtype)
            fetch(part, k_t[first : first + width, :])
            self.k_t.append(part)
        self.values = sbuf((KEYS, self.size // KEYS, self.dv + 1), v.dtype)
        fetch(self.values, v.reshape_dim(0, (self.size // KEYS, KEYS)).permute((1, 0, 2)))

    def scores(self, queries, p):
        """S [rows, keys] float32 in PSUM."""
        scores = psum((queries.geometry.rows, self.size))
        q = queries.of_part(p)
        for c in range(len(q)):
            channels = self.k_t[c].shape[0]
            nisa.nc_matmul(scores, q[c][0:channels, :], self.k_t[c], accumulate=c > 0)
        return scores

    def add_values(self, out, turned):
        """out = P @ V with P^T [128 keys, tiles, rows]."""
        for t in range(self.size // KEYS):
            nisa.nc_matmul(out, turned[:, t, :], self.values[:, t, 0 : self.dv], accumulate=t > 0)


class Branch(nl.NKIObject):
    """The running softmax of all rows of a tile; `parts`: see `selected_attention.softmax.Rows`."""

    def __init__(self, geometry, dv, scale):
        self.scale = scale
        self.parts = []
        for p in range(geometry.parts):
            part = Rows(p * geometry.rows, geometry.rows, dv, True)
            # The loop over keys takes no turn where no query of the tile sees one.
            nisa.memset(part.shift, 0.0)
            self.parts.append(part)

    def within(self, scores, low, high):
        """Scores [rows, keys], very small where not low <= key < high [rows, 1]."""
        seen, ignored = sbuf(scores.shape, nl.float32), sbuf((scores.shape[0], 1), nl.float32)
        nisa.range_select(
            seen, scores, nl.greater_equal, nl.less, low, high, reduce_res=ignored, range_start=0
        )
        return seen

    def add(self, seen_of, keys):
        """Adds keys to the sums of all parts.

        Each stage is issued for all parts before the next one, so that no engine waits for a part
        while another could go on.

        Args:
            seen_of: makes the scores [rows, keys] of a part. keys: have `add_values`.
        """
        weighed, turned, sums = [], [], []
        for p in range(len(self.parts)):
            weighed.append(self.weigh(p, seen_of(p)))
        for p in range(len(self.parts)):
            turned.append(self.turn(weighed[p][0]))
        for p in range(len(self.parts)):
            sums.append(psum((self.parts[p].length, self.parts[p].acc.shape[1])))
            keys.add_values(sums[p], turned[p])
            _, total, fade = weighed[p]
            self.parts[p].add(sums[p], total, fade)

    def weigh(self, p, seen):
        """Exponentials [rows, keys], their sums, and what older sums fade by."""
        part = self.parts[p]
        rows, size = seen.shape
        fade = part.raise_top(seen.expand_dim(1), self.scale)
        weights, total = sbuf((rows, size), nl.bfloat16), sbuf((rows, 1), nl.float32)
        nisa.activation(
            weights, nl.exp, seen, bias=part.shift, scale=self.scale, reduce_op=nl.add,
            reduce_res=total, reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip
        return weights, total, fade

    def turn(self, weights):
        """The transpose by tiles of keys, [keys of a tile, tiles, rows]."""
        rows, size = weights.shape
        height = min(KEYS, size)
        shape = (height, size // height, rows)
        bank, turned = psum(shape, nl.bfloat16), sbuf(shape, nl.bfloat16)
        for t in range(size // height):
            some = weights[:, t * height : (t + 1) * height]
            nisa.nc_transpose(bank[:, t, :], some, engine=nisa.engine.tensor)
        nisa.tensor_copy(turned, bank, engine=nisa.engine.vector)
        return turned

    def inverse(self, p):
        """1 / a row's sum, [rows, 1]; of a row that sees nothing any number."""
        found = sbuf(self.parts[p].total.shape, nl.float32)
        # The largest exponential is 1: only an empty sum is smaller.
        nisa.tensor_scalar(found, self.parts[p].total, nl.maximum, 0.5)
        nisa.reciprocal(found, found)
        return found

    def negative_lse(self, p):
        """What is added to scaled logits, so that exponentials are probabilities."""
        part = self.parts[p]
        found = sbuf(part.total.shape, nl.float32)
        nisa.tensor_scalar(found, part.total, nl.maximum, 0.5)
        nisa.activation(found, nl.log, found)
        nisa.tensor_tensor(found, part.shift, found, nl.subtract)
        return found
