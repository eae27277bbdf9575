"""Models that are spread by heads, by tokens, or both, against the same model on one rank."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nsa_neuron.distributed import context_parallel, shard_tokens, sharded_loss, tensor_parallel
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn import ByteLanguageModel, NsaConfig
from nsa_neuron.records import recording
from nsa_neuron.registry import use_backend

# 64 tokens have 8 blocks, of which 3 are forced: one is chosen among the others.
GEOMETRY = {"block": 8, "stride": 4, "select_block": 8, "num_selected": 4, "window": 12}
SIZES = {"dim": 16, "heads": 8, "kv_heads": 4, "dk": 8, "dv": 6, **GEOMETRY}


def model(kinds=("nsa", "window", "full"), **changes):
    """In which heads differ enough for each to have its say in which blocks are selected."""
    torch.manual_seed(0)
    net = ByteLanguageModel(NsaConfig(**{**SIZES, **changes}), kinds).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("q.weight"):
                p.mul_(torch.linspace(1, 30, len(p))[:, None])
    return net


def bytes_of(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def check_training(
    shape, changes, edges=None, kinds=("nsa", "window", "full"), batch=2, spread_states=False
):
    """Loss and gradients of a mesh (cp, tp) are those of one rank."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("cp", "tp"))
    cu = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    tokens = bytes_of(1 if edges else batch, 64 if edges is None else edges[-1])
    whole = model(kinds, **changes)
    spread = copy.deepcopy(whole)
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    if cu is not None:
        targets[:, cu[1:].long() - 1] = -100
    counted = int((targets >= 0).sum())
    want = sharded_loss(whole(tokens, cu_seqlens=cu), targets, 1, counted)
    want.backward()
    tensor_parallel(spread, mesh["tp"], sequence=spread_states, whole_logits=not spread_states)
    context_parallel(spread, mesh["cp"])
    own, next_ones = shard_tokens(tokens, mesh["cp"], cu)
    logits = spread(own, cu_seqlens=cu)
    if spread_states:
        assert logits.shape[-1] == 256 // shape[1]
    vocabulary = mesh["tp"] if spread_states else None
    loss = sharded_loss(logits, next_ones, shape[0], counted, vocabulary)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh["cp"].get_group())
    torch.testing.assert_close(total / shape[0], want.detach(), rtol=1e-9, atol=1e-9)
    named = dict(whole.named_parameters())
    for name, p in spread.named_parameters():
        if isinstance(p, DTensor):  # summed already: no later use of it has to
            assert not any(x.is_partial() for x in p.grad.placements), name
        grad = full(p.grad).clone()
        dist.all_reduce(grad, group=mesh["cp"].get_group())
        torch.testing.assert_close(
            grad / shape[0], named[name].grad, rtol=1e-8, atol=1e-9,
            msg=lambda found, name=name: f"{name}: {found}",
        )  # fmt: skip
    assert all(isinstance(p, DTensor) for p in spread.parameters()) == (shape[1] > 1)


def check_generation(changes):
    """A spread model writes what the whole one writes, token by token through its cache."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = model(("nsa", "nsa"), **changes).eval()
    spread = tensor_parallel(copy.deepcopy(whole), mesh)
    prompt = bytes_of(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(spread(prompt), whole(prompt), rtol=1e-9, atol=1e-9)
    want, got = (_greedy(net, prompt, 12) for net in (whole, spread))
    assert torch.equal(want, got)


@torch.no_grad()
def _greedy(net, prompt, count):
    cache = net.new_cache(1, 64)
    tokens, found = prompt, []
    for _ in range(count):
        with cache.step(tokens.shape[1]) as step:
            logits = net(tokens, step, last=1)
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        found.append(tokens)
    return torch.cat(found, 1)


@torch.no_grad()
def check_cores():
    """Each rank, as a core of a Trainium, decodes its own kv heads by the NKI kernels."""
    mesh, tokens = init_device_mesh("cpu", (dist.get_world_size(),)), bytes_of(1, 42)
    whole = model(("nsa",)).float().eval()
    want = whole(tokens)
    spread = tensor_parallel(copy.deepcopy(whole), mesh)
    cache, at = spread.new_cache(1, 64), 0
    for count in (40, 1, 1):
        with use_backend("neuron", "sim"), recording() as runs, cache.step(count) as step:
            got = spread(tokens[:, at : at + count], step)
        at += count
        torch.testing.assert_close(got, want[:, at - count : at], rtol=1e-4, atol=1e-4)
    assert runs and cache.layers[0]["slc"][0].shape[2] == 4 // dist.get_world_size()


def check_refused(changes):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(InvalidArgument, match="a divisor"):
        tensor_parallel(model(**changes), mesh)


CHANGES = {
    "heads": {},
    "shared_kv": {"shared_kv": True},
    "more_ranks_than_kv_heads": {"kv_heads": 1},
    "before_linear": {"rope": "before", "phi": "linear"},
    "mean": {"phi": "mean", "kv_heads": 2},
    "phi_per_head": {"phi_per_head": True},
    "norms_and_biases": {"qk_norm": 1e-6, "qkv_bias": True},
    "norms_and_biases_of_one_kv_head": {"qk_norm": 1e-6, "qkv_bias": True, "kv_heads": 1},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("shape", [(1, 2), (2, 1)], ids=["tp", "cp"])
def test_two_ranks_train_as_one(two, name, shape):
    two(check_training, shape, CHANGES[name])


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1}, {"kv_heads": 2}], ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (4, 1)], ids=str)
def test_four_ranks_train_as_one(four, changes, shape):
    four(check_training, shape, changes)


def test_packed_sequences_on_a_mesh(four):
    four(check_training, (2, 2), {}, (0, 11, 50, 96))


@pytest.mark.parametrize("name", CHANGES)
def test_states_spread_by_tokens_train_as_one(two, name):
    two(check_training, (1, 2), CHANGES[name], None, ("nsa", "window", "full"), 2, True)


@pytest.mark.parametrize("edges", [None, (0, 11, 50, 96)], ids=["even", "packed"])
@pytest.mark.parametrize("shape", [(1, 4), (2, 2)], ids=str)
def test_states_spread_over_four_ranks_train_as_one(four, shape, edges):
    four(check_training, shape, {"kv_heads": 2}, edges, ("nsa", "full"), 2, True)


def check_spread_states_are_refused():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = tensor_parallel(model(("nsa",)), mesh, sequence=True)
    with pytest.raises(InvalidArgument, match="'tokens' is 63 long"):
        net(bytes_of(1, 63))
    with pytest.raises(InvalidArgument, match="'last' is given"):
        net(bytes_of(1, 64), last=1)
    with pytest.raises(InvalidArgument, match="'step' is given"), torch.no_grad():
        _greedy(net, bytes_of(1, 64), 1)
    net(bytes_of(1, 64))  # nothing was left half done


def test_tokens_that_cannot_be_spread_are_refused(two):
    two(check_spread_states_are_refused)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1}], ids=str)
def test_generation_with_tensor_parallelism(two, changes):
    two(check_generation, changes)


def test_cores_decode_their_own_heads(two):
    two(check_cores)


def test_generation_with_more_ranks_than_kv_heads(four):
    four(check_generation, {"kv_heads": 2})


@pytest.mark.parametrize("changes", [{"heads": 9, "kv_heads": 3}, {"heads": 9, "kv_heads": 1}])
def test_heads_that_do_not_divide_are_refused(two, changes):
    two(check_refused, changes)
