"""Caches: whatever way tokens are fed, forked and taken back, outputs are those of the whole."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MIXED, bytes_of, fed, model

from nsa_neuron.errors import CacheExhausted, InvalidArgument, InvalidType, NsaError
from nsa_neuron.nn.cache import ContiguousCache
from nsa_neuron.nn.cache import cache as caches

KINDS = {
    "contiguous": {},
    "paged": {"paged": True},
    "released": {"paged": True, "slack": 5},
}
NETS = {
    "separate": model(MIXED),
    "shared": model(MIXED, shared_kv=True),
    "shared before": model(MIXED, shared_kv=True, rope="before", phi="linear"),
    "windows": model(("window",)),
}
TOKENS = bytes_of(2, 90)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Several pages in texts of a few hundred tokens."""
    monkeypatch.setattr(caches, "PAGE_TOKENS", 64)


def whole(name, tokens):
    with torch.no_grad():
        return NETS[name](tokens)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sizes", [[1] * 37, [7, 1, 8, 20, 34], [69, 1], [1, 69]])
def test_chunks_equal_the_whole(name, kind, sizes):
    tokens = TOKENS[:, : sum(sizes)]
    cache = NETS[name].new_cache(2, 90, **KINDS[kind])
    close(fed(NETS[name], tokens, sizes, cache), whole(name, tokens))
    assert cache.lengths == [sum(sizes)] * 2


