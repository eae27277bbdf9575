"""What one process can tell: checkpoints, logs, clipping, caches' memory, partial results."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from nsa_neuron import functional as nsa
from nsa_neuron.distributed import counting, decode_step, parallelism, shard_tokens, training
from nsa_neuron.distributed.checkpoint import load, save, steps
from nsa_neuron.distributed.decode_step import LayerStep, Rows, Shared, Tail
from nsa_neuron.distributed.decoding import ContextCache
from nsa_neuron.distributed.exchange import count
from nsa_neuron.distributed.parallelism import Parallelism, parallelize
from nsa_neuron.distributed.pipeline import Stage, stage_indices
from nsa_neuron.distributed.tensor_parallel import check_heads
from nsa_neuron.distributed.training import How, train
from nsa_neuron.errors import InvalidArgument, NsaError, StateMismatch
from nsa_neuron.nn import ByteLanguageModel, NsaConfig
from nsa_neuron.training.corpus import corpus_of
from nsa_neuron.training.tasks import Text

CONFIG = NsaConfig(
    dim=16, heads=4, kv_heads=2, dk=8, dv=6, block=8, stride=4, select_block=16, num_selected=4,
    window=12,
)  # fmt: skip
TASK = Text(corpus_of(text=[bytes(range(256)) * 4] * 3))
HOW = How(steps=5, batch=2, length=32, rate=1e-2, save_every=2)


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(folder, **changes):
    told = []
    how = dataclasses.replace(HOW, **changes)
    losses = train(CONFIG, ("window",), TASK, Parallelism(), how, folder, report=told.append)
    return losses, told


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def test_a_run_that_lost_steps_takes_them_again_and_logs_each_once(alone, tmp_path):
    whole, told = run(tmp_path / "whole")
    assert sorted(steps(tmp_path / "whole")) == [4, 5] and told == log_of(tmp_path / "whole")
    first, _ = run(tmp_path / "parts", steps=3)
    (tmp_path / "parts" / "step-3").rename(tmp_path / "gone")
    rest, _ = run(tmp_path / "parts")
    assert first + rest[1:] == whole and len(rest) == 3
    rows = log_of(tmp_path / "parts")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row, loss in zip(rows, whole, strict=True):
        assert row["loss"] == loss and row["bytes"] == 2 * 32 and row["seconds"] > 0
        assert row["mesh"] == {"pp": 1, "dp": 1, "cp": 1, "tp": 1}
        assert row["context bytes sent"] == 0
    other, _ = run(tmp_path / "other", seed=1)
    assert other[0] != whole[0]


def test_one_rank_trains_as_a_plain_loop(alone, tmp_path):
    """Seeds, targets, mean, clipping and optimizer, written out: other meshes are compared with
    this one only."""
    got, _ = run(tmp_path, seed=3, clip=0.05, rate=0.02, length=16, save_every=3)
    assert sorted(steps(tmp_path)) == [3, 5]
    torch.manual_seed(3)
    net, want = ByteLanguageModel(CONFIG, ("window",)), []
    adam = torch.optim.AdamW(net.parameters(), lr=0.02, betas=(0.9, 0.95))
    for step in range(5):
        gen = torch.Generator().manual_seed(3_000_009 + step)
        tokens = TASK.batch(2, 16, gen).tokens
        odds = net(tokens)[:, :-1].log_softmax(-1)
        loss = -odds.gather(-1, tokens[:, 1:, None]).mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        adam.step()
        want.append(loss.item())
    assert got == pytest.approx(want, rel=1e-5)


def test_a_run_that_diverges_ends(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "sharded_loss", lambda logits, *_: logits.sum() * math.inf)
    with pytest.raises(NsaError, match="lower the learning rate"):
        run(tmp_path)
    assert steps(tmp_path) == []


def test_a_run_s_defaults():
    assert dataclasses.astuple(How()) == (
        100, 4, 256, 3e-3, 1.0, 0, 50, "auto", False, "", "1f1b", 4, True
    )  # fmt: skip


class Pair(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(value)))


def test_the_newest_checkpoints_stay_and_the_newest_is_loaded(alone, tmp_path):
    net = Pair(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    for step in (8, 9, 10, 11):
        net.weight.grad = torch.ones(2)
        optimizer.step()
        at = net.weight.detach().clone()
        assert save(tmp_path, step, [net], [optimizer], {"a": 1}) == tmp_path / f"step-{step}"
    assert sorted(steps(tmp_path)) == [10, 11]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    again = Pair(5)
    fresh = torch.optim.AdamW(again.parameters(), lr=0.5)
    assert load(tmp_path, [again], [fresh], {"a": 1}) == 11
    assert torch.equal(again.weight, at)
    (state,) = fresh.state.values()
    assert float(state["step"]) == 4 and torch.equal(
        state["exp_avg"], next(iter(optimizer.state.values()))["exp_avg"]
    )
    with pytest.raises(StateMismatch, match="its a differ"):
        load(tmp_path, [again], [fresh], {"a": 2})
    assert load(tmp_path / "none", [again], [fresh], {}) == 0
    save(tmp_path / "more", 7, [net], [optimizer], {}, keep=3)
    save(tmp_path / "more", 7, [net], [optimizer], {}, keep=3)  # again: the later one stays
    assert steps(tmp_path / "more") == [7]


@pytest.mark.parametrize(("clip", "clipped"), [(1e-3, True), (1e6, False)])
def test_gradients_have_at_most_the_norm_that_was_asked_for(alone, clip, clipped):
    how = dataclasses.replace(HOW, clip=clip)
    made = training._Run(CONFIG, ("window",), Parallelism(), how, "cpu")
    tokens = TASK.batch(2, 32, torch.Generator().manual_seed(0)).tokens
    made.step(tokens)
    grads = [p.grad for p in made.models[0].parameters()]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert norm == pytest.approx(clip, rel=1e-3) if clipped else 1e-2 < norm < 1e3


def test_replayed_blocks_run_twice_and_give_the_same_gradients(alone):
    mesh, found = Parallelism().mesh(), []
    tokens = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(0))
    for replay in (False, True):
        torch.manual_seed(0)
        net, calls = ByteLanguageModel(CONFIG, ("window",)), []
        parallelize(net, mesh, replay=replay)
        net.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        net(tokens).square().sum().backward()
        assert len(calls) == 1 + replay
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Mesh(dict):
    """Sizes of the dimensions of a mesh."""

    ndim = 1

    def size(self):
        return math.prod(self.values())

    def __getitem__(self, names):
        names = (names,) if isinstance(names, str) else names
        return Mesh({n: self.get(n, 1) for n in names})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", [{"dp": 2}, {"dp": 2, "cp": 1}, {"dp": 1}], ids=str)
def test_parameters_are_sharded_and_gradients_reduced_in_float32(shape, dtype, monkeypatch):
    sharded = []
    monkeypatch.setattr(parallelism, "flatten_mesh", lambda mesh, name: (mesh.size(), name))
    monkeypatch.setattr(
        parallelism, "fully_shard", lambda m, mesh, mp_policy: sharded.append((m, mesh, mp_policy))
    )
    net = ByteLanguageModel(CONFIG, ("window", "nsa"))
    assert parallelize(net, Mesh(shape), dtype=dtype) is net
    if Mesh(shape).size() == 1:
        assert sharded == []
        return
    assert [m for m, _, _ in sharded] == [*net.blocks, net]
    for _, mesh, policy in sharded:
        assert mesh == (2, "dp_cp") and policy.param_dtype == dtype
        assert policy.reduce_dtype == (torch.float32 if dtype else None)


def test_next_tokens_of_packed_sequences(alone):
    mesh = init_device_mesh("cpu", (1,))
    tokens = torch.arange(10, 20)[None]
    own, after = shard_tokens(tokens, mesh)
    assert torch.equal(own, tokens) and after.tolist() == [[*range(11, 20), -100]]
    edges = torch.tensor([0, 1, 4, 10], dtype=torch.int32)
    _, after = shard_tokens(tokens, mesh, edges)
    assert after.tolist() == [[-100, 12, 13, -100, *range(15, 20), -100]]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "fits"),
    [(8, 4, 2, True), (8, 4, 8, True), (8, 2, 4, True), (6, 3, 2, False), (12, 3, 4, False),
     (12, 3, 6, True), (8, 4, 3, False), (12, 6, 3, True), (12, 4, 6, False), (4, 1, 4, True),
     (12, 2, 3, False)],
)  # fmt: skip
def test_heads_that_can_be_spread(heads, kv_heads, ranks, fits):
    config = NsaConfig(dim=8, heads=heads, kv_heads=kv_heads, dk=4, dv=4)
    if fits:
        check_heads(config, ranks)
    else:
        with pytest.raises(InvalidArgument, match="tensor_parallel: argument 'mesh' is"):
            check_heads(config, ranks)


def test_stages_hold_every_block_once_and_its_ends():
    net = ByteLanguageModel(CONFIG, ("window",) * 5)
    for count_ in (1, 2, 3, 5):
        stages = [Stage(net, i, count_) for i in range(count_)]
        held = [int(name) for stage in stages for name in stage.blocks]
        assert held == [0, 1, 2, 3, 4]
        assert [s.embedding is not None for s in stages] == [i == 0 for i in range(count_)]
        assert [s.head is not None for s in stages] == [i == count_ - 1 for i in range(count_)]
        x = tokens = torch.randint(256, (1, 9))
        for stage in stages:
            x = stage(x)
        torch.testing.assert_close(x, net(tokens))
    with pytest.raises(InvalidArgument, match="at most the 5 blocks"):
        Stage(net, 0, 6)
    assert [stage_indices("zbv", r, 3) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert [stage_indices("1f1b", r, 3) for r in range(3)] == [[0], [1], [2]]


def test_parallelism_counts_its_ranks(alone):
    made = Parallelism(2, 3, 5, 7)
    assert (made.ranks, made.averaging) == (210, 15)
    for name in ("pp", "dp", "cp", "tp"):
        with pytest.raises(InvalidArgument) as caught:
            Parallelism(**{name: 0})
        assert caught.value.argument == name
    with pytest.raises(InvalidArgument, match="pp 1 x dp 1 x cp 2 x tp 1 = 2 ranks; it must be 1"):
        Parallelism(cp=2).mesh()


@pytest.mark.parametrize(
    ("mesh", "changes", "argument"),
    [
        (Parallelism(dp=2), {"batch": 3}, "batch"),
        (Parallelism(pp=2), {"batch": 6}, "batch"),
        (Parallelism(cp=3), {}, "length"),
        (Parallelism(tp=3), {}, "length"),
        (Parallelism(cp=2, tp=2), {"length": 34}, "length"),
        (Parallelism(tp=3), {"sequence": False}, None),
        (Parallelism(dp=2), {}, None),
        (Parallelism(pp=2), {"batch": 8}, None),
        (Parallelism(cp=2, tp=2), {}, None),
    ],
    ids=str,
)
def test_what_a_mesh_divides(mesh, changes, argument):
    how = dataclasses.replace(HOW, **changes)
    if argument is None:
        training._check(mesh, how)
        return
    with pytest.raises(InvalidArgument) as caught:
        training._check(mesh, how)
    assert caught.value.argument == argument


def test_counters_count_while_they_are_open():
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    with counting() as outer:
        count("a", x)
        with counting() as inner:
            count("a", x, 3)
            count("b", x.double())
        count("b", x)
    count("a", x)
    assert dict(outer) == {"a": 4 * 30, "b": 120 + 30} and dict(inner) == {"a": 90, "b": 120}


def pair(rows, first=0):
    k = torch.arange(first, first + rows, dtype=torch.float32).view(1, -1, 1, 1)
    return k.clone(), -k


def values(rows, count_):
    k, v = rows.last(count_)
    assert torch.equal(k, -v)
    return k.flatten().tolist()


def test_rows_grow_by_an_eighth_and_give_their_last():
    rows = Rows(pair(3))
    assert values(rows, 9) == [0, 1, 2] and values(rows, 2) == [1, 2] and rows.nbytes == 3 * 8
    rows.append(pair(2, 3))
    assert values(rows, 5) == [0, 1, 2, 3, 4] and rows.nbytes == (5 + 32) * 8
    room = rows.nbytes
    for i in range(5, 37):
        rows.append(pair(1, i))
        assert rows.nbytes == room
    rows.append(pair(1, 37))
    assert rows.nbytes == (38 + 32) * 8 and values(rows, 38) == list(range(38))
    large = Rows(pair(800))
    large.append(pair(1, 800))
    assert large.nbytes == (801 + 100) * 8


def test_a_tail_keeps_what_is_needed_and_not_much_more():
    tail = Tail(pair(3), 5)
    for i in range(3, 400):
        tail.append(pair(1, i))
        assert values(tail, 5) == list(range(max(0, i - 4), i + 1))
        assert tail.count <= 10 and tail.nbytes <= (10 + 32) * 8


def step_of(ranks=None, own=(), tokens=40, writes=True, rows=None):
    layer = SimpleNamespace(config=CONFIG)
    shared = Shared(ranks, tokens, torch.tensor([tokens - 1]), torch.tensor(own), writes)
    return LayerStep(shared, layer, False, rows or {})


def test_chosen_blocks_are_found_among_the_own_ones():
    ids = torch.tensor([[[[0, 2, 5, -1], [2, 3, 6, 9]]]], dtype=torch.int32)
    assert step_of(own=[0, 3, 5, 6])._own_ids(ids).tolist() == [[[[0, 2, -1, -1], [1, 3, -1, -1]]]]
    assert step_of(own=[9])._own_ids(ids).tolist() == [[[[-1] * 4, [0, -1, -1, -1]]]]
    assert step_of()._own_ids(ids).tolist() == [[[[-1] * 4] * 2]]
    assert step_of(own=[0])._own_ids(ids).dtype == torch.int32


def test_a_block_is_complete_with_its_last_token():
    ends = {n: step_of(tokens=n).block_ends.tolist() for n in range(5, 21)}
    assert {n: found for n, found in ends.items() if found} == {
        8: [7],
        12: [11],
        16: [15],
        20: [19],
    }
    rows = {"cmp": Rows(pair(30))}
    assert step_of(tokens=12, rows=rows).unfinished()[0].shape[1] == 8
    assert step_of(tokens=13, rows=rows).unfinished()[0].shape[1] == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [(10, 30), (40, 0), (0, 40), (13, 7, 20)], ids=str)
def test_parts_of_a_softmax_together_are_the_whole(parts, dtype, monkeypatch):
    """Of the keys of each rank; one without keys has no weight, and logits may be large."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 8, generator=gen, dtype=torch.float64).to(dtype) * 4
               for n, h in ((1, 4), (40, 2), (40, 2)))  # fmt: skip
    want, _ = nsa.attention(q.double(), k.double(), v.double())
    sent = []

    def collect(ranks, x, purpose):
        sent.append(x)
        raise InterruptedError

    monkeypatch.setattr(decode_step, "gather", collect)
    rows = zip(k.split(parts, 1), v.split(parts, 1), strict=True)
    steps_ = [step_of("ranks", rows={"slc": Rows(one)}) for one in rows]
    attend = lambda k, v: nsa.attention(q, k, v)  # noqa: E731
    for one in steps_:
        with pytest.raises(InterruptedError):
            one._together(q, attend)
    assert all(x.shape == (2, 1, 4, 8 + 1) for x in sent)
    monkeypatch.setattr(decode_step, "gather", lambda *_: sent)
    got = steps_[0]._together(q, attend)
    assert got.dtype == dtype
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(got.double(), want, **close)


