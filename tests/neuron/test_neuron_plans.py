"""What launchers choose from plans: a wrong choice gives right results, slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_neuron.backends.neuron import plans
from nsa_neuron.backends.neuron.launch import decode, groups, ranges, select_blocks
from nsa_neuron.backends.neuron.launch.decode import single
from nsa_neuron.backends.neuron.launch.selected_attention import sizes
from nsa_neuron.backends.neuron.run import package

pytestmark = pytest.mark.sim


class Asked(Exception):
    """A kernel was asked for, with these constants."""


class Asking:
    """Kernels that run nothing."""

    cores = 1

    def forward(self, *_: Any, **constants: Any) -> None:
        raise Asked(constants)


def selection(tokens: int, kv_heads: int, group: int = 16) -> dict[str, Any]:
    """Constants of `select_blocks` on all queries of a sequence, 192 channels, bfloat16."""
    q = torch.empty(1, tokens, kv_heads * group, 192, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, tokens // 16 - 1, kv_heads, 192, dtype=torch.bfloat16, device="meta")
    with pytest.raises(Asked) as caught:
        select_blocks.forward(
            Asking(), plans.load("select_blocks"), q, k, torch.empty(q.shape[:3], device="meta"),
            kv_len=tokens, block=32, stride=16, select_block=64, num_selected=16, num_initial=1,
            num_local=2, scale=0.07,
        )  # fmt: skip
    constants: dict[str, Any] = caught.value.args[0]
    return constants


def test_selection_loops_from_a_million_instructions_on():
    """One program per tile at 64K tokens of 4 kv heads, as its page says, hardware loops beyond."""
    for tokens, heads, loops in ((65_536, 4, False), (262_144, 1, True)):
        constants = selection(tokens, heads)
        assert (constants["reach"] == ()) is loops
        assert constants["length"] == 128  # queries of a tile, as many as there are partitions


def test_pieces_of_keys_fill_a_bank_of_psum():
    """480 of 512 columns unrolled; in loops a sixteenth of all keys, between 256 and 480 blocks."""
    assert [selection(n, 1)["piece"] for n in (512, 65_536, 262_144, 1_048_576)] == [
        32, 480, 256, 480,
    ]  # fmt: skip


def test_tiles_of_large_groups_have_fewer_queries():
    """Transposed queries take 48 KiB of a partition: 768 heads of 32 bytes, or 32 queries."""
    assert [selection(4096, 1, group)["length"] for group in (16, 12, 48, 256)] == [
        128,
        128,
        128,
        32,
    ]


@pytest.mark.parametrize(
    ("keys", "blocks", "dtype", "at_once"),
    [
        (4095, 1024, torch.bfloat16, 4),  # 64K tokens
        (4095, 1024, torch.float32, 1),
        (1023, 256, torch.float32, 4),
        (8191, 2048, torch.bfloat16, 1),  # 128K tokens: their keys leave no room for another's
        (65_535, 16_384, torch.bfloat16, 0),  # 1M: not even one row of logits
    ],
)
def test_sequences_of_decode_that_overlap(keys, blocks, dtype, at_once):
    assert decode.sequences_at_once(keys, blocks, torch.empty(1, dtype=dtype)) == at_once


def alone(group: int = 16, tokens: int = 65_536, window: int = 512, chosen: int = 16, **more: int):
    """The form of `single` for one kv head of 192/128 in pages of 64 rows."""
    known = {"block": 32, "stride": 16, "size": 64} | more

    def pools(rows: int) -> tuple[torch.Tensor, ...]:
        count = -(-rows // 64)
        table = torch.empty(1, count, dtype=torch.int32, device="meta")
        k, v = (
            torch.empty(count, 64, 1, dim, dtype=torch.bfloat16, device="meta")
            for dim in (192, 128)
        )
        return k, v, table

    return single.Call.of(
        group, 1, pools(tokens // 16), pools(tokens), pools(tokens), selected=chosen,
        window=window, **known,
    )  # fmt: skip


def test_which_calls_one_kernel_for_one_head_takes():
    """Whatever does not fit partitions or banks goes to the kernel with heads on partitions."""
    assert all(alone(tokens=n) is not None for n in (64, 4096, 65_536)) and alone(1) is not None
    # Rows of 8 tokens of a block lie on two groups of lanes: 512 logits, what a bank holds.
    assert alone(64) is not None and alone(65) is None
    assert alone(tokens=262_144) is not None and alone(tokens=524_288) is None  # 128 keys a lane
    # 126 whole rows of 16 tokens, and two that the window cuts; longer rows fill no bank.
    assert alone(window=2033) is not None and alone(window=2034) is None
    assert alone(stride=64, block=64) is not None
    assert alone(block=512, size=512) is None  # 31 strides of overlap, rows of 16


@pytest.mark.parametrize(
    ("group", "queries"), [(1, 128), (2, 64), (4, 32), (16, 32), (32, 32), (64, 16), (1024, 1)]
)
def test_queries_of_a_tile_of_selected_attention(group, queries):
    assert sizes.queries_of(group) == queries


def test_bodies_and_trips_of_selected_attention():
    """The paper's sizes reach the plan's limits forward; long lists of ids leave one tile."""
    forward = plans.load("selected_attention")["forward"]
    cut = sizes.choose(forward, 64, 16, (192, 128), 16, 2, backward=False)
    assert (cut.page, cut.queries, cut.body, cut.blocks) == (64, 32, 16, 48)
    many = sizes.choose(forward, 64, 1, (192, 128), 3000, 2, backward=False)
    assert many.body == 1
    backward = plans.load("selected_attention")["backward"]
    cut = sizes.choose(backward, 64, 16, (192, 128), 16, 2, backward=True)
    assert cut.body == 4 and 40 <= cut.blocks <= 48


@pytest.mark.parametrize("window", [1, 129, 300, 700, 2000])
@pytest.mark.parametrize("past", [0, 37, 833])
def test_chunks_of_hardware_loops_cover_what_is_seen_once(window, past):
    """Of each pair of groups, by brute force: every key that a query sees is in one chunk, chunks
    without masks hold what all queries see, and no more keys have masks than must."""
    queries, small, large = 100, 128, 512
    keys = queries + past
    seen = ranges.causal(queries, keys, window, None, None, torch.device("cpu"))
    of_call = groups.Groups.of(seen, 16, {"tiles": 1, "large": large, "small": small})
    bounds = of_call.bounds.long().view(-1, 2 * of_call.queries, 2)
    assert of_call.queries == 32 and of_call.trips[::2].equal(of_call.trips[1::2])
    for pair, trips in zip(bounds, of_call.trips[::2].tolist(), strict=True):
        lo, hi = pair.unbind(-1)
        first, all_from, split, big_from, big_to, after, all_to, last = trips
        masked = [*range(first, all_from), *range(all_to, last)]
        plain = [*range(all_from, split), *range(after, all_to)]
        chunks = [(j * small, small) for j in (*masked, *plain)]
        chunks += [(j * large, large) for j in range(big_from, big_to)]
        found = sorted(key for start, size in chunks for key in range(start, start + size))
        assert found == sorted(set(found))
        assert found[0] <= int(lo.min()) and found[-1] >= int(hi.max()) - 1
        assert found == list(range(found[0], found[-1] + 1))
        assert found[0] > int(lo.min()) - small and found[-1] < int(hi.max()) + small
        every = [
            j for j in range(-(-keys // small))
            if int(lo.max()) <= j * small and (j + 1) * small <= int(hi.min())
        ]  # fmt: skip
        unmasked = {start // small + i for start, size in chunks[len(masked) :]
                    for i in range(size // small)}  # fmt: skip
        assert unmasked == set(every)
        whole = [j for j in range(keys // large) if {j * 4 + i for i in range(4)} <= set(every)]
        assert list(range(big_from, big_to)) == whole


@pytest.mark.parametrize("window", [1, 129, 300, 700, 2000])
@pytest.mark.parametrize("past", [0, 37, 833])
def test_sections_of_hardware_loops_meet_what_sees_them_once(window, past):
    """Of each pair of sections of keys, by brute force: the pairs of groups that see some key, and
    among them, without masks, exactly those whose queries all see all of them."""
    queries, width = 700, 2 * groups.SECTION
    keys = queries + past
    seen = ranges.causal(queries, keys, window, None, None, torch.device("cpu"))
    of_call = groups.Groups.of(seen, 16, {"tiles": 1, "large": 512, "small": 128})
    pairs = of_call.bounds.long().view(-1, 2 * of_call.queries, 2).tolist()
    sections = of_call.sections(keys)
    assert sections[::2].equal(sections[1::2])
    for j, (first, all_from, all_to, last) in enumerate(sections[::2].tolist()):
        start, end = j * width, (j + 1) * width
        some = [
            p for p, rows in enumerate(pairs) if any(lo < end and hi > start for lo, hi in rows)
        ]
        every = [
            p for p, rows in enumerate(pairs) if all(lo <= start and hi >= end for lo, hi in rows)
        ]
        assert list(range(first, last)) == some
        assert list(range(all_from, all_to)) == every


@pytest.mark.parametrize(
    ("stride", "blocks"), [(16, 128), (64, 128), (65, 126), (128, 64), (256, 32), (8192, 1)]
)
def test_tiles_of_blocks_have_at_most_64_tiles_of_tokens(stride, blocks):
    tile = package().load("compress.mean").block_tile
    assert tile(1000, stride, stride) == blocks and tile(1, stride, stride) == 1
