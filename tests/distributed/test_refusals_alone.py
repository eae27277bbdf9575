"""Refusals of meshes, models and calls, on ranks that exist in name only: nothing is exchanged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from nsa_neuron.distributed import context_parallel, exchange, shard_tokens, tensor_parallel
from nsa_neuron.distributed.context_parallel import RankAttention, group_of, shard
from nsa_neuron.distributed.decode_step import LayerStep, Shared
from nsa_neuron.distributed.decoding import ContextCache
from nsa_neuron.distributed.parallelism import Parallelism
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn import ByteLanguageModel, NsaConfig

SIZES = {
    "dim": 16, "heads": 8, "kv_heads": 2, "dk": 8, "dv": 6, "block": 8, "stride": 4,
    "select_block": 16, "num_selected": 4, "window": 12,
}  # fmt: skip


def model(kinds=("nsa", "window"), **changes):
    torch.manual_seed(0)
    return ByteLanguageModel(NsaConfig(**{**SIZES, **changes}), kinds)


@pytest.fixture
def four():
    """Rank 0 of four, none of which answers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        yield init_device_mesh("cpu", (4,))
    finally:
        dist.destroy_process_group()


def refused(argument, call, *args, **more):
    with pytest.raises(InvalidArgument) as caught:
        call(*args, **more)
    assert caught.value.argument == argument
    return str(caught.value)


def test_meshes_of_one_dimension_only(four):
    plane = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    net, tokens = model(), torch.zeros(1, 64, dtype=torch.int64)
    for name, call in (
        ("context_parallel", lambda: context_parallel(net, plane)),
        ("tensor_parallel", lambda: tensor_parallel(net, plane)),
        ("shard", lambda: shard_tokens(tokens, plane)),
    ):
        text = refused("mesh", call)
        assert text.startswith(f"{name}: ") and "of 2 dimensions; it must be of one" in text
    assert all(block.attention.parallel is None for block in net.blocks)
    assert group_of(init_device_mesh("cpu", (4,)), "x").size() == 4


def test_models_that_cannot_be_spread(four):
    for spread in (context_parallel, tensor_parallel):
        assert "without attention layers" in refused("model", spread, nn.Linear(2, 2), four)
    text = refused("fetch", context_parallel, model(), four, "guess")
    assert "it must be one of auto, gather, blocks" in text
    net = model(phi_per_head=True)
    text = refused("mesh", tensor_parallel, net, four)
    assert "of 4 ranks; it must be at most kv_heads = 2 with phi_per_head" in text
    assert not any(isinstance(p, DTensor) for p in net.parameters())
    for name in ("gather", "blocks", "auto"):
        context_parallel(net, four, name)
        assert [block.attention.parallel.fetch for block in net.blocks] == [name] * 2
    assert net.blocks[0].attention.parallel.context.size() == 4


@pytest.mark.parametrize("dim", [0, 1])
def test_tokens_are_cut_into_equal_parts(four, dim):
    x = torch.arange(16 * 12).view(16, 12)
    assert torch.equal(shard(x, four, dim), x[:4] if dim == 0 else x[:, :3])
    text = refused("x", shard, x[:6, :6], four, dim)
    assert "6 tokens long; it must be a multiple of the 4 ranks; pad it" in text


def test_positions_of_the_tokens_of_a_rank(four):
    place = RankAttention(context=dist.group.WORLD)
    assert (place.rank, place.world, place.names[1]) == (0, 4, "") and place.names[0]
    assert place.positions(3, None, torch.device("cpu")).tolist() == [0, 1, 2]
    edges = torch.tensor([0, 2, 12], dtype=torch.int32)
    assert place.positions(3, edges, torch.device("cpu")).tolist() == [0, 1, 0]
    alone = RankAttention()
    assert (alone.rank, alone.world, alone.names) == (0, 1, ("", ""))


def test_meshes_of_as_many_ranks_as_run(four):
    mesh = Parallelism(pp=1, dp=2, cp=2, tp=1).mesh()
    assert mesh.mesh_dim_names == ("pp", "dp", "cp", "tp") and mesh.shape == (1, 2, 2, 1)
    assert mesh.mesh.flatten().tolist() == [0, 1, 2, 3]  # the last dimension's ranks are neighbours
    text = refused("mesh", Parallelism(pp=3, tp=2).mesh)
    assert "pp 3 x dp 1 x cp 1 x tp 2 = 6 ranks; it must be 4 ranks, as many as run" in text


def test_more_ranks_than_whole_heads():
    """A projection that was cut within a kv head is found before anything is attended to."""
    layer = model(("full",)).blocks[0].attention
    layer.kv = nn.Linear(16, 14 + 7)
    text = refused("kv", layer, torch.zeros(1, 3, 16))
    assert "21 columns on this rank; it must be whole heads, multiples of 14" in text


def test_a_cache_takes_a_prompt_and_then_single_tokens():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        cache = ContextCache(model().eval(), init_device_mesh("cpu", (1,)))
        tokens = torch.arange(30)[None]
        assert "behind a prefill" in refused("tokens", cache.step, tokens[:, :1])
        assert cache.nbytes == 0
        cache.prefill(tokens)
        for wrong in (tokens[:, :2], tokens[:, :0]):
            assert "one token per sequence" in refused("tokens", cache.step, wrong)
        assert "30 tokens long; it must be empty" in refused("cache", cache.prefill, tokens)
        assert cache.tokens == 30
    finally:
        dist.destroy_process_group()


def test_a_step_has_the_tokens_of_its_positions():
    shared = Shared(None, 9, torch.tensor([8]), torch.tensor([0]), True)
    step = LayerStep(shared, SimpleNamespace(config=NsaConfig(**SIZES)), False, {})
    step.check(torch.zeros(2, 1, 16))
    text = refused("x", step.check, torch.zeros(2, 3, 16))
    assert "3 tokens long; it must be 1 tokens long" in text


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("asked", ["", "1"])
def test_calls_are_compared_where_it_waits_for_no_device(device, asked, monkeypatch):
    told = []
    monkeypatch.setattr(exchange, "_compare", lambda *a: told.append(a))
    monkeypatch.setenv("NSA_CHECK_VALUES", asked)
    with exchange.agreed([None, "a", "b"], torch.empty(1, device=device)) as say:
        say("right")
    compared = device == "cpu" or asked == "1"
    assert [(g, text, refusal) for g, text, _, refusal in told] == [
        ("a", "right", None), ("b", "right", None)
    ] * compared  # fmt: skip
    told.clear()
    error = InvalidArgument("op", "x", 1, "2")
    with pytest.raises(InvalidArgument), exchange.agreed(["a"], torch.empty(1, device=device)):
        raise error
    assert told == [("a", f"refuses: {error}", torch.device(device), error)] * compared


def test_waiting_has_its_name_in_profiles(monkeypatch):
    named = []
    plain = torch.profiler.record_function
    monkeypatch.setattr(torch.profiler, "record_function", lambda n: named.append(n) or plain(n))

    class Work:
        def wait(self):
            raise RuntimeError("gone")

    x = torch.arange(6)
    for work in (Work(), None):
        pending = exchange.Pending(work, x, x, [[(2, 2)], [], [(1,), (1, 1)]], "halo")
        if work is None:
            got = [[y.tolist() for y in part] for part in pending.wait()]
            assert got == [[[[0, 1], [2, 3]]], [], [[4], [[5]]]]
            continue
        with pytest.raises(exchange.RankFailure) as caught:
            pending.wait()
        assert "the exchange 'halo' failed" in str(caught.value) and "gone" in str(caught.value)
    assert named == ["nsa_distributed::wait"]
