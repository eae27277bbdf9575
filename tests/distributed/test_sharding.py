"""DTensors through every op: whatever the placements, results equal the whole's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from nsa_neuron.distributed.sharding import heads_split, shardings
from nsa_neuron.ops import OPS, get

PLACEMENTS = {"batch": Shard(0), "tokens": Shard(1), "heads": Shard(2), "all": Replicate()}


def call_of(name):
    """Arguments of a call of an op by name, from the first of its cases, with 2 x 4 heads."""
    spec = get(name)
    special = {"compress": "mlp", "compress_backward": "mlp", "decode": "two_sequences"}
    case = next(
        c for c in spec.cases if (c.name == special[name] if name in special else c.lengths is None)
    )
    sizes = {**case.sizes, "B": 2}
    sizes |= {"Hkv": 4} | ({"Hq": 8} if "Hq" in sizes else {})
    return spec, spec.arguments(replace(case, sizes=sizes), torch.float64)


def run(spec, values):
    op = getattr(torch.ops.nsa, spec.name).default
    results = op(**values)
    return results if isinstance(results, tuple) else (results,)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)


def check_op(name, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape)
    spec, values = call_of(name)
    whole = run(spec, values)
    tensors = {arg.name: values[arg.name] for arg in spec.tensors if values[arg.name] is not None}
    rules = shardings(spec, {k: distribute_tensor(x, mesh)._spec for k, x in tensors.items()})
    for wanted in itertools.product(PLACEMENTS.values(), repeat=len(mesh_shape)):
        placed = dict(values)
        for key, x in tensors.items():
            fits = [
                p if isinstance(p, Replicate) or p.dim < x.dim() else Replicate() for p in wanted
            ]
            placed[key] = distribute_tensor(x, mesh, fits)
        for got, want in zip(run(spec, placed), whole, strict=True):
            assert isinstance(got, DTensor)
            close(got.full_tensor(), want)
    return len(rules)


def check_rules_keep_shards(name):
    """Inputs placed as a rule says are not moved, and results are as the rule says."""
    mesh = init_device_mesh("cpu", (2,))
    spec, values = call_of(name)
    whole = run(spec, values)
    names = [arg.name for arg in spec.tensors if values[arg.name] is not None]
    given = {k: distribute_tensor(values[k], mesh)._spec for k in names}
    moved = []
    for outputs, inputs in shardings(spec, given):
        placed = dict(values)
        for key, placement in zip(names, inputs, strict=True):
            placed[key] = distribute_tensor(values[key], mesh, [placement])
        results = run(spec, placed)
        for got, want, placement in zip(results, whole, outputs, strict=True):
            moved += [(spec.name, got.placements, placement)] * (got.placements != (placement,))
            close(got.full_tensor(), want)
    assert moved == []
    return len(shardings(spec, given))


def check_gradients(mesh_shape, placement):
    mesh = init_device_mesh("cpu", mesh_shape)
    spec, values = call_of("nsa_attention")
    leaves = [arg.name for arg in spec.tensors if arg.differentiable]
    for key in leaves:
        values[key] = values[key].requires_grad_()
    o = run(spec, values)[0]
    weight = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
    whole = torch.autograd.grad((o * weight).sum(), [values[key] for key in leaves])
    placed = dict(values)
    for key in leaves:
        placed[key] = distribute_tensor(values[key].detach(), mesh, placement).requires_grad_()
    out = run(spec, placed)[0]
    assert out.placements == tuple(placement)
    loss = (out * distribute_tensor(weight, mesh, placement)).sum()
    for got, want in zip(
        torch.autograd.grad(loss, [placed[key] for key in leaves]), whole, strict=True
    ):
        close(got.full_tensor(), want)


def check_uneven_heads():
    """3 kv heads on 2 ranks: torch would put query heads away from their kv head."""
    mesh = init_device_mesh("cpu", (2,))
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, h, 4, generator=gen, dtype=torch.float64) for h in (6, 3, 3))
    want = torch.ops.nsa.attention(q, k, v)[0]
    got = torch.ops.nsa.attention(*(distribute_tensor(x, mesh, [Shard(2)]) for x in (q, k, v)))[0]
    assert got.placements == (Replicate(),)
    close(got.full_tensor(), want)


def check_partial_and_packed():
    mesh = init_device_mesh("cpu", (2,))
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, 2, 4, generator=gen, dtype=torch.float64) for _ in range(3))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    want = torch.ops.nsa.sliding_window_attention(q, k, v, cu, cu, window=3)[0]
    half = DTensor.from_local(q / 2, mesh, [Partial()])
    placed = [distribute_tensor(x, mesh, [Shard(0)]) for x in (k, v)]
    edges = distribute_tensor(cu, mesh)
    got = torch.ops.nsa.sliding_window_attention(half, *placed, edges, edges, window=3)[0]
    close(got.full_tensor(), want)


@pytest.mark.parametrize("name", [spec.name for spec in OPS])
def test_every_op_with_every_placement_on_two_ranks(two, name):
    two(check_op, name, (2,))


@pytest.mark.parametrize("name", [spec.name for spec in OPS])
def test_rules_move_nothing_that_lies_as_they_say(two, name):
    assert two(check_rules_keep_shards, name) == [3, 3]  # replicas, batch, heads


@pytest.mark.parametrize(
    "placement", [(Shard(0), Shard(2)), (Shard(2), Shard(2)), (Replicate(), Shard(0))], ids=str
)
def test_gradients_on_a_mesh_of_two_dimensions(four, placement):
    four(check_gradients, (2, 2), placement)


@pytest.mark.parametrize("name", ["nsa_attention_backward", "compress_backward", "decode"])
def test_placements_of_two_mesh_dimensions(four, name):
    four(check_op, name, (2, 2))


def test_heads_that_do_not_divide_are_replicated(two):
    two(check_uneven_heads)


def test_partial_and_packed_inputs_are_redistributed(two):
    two(check_partial_and_packed)


def test_heads_are_split_only_where_groups_stay_whole():
    assert heads_split({"Hq": 8, "Hkv": 2}, (4, 2))
    assert heads_split({"Hq": 8, "Hkv": 4}, (2, 2))
    assert not heads_split({"Hq": 12, "Hkv": 6}, (2, 2))
    assert not heads_split({"Hq": 6, "Hkv": 3}, (2,))
    assert heads_split({"Hq": 6, "Hkv": 3}, (3,))
    assert heads_split({"Hq": 5}, (2,))
    assert not heads_split({"D": 5}, (2,))
