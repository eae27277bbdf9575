"""Which of the two designs runs: `by_query`, `by_block`, or whichever the ids favour.

`plan["dispatch"]["strategy"]` names one of the designs, or is `"by_overlap"`. Then the constants

- `forward_rows`, `backward_dq_rows`: how many query rows (tokens of a tile x heads of the group)
  must share a union entry of 64 keys on average, so that `by_query` is the faster one. A longer
  block costs more to read, and needs as many more rows;
- `min_pairs`: so many (token, slot) pairs, empty ones included, must there be for the second
  design's launches to be worth it

decide, from shapes alone where these leave no doubt, else on the device: both designs are launched
with a flag, and the programs of the one that lost return when they have read it. Nothing waits for
the device, and the flag depends on the ids only. What the loser costs at 64K tokens, 4 kv heads and
16 slots (computed, not measured): `by_query` 65,536 programs, 0.04 to 0.25 ms; `by_block` its
lists' 2,600 programs and 8 passes of 5,400, 0.17 ms; the winner takes 8 to 14 ms. Where the lists
are for `by_block` alone they are not made then. Its partial results are allocated all the same
(2.1 GB of outputs there, 6.4 GB of dq), since only the device knows that they stay unread: a host
that knew would have waited for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.selected_attention.by_query import Union
    from nsa_neuron.backends.cuda.launch.selected_attention.call import Call

BY_QUERY, BY_BLOCK, BY_OVERLAP = "by_query", "by_block", "by_overlap"
PLANNED_BLOCK = 64
"""Keys of a selection block for which the plans give their rows."""


def decide(call: Call, kernel: str) -> tuple[str, float]:
    """What is launched, and for `by_overlap` the mean sharing from which `by_query` is taken.

    The mean sharing of a tile of QUERIES tokens is in [1, QUERIES]: (token, block) pairs per entry
    of the union. It is near QUERIES where the slots hold all of a sequence.

    Args:
        kernel: `"forward"` or `"backward_dq"`.
    """
    dispatch = call.plan["dispatch"]
    if dispatch["strategy"] != BY_OVERLAP:
        return dispatch["strategy"], 0.0
    rows = dispatch[f"{kernel}_rows"] * call.select_block / PLANNED_BLOCK
    min_sharing = rows / call.group
    if min_sharing >= call.plan[kernel]["QUERIES"]:
        return BY_BLOCK, 0.0
    all_selected = call.block_indices.shape[3] * call.select_block >= call.k.shape[1]
    few = call.block_indices.numel() < dispatch["min_pairs"]
    if min_sharing <= 1 or all_selected or few:
        return BY_QUERY, 0.0
    return BY_OVERLAP, min_sharing


def measure(call: Call, union: Union, min_sharing: float) -> Tensor:
    """The flag, int32 [1]: 1 where the mean sharing reaches `min_sharing` (`by_query`), else 0."""
    chosen = union.counts.new_empty(1)
    call.kernels.choose_strategy[(1,)](
        union.counts, union.pairs, chosen, union.counts.numel(), min_sharing,
        **call.plan["choose_strategy"],
    )  # fmt: skip
    return chosen
