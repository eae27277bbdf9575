"""Native Sparse Attention, forward, in one kernel."""

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.common.buffers import psum, sbuf
from nki_kernels.common.cores import share, this_core
from nki_kernels.nsa_attention.constants import Constants
from nki_kernels.nsa_attention.geometry import Geometry, tiles_of
from nki_kernels.nsa_attention.pipeline import Pipeline


class Lane(nl.NKIObject):
    """The tensors of one kv head of one batch row."""

    def __init__(self, q_t, k_cmp_t, v_cmp, pages, k_win_t, v_win, gates, shifts, o, flags):
        self.q_t, self.gates, self.shifts = q_t, gates, shifts
        self.k_cmp_t, self.v_cmp, self.pages = k_cmp_t, v_cmp, pages
        self.k_win_t, self.v_win = k_win_t, v_win
        self.o, self.flags = o, flags


@nki.jit
def forward(
    q_t, k_cmp_t, v_cmp, pages, k_win_t, v_win, gates, shifts, weights, heads, member, slot_keys,
    batch: int, group: int, block: int, count: int, initial: int, local: int, window: int,
    past: int, tokens: int, ahead: int, kept: int, paired: bool, queues: tuple, scale: float,
):  # fmt: skip
    """o [B, S', Hq, DV] and redo [LANES, tiles] float32, 1 where a tile must be done again.

    """
    lanes, tiles, _, columns = q_t.shape
    kv_heads = lanes // batch
    dv = v_cmp.shape[2] - 1
    slots = slot_keys.shape[0]
    geometry = Geometry(group, block, count, initial, local, window, slots, past, tokens)
    o = nl.ndarray(
        (batch, 32 * tiles, kv_heads * group, dv), dtype=q_t.dtype, buffer=nl.shared_hbm
    )
    redo = nl.ndarray((lanes, tiles), dtype=nl.float32, buffer=nl.shared_hbm)
    _, cores = this_core()
    padded = (geometry.blocks + 127) // 128 * 128
    turned = nl.ndarray((cores, kept, padded, 32), dtype=q_t.dtype, buffer=nl.private_hbm)
    lists = nl.ndarray((cores, tiles, slots), dtype=nl.int32, buffer=nl.private_hbm)
    constants = Constants(weights, heads, member, slot_keys)
    core, _ = this_core()
    first, number = share(lanes)
    for lane in range(first, first + number):
        b, head = divmod(lane, kv_heads)
        tensors = Lane(
            q_t[lane], k_cmp_t[lane], v_cmp[lane], pages[lane], k_win_t[lane], v_win[lane],
            gates[lane], shifts[lane], o[b, :, head * group : (head + 1) * group, :],
            redo[lane : lane + 1, :],
        )  # fmt: skip
        pipeline = Pipeline(
            geometry, constants, tensors, turned[core], lists[core], scale, queues,
            tiles_of(geometry, paired), ahead,
        )  # fmt: skip
        pipeline.run()
    return o, redo