actions = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(0, 1), st.integers(1, 40)),
        st.tuples(st.just("both"), st.integers(0, 9), st.integers(1, 12)),
        st.tuples(st.just("back"), st.integers(0, 1), st.integers(1, 5)),
        st.tuples(st.just("fork"), st.integers(0, 1), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(plan=actions)
def test_any_interleaving_fork_and_truncation(kind, plan):
    """Two sequences take turns; what each holds is replayed on a list."""
    name = "separate"
    net = NETS[name]
    cache = net.new_cache(2, 90, **KINDS[kind])
    held = [[], []]
    fresh = iter(bytes_of(2000, seed=3).tolist())
    for action, which, count in plan:
        if action == "back":
            keep = max(0, len(held[which]) - count)
            lengths = cache.lengths
            lengths[which] = keep
            cache.truncate(lengths)
            held[which] = held[which][:keep]
            continue
        if action == "fork":
            lengths = cache.lengths
            lengths[1 - which] = 0
            cache.truncate(lengths)
            cache.fork(which, 1 - which)
            held[1 - which] = list(held[which])
            continue
        counts = [0, 0]
        if action == "feed":
            counts[which] = min(count, 90 - len(held[which]))
        else:
            counts = [min(n, 90 - len(held[b])) for b, n in enumerate((count, which))]
        if not any(counts):
            continue
        tokens = torch.full((2, max(counts)), 7)
        for b, n in enumerate(counts):
            new = [next(fresh) for _ in range(n)]
            held[b] += new
            if n:
                tokens[b, -n:] = torch.tensor(new)
        with torch.no_grad(), cache.step(max(counts), counts) as step:
            got = net(tokens, step)
        for b, n in enumerate(counts):
            if n:
                want = whole(name, torch.tensor([held[b]]))
                close(got[b, -n:], want[0, -n:])
    assert cache.lengths == [len(part) for part in held]


def test_forks_share_pages_until_they_write():
    net = NETS["separate"]
    cache = net.new_cache(3, 200, paged=True, pages=6)
    table = cache.books.tables["slc"]
    fed_once = bytes_of(1, 100).expand(3, -1)
    with torch.no_grad(), cache.step(100, [100, 0, 0]) as step:
        net(fed_once, step)
    cache.fork(0, 1)
    cache.fork(0, 2)
    table = cache.books.tables["slc"]
    assert table.free == 4 and table.users.max() == 3
    with torch.no_grad(), cache.step(1) as step:
        net(bytes_of(3, 1, seed=9), step)
    table = cache.books.tables["slc"]
    assert table.free == 2  # the full page is shared still; the half-full one is not
    assert table.users.max() == 3


def test_a_released_cache_stays_small():
    net = model(("window", "nsa"))
    cache = net.new_cache(1, 640, paged=True, slack=2)
    with torch.no_grad():
        for start in range(0, 640, 64):
            with cache.step(64) as step:
                net(bytes_of(1, 640)[:, start : start + 64], step)
    used = {name: len(t.users) - t.free for name, t in cache.books.tables.items()}
    assert used == {"cmp": 10, "slc": 10, "win": 1, "raw": 1}
    with pytest.raises(InvalidArgument, match="slack = 2"):
        cache.truncate([600])
    cache.truncate([638])
    assert cache.lengths == [638]


@torch.no_grad()
def test_pools_of_what_is_given_back_are_small_and_large_enough():
    """However the text comes, and after a cache has been made wider and longer."""
    net, tokens = model(("window", "nsa")), bytes_of(2, 900)
    want = net(tokens)
    cache = net.new_cache(1, 640, paged=True, slack=2, longest_step=40)
    pages = {name: len(table.users) for name, table in cache.books.tables.items()}
    assert pages == {"cmp": 10, "slc": 10, "win": 2, "raw": 2}
    assert cache.nbytes < net.new_cache(1, 640).nbytes * 0.6
    close(fed(net, tokens[:1], [500, 40, 1, 39, 1, 1, 2], cache), want[:1, :584])
    with pytest.raises(InvalidArgument, match="at most longest_step = 40"):
        enter(cache, 41)
    cache.truncate([582])
    with pytest.raises(InvalidArgument, match="at least 582"):
        cache.resize([0, 0], 581, 70)
    with pytest.raises(InvalidArgument, match="'order' is 1; it must be from 0 to 0"):
        cache.resize([0, 1], 900, 70)
    cache.resize([0, 0], 900, 70)
    assert cache.lengths == [582, 582]
    tail = torch.cat([tokens[:1, 582:782], tokens[1:, 582:782]])
    got = fed(net, tail, [70, 1, 70, 59], cache)
    close(got, net(torch.cat([tokens[[0, 0], :582], tail], 1))[:, 582:])
    cache.resize([1], 900, 70)
    assert cache.lengths == [782]
    one = fed(net, tokens[:1, :9], [9], cache)
    close(one, net(torch.cat([tokens[:1, :582], tail[1:], tokens[:1, :9]], 1))[:, 782:])


def test_prefix_reuse():
    """A fork cut to the common prefix continues as if it had read the prefix itself."""
    net = NETS["separate"]
    cache = net.new_cache(2, 90, paged=True)
    with torch.no_grad():
        with cache.step(60, [60, 0]) as step:
            net(TOKENS[:, :60], step)
        cache.fork(0, 1)
        cache.truncate([60, 37])
        with cache.step(20, [0, 20]) as step:
            got = net(TOKENS[:, 40:60], step)[1]
    joined = torch.cat([TOKENS[:1, :37], TOKENS[1:, 40:60]], 1)
    close(got, whole("separate", joined)[0, 37:])


@pytest.mark.parametrize("kind", KINDS)
def test_reorder(kind):
    net = NETS["separate"]
    cache = net.new_cache(2, 90, **KINDS[kind])
    fed(net, TOKENS[:, :50], [50], cache)
    cache.reorder([1, 1])
    got = fed(net, TOKENS[:, 50:60], [1] * 10, cache)
    joined = torch.cat([TOKENS[[1, 1], :50], TOKENS[:, 50:60]], 1)
    close(got, whole("separate", joined)[:, 50:])


def snapshot(cache):
    return cache.lengths, {n: t.table.copy() for n, t in cache.books.tables.items()}


def same(a, b):
    return a[0] == b[0] and all((a[1][n] == b[1][n]).all() for n in a[1])


def enter(cache, *args):
    with cache.step(*args):
        pass


@pytest.mark.parametrize(
    ("do", "error", "text"),
    [
        (lambda n, c: enter(c, 60), CacheExhausted, "capacity is 90 tokens"),
        (lambda n, c: enter(c, 0), InvalidArgument, "at least 1"),
        (lambda n, c: enter(c, 3, [1]), InvalidArgument, "one per sequence"),
        (lambda n, c: enter(c, 3, [1, 4]), InvalidArgument, "from 0 to 3"),
        (lambda n, c: enter(c, 3, [1, -1]), InvalidArgument, "from 0 to 3"),
        (lambda n, c: enter(c, 3, [0, 0]), InvalidArgument, "not all 0"),
        (lambda n, c: c.truncate([[1], [1, 2]]), InvalidArgument, "2 ints"),
        (lambda n, c: c.truncate([41, 0]), InvalidArgument, "sequences'"),
        (lambda n, c: c.truncate([-1, 0]), InvalidArgument, "from 0"),
        (lambda n, c: c.truncate([1.5, 0]), InvalidArgument, "2 ints"),
        (lambda n, c: c.fork(0, 1), InvalidArgument, "empty"),
        (lambda n, c: c.fork(0, 2), InvalidArgument, "from 0 to 1"),
        (lambda n, c: c.reorder([0, 2]), InvalidArgument, r"within 0 \.\. 1"),
        (lambda n, c: fed(n, TOKENS[:1, :3], [3], c), InvalidArgument, "of 1 sequences"),
        (lambda n, c: fed(n, TOKENS[:, :3] + 256, [3], c), InvalidArgument, "bytes, from 0 to 255"),
        (lambda n, c: fed(n.float(), TOKENS[:, :3], [3], c), InvalidType, "torch.float64"),
        (lambda n, c: fed(model(("nsa",)), TOKENS[:, :3], [3], c), InvalidArgument, "4 layers"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_leave_the_cache_as_it_was(kind, do, error, text):
    net = copy.deepcopy(NETS["separate"])
    cache = net.new_cache(2, 90, **KINDS[kind])
    fed(net, TOKENS[:, :40], [40], cache)
    before = snapshot(cache)
    with pytest.raises(error, match=text):
        do(net, cache)
    assert same(before, snapshot(cache))
    got = fed(NETS["separate"], TOKENS[:, 40:42], [1, 1], cache)
    close(got, whole("separate", TOKENS[:, :42])[:, 40:])


def test_a_step_ends_with_its_block_and_nothing_else_happens_meanwhile():
    net = NETS["separate"]
    cache = net.new_cache(2, 90)
    with torch.no_grad(), cache.step(5) as step:
        net(TOKENS[:, :5], step)
        for do in (
            lambda: enter(cache, 1),
            lambda: cache.truncate([0, 0]),
            lambda: cache.reorder([0, 1]),
        ):
            with pytest.raises(InvalidArgument, match="inside a step"):
                do()
    with pytest.raises(InvalidArgument, match="over"):
        net(TOKENS[:, :5], step)
    close(fed(net, TOKENS[:, 5:9], [4], cache), whole("separate", TOKENS[:, :9])[:, 5:])


def test_no_free_page():
    net = NETS["separate"]
    cache = net.new_cache(2, 90, paged=True, pages=2)
    fed(net, TOKENS[:, :60], [60], cache)
    before = snapshot(cache)
    with pytest.raises(CacheExhausted, match="all 2 pages of 64 rows are in use"):
        fed(net, TOKENS[:, 60:70], [10], cache)
    assert same(before, snapshot(cache))


@pytest.mark.parametrize("position", [20, -3])
def test_a_cache_alone_says_where_tokens_stand(position):
    """A position that the cache does not have cannot be asked for: there is no such argument."""
    net = NETS["separate"]
    cache = net.new_cache(2, 64)
    with pytest.raises(TypeError), cache.step(5, position=position):
        pass
    with torch.no_grad(), pytest.raises(InvalidArgument, match="'step'"), cache.step(5) as step:
        net(TOKENS[:, :5], position)
    assert cache.lengths == [0, 0] and step.positions[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [{"batch": 0}, {"capacity": 0}, {"capacity": 1.5}])
def test_bad_sizes(size):
    with pytest.raises(InvalidArgument) as caught:
        NETS["separate"].new_cache(**{"batch": 1, "capacity": 64, **size})
    assert caught.value.argument == next(iter(size))
    with pytest.raises(NsaError):
        NETS["separate"].new_cache(1, 64, paged=True, slack=-1)


@pytest.mark.parametrize("kinds", ["nsa", ["nsa", "sparse"], []])
def test_bad_kinds_and_dtypes(kinds):
    config = NETS["separate"].config
    with pytest.raises(InvalidArgument, match=r"'kinds'.*a kind for each layer"):
        ContiguousCache(config, kinds, 1, 64)
    with pytest.raises(InvalidType, match=r"'dtype' is torch.int32"):
        NETS["separate"].new_cache(1, 64, dtype=torch.int32)


def test_a_cache_keeps_no_graph_and_can_be_copied():
    net = copy.deepcopy(NETS["separate"]).train()
    cache = net.new_cache(2, 90)
    with cache.step(40) as step:
        logits = net(TOKENS[:, :40], step)
    assert logits.requires_grad
    assert all(x.grad_fn is None for layer in cache.layers for pair in layer.values() for x in pair)
    twin = copy.deepcopy(cache)
    fed(net, TOKENS[:, 40:50], [10], cache)
    close(fed(net, TOKENS[:, 40:50], [10], twin), whole("separate", TOKENS[:, :50])[:, 40:])


def test_an_idle_sequence_with_nan_disturbs_nobody():
    """What a padded row leaves behind in the spare page is never read."""
    net = copy.deepcopy(NETS["separate"])
    cache = net.new_cache(2, 90, paged=True)
    for pools in cache.layers:
        for pair in pools.values():
            for x in pair:
                x[:-1] = float("nan")
    got = fed(net, TOKENS[:, :50], [20, 1, 29], cache)
    close(got, whole("separate", TOKENS[:, :50]))


def test_compiled_decoding_compiles_once_for_any_length_and_capacity():
    torch._dynamo.reset()
    net = model(("nsa",), torch.float32)
    fast = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for capacity, prompt in ((320, 75), (700, 300)):
            cache, tokens = net.new_cache(1, capacity), bytes_of(1, prompt + 3)
            # Prefill and decode: two graphs, made for the first cache.
            with torch._dynamo.config.patch(error_on_recompile=capacity > 320):
                got = fed(fast, tokens, [prompt, 1, 1, 1], cache)
            torch.testing.assert_close(got, net(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_blocks_of_a_head_lie_together(kind, monkeypatch):
    """As `neuron` reads them; rows of the other pools hold all heads, and pages have 256 tokens."""
    monkeypatch.undo()
    net = model(("nsa", "window"))
    cache = net.new_cache(1, 300, **KINDS[kind])
    pools, heads, dk = cache.layers[0], cache.config.kv_heads, cache.config.dk
    assert cache.page == 256 and heads > 1
    assert pools["slc"][0].stride()[1:] == (dk, 256 * dk, 1)
    assert all(pools[name][0].is_contiguous() for name in ("cmp", "win", "raw"))
    text = bytes_of(1, 300)
    close(fed(net, text, [250, 1, 40, 9], cache), net(text))
