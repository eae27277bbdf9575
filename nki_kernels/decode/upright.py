"""Attention of a few rows with keys on the partitions: all 128 of them for a single kv head.

Logits are [keys, heads, t] for t tokens of each gathered row, K turned by PE and then stationary:
weights need no turning, since PE sums over partitions, and 4096 keys of 16 heads are 512 columns.
What is then across partitions is the maximum (turned there and back) and the sum (a matmul).

One more column holds `FLOOR`, below every logit and above every hidden one: it is the maximum where
nothing is seen, so that its weight is 1 there and no sum is 0, and its weight is 0 elsewhere.
"""

import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.spans import spans
from nki_kernels.decode.lanes import FLOOR, HALVES

HIDDEN = -3.0e38
"""What a hidden logit is replaced by."""

TURNED_BYTES = 1024
"""Of a partition of PSUM: half a bank, so that a copy does not wait long for its transposes."""


BEHIND = 3
"""Parts of turned keys whose copies are on their way while PE turns further ones."""


class Upright(nl.NKIObject):
    """Logits of a branch, then weights.

    Attributes:
        values: [rows, heads, tokens + 1] float32: logits, from `shift` on less the heads' largest.
        weights: their exponentials in the inputs' dtype.
    """

    def __init__(self, columns, heads, rows, tokens, zeros):
        self.columns, self.zeros = columns, zeros
        self.heads, self.rows, self.tokens = heads, rows, tokens
        self.values = sbuf((rows, heads, tokens + 1), nl.float32)
        nisa.memset(self.values[:, :, tokens:], FLOOR)
        self.waiting, self.open = [], False

    def score(self, k, shown, first, by_scalar):
        """Logits of a tile; `drain` makes the last.

        PE turns parts of the keys while those before are copied, and multiplies these then.

        Args:
            k: [rows, t, DK].
            shown: [rows, t] uint8, not 0 where a token is seen; None: see `hide`.
            first: place of the tile's first token among `tokens`.
            by_scalar: whether ScalarE makes all copies; else VectorE makes every other one.
        """
        self.bank = psum((self.rows, self.heads, k.shape[1]))
        if len(self.columns) > 1:
            self.begin()
        pieces = self.pieces(k)
        for i in range(len(pieces)):
            last = i + 1 == len(pieces)
            scalar = by_scalar or (len(pieces) - i) % 2 == 0
            turned = self.turn(k, pieces[i], nisa.engine.scalar if scalar else nisa.engine.vector)
            self.waiting.append((self.bank, turned, pieces[i], shown if last else None, first))
            self.flush(BEHIND)

    def begin(self):
        """Writes the whole bank, which all its columns then go on with: parts of DK take turns, and
        a group must not go on once another one began in its bank. PE waits for keys meanwhile."""
        columns = self.bank.shape[1] * self.bank.shape[2]
        nisa.nc_matmul(
            self.bank, self.zeros[:, 0 : self.rows], self.zeros[:, 0:columns], accumulate=False
        )

    def drain(self):
        """The logits of all tiles."""
        self.flush(0)

    def pieces(self, k):
        """How keys are turned: (part of DK, its first, width, tokens a column, first column,
        columns); a column holds two tokens where that fills the partitions better."""
        most, found = TURNED_BYTES // ((4 if k.dtype == nl.float32 else 2) * self.rows), []
        parts = spans(k.shape[2], nl.tile_size.pmax)
        for c in range(len(parts)):
            first, width = parts[c]
            step = 2 if width in HALVES and k.shape[1] % 2 == 0 else 1
            for start, count in spans(k.shape[1] // step, most):
                found.append((c, first, width, step, start, count))
        return found

    def turn(self, k, piece, engine):
        """[step * width, columns, rows]: token (start + i) * step + s is [s * width :, i, :]."""
        _, first, width, step, start, count = piece
        bank = psum((step * width, count, self.rows), k.dtype)
        for i in range(count):
            j = (start + i) * step
            some = k[:, j : j + step, first : first + width]
            nisa.nc_transpose(bank[:, i, :], some, engine=nisa.engine.tensor)
        turned = sbuf(bank.shape, k.dtype)
        nisa.tensor_copy(turned, bank, engine=engine)
        return turned

    def flush(self, kept):
        """Multiplies what is turned, but for the last `kept` pieces."""
        ready = max(0, len(self.waiting) - kept)
        for bank, turned, piece, shown, first in self.waiting[0:ready]:
            self.multiply(bank, turned, piece)
            if shown is not None:
                self.hide(bank, shown, first)
        self.waiting = self.waiting[ready:]

    def multiply(self, bank, turned, piece):
        """The part of the logits that a turned piece gives."""
        c, _, width, step, start, count = piece
        begun = len(self.columns) > 1
        for i in range(count):
            for s in range(step):
                out = bank[:, :, (start + i) * step + s]
                rows = slice(s * width, (s + 1) * width)
                keys, queries = turned[rows, i, :], self.columns[c][rows, :]
                if step == 1:
                    nisa.nc_matmul(out, keys, queries, accumulate=begun)
                else:
                    nisa.nc_matmul(
                        out, keys, queries, accumulate=begun, tile_position=(s * width, 0),
                        tile_size=(width, nl.tile_size.pmax),
                    )  # fmt: skip

    def hide(self, bank, shown, first):
        """Takes the logits of a tile out of PSUM; see `score`."""
        nisa.select_reduce(
            self.values[:, :, first : first + shown.shape[1]],
            shown.expand_dim(1).broadcast(1, self.heads), bank, HIDDEN,
        )  # fmt: skip

    def find_tops(self):
        """The largest logit of each head on each partition, turned: [heads, rows]."""
        tops = sbuf((self.rows, self.heads), nl.float32)
        nisa.tensor_reduce(tops, nl.maximum, self.values, axis=2)
        self.turned = psum((self.heads, self.rows))
        nisa.nc_transpose(self.turned, tops, engine=nisa.engine.tensor)

    def shift(self, meanwhile):
        """Takes the largest logit of each head from its logits. meanwhile: what VectorE does while
        PE turns."""
        top, back = sbuf((self.heads, 1), nl.float32), psum((self.rows, self.heads))
        nisa.tensor_reduce(top, nl.maximum, self.turned, axis=1)
        nisa.nc_transpose(back, top.broadcast(1, self.rows), engine=nisa.engine.tensor)
        meanwhile()
        nisa.tensor_tensor(
            self.values, self.values, back.expand_dim(2).broadcast(2, self.tokens + 1), nl.subtract
        )

    def weigh(self, dtype, scale):
        """Makes the weights."""
        self.weights = sbuf(self.values.shape, dtype)
        nisa.activation(self.weights, nl.exp, self.values, scale=scale)

    def sum_weights(self, ones):
        """The sum of each head's weights. ones: [128, 1] of their dtype."""
        self.total = psum((self.heads, 1))
        for j in range(self.tokens + 1):
            some = self.weights[:, :, j]
            nisa.nc_matmul(self.total, some, ones[0 : self.rows, :], accumulate=j > 0)

    def add(self, v, first):
        """Adds weights times values of a tile: v [rows, t, DV], finite where nothing has weight."""
        if not self.open:
            self.out = psum((self.heads, v.shape[2]))
        for j in range(v.shape[1]):
            some = self.weights[:, :, first + j]
            nisa.nc_matmul(self.out, some, v[:, j, :], accumulate=self.open)
            self.open = True

    def find_factor(self, gate):
        """gate / the sum of the weights, [heads, 1]."""
        self.factor = sbuf((self.heads, 1), nl.float32)
        nisa.reciprocal(self.factor, self.total)
        nisa.tensor_tensor(self.factor, self.factor, gate, nl.multiply)

    def gated(self, before, dtype):
        """gate * the branch + what was `before`, a list of at most one [heads, DV] float32."""
        found = sbuf(self.out.shape, dtype)
        if len(before) == 0:
            nisa.tensor_scalar(found, self.out, nl.multiply, self.factor)
        else:
            nisa.scalar_tensor_tensor(found, self.out, nl.multiply, self.factor, nl.add, before[0])
        return found


def clear(v, bits):
    """Values [rows, t, DV] become zero where no token may be used; see `lanes.clear_foreign`.

    Args:
        bits: [rows, t] int32, -1 for a token that may be used, else 0.
    """
    wide = v.dtype == nl.float32 or v.shape[2] % 2 == 0
    own = v.view(nl.int32 if wide else nl.int16)
    if not wide:
        narrow = sbuf(bits.shape, nl.int16)
        nisa.tensor_copy(narrow, bits)
        bits = narrow
    nisa.tensor_tensor(own, own, bits.expand_dim(2).broadcast(2, own.shape[2]), nl.bitwise_and)
