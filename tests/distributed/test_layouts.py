"""Where tokens and blocks lie, against loops over every token, block and query; no process."""

from __future__ import annotations

import itertools

import pytest
import torch

from nsa_neuron.distributed import spread as spreading
from nsa_neuron.distributed.context_parallel import RankAttention, sharded_loss
from nsa_neuron.distributed.layout import Geometry, group
from nsa_neuron.distributed.spread import Spread, choose_blocks
from nsa_neuron.distributed.wire import Sizes, blocks, received, training

EDGES = {
    (4, 6): [None, (0, 5, 24), (0, 6, 24), (0, 1, 2, 13, 24), (0, 18, 24), (0, 12, 24)],
    (3, 8): [None, (0, 7, 9, 24), (0, 8, 16, 24), (0, 3, 20, 24)],
    (2, 5): [None, (0, 9, 10)],
    (1, 12): [None, (0, 4, 12)],
}
GEOMETRIES = [(4, 2, 3), (4, 4, 1), (6, 2, 30), (3, 1, 5)]
GROUPS = [
    (*key, edges, geometry)
    for (key, found), geometry in itertools.product(EDGES.items(), GEOMETRIES)
    for edges in found
]


class Loops:
    """Everything by looking at each token."""

    def __init__(self, world, tokens, edges, geometry):
        self.block, self.stride, self.window = geometry
        self.edges = edges or (0, world * tokens)
        self.pieces = list(itertools.pairwise(self.edges))
        # A block belongs to the rank of its last token: (last token, first token, end in sequence).
        self.blocks = [
            (a + first + self.block - 1, a + first, first + self.block - 1)
            for a, b in self.pieces
            for first in range(0, b - a - self.block + 1, self.stride)
        ]

    def start(self, token):
        return max(a for a, _ in self.pieces if a <= token)


@pytest.mark.parametrize(("world", "tokens", "edges", "geometry"), GROUPS)
def test_layouts_are_what_a_loop_over_tokens_finds(world, tokens, edges, geometry):
    loops = Loops(world, tokens, edges, geometry)
    for rank in range(world):
        made = group(rank, world, tokens, Geometry(*geometry), edges)
        own, mine = made.own, range(rank * tokens, (rank + 1) * tokens)
        start = loops.start(mine[0])
        assert (own.low, own.high, own.start) == (mine[0], mine[-1] + 1, start)
        assert own.keys == (start, mine[-1] + 1)
        seen = {k for t in mine for k in range(max(loops.start(t), t - loops.window + 1), t + 1)}
        assert own.window == (min(seen), mine[-1] + 1)
        ends = [b for _, b in loops.pieces if b in range(mine[0] + 1, mine[-1] + 1)]
        assert own.stops == [*ends, mine[-1] + 1]
        held = [b for b in loops.blocks if b[0] in mine]
        assert own.block_ends == [end for _, _, end in held]
        stops = [mine[0], *own.stops]
        counts = [sum(b[0] in range(x, y) for b in held) for x, y in itertools.pairwise(stops)]
        assert own.block_counts == counts
        first = min((b[1] for b in held if loops.start(b[0]) == start), default=None)
        if first is not None:
            assert own.compressed == (first, mine[-1] + 1)
        assert own.compressed[0] <= mine[-1] + 1 and own.offsets(start)[0] == 0
        assert own.offsets(start)[1:] == [stop - start for stop in own.stops]
        before = [sum(b[0] < r * tokens for b in loops.blocks) for r in range(world + 1)]
        assert made.block_bounds == before
        assert made.token_bounds == [r * tokens for r in range(world + 1)]
        for r, (low, high) in enumerate(made.blocks_needed):
            # All of the sequence that the rank's first token is of, and what came up to its end.
            at = loops.start(r * tokens)
            assert low == sum(b[1] < at for b in loops.blocks)
            assert high == before[r + 1]


