"""The lists of who selected each block, against lists that Python makes."""

from __future__ import annotations

from dataclasses import replace

import masked_oracle as oracle
import pytest
import torch
from chosen_blocks import random_ids
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples
from poisoned import poison  # noqa: F401
from selected_oracle import kernels, plan

from nsa_neuron.backends.cuda.launch.common import next_power_of_two
from nsa_neuron.backends.cuda.launch.selected_attention import lists
from nsa_neuron.backends.cuda.launch.selected_attention.call import Call

pytest.importorskip("triton")
pytestmark = pytest.mark.sim


def call_of(ids: torch.Tensor, keys: int, block: int, cu=(None, None), **constants: dict) -> Call:
    batch, tokens, kv_heads, _ = ids.shape
    q = torch.zeros(batch, tokens, kv_heads, 16)
    k = torch.zeros(batch, keys, kv_heads, 16)
    tiles = plan("by_block")
    for kernel, changed in constants.items():
        tiles[kernel] |= changed
    return Call(kernels(), tiles, q, k, k, ids, block, 1.0, cu)


def expected(call: Call, lengths: list[tuple[int, int]]) -> dict:
    """(batch row, kv head, block number) to its (token, slot) pairs, by going through the ids."""
    found: dict = {}
    ids, m = call.block_indices, call.select_block
    for row in range(ids.shape[0]):
        for head in range(ids.shape[2]):
            first_q = first_k = 0
            for number, (queries, keys) in enumerate(lengths):
                first_block = first_k // m + number if len(lengths) > 1 else 0
                for token in range(queries):
                    chosen = ids[row, first_q + token, head].tolist()
                    for slot, block in enumerate(chosen):
                        if 0 <= block * m <= keys - queries + token:
                            at = (row, head, first_block + block)
                            found.setdefault(at, []).append((first_q + token, slot))
                first_q, first_k = first_q + queries, first_k + keys
    return found


