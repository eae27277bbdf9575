"""What the NKI kernels cannot take, and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nsa_neuron.backends.neuron import buckets, plans
from nsa_neuron.backends.neuron.launch import groups, reach
from nsa_neuron.backends.neuron.launch.decode.caches import reads_single_tokens, row_of_block
from nsa_neuron.backends.neuron.launch.selected_attention.sizes import (
    MOST_ROWS,
    page_of,
    queries_of,
)
from nsa_neuron.ops.common import compressed_blocks
from nsa_neuron.registry import Unsupported

if TYPE_CHECKING:
    from nsa_neuron.spec import Bound

PARTITIONS = 128
EXACT = 2**24
"""float32 counts so far without gaps; VectorE computes integers in float32."""

COMPRESSED_AT_ONCE = 8192
"""Tokens of a compression block, and features of its hidden layer, of which all channels fit into
SBUF together with the weights of one token (256 channels, float32)."""

MOST_SCORED = 512
"""Heads of a group whose transposes for 32 queries fit into SBUF (256 channels, float32)."""

MOST_RANKED = 16_384
"""Elements of VectorE's search for the eight largest (trainium2.md, part 3.5)."""

MOST_IDS = 40_000
"""float32 ids on a partition while the union of a tile is listed."""

QUADRANTS = 4  # kv heads of a program, at most

DECODED_KEYS = 8192
"""Of a kv head, how many chosen keys or keys of windows decode takes at a time."""

MOST_INSTRUCTIONS = 5_000_000
"""Of one program, as AWS's compiler's error NCC_EBVF030 gives it (docs/nki_0_7.md, part 3)."""

RANGES = ("attention", "compressed_attention", "sliding_window_attention")
"""Ops of `nki_kernels/common/range_attention`."""

LOOPED_INSTRUCTIONS = 6_000
"""Of a program with hardware loops, at most, for each kv head and 128 query heads of it, whatever
the length (`tests/neuron/test_neuron_programs.py` counts them)."""


def refusal(bound: Bound, mode: str) -> Unsupported | None:
    """The refusal of a call that the kernels cannot take."""
    stem = bound.spec.stem
    if stem in RANGES:
        return _range_refusal(bound, mode)
    return _REFUSALS[stem](bound) if stem in _REFUSALS else None


def _range_refusal(bound: Bound, mode: str) -> Unsupported | None:
    """The simulator takes any program, in time."""
    keys = bound["Nc"] if "Nc" in bound.sizes else bound["T"]
    if keys >= EXACT:
        return Unsupported("length", f"{keys} keys >= {EXACT}, exact in float32")
    count = range_instructions(bound, buckets.padding(bound) if mode == "hw" else 0)
    if mode == "hw" and count > MOST_INSTRUCTIONS:
        reason = (
            f"its program has about {count:,} instructions > {MOST_INSTRUCTIONS:,}, what AWS's "
            "compiler takes; call it for fewer kv heads or batch rows at a time"
        )
        return Unsupported("program", reason)
    return None


def range_instructions(bound: Bound, more: int = 0) -> int:
    """About how many instructions the largest kernel of a range attention has, on one core, if
    the call is filled up with `more` tokens."""
    stem = bound.spec.name.removesuffix("_backward")
    direction = "forward" if stem == bound.spec.name else "backward"
    keys, step = bound["T"] + more, 1
    hi_add, lo_add = bound["T"] - bound["S"] + 1, reach.UNLIMITED
    if "Nc" in bound.sizes:
        step = bound["d"]
        filled = compressed_blocks(bound["T"] + more, bound["l"], step)
        keys = filled if more else bound["Nc"]  # packed sequences have other numbers of blocks
        hi_add += step - bound["l"]
    if "w" in bound.sizes:
        lo_add = hi_add - bound["w"]
    packed = "N1" in bound.sizes
    of_tiles = (hi_add, lo_add, step, not packed)
    shape = (bound["B"], bound["S"] + more, bound["Hkv"])
    count = groups.unrolled_instructions(direction, shape, bound.group, keys, of_tiles)
    if not groups.loops(count, plans.load(stem)["looped"], packed):
        return count
    lanes: int = bound["B"] * bound["Hkv"] * math.ceil(bound.group / PARTITIONS)
    return lanes * LOOPED_INSTRUCTIONS


