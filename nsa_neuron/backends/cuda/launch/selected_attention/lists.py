"""Builds the lists of who selected each block: four launches, see `cuda_kernels` there.

Shapes decide every size, nothing waits for the device, and where `chosen` says that the design
without lists runs, the launches return at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.backends.cuda.launch.common import next_power_of_two

if TYPE_CHECKING:
    from nsa_neuron.backends.cuda.launch.selected_attention.call import Call

_PAIRS_PER_BLOCK = 2
"""Pairs of a chunk over the blocks that it counts: the table of counts has 2 bytes per pair."""


@dataclass(frozen=True)
class Cut:
    """How the lists are cut: `longest` queries per work item, so many tokens per pass."""

    longest: int
    tokens: int


@dataclass(frozen=True)
class Pass:
    """A launch over work items: all of some rows of the batch, or one part of one row.

    Attributes:
        rows: of the batch. first_token: in the flattened batch. tokens: of all its rows.
        part_offset: of the part's row in a lane of `WorkItems.table`.
    """

    rows: int
    first_token: int
    tokens: int
    part_offset: int


@dataclass(frozen=True)
class WorkItems:
    """The lists cut.

    Attributes:
        table: int32 [B, Hkv, parts, width], see the kernels. lane_width: parts * width.
        bound, slots: most work items and workspace slots of a lane's part, known from shapes alone.
        passes: what to launch, one after the other.
    """

    table: Tensor
    lane_width: int
    bound: int
    slots: int
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Lists:
    """The pairs of a query and a block, by block and then by query.

    Attributes:
        queries: int32 [B, Hkv, S * n], token numbers; slots: int16, where in their ids it stands.
        used: int8 [B, S, Hkv, n], 1 for the pairs that are in the lists.
        blocks_per_head: numbers of blocks of a batch row and kv head.
        cuts: as asked for.
    """

    queries: Tensor
    slots: Tensor
    used: Tensor
    blocks_per_head: int
    cuts: tuple[WorkItems, ...]


def build(call: Call, *cuts: Cut, chosen: Tensor | None = None) -> Lists:
    """Lists of all pairs whose id is not negative and whose block does not start after the query.

    Args:
        cuts: at least one.
        chosen: where the other design won, nothing is written. None: the lists are needed.
    """
    ids, (cu_q, cu_k, num_seqs) = call.block_indices, call.packed
    batch, tokens, kv_heads, num_selected = ids.shape
    keys, block = call.k.shape[1], call.select_block
    blocks = keys // block + num_seqs if num_seqs else -(-keys // block)
    count, place = (pair_tile(call.plan[k], num_selected) for k in ("count_pairs", "place_pairs"))
    step = max(count["TOKENS"], place["TOKENS"])
    chunk = _chunk(blocks, num_selected, step, min(cut.tokens for cut in cuts))
    chunks = max(1, -(-tokens // chunk))
    new_empty = ids.new_empty
    counts = new_empty(batch, kv_heads, chunks + 1, blocks)
    queries = new_empty(batch, kv_heads, tokens * num_selected)
    slots = new_empty(batch, kv_heads, tokens * num_selected, dtype=torch.int16)
    used = new_empty(ids.shape, dtype=torch.int8)

    flagged = {"MEASURED": chosen is not None}
    flag = ids if chosen is None else chosen
    sizes = {"NUM_SELECTED": num_selected, "SELECT_BLOCK": block, "PACKED": num_seqs > 0}
    packed = (cu_q, cu_k, num_seqs, tokens, keys, blocks, chunk)
    plan = call.plan
    call.kernels.count_pairs[(chunks, kv_heads, batch)](
        ids, counts, used, flag, *packed, **sizes, **flagged, **count
    )
    tiles = -(-blocks // plan["sum_chunks"]["COLUMNS"])
    call.kernels.sum_chunks[(tiles, kv_heads, batch)](
        counts, flag, blocks, chunks, **flagged, **plan["sum_chunks"]
    )
    made = []
    for cut in cuts:
        items, parts, per_part = _allocate(call, cut, blocks, chunk)
        call.kernels.cut_lists[(parts, kv_heads, batch)](
            counts, items.table, flag, blocks, chunks, per_part, items.lane_width // parts,
            cut.longest, **flagged, **plan["cut_lists"],
        )  # fmt: skip
        made.append(items)
    call.kernels.place_pairs[(chunks, kv_heads, batch)](
        ids, counts, made[0].table, queries, slots, flag, *packed, made[0].lane_width,
        **sizes, **flagged, **place,
    )  # fmt: skip
    return Lists(queries, slots, used, blocks, tuple(made))


def pair_tile(planned: Mapping[str, Any], num_selected: int) -> dict[str, Any]:
    """The plan of a kernel over PAIRS pairs at a time, as the tokens that have so many."""
    passed = {name: value for name, value in planned.items() if name != "PAIRS"}
    width = next_power_of_two(num_selected)
    return {**passed, "SELECTED_POW2": width, "TOKENS": max(1, planned["PAIRS"] // width)}


def _chunk(blocks: int, num_selected: int, step: int, tokens_per_pass: int) -> int:
    """Tokens of a chunk: a multiple of `step` that no pass is shorter than, unless `step` is."""
    wanted = -(-_PAIRS_PER_BLOCK * blocks // num_selected)
    return max(1, min(-(-wanted // step), tokens_per_pass // step)) * step


def _allocate(call: Call, cut: Cut, blocks: int, chunk: int) -> tuple[WorkItems, int, int]:
    """Room for the work items; how many parts a lane has, and how many chunks a part."""
    batch, tokens, kv_heads, num_selected = call.block_indices.shape
    per_part = max(1, cut.tokens // chunk)
    # Whole rows of the batch in a pass, or parts of one.
    step = per_part * chunk if cut.tokens < tokens else max(1, tokens)
    per_part = -(-step // chunk)
    parts = max(1, -(-tokens // step))
    full_items = step * num_selected // cut.longest
    bound = blocks + full_items
    # Multiples of 16: Triton compiles a kernel once more for integers that are not.
    width = -(-(4 * (blocks + 1) + bound) // 16) * 16
    table = call.block_indices.new_empty(batch, kv_heads, parts, width)
    rows = max(1, cut.tokens // max(1, tokens)) if parts == 1 else 1
    passes = tuple(_passes(batch, tokens, rows, step, parts, width))
    return WorkItems(table, parts * width, bound, 2 * full_items, passes), parts, per_part


def _passes(
    batch: int, tokens: int, rows: int, step: int, parts: int, width: int
) -> Iterator[Pass]:
    for row in range(0, batch, rows):
        here = min(rows, batch - row)
        for part in range(parts):
            last = min((part + 1) * step, tokens)
            first = row * tokens + part * step
            yield Pass(here, first, here * (last - part * step), part * width)