def check(call: Call, lengths: list[tuple[int, int]], *cuts: lists.Cut) -> lists.Lists:
    """Lists, used pairs, and every cut's passes and work items."""
    found, want = lists.build(call, *cuts), expected(call, lengths)
    batch, tokens, kv_heads, _ = call.block_indices.shape
    pairs = [[r, token, h, slot] for (r, h, _), chosen in want.items() for token, slot in chosen]
    assert sorted(pairs) == found.used.nonzero().tolist()
    width = next_power_of_two(call.block_indices.shape[3])
    step = max(1, *(call.plan[name]["PAIRS"] // width for name in ("count_pairs", "place_pairs")))
    for cut, items in zip(cuts, found.cuts, strict=True):
        covered = torch.zeros(batch * tokens, dtype=torch.int64)
        for p in items.passes:
            covered[p.first_token : p.first_token + p.tokens] += 1
            assert p.rows == 1 or p.tokens == p.rows * tokens
            assert p.tokens <= max(cut.tokens, step), "partial results would need more memory"
            for row in range(p.first_token // tokens, p.first_token // tokens + p.rows):
                low = p.first_token % tokens
                high = tokens if p.rows > 1 else low + p.tokens
                for head in range(kv_heads):
                    mine = {
                        block: [pair for pair in chosen if low <= pair[0] < high]
                        for (r, h, block), chosen in want.items()
                        if (r, h) == (row, head)
                    }
                    check_part(found, items, cut, (row, head, p.part_offset), mine)
        assert covered.eq(1).all()
    return found


def check_part(found, items, cut, at, mine) -> None:
    row, head, part_offset = at
    blocks = found.blocks_per_head
    part = items.table[row, head].flatten()[part_offset:].tolist()
    begin, end, first_item, first_slot = (part[i * (blocks + 1) :] for i in range(4))
    item_block = part[4 * (blocks + 1) :]
    seen_items = seen_slots = 0
    for block in range(blocks):
        want = mine.get(block, [])
        span = slice(begin[block], end[block])
        queries, slots = found.queries[row, head, span], found.slots[row, head, span]
        assert list(zip(queries.tolist(), slots.tolist(), strict=True)) == want
        count = -(-len(want) // cut.longest)
        assert first_item[block] == seen_items
        assert item_block[seen_items : seen_items + count] == [block] * count
        seen_items += count
        if count > 1:
            assert first_slot[block] == seen_slots
            seen_slots += count
    assert first_item[blocks] == seen_items <= items.bound and seen_slots <= items.slots


@examples(12)
@given(
    batch=st.integers(1, 3), queries=st.integers(1, 24), past=st.integers(0, 60),
    kv_heads=st.integers(1, 2), slots=st.integers(1, 5), block=st.sampled_from([4, 8, 13]),
    longest=st.integers(1, 9), tokens=st.integers(1, 80), pairs=st.sampled_from([1, 8, 32]),
    columns=st.sampled_from([2, 8, 64]),
)  # fmt: skip
def test_any_shape(batch, queries, past, kv_heads, slots, block, longest, tokens, pairs, columns):
    """Blocks of the future and ids past any block among them; two cuts of the same lists."""
    keys = queries + past
    each = [random_ids(queries, keys, kv_heads, slots, block, seed=i) for i in range(batch)]
    ids = torch.cat(each)
    ids[:, ::3, :, -1] = keys // block + 5
    width = {"COLUMNS": columns}
    call = call_of(
        ids, keys, block, count_pairs={"PAIRS": pairs, **width}, sum_chunks={"ROWS": 2, **width},
        cut_lists=width,
    )  # fmt: skip
    cuts = (lists.Cut(longest, tokens), lists.Cut(3, batch * queries))
    check(call, [(queries, keys)], *cuts)


def test_no_pass_is_longer_than_the_shortest_that_was_asked_for():
    """Counted by chunks of 100 tokens, 50 blocks would cost least; a pass has 8 of them."""
    ids = random_ids(40, 200, 1, 1, 4)
    few = {"PAIRS": 8}
    call = call_of(ids, 200, 4, count_pairs=few, place_pairs=few)
    check(call, [(40, 200)], lists.Cut(4, 8), lists.Cut(3, 40))


def test_packed_sequences_with_empty_ones():
    lengths = [(3, 9), (0, 0), (11, 30), (1, 17), (0, 5), (9, 9)]
    cu_q, cu_k, _ = oracle.sequences(*map(list, zip(*lengths, strict=True)))
    each = [random_ids(s, t, 2, 3, 8, seed=s) for s, t in lengths if s]
    ids = torch.cat(each, 1)
    call = call_of(ids, sum(t for _, t in lengths), 8, (cu_q, cu_k))
    check(call, lengths, lists.Cut(4, 8))


def test_every_query_on_one_list_and_nobody_on_any():
    ids = torch.zeros(1, 33, 1, 2, dtype=torch.int32)
    ids[..., 1] = -1
    check(call_of(ids, 33, 8), [(33, 33)], lists.Cut(4, 33))
    found = check(call_of(ids - 1, 33, 8), [(33, 33)], lists.Cut(4, 33))
    assert not found.used.any()


class Filled:
    """Kernels whose results are full of 7 before they are first launched with them."""

    NAMES = ("counts", "used_slots", "items", "queries", "slots")

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str):
        kernel = getattr(kernels(), name)

        def launcher(grid: tuple[int, ...]):
            def launch(*args, **constants):
                for argument, value in zip(kernel.arg_names, args, strict=False):
                    if argument in self.NAMES and argument not in self.seen:
                        self.seen[argument] = value.fill_(7)
                return kernel[grid](*args, **constants)

            return launch

        return _Indexed(launcher)


class _Indexed:
    def __init__(self, get) -> None:
        self.get = get

    def __getitem__(self, grid: tuple[int, ...]):
        return self.get(grid)


@pytest.mark.parametrize(("flag", "written"), [(0, True), (1, False)])
def test_the_design_without_lists_leaves_them_alone(flag, written):
    """Nothing of them is computed where the device chose the other design."""
    filled = Filled()
    call = replace(call_of(random_ids(9, 20, 1, 2, 8), 20, 8), kernels=filled)
    lists.build(call, lists.Cut(4, 8), chosen=torch.tensor([flag], dtype=torch.int32))
    assert set(filled.seen) == set(Filled.NAMES)
    assert all(x.eq(7).all() != written for x in filled.seen.values())


def test_the_table_of_counts_stays_smaller_than_the_pairs():
    """At any length: 2 bytes per pair, against 6 of the lists."""
    for tokens in (2**13, 2**16, 2**20):
        chunk = lists._chunk(tokens // 64, 16, 4, 8192)
        table = 4 * tokens // 64 * (tokens // chunk)
        assert table <= 2 * tokens * 16 and 8192 % chunk == 0
