"""Context parallelism on 2 and 4 ranks: outputs and gradients are those of one rank."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from whole import GEOMETRY, LEAVES, gradients, on_one_rank, on_ranks, problem, weight_of

from nsa_neuron import functional as nsa
from nsa_neuron.distributed import context_parallel, shard_tokens, sharded_loss
from nsa_neuron.distributed.exchange import RankFailure, RanksDiffer, counting
from nsa_neuron.distributed.wire import Sizes, received
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn import ByteLanguageModel, NsaConfig
from nsa_neuron.numerics import Budget

CASES = {
    # tokens, edges, what is changed
    "even": (64, None, {}),
    "two_sequences_per_batch": (64, None, {"batch": 2}),
    "window_over_many_ranks": (48, None, {"window": 40}),
    "shards_shorter_than_a_block": (24, None, {}),
    "border_within_a_block": (72, None, {}),
    "odd_shards": (76, None, {}),
    "nothing_complete": (4, None, {}),
    "many_blocks": (160, None, {"num_selected": 3, "num_initial": 0, "num_local": 1}),
    "linear": (64, None, {"method": "linear", "pe": False}),
    "mean_stride_is_block": (64, None, {"method": "mean", "stride": 8}),
    "no_rope": (64, None, {"rope_base": 0.0}),
    "group_of_four": (64, None, {"heads": (4, 1, 8, 8)}),
    "packed": (96, (0, 5, 13, 52, 53, 96), {}),
    "packed_on_borders": (96, (0, 24, 48, 96), {}),
    "packed_aligned": (128, (0, 16, 112, 128), {}),
    "packed_short": (48, (0, 1, 2, 3, 7, 48), {}),
}


def split(changes):
    """Arguments of `problem`, scalars of the call, the rotary base."""
    made = {k: changes[k] for k in ("batch", "heads", "method", "pe") if k in changes}
    scalars = {k: changes.get(k, value) for k, value in GEOMETRY.items()}
    return made, scalars, changes.get("rope_base", 10_000.0)


def assert_near(got, want, name):
    torch.testing.assert_close(
        got, want, rtol=1e-9, atol=1e-9, msg=lambda found: f"{name}: {found}"
    )


def check_equal(name, fetch):
    tokens, edges, changes = CASES[name]
    made, scalars, base = split(changes)
    whole = problem(tokens, **made)
    leaves = [n for n in LEAVES if whole[n] is not None]
    for n in leaves:
        whole[n].requires_grad_()
    want = on_one_rank(whole, scalars, base, edges)
    weight = weight_of(want.detach())
    wanted = gradients(want, weight, [whole[n] for n in leaves])
    rank, count = dist.get_rank(), tokens // dist.get_world_size()
    rows = slice(rank * count, (rank + 1) * count)
    got = on_ranks(whole, scalars, base, edges, fetch)
    assert_near(got, want[:, rows], "o")
    found = gradients(got, weight[:, rows], [whole[n] for n in leaves])
    for n, mine, exact in zip(leaves, found, wanted, strict=True):
        total = mine.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(
            total, exact, rtol=1e-9, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fetch", ["auto", "gather"])
def test_two_ranks_are_one(two, name, fetch):
    two(check_equal, name, fetch)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fetch", ["blocks", "gather"])
def test_four_ranks_are_one(four, name, fetch):
    four(check_equal, name, fetch)


@pytest.mark.parametrize("op", ["context_attention", "context_softmax"])
def test_ops_of_one_rank_are_well_made(op):
    """torch's own checks: schema, fake, autograd registration, AOT dispatch."""
    made, edges = problem(40), torch.tensor([0, 13, 40], dtype=torch.int32)
    if op == "context_softmax":
        args = (made["q"], made["k_win"], made["v_win"], edges, 12, "")
    else:
        args = (*(made[n] for n in LEAVES), edges, *GEOMETRY.values(), 100.0, "", "", "auto")
    for x in args:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.nsa_distributed, op).default, args)


def sent(tokens, fetch, changes):
    """Bytes that this rank sends, forward and backward, by purpose; and the selected ids."""
    made, scalars, base = split(changes)
    whole = problem(tokens, **made)
    leaves = [whole[n].requires_grad_() for n in LEAVES if whole[n] is not None]
    with counting() as counter:
        o = on_ranks(whole, scalars, base, None, fetch)
        gradients(o, weight_of(o.detach()), leaves)
    return dict(counter), _ids(whole, scalars)