def _compress_refusal(bound: Bound) -> Unsupported | None:
    for symbol, what in (("l", "block"), ("F", "hidden")):
        size = bound.sizes.get(symbol, 0)
        if size > COMPRESSED_AT_ONCE:
            reason = f"{symbol} = {size} > {COMPRESSED_AT_ONCE}, what SBUF holds of a block"
            return Unsupported(what, reason)
    return None


def _select_refusal(bound: Bound) -> Unsupported | None:
    if bound.group > MOST_SCORED:
        reason = f"Hq / Hkv = {bound.group} > {MOST_SCORED}, what SBUF holds of 32 queries"
        return Unsupported("group", reason)
    keys = bound["T"] // bound["d"] + bound["m"] // bound["d"]
    if keys >= EXACT:
        return Unsupported("length", f"{keys} compressed keys >= {EXACT}, exact in float32")
    return None


def _selected_refusal(bound: Bound) -> Unsupported | None:
    if bound.group > MOST_ROWS:
        return Unsupported("group", f"Hq / Hkv = {bound.group} > {MOST_ROWS} rows of a tile")
    ids = bound["n"] * (bound["m"] // page_of(bound["m"]))
    of_tile = queries_of(bound.group) * ids
    if of_tile > MOST_IDS:
        reason = f"{of_tile} ids of a tile's queries > {MOST_IDS}, what a partition of SBUF holds"
        return Unsupported("ids", reason)
    sequences = bound.sizes.get("N1", 2) - 1
    keys = bound["B"] * bound["Hkv"] * (bound["T"] + sequences * bound["m"])
    if keys >= EXACT:
        return Unsupported("length", f"{keys} keys of all heads >= {EXACT}, exact in float32")
    return None


def _decode_refusal(bound: Bound) -> Unsupported | None:
    if bound.group > PARTITIONS:
        return Unsupported("group", f"Hq / Hkv = {bound.group} > {PARTITIONS} partitions")
    blocks = bound["most_slc"] * bound["page_slc"] // bound["m"]
    if blocks > MOST_RANKED:
        reason = f"tables of {blocks} selection blocks > {MOST_RANKED}, what VectorE ranks at once"
        return Unsupported("blocks", reason)
    queries = min(bound["S"], PARTITIONS // bound.group)
    for symbol, what, keys in (
        ("n", "selected", min(bound["n"], blocks) * bound["m"] * queries),
        ("w", "window", min(bound["w"] + queries, bound["most_win"] * bound["page_win"])),
    ):  # fmt: skip
        if keys > DECODED_KEYS:
            reason = f"{keys} keys of a kv head by {symbol} > {DECODED_KEYS}, what SBUF holds"
            return Unsupported(what, reason)
    tokens, heads = bound["pages_slc"] * bound["page_slc"], bound["Hkv"]
    of_row = row_of_block(bound["m"], bound["n"])
    size = max(bound["Dk"], bound["Dv"]) * bound.dtype.itemsize
    if reads_single_tokens(of_row, heads, min(heads, QUADRANTS), size):
        of_row = 1
    rows = tokens * math.ceil(heads / of_row)
    if rows >= EXACT:
        return Unsupported("pool", f"a pool of {rows} rows of keys >= {EXACT}, exact in float32")
    return None


_REFUSALS = {
    "compress": _compress_refusal,
    "decode": _decode_refusal,
    "select_blocks": _select_refusal,
    "selected_attention": _selected_refusal,
}