def test_a_normaliser_is_not_rounded_to_half_precision(monkeypatch):
    """Two ranks whose lse are 256.25 and 256.75: bfloat16 has neither."""
    q = torch.zeros(1, 1, 1, 1).bfloat16()
    one, two = torch.tensor(256.25), torch.tensor(256.75)
    sent = []
    monkeypatch.setattr(decode_step, "gather", lambda r, x, p: sent.append(x) or sent)
    step = step_of("ranks", rows={"slc": Rows(pair(1))})
    for o, lse in ((0.0, one), (1.0, two)):
        got = step._together(
            q, lambda k, v, o=o, lse=lse: (q + o, lse.view(1, 1, 1))
        )  # fmt: skip
    want = 1 / (1 + math.exp(-0.5))
    assert float(got) == pytest.approx(want, abs=0.003)


def test_new_blocks_go_to_the_rank_with_the_fewest(monkeypatch):
    """Two ranks that read 5 blocks, 3 and 2 of them: the next ones go to 1, 0, 1."""
    net = ByteLanguageModel(CONFIG, ("window",)).eval()
    for rank in range(2):
        cache = ContextCache.__new__(ContextCache)
        cache.model, cache.ranks, cache.place = net, None, (rank, 2)
        cache.layers, cache.tokens = [b.attention for b in net.blocks], 80
        cache._owners, cache._rows = [0, 0, 0, 1, 1], [{}]
        writes = []

        def hidden(tokens, given, writes=writes, net=net):
            (layer,) = given.layers
            writes.append((layer.shared.writes, layer.shared.own.tolist()))
            return torch.zeros(*tokens.shape, 16)

        monkeypatch.setattr(net, "hidden", hidden)
        for _ in range(33):
            cache.step(torch.zeros(1, 1, dtype=torch.int64))
        assert cache._owners == [0, 0, 0, 1, 1, 1, 0, 1] and cache.tokens == 113
        mine = [[0, 1, 2], [0, 1, 2, 6], [0, 1, 2, 6]], [[3, 4, 5], [3, 4, 5], [3, 4, 5, 7]]
        assert [own for _, own in writes[::16]] == mine[rank]
        assert [w for w, _ in writes] == [r == rank for r in [1] * 16 + [0] * 16 + [1]]
