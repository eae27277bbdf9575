"""What the parts of the kernel read and write."""

import nki.language as nl


class Lane(nl.NKIObject):
    """The tensors of one kv head of one batch row: arguments of `forward`, and

    Attributes:
        o: [32 * (tiles + 1), G, DV]. unsafe, crowded: see `flags`.
        turned: [tiles, blocks, 32], what queries chose. others: [tiles, rows, parts, DV] float32, o
            without the selected branch.
    """

    def __init__(
        self, q_t, k_cmp_t, v_cmp, pages, rows, k_win_t, v_win, gates, shifts, o, flags, kept
    ):  # fmt: skip
        self.q_t, self.gates, self.shifts = q_t, gates, shifts
        self.k_cmp_t, self.v_cmp, self.pages, self.rows = k_cmp_t, v_cmp, pages, rows
        self.k_win_t, self.v_win = k_win_t, v_win
        self.o = o
        self.unsafe, self.crowded = flags[0:1, :], flags[1:2, :]
        self.turned, self.others = kept

    def loop(self, chunks, near, turns, starts, before_o, before_unsafe):
        """What only `looped` has: see `looped.forward_looped`; `o` from the group before its
        first one on, `unsafe` from the one before that."""
        self.chunks, self.near, self.turns, self.starts = chunks, near, turns, starts
        self.before_o, self.before_unsafe = before_o, before_unsafe