@torch.no_grad()
def _ids(whole, scalars):
    """What one rank selects, by the public functions; the encoding is off."""
    place = {name: scalars[name] for name in ("block", "stride")}
    k_cmp, v_cmp = (
        nsa.compress(
            whole[f"{s}_raw"], *(whole[f"{s}_{n}"] for n in ("w1", "b1", "w2", "b2", "pe")),
            method=scalars["method"], **place,
        )
        for s in "kv"
    )  # fmt: skip
    place["kv_len"] = whole["q"].shape[1]
    _, lse = nsa.compressed_attention(whole["q"], k_cmp, v_cmp, **place)
    names = ("select_block", "num_selected", "num_initial", "num_local")
    return nsa.select_blocks(
        whole["q"], k_cmp, lse, **place, **{name: scalars[name] for name in names}
    )


@pytest.mark.parametrize("changes", [{}, {"batch": 2}, {"window": 40}], ids=str)
def test_bytes_are_those_of_the_formula(four, changes):
    tokens, size = 128, 8
    counted = [counter for counter, _ in four(sent, tokens, "gather", changes)]
    _, hkv, dk, dv = (4, 2, 8, 6)
    row = changes.get("batch", 1) * hkv * (dk + dv) * size
    sizes = Sizes(4, tokens // 4, 8, 4, changes.get("window", 12), row)
    for purpose in ("halo", "compressed", "selected"):
        wanted = sum(received(sizes, rank)[purpose] for rank in range(4))
        assert sum(c[purpose] for c in counted) == 2 * wanted > 0
        assert sum(c[f"{purpose} gradients"] for c in counted) == wanted
        returned = [c[f"{purpose} gradients"] for c in counted]
        assert returned == [received(sizes, rank)[purpose] for rank in range(4)]


def test_only_blocks_that_somebody_selected_are_sent(four):
    changes = {"num_selected": 3, "heads": (2, 1, 8, 6), "rope_base": 0.0}
    tokens, m = 256, 16
    found = four(sent, tokens, "blocks", changes)
    ids, remote = found[0][1], []
    for rank in range(4):
        rows = ids[0, rank * tokens // 4 : (rank + 1) * tokens // 4]
        asked = {int(i) for i in rows.flatten() if i >= 0}
        remote.append(len([i for i in asked if i < rank * tokens // 4 // m]))
    row = (8 + 6) * 8
    assert sum(counter["selected"] for counter, _ in found) == 2 * sum(remote) * m * row
    back = [counter["selected gradients"] for counter, _ in found]
    assert back == [count * m * row for count in remote]
    assert 0 < sum(remote) < 6 * tokens // 4 // m  # fewer than gathering all would be


def bytes_by_choice(tokens, changes):
    """Selected rows' bytes of the last rank, for each way to fetch."""
    return {
        fetch: sent(tokens, fetch, changes)[0].get("selected gradients", 0)
        for fetch in ("auto", "blocks", "gather")
    }


def test_auto_takes_what_moves_less(two):
    few = {"num_selected": 3, "num_initial": 1, "num_local": 2, "heads": (2, 1, 8, 6)}
    chosen = two(bytes_by_choice, 256, few)[1]
    assert chosen["auto"] == chosen["blocks"] < chosen["gather"]
    many = {"num_selected": 8, "heads": (2, 1, 8, 6)}
    chosen = two(bytes_by_choice, 128, many)[1]
    assert chosen["auto"] == chosen["gather"] == chosen["blocks"]


def check_refusal(kind):
    rank = dist.get_rank()
    made = problem(64)
    scalars, edges, fetch = dict(GEOMETRY), None, "auto"
    if kind == "window" and rank == 1:
        scalars["window"] = 13
    if kind == "edges":
        edges = (0, 32, 64) if rank == 1 else (0, 33, 64)
    if kind == "bad on one rank" and rank == 1:
        scalars["stride"] = 3
    if kind == "bad on all":
        fetch = "guess"
    if kind == "too short":
        edges = (0, 32, 63)
    if kind == "another dtype" and rank == 1:
        made = {name: x if x is None else x.float() for name, x in made.items()}
    with pytest.raises((RanksDiffer, InvalidArgument)) as error:
        on_ranks(made, scalars, 0.0, edges, fetch)
    return type(error.value).__name__, str(error.value)


@pytest.mark.parametrize("kind", ["window", "edges", "another dtype"])
def test_ranks_that_differ_raise_everywhere(two, kind):
    first, second = two(check_refusal, kind)
    assert first == second and first[0] == "RanksDiffer"
    assert "rank 0" in first[1] and "rank 1" in first[1]


def test_a_rank_that_refuses_its_arguments_does_not_leave_others_waiting(two):
    (kind, text), (own_kind, own) = two(check_refusal, "bad on one rank")
    assert (kind, own_kind) == ("RanksDiffer", "InvalidArgument")
    assert own in text and "stride" in own


@pytest.mark.parametrize("kind", ["bad on all", "too short"])
def test_bad_arguments_raise_everywhere(two, kind):
    assert {kind for kind, _ in two(check_refusal, kind)} == {"InvalidArgument"}


def survive():
    """The others' exchange with a rank that has ended."""
    if dist.get_rank() == 1:
        os._exit(0)
    with pytest.raises(RankFailure, match="another rank has ended") as error:
        on_ranks(problem(64), dict(GEOMETRY), 0.0, None)
    return str(error.value)


def stay_away():
    """A rank that lives and does not come."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=4))
    if dist.get_rank() == 1:
        return
    with pytest.raises(RankFailure, match=r"did not come within.*imed out"):
        on_ranks(problem(64), dict(GEOMETRY), 0.0, None, context=group)


def test_a_rank_that_dies_ends_the_others(tmp_path):
    ranks = Ranks(2, tmp_path)
    try:
        assert "imed out" not in ranks.first(survive)  # at once, not after the group's timeout
    finally:
        ranks.close()


def test_a_rank_that_stays_away_ends_the_others(tmp_path):
    ranks = Ranks(2, tmp_path)
    try:
        ranks(stay_away)
    finally:
        ranks.close()


def check_compiled():
    """A compiled model without graph breaks gives the eager one's loss and gradients."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    geometry = {k: GEOMETRY[k] for k in ("block", "stride", "select_block", "num_selected")}
    config = NsaConfig(dim=16, heads=4, kv_heads=2, dk=8, dv=6, window=12, **geometry)
    net = context_parallel(ByteLanguageModel(config, ("nsa", "window", "full")), mesh)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    own, targets = shard_tokens(tokens, mesh)
    found = []
    for run in (net, compiled):
        net.zero_grad()
        loss = sharded_loss(run(own), targets, 2, 63)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    for eager, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-6)


def test_a_compiled_model_has_no_graph_breaks(two):
    two(check_compiled)


def check_low_precision(dtype):
    """Errors against float64 are within the policy that kernels are held to."""
    rank, tokens = dist.get_rank(), 128
    rows = slice(rank * tokens // 2, (rank + 1) * tokens // 2)
    scalars = {**GEOMETRY, "num_selected": 16}  # all blocks: no choice between near-ties
    low = problem(tokens, dtype=dtype)
    exact = {name: x if x is None else x.double() for name, x in low.items()}
    leaves = [n for n in LEAVES if low[n] is not None]
    for made in (low, exact):
        for n in leaves:
            made[n].requires_grad_()
    oracle, eager = (on_one_rank(made, scalars, 0.0, None) for made in (exact, low))
    weight = weight_of(oracle.detach())
    wanted = gradients(oracle, weight, [exact[n] for n in leaves])
    plain = gradients(eager, weight, [low[n] for n in leaves])
    got = on_ranks(low, scalars, 0.0, None)
    assert Budget()(got, oracle[:, rows], eager[:, rows], {}).ok
    found = gradients(got, weight[:, rows], [low[n] for n in leaves])
    for n, mine, want, own in zip(leaves, found, wanted, plain, strict=True):
        total = mine.float()
        dist.all_reduce(total)
        diff = Budget(roundings=2)(total.to(dtype), want, own, {})  # each rank rounds its part
        assert diff.ok, f"{n}: {diff}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_within_the_policy(two, dtype):
    two(check_low_precision, dtype)