@pytest.mark.parametrize(("world", "tokens", "edges", "geometry"), GROUPS)
def test_aligned_is_no_block_on_both_sides_of_any_border(world, tokens, edges, geometry):
    loops = Loops(world, tokens, edges, geometry)
    for size, rank in itertools.product((2, 3, 4, 6), range(world)):
        cut = any(
            (border - loops.start(border)) % size for border in range(0, world * tokens, tokens)
        )
        assert group(rank, world, tokens, Geometry(*geometry), edges).aligned(size) == (not cut)


@pytest.mark.parametrize(("world", "tokens"), [(4, 6), (2, 9), (1, 5)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_bytes_are_those_of_rows_that_others_hold(world, tokens, geometry):
    """Row by row: what a rank needs of each kind and another rank holds."""
    loops, row = Loops(world, tokens, None, geometry), 7
    sizes = Sizes(world, tokens, *geometry, row)
    for rank in range(world):
        low = rank * tokens
        made = group(rank, world, tokens, Geometry(*geometry)).own
        raw = low - min(low, made.compressed[0])
        near = {
            k for t in range(low, low + tokens) for k in range(max(0, t - loops.window + 1), low)
        }
        done = sum(b[0] < low for b in loops.blocks)
        found = received(sizes, rank)
        assert blocks(sizes, low) == done
        assert found["compressed"] == done * row and found["selected"] == low * row
        if made.block_counts != [0]:
            assert found["halo"] == (raw + len(near)) * row
        # Forward and again for the backward pass, whose gradients are as many bytes.
        assert training(sizes, rank) == 3 * sum(found.values())
        assert training(sizes, rank, 2) == 5 * sum(found.values())


class Messages:
    """Exchanges of ranks that run one after the other in this process."""

    def __init__(self, monkeypatch):
        self.sent, self.rank = {}, 0
        monkeypatch.setattr(spreading, "exchange", self.exchange)
        monkeypatch.setattr(spreading, "gather", self.gather)

    def exchange(self, ranks, send, receive, like, purpose):
        self.sent[self.rank] = send
        return Later(self, self.rank, receive)

    def gather(self, ranks, x, purpose):
        return self.counts(x)


class Later:
    """What the others sent, once all have."""

    def __init__(self, messages, rank, shapes):
        self.messages, self.rank, self.shapes = messages, rank, shapes

    def wait(self):
        found = [self.messages.sent[r][self.rank] for r in range(len(self.shapes))]
        for part, shapes in zip(found, self.shapes, strict=True):
            assert [tuple(x.shape) for x in part] == [tuple(s) for s in shapes]
        return found


def each(messages, world, do):
    results = []
    for rank in range(world):
        messages.rank = rank
        results.append(do(rank))
    return results


NEEDS = {
    "halo": [(0, 6), (3, 12), (9, 18), (15, 24)],
    "all": [(0, 6), (0, 12), (0, 18), (0, 24)],
    "own": [(0, 6), (6, 12), (12, 18), (18, 24)],
    "mixed": [(0, 6), (6, 12), (5, 18), (0, 24)],
}


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_come_and_gradients_return_summed_in_float32(name, dtype, monkeypatch):
    messages, needs = Messages(monkeypatch), NEEDS[name]
    bounds = [0, 6, 12, 18, 24]
    rows = [torch.randn(2, 24, 1, d, dtype=torch.float64).to(dtype) for d in (3, 2)]
    spreads = [Spread(None, r, bounds, needs) for r in range(4)]
    own = [[x[:, bounds[r] : bounds[r + 1]] for x in rows] for r in range(4)]
    pending = each(messages, 4, lambda r: spreads[r].fetch(own[r], "rows"))
    for r, (first, last) in enumerate(needs):
        got = spreads[r].assemble(pending[r], own[r])
        assert all(torch.equal(x, y[:, first:last]) for x, y in zip(got, rows, strict=True))
        assert spreads[r].ahead == bounds[r] - first
    # One great gradient and many small ones, which half precision would lose.
    grads = [
        [torch.full((2, b - a, 1, d), 256.0 if r == 3 else 0.75, dtype=dtype) for d in (3, 2)]
        for r, (a, b) in enumerate(needs)
    ]
    back = each(messages, 4, lambda r: spreads[r].give_back(grads[r], "gradients"))
    for r in range(4):
        for total in spreads[r].collect(back[r], grads[r]):
            users = [
                [u for u, (a, b) in enumerate(needs) if a <= row < b]
                for row in range(bounds[r], bounds[r + 1])
            ]
            want = torch.tensor([sum(256.0 if u == 3 else 0.75 for u in one) for one in users])
            assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(total, want.to(total.dtype)[None, :, None, None].expand_as(total))


def chosen(messages, world, tokens, ids, edges=None, force=False, size=2):
    """What each rank fetches; `ids` by rank, of its queries."""
    made = [group(r, world, tokens, Geometry(2, 2, 2), edges) for r in range(world)]
    counts = []
    for own, mine in zip(made, ids, strict=True):
        layout = own.own
        first = (layout.low - layout.start) // size
        remote = sorted({i for row in mine[: layout.stops[0] - layout.low] for i in row if 0 <= i < first})  # fmt: skip # noqa: E501
        owners = [(i * size + layout.start) // tokens for i in remote]
        counts.append(torch.tensor([owners.count(r) for r in range(world)]))

    def gathered(x):
        assert torch.equal(x, counts[messages.rank])
        return counts

    messages.counts = gathered
    tensors = [torch.tensor(mine, dtype=torch.int32)[None, :, None] for mine in ids]
    wanted = [0] * world

    def ask(ranks, send, receive, like, purpose):
        wanted[messages.rank] = [part[0].tolist() for part in send]
        messages.sent[messages.rank] = send
        return Later(messages, messages.rank, receive)

    return made, tensors, counts, wanted, ask


def test_blocks_are_asked_of_their_owners_and_places_follow(monkeypatch):
    """Two ranks of 8 tokens, blocks of 2: rank 1 asks for what it chose of blocks 0 to 3."""
    messages = Messages(monkeypatch)
    ids = [[[0, -1]] * 8, [[0, 4], [2, 4], [2, 5], [0, 5], [4, 6], [5, 6], [2, 7], [6, 7]]]
    made, tensors, _, wanted, ask = chosen(messages, 2, 8, ids)
    monkeypatch.setattr(spreading, "exchange", ask)
    # Rank 1's requests are known before rank 0 waits for them.
    messages.sent = {0: [[torch.zeros(0, dtype=torch.int64)]] * 2,
                     1: [[torch.tensor([0, 2])], [torch.zeros(0, dtype=torch.int64)]]}  # fmt: skip
    found = each(messages, 2, lambda r: choose_blocks(None, made[r], 2, tensors[r], force=True))
    assert wanted == [[[], []], [[0, 2], []]]
    assert [x.tolist() for x in found[0].asked] == [[], [0, 2]]
    assert found[1].ids.tolist() == [0, 2] and found[1].ahead == 4 and found[1].first_own == 4
    local = found[1].local_ids(tensors[1])[0, :, 0].tolist()
    places = {0: 0, 2: 1, 4: 2, 5: 3, 6: 4, 7: 5}
    assert local == [[places[i] for i in row] for row in ids[1]]
    assert found[0].local_ids(tensors[0])[0, :, 0].tolist() == ids[0]
    # 4 rows against the 8 that gathering moves; with as many or more, all come.
    assert choose_blocks(None, made[1], 2, tensors[1]) is not None
    monkeypatch.setattr(spreading, "exchange", messages.exchange)
    x = torch.arange(16.0).view(1, 16, 1, 1)
    own = [x[:, :8], x[:, 8:]]
    pending = each(messages, 2, lambda r: found[r].fetch([own[r]], "blocks"))
    assert found[1].assemble(pending[1], [own[1]])[0].flatten().tolist() == [0, 1, 4, 5, *range(8, 16)]  # fmt: skip # noqa: E501
    grads = [torch.ones(1, 8, 1, 1).bfloat16(), torch.full((1, 12, 1, 1), 256.0).bfloat16()]
    back = each(messages, 2, lambda r: found[r].give_back([grads[r]], "gradients"))
    (total,) = found[0].collect(back[0], [grads[0]])
    assert total.dtype == torch.float32
    assert total.flatten().tolist() == [257, 257, 1, 1, 257, 257, 1, 1]
    (total,) = found[1].collect(back[1], [grads[1]])
    assert total.flatten().tolist() == [256.0] * 8


@pytest.mark.parametrize(("count", "gathers"), [(3, False), (4, True)])
def test_all_rows_come_where_blocks_would_move_as_many(count, gathers, monkeypatch):
    messages = Messages(monkeypatch)
    ids = [[[0]] * 8, [[i % count] for i in range(8)]]
    made, tensors, _, _, ask = chosen(messages, 2, 8, ids)
    monkeypatch.setattr(spreading, "exchange", ask)
    none = torch.zeros(0, dtype=torch.int64)
    messages.sent = {0: [[none]] * 2, 1: [[torch.arange(count)], [none]]}
    for force in (False, True):
        found = each(messages, 2, lambda r: choose_blocks(None, made[r], 2, tensors[r], force))  # noqa: B023
        assert [x is None for x in found] == [gathers and not force] * 2


@pytest.mark.parametrize("rank", range(3))
def test_positions_of_a_rank_are_those_of_its_part(rank):
    attention = RankAttention()
    object.__setattr__(attention, "rank", rank)
    object.__setattr__(attention, "world", 3)
    cpu, edges = torch.device("cpu"), torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    assert attention.positions(4, None, cpu).tolist() == list(range(4 * rank, 4 * rank + 4))
    packed = [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5][4 * rank : 4 * rank + 4]
    assert attention.positions(4, edges, cpu).tolist() == packed


def test_the_mean_of_shares_is_the_loss_and_half_precision_does_not_round_it():
    logits, targets = torch.randn(2, 300, 64).bfloat16() * 4, torch.randint(64, (2, 300))
    targets[0, 5:9] = -100
    odds = logits.double().log_softmax(-1)
    kept = [(b, t) for b in range(2) for t in range(300) if targets[b, t] >= 0]
    want = -float(sum(odds[b, t, targets[b, t]] for b, t in kept)) / len(kept)
    parts = [
        sharded_loss(x, y, 4, len(kept))
        for x, y in zip(logits.chunk(4, 1), targets.chunk(4, 1), strict=True)
    ]
    assert parts[0].dtype == torch.float32
    assert float(sum(parts)) / 4 == pytest.approx(want, rel=1e-5)


def test_blocks_of_a_sequence_that_begins_within_a_rank(monkeypatch):
    """The second sequence begins at token 4: rank 1's own blocks are 2 to 5 of it."""
    messages, edges = Messages(monkeypatch), (0, 4, 16)
    ids = [[[0]] * 8, [[1, 2], [1, 2], [1, 3], [1, 3], [1, 4], [1, 4], [1, 5], [1, 5]]]
    made, tensors, _, wanted, ask = chosen(messages, 2, 8, ids, edges)
    monkeypatch.setattr(spreading, "exchange", ask)
    none = torch.zeros(0, dtype=torch.int64)
    messages.sent = {0: [[none]] * 2, 1: [[torch.tensor([1])], [none]]}
    found = each(messages, 2, lambda r: choose_blocks(None, made[r], 2, tensors[r], force=True))
    assert wanted == [[[], []], [[1], []]] and found[1].first_own == 2 and found[1].ahead == 2
    local = found[1].local_ids(tensors[1])[0, :, 0].tolist()
    assert local == [[0, i] for i in (1, 1, 2, 2, 3, 3, 4, 4)]
    monkeypatch.setattr(spreading, "exchange", messages.exchange)
    x = torch.arange(16.0).view(1, 16, 1, 1)
    own = [x[:, :8], x[:, 8:]]
    pending = each(messages, 2, lambda r: found[r].fetch([own[r]], "blocks"))
    rows = found[1].assemble(pending[1], [own[1]])[0].flatten().tolist()
    assert rows == [6, 7, *range(8, 16)]
