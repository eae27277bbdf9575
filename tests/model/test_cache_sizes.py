"""Sizes of caches by hand: pages, bytes, rows of a step, and when `decode` is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import bytes_of, config, fed, model

from nsa_neuron import functional
from nsa_neuron.errors import CacheExhausted, InvalidArgument
from nsa_neuron.nn import ContiguousCache, PagedCache
from nsa_neuron.nn.cache import cache as caches
from nsa_neuron.nn.cache.cache import page_tokens


@pytest.mark.parametrize(
    ("select_block", "tokens"),
    [(8, 256), (16, 256), (48, 288), (256, 256), (320, 320), (192, 384)],
)
def test_a_page_holds_whole_blocks_and_at_least_256_tokens(select_block, tokens):
    assert page_tokens(config(select_block=select_block)) == tokens


@pytest.mark.parametrize(
    ("change", "kinds", "rows"),
    [
        # Per page of 256 tokens: 64 compressed blocks, and a set of raw rows for each branch.
        ({}, ("nsa",), 64 + 3 * 256),
        ({"shared_kv": True}, ("nsa",), 64 + 2 * 256),
        ({"shared_kv": True, "rope": "before"}, ("nsa",), 64 + 256),
        ({"shared_kv": True, "rope_base": 0.0}, ("nsa",), 64 + 256),
        ({}, ("window",), 256),
        ({}, ("full", "full"), 2 * 256),
        ({}, ("nsa", "full", "window"), 64 + 5 * 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_every_pool(change, kinds, rows, dtype):
    """2 sequences of 257 tokens have 2 pages each, and each pool 2 spare ones."""
    made = ContiguousCache(config(**change), kinds, 2, 257, dtype=dtype)
    assert made.nbytes == (2 * 2 + 2) * rows * 2 * (8 + 6) * dtype.itemsize
    paged = PagedCache(config(**change), kinds, 2, 256, dtype=dtype)
    assert paged.nbytes == (2 + 2) * rows * 2 * (8 + 6) * dtype.itemsize
    few = PagedCache(config(**change), kinds, 2, 5000, dtype=dtype, pages=1)
    assert few.nbytes == (1 + 2) * rows * 2 * (8 + 6) * dtype.itemsize


@pytest.mark.parametrize("change", [{}, {"paged": True}, {"paged": True, "slack": 0}], ids=str)
def test_a_cache_holds_its_capacity_and_not_a_token_more(change):
    net = model(("nsa", "window"))
    cache, tokens = net.new_cache(1, 20, **change), bytes_of(1, 21)
    got = fed(net, tokens[:, :20], [19, 1], cache)
    with torch.no_grad():
        torch.testing.assert_close(got, net(tokens[:, :20]), rtol=1e-9, atol=1e-9)
    with pytest.raises(CacheExhausted, match="sequence 0 has 20 tokens and gets 1 more"):
        fed(net, tokens[:, 20:], [1], cache)


@pytest.mark.parametrize("tokens", [32, 33])
def test_up_to_32_new_tokens_go_through_decode(tokens, monkeypatch):
    used = []
    for name in ("decode", "nsa_attention"):
        op = getattr(functional, name)
        monkeypatch.setattr(
            functional, name, lambda *a, op=op, name=name, **k: used.append(name) or op(*a, **k)
        )
    net = model(("nsa",))
    cache = net.new_cache(1, 90)
    fed(net, bytes_of(1, 40 + tokens), [40, tokens], cache)
    assert used == ["nsa_attention", "decode" if tokens == 32 else "nsa_attention"]


def test_complete_blocks_are_counted_from_the_last_token():
    """Blocks of 8 every 4: the first with the 8th token, the next with the 12th."""
    cache = ContiguousCache(config(), ("nsa",), 1, 90)
    lengths = np.arange(20)
    counts = [0] * 8 + [1] * 4 + [2] * 4 + [3] * 4
    assert cache.blocks(lengths).tolist() == counts


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        # Of 30 tokens: 6 blocks are complete and the 7th begins at 24; the next query's window
        # has the tokens from 19 on.
        ({}, {"cmp": 0, "slc": 0, "win": 19, "raw": 24}),
        ({"shared_kv": True}, {"cmp": 0, "slc": 0, "raw": 24}),
    ],
    ids=str,
)
def test_what_later_queries_need_of_a_pool(change, needed):
    cache = PagedCache(config(**change), ("nsa", "window"), 1, 90, slack=0)
    lengths = np.array([30])
    assert {n: int(cache._needed(n, lengths)[0]) for n in cache.books.tables} == needed
    windows = PagedCache(config(shared_kv=True), ("window",), 1, 90, slack=0)
    assert int(windows._needed("slc", lengths)[0]) == 19
    cache.slack = 7  # as if it were 23 tokens long
    firsts = {"win": 12, "raw": 16}
    for name, first in firsts.items() if not change else ():
        assert int(cache._first_written(name, lengths)[0]) == first
        assert int(cache._first_written(name, np.array([3]))[0]) == 0


def test_pools_of_what_is_given_back_have_room_for_a_step_of_each_sequence():
    """The last window less one, a stride, the slack and the step: 11 + 4 + 9 + 40 rows are a page
    of 64, and one more for a border; of raw rows one block less a stride may be incomplete."""
    made = PagedCache(config(), ("nsa", "window"), 3, 4096, slack=9, longest_step=40)
    assert {n: len(t.users) for n, t in made.books.tables.items()} == {
        "cmp": 48, "slc": 48, "win": 6, "raw": 6
    }  # fmt: skip
    for step, pages in ((232, 2), (233, 3)):
        made = PagedCache(config(), ("window",), 1, 4096, slack=9, longest_step=step)
        assert len(made.books.tables["win"].users) == pages
    short = PagedCache(config(), ("window",), 1, 256, slack=9, longest_step=40)
    assert len(short.books.tables["win"].users) == 1  # never more than the capacity takes


def plan(monkeypatch, kinds, sizes, counts, **options):
    monkeypatch.setattr(caches, "PAGE_TOKENS", 16)
    cache = PagedCache(config(), kinds, 2, 64, **options)
    for size in sizes:
        with cache.step(size):
            pass
    with cache.step(*counts) as step:
        return step


def test_the_tensors_of_a_step(monkeypatch):
    """Two sequences of 9 tokens get 3 and 1: pages of 16 tokens, or of 4 blocks."""
    step = plan(monkeypatch, ("nsa", "window"), [9], (3, [3, 1]))
    assert step.shape == (2, 3) and not step.whole and step.few
    assert step.positions.tolist() == [[9, 10, 11], [0, 0, 9]]
    assert step.seqlens.tolist() == [12, 10] and step.cu_queries.tolist() == [0, 3, 4]
    assert step.queries.tolist() == [0, 1, 2, 5]
    # Sequence 0 has page 0 and sequence 1 page 1; what is no token goes to page 8, the first spare.
    win = step.writes["win"].tolist()
    assert win[:3] == [9, 10, 11] and win[5] == 25 and all(row // 16 == 8 for row in win[3:5])
    # The second block ends with token 11, which sequence 0 has got.
    assert step.writes["cmp"].tolist()[0] == 1 and step.writes["cmp"].tolist()[1] // 4 == 8
    assert step.block_ends.tolist() == [[11], [11]]
    assert step.unfinished.tolist()[:8] == list(range(4, 12))
    assert step.unfinished.tolist()[8:14] == list(range(20, 26))
    assert step.reads.keys() == {"near"}
    near = step.reads["near"]  # from the oldest key of the first new query: none is out of sight
    assert near.edges.tolist() == [0, 12, 22] and near.rows.tolist() == [*range(12), *range(16, 26)]
    later = plan(monkeypatch, ("window",), [30], (3, [3, 0])).reads["near"]
    assert later.edges.tolist() == [0, 14]  # tokens 19 to 32: 11 before the first, and three


def test_a_first_step_needs_nothing_but_its_tokens(monkeypatch):
    step = plan(monkeypatch, ("nsa",), [], (12,))
    assert step.whole and step.reads == {} and step.queries is None
    assert step.block_ends.tolist() == [[7, 11]] * 2 and step.cu_queries.tolist() == [0, 12, 24]
    part = plan(monkeypatch, ("nsa",), [], (12, [12, 11]))
    assert not part.whole


def test_a_contiguous_cache_has_its_pages_in_order():
    made = ContiguousCache(config(), ("nsa",), 2, 600)
    assert made.books.tables["slc"].table.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert made.books.tables["slc"].users.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("given", "argument"),
    [({"slack": True}, "slack"), ({"longest_step": 0}, "longest_step"), ({"pages": 0}, "pages"),
     ({"longest_step": True}, "longest_step"), ({"batch": True}, "batch")],
    ids=str,
)  # fmt: skip
def test_sizes_that_are_none(given, argument):
    values = {"batch": 1, "capacity": 64, **given}
    with pytest.raises(InvalidArgument) as caught:
        PagedCache(config(), ("nsa",), **values)
    assert caught.value.argument == argument
    made = PagedCache(config(), ("nsa",), 1, 64, slack=0, longest_step=1)
    assert (made.slack, made.longest_step) == (0, 1)
    with pytest.raises(InvalidArgument, match="capacity"):
        PagedCache(config(max_positions=63), ("nsa",), 1, 64)
