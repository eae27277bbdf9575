"""Rules 1 to 10 of the contract, each against the loops of `naive_nsa` (float64)."""

from __future__ import annotations

import math

import pytest
import torch
from naive_nsa import (
    attend,
    causal,
    chosen,
    complete,
    compress,
    gated,
    gelu,
    importance,
    select,
    windowed,
)
from torch import Tensor

import nsa_neuron as nsa
from nsa_neuron.ops.select_blocks import ranked_scores

# (l, d, m): the defaults scaled down, l = d, l = d = m, a ratio of three, l < m with odd strides
GEOMETRIES = [(4, 2, 8), (8, 4, 16), (4, 4, 8), (8, 8, 8), (6, 2, 8), (9, 3, 12), (2, 1, 3)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def qkv(seed: int, s: int, t: int, hq: int, hkv: int, dk: int = 3, dv: int = 2) -> list[Tensor]:
    return [normal(seed, s, hq, dk), normal(seed + 1, t, hkv, dk), normal(seed + 2, t, hkv, dv)]


def batched(*tensors: Tensor) -> list[Tensor]:
    return [x[None] for x in tensors]


@pytest.mark.parametrize(("l", "d", "m"), GEOMETRIES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 29])
def test_rule_1_mean_of_complete_blocks(l: int, d: int, m: int, tokens: int) -> None:
    x, pe = normal(1, tokens, 2, 3), normal(2, l, 3)
    same(
        nsa.compress(x[None], method="mean", block=l, stride=d)[0],
        compress(x, lambda b, h: b.mean(0), l, d),
    )
    same(
        nsa.compress(x[None], pe=pe, method="mean", block=l, stride=d)[0],
        compress(x, lambda b, h: (b + pe).mean(0), l, d),
    )


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rule_1_linear(per_head: bool, bias: bool) -> None:
    l, d, dim, heads = 4, 2, 3, 2
    lead = (heads,) if per_head else ()
    x, w1 = normal(1, 13, heads, dim), normal(2, *lead, l * dim, dim)
    pe, b1 = normal(3, *lead, l, dim), normal(4, *lead, dim) if bias else None

    def of(w: Tensor | None, h: int) -> Tensor | float:
        return 0.0 if w is None else w[h] if per_head else w

    wanted = compress(x, lambda b, h: (b + of(pe, h)).flatten() @ of(w1, h) + of(b1, h), l, d)
    got = nsa.compress(x[None], w1, b1, pe=pe, method="linear", block=l, stride=d)
    same(got[0], wanted)


@pytest.mark.parametrize("per_head", [False, True])
def test_rule_1_mlp_with_intra_block_position(per_head: bool) -> None:
    l, d, dim, hidden, heads = 4, 2, 3, 5, 2
    lead = (heads,) if per_head else ()
    x = normal(1, 13, heads, dim)
    shapes = ((l * dim, hidden), (hidden,), (hidden, dim), (dim,), (l, dim))
    weights = [normal(seed, *lead, *shape) for seed, shape in enumerate(shapes, 2)]

    def phi(b: Tensor, h: int) -> Tensor:
        w1, b1, w2, b2, pe = (w[h] if per_head else w for w in weights)
        return gelu((b + pe).flatten() @ w1 + b1) @ w2 + b2

    got = nsa.compress(x[None], *weights, method="mlp", block=l, stride=d)
    same(got[0], compress(x, phi, l, d))


def test_rule_1_keys_and_values_have_their_own_phi() -> None:
    """Compression of one tensor depends on its own weights only."""
    x, a, b = normal(1, 9, 1, 3), normal(2, 12, 3), normal(3, 12, 3)
    with_a, with_b = (nsa.compress(x[None], w, method="linear", block=4, stride=2) for w in (a, b))
    assert not torch.allclose(with_a, with_b)


@pytest.mark.parametrize(("l", "d", "m"), GEOMETRIES)
@pytest.mark.parametrize(("s", "t"), [(19, 19), (5, 23), (1, 18)])
def test_rule_2_compressed_attention_sees_complete_blocks(
    l: int, d: int, m: int, s: int, t: int
) -> None:
    nc = max(0, (t - l) // d + 1)
    q, k, v = qkv(5, s, nc, 4, 2)
    o, lse = nsa.compressed_attention(*batched(q, k, v), kv_len=t, block=l, stride=d)
    wanted_o, wanted_lse = attend(q, k, v, complete(l, d, t), t - s, None)
    same(o[0], wanted_o)
    same(lse[0], wanted_lse)


def test_rule_2_a_block_is_visible_from_its_last_token_on() -> None:
    q, k, v = qkv(6, 12, 5, 1, 1)
    base = nsa.compressed_attention(*batched(q, k, v), kv_len=12, block=4, stride=2)[0]
    for i in range(5):
        changed = v.clone()
        changed[i] += 1
        other = nsa.compressed_attention(*batched(q, k, changed), kv_len=12, block=4, stride=2)[0]
        moved = (other != base).flatten(2).any(-1)[0]
        assert moved.tolist() == [t >= i * 2 + 3 for t in range(12)]


def scores_of(q: Tensor, k: Tensor, t: int, l: int, d: int, m: int) -> Tensor:
    """The reference's ranked scores `[S, Hkv, Ns]`, forced blocks inf."""
    nc = k.shape[0]
    v = k.new_zeros(nc, k.shape[1], 1)
    _, lse = nsa.compressed_attention(*batched(q, k, v), kv_len=t, block=l, stride=d)
    chunks = ranked_scores(q[None], k[None], lse, t, l, d, m, 0, 1, q.shape[-1] ** -0.5, None, None)
    return torch.cat([scores for _, scores in chunks], 1)[0]


@pytest.mark.parametrize(("l", "d", "m"), GEOMETRIES)
@pytest.mark.parametrize(("s", "t"), [(31, 31), (4, 37)])
def test_rule_3_importance_counts_shared_tokens(l: int, d: int, m: int, s: int, t: int) -> None:
    q, k, _ = qkv(7, s, max(0, (t - l) // d + 1), 6, 2)
    wanted = torch.tensor(importance(q, k, t, t - s, l, d, m, None), dtype=torch.float64)
    got = scores_of(q, k, t, l, d, m)
    judged = got.isfinite()
    assert judged.any()
    same(got[judged], wanted[judged])


def test_rule_3_defaults_weigh_blocks_4j_minus_1_to_4j_plus_3_by_1_2_2_2_1() -> None:
    """One-hot probabilities read the weights off: key i alone has a large logit."""
    t, q = 512, torch.ones(1, 1, 1, dtype=torch.float64)
    nc = (t - 32) // 16 + 1
    table = torch.zeros(nc, 8)
    for i in range(nc):
        k = torch.full((nc, 1, 1), -1e4, dtype=torch.float64)
        k[i] = 0
        table[i] = scores_of(q, k, t, 32, 16, 64)[0, 0]
    for j in range(1, 7):
        column = {i: float(x) for i, x in enumerate(table[:, j]) if x != 0}
        around = {4 * j - 1: 1, 4 * j: 2, 4 * j + 1: 2, 4 * j + 2: 2, 4 * j + 3: 1}
        assert column == around


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rule_3_scores_are_float32_whatever_the_input(dtype: torch.dtype) -> None:
    """Ids from 16-bit inputs are those of the same numbers in float32."""
    case = {"kv_len": 200, "block": 8, "stride": 4, "select_block": 16, "num_selected": 5}
    q, k, _ = (x.to(dtype) for x in qkv(8, 200, 49, 4, 1, dk=16))
    lse = nsa.compressed_attention(
        q[None].float(), k[None].float(), k[None].float(), kv_len=200, block=8, stride=4
    )[1]
    low = nsa.select_blocks(q[None], k[None], lse, **case)
    high = nsa.select_blocks(q[None].float(), k[None].float(), lse, **case)
    assert torch.equal(low, high)


@pytest.mark.parametrize(("l", "d", "m"), GEOMETRIES)
@pytest.mark.parametrize(("s", "t", "n"), [(40, 40, 4), (3, 50, 3), (40, 40, 16)])
@pytest.mark.parametrize(("initial", "local"), [(1, 2), (0, 1), (1, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_rule_4_selection(
    l: int, d: int, m: int, s: int, t: int, n: int, initial: int, local: int, tied: bool
) -> None:
    """Ids of the loops exactly; with q = 0 every interior block ties."""
    q, k, v = qkv(9, s, max(0, (t - l) // d + 1), 4, 2)
    if tied:
        q.zero_()
    where = {"kv_len": t, "block": l, "stride": d}
    _, lse = nsa.compressed_attention(*batched(q, k, v), **where)
    ids = nsa.select_blocks(
        q[None], k[None], lse, **where, select_block=m, num_selected=n, num_initial=initial,
        num_local=local,
    )  # fmt: skip
    scores = importance(q, k, t, t - s, l, d, m, None)
    if tied:  # sums in another order differ in the last bits; ties must not
        scores = [[[round(x, 9) for x in head] for head in row] for row in scores]
    assert ids.dtype == torch.int32
    assert ids[0].tolist() == select(scores, t - s, m, n, initial, local)


def test_rule_4_no_gradient_flows_through_selection() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(10, 40, 19, 2, 1))
    where = {"kv_len": 40, "block": 4, "stride": 2}
    _, lse = nsa.compressed_attention(*batched(q, k, v), **where)
    ids = nsa.select_blocks(q[None], k[None], lse, **where, select_block=8, num_selected=3)
    assert not ids.requires_grad


@pytest.mark.parametrize(("s", "t"), [(20, 20), (4, 27)])
@pytest.mark.parametrize("m", [1, 4, 8])
def test_rule_5_selected_attention(s: int, t: int, m: int) -> None:
    """Arbitrary distinct ids in any order, with -1 anywhere and blocks after the query."""
    q, k, v = qkv(11, s, t, 4, 2)
    gen = torch.Generator().manual_seed(3)
    blocks = -(-t // m)
    n = min(3, blocks)
    rows = [torch.randperm(blocks, generator=gen)[:n] for _ in range(s * 2)]
    ids = torch.stack(rows).view(s, 2, n).int()
    ids[torch.rand(s, 2, n, generator=gen) < 0.3] = -1
    o, lse = nsa.selected_attention(*batched(q, k, v, ids), select_block=m)
    wanted_o, wanted_lse = attend(q, k, v, chosen(ids, m, t - s), t - s, None)
    same(o[0], wanted_o)
    same(lse[0], wanted_lse)


@pytest.mark.parametrize("w", [1, 2, 7, 19, 20, 21, 500])
@pytest.mark.parametrize(("s", "t"), [(20, 20), (1, 20), (6, 29)])
def test_rule_6_window_is_exactly_w(w: int, s: int, t: int) -> None:
    q, k, v = qkv(12, s, t, 2, 1)
    o, lse = nsa.sliding_window_attention(*batched(q, k, v), window=w)
    wanted_o, wanted_lse = attend(q, k, v, windowed(w), t - s, None)
    same(o[0], wanted_o)
    same(lse[0], wanted_lse)
    uniform = nsa.sliding_window_attention(*batched(torch.zeros_like(q), k, v), window=w)[1]
    seen = uniform.exp().round()[0, :, 0].tolist()
    assert seen == [min(w, position + 1) for position in range(t - s, t)]


def test_rule_7_combination() -> None:
    branches = [normal(seed, 1, 6, 2, 3) for seed in range(3)]
    gates = torch.rand(1, 6, 2, 3, dtype=torch.float64)
    same(nsa.gated_sum(*branches, gates), gated(branches, gates))
    for c in range(3):  # order: compressed, selected, window
        only = torch.zeros_like(gates)
        only[..., c] = 1
        same(nsa.gated_sum(*branches, only), branches[c])


def whole_inputs(seed: int, s: int, t: int, hq: int = 4, hkv: int = 2) -> list[Tensor]:
    q, k, v = qkv(seed, s, t, hq, hkv)
    rest = [normal(seed + 10 + i, t, hkv, 3 if i % 2 == 0 else 2) for i in range(4)]
    gates = torch.rand(s, hq, 3, generator=torch.Generator().manual_seed(seed)).double()
    return [q, k, v, *rest, gates]


WHOLE = {"block": 4, "stride": 2, "select_block": 8, "num_selected": 4, "window": 6}


def naive_whole(
    q, k1, v1, k2, v2, k3, v3, gates, scale: float | None = None, initial: int = 1, local: int = 2
) -> Tensor:
    """All of NSA by the loops; k1, v1 are raw and mean-pooled here."""
    t, l, d, m = len(k2), WHOLE["block"], WHOLE["stride"], WHOLE["select_block"]
    first = t - len(q)
    k_cmp, v_cmp = (compress(x, lambda b, h: b.mean(0), l, d) for x in (k1, v1))
    o_cmp, _ = attend(q, k_cmp, v_cmp, complete(l, d, t), first, scale)
    scores = importance(q.detach(), k_cmp.detach(), t, first, l, d, m, scale)
    ids = torch.tensor(select(scores, first, m, WHOLE["num_selected"], initial, local))
    o_slc, _ = attend(q, k2, v2, chosen(ids, m, first), first, scale)
    o_win, _ = attend(q, k3, v3, windowed(WHOLE["window"]), first, scale)
    return gated([o_cmp, o_slc, o_win], gates)


@pytest.mark.parametrize(("s", "t"), [(45, 45), (2, 61)])
@pytest.mark.parametrize(("scale", "initial", "local"), [(None, 1, 2), (0.9, 0, 1), (-3.0, 2, 1)])
def test_rule_7_whole_attention(
    s: int, t: int, scale: float | None, initial: int, local: int
) -> None:
    values = whole_inputs(13, s, t)
    q, k1, v1, *rest = batched(*values)
    k_cmp, v_cmp = (nsa.compress(x, block=4, stride=2) for x in (k1, v1))
    same(
        nsa.nsa_attention(
            q, k_cmp, v_cmp, *rest, **WHOLE, scale=scale, num_initial=initial, num_local=local
        )[0],
        naive_whole(*values, scale, initial, local),
    )


@pytest.mark.parametrize("branch", range(3))
def test_rule_8_branches_are_independent(branch: int) -> None:
    """With one branch gated in, the other pairs' gradients are zero, theirs is not."""
    q, k1, v1, *rest, gates = (x.requires_grad_() for x in batched(*whole_inputs(14, 30, 30)))
    k_cmp, v_cmp = (nsa.compress(x.detach(), block=4, stride=2).requires_grad_() for x in (k1, v1))
    only = torch.zeros_like(gates)
    only[..., branch] = 1
    o = nsa.nsa_attention(q, k_cmp, v_cmp, *rest, only, **WHOLE)
    pairs = [(k_cmp, v_cmp), (rest[0], rest[1]), (rest[2], rest[3])]
    grads = torch.autograd.grad(o.square().sum(), [x for pair in pairs for x in pair])
    for index, grad in enumerate(grads):
        assert bool(grad.any()) == (index // 2 == branch)


def test_rule_9_dead_rows_forward_and_backward() -> None:
    """Rows before the first complete block, rows that select nothing: o = 0, lse = -inf."""
    q, k, v = (x.requires_grad_() for x in batched(*qkv(15, 12, 5, 2, 1)))
    o, lse = nsa.compressed_attention(q, k, v, kv_len=12, block=4, stride=2)
    assert not o[:, :3].any() and bool(lse[:, :3].isneginf().all())
    grads = torch.autograd.grad([o, lse], [q, k, v], [torch.ones_like(o), torch.ones_like(lse)])
    assert not grads[0][:, :3].any()
    assert all(bool(g.isfinite().all()) for g in grads)

    q, k, v = (x.requires_grad_() for x in batched(*qkv(16, 12, 12, 2, 1)))
    ids = torch.full((1, 12, 1, 2), -1, dtype=torch.int32)
    ids[:, 6:, :, 0] = 0
    ids[:, 3] = 2  # a block after the query: nothing to see either
    ids[:, 3, :, 1] = -1
    o, lse = nsa.selected_attention(q, k, v, ids, select_block=4)
    assert not o[:, :6].any() and bool(lse[:, :6].isneginf().all())
    grads = torch.autograd.grad([o, lse], [q, k, v], [torch.ones_like(o), torch.ones_like(lse)])
    assert not grads[0][:, :6].any()
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rule_9_no_compressed_block_at_all(dtype: torch.dtype) -> None:
    q = torch.randn(2, 3, 2, 4).to(dtype).requires_grad_()
    k, v = (torch.empty(2, 0, 1, dim, dtype=dtype, requires_grad=True) for dim in (4, 5))
    o, lse = nsa.compressed_attention(q, k, v, kv_len=3)
    assert o.shape == (2, 3, 2, 5) and not o.any() and bool(lse.isneginf().all())
    o.sum().backward()
    assert q.grad is not None and not q.grad.any()
    ids = nsa.select_blocks(q, k, lse, kv_len=3)
    assert ids.tolist() == [[[[0, *[-1] * 15]]] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rule_10_lse_is_natural_log_in_float32(dtype: torch.dtype) -> None:
    """With zero logits lse is ln(number of visible keys) in every op."""
    t, stat = 20, torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (torch.zeros(1, t, 1, 4, dtype=dtype) for _ in range(3))
    ids = torch.zeros(1, t, 1, 1, dtype=torch.int32)
    seen = torch.arange(1, t + 1, dtype=torch.float64)
    cmp = (torch.zeros(1, 9, 1, 4, dtype=dtype),) * 2
    blocks = ((seen - 4).div(2, rounding_mode="floor") + 1).clamp(min=0)
    results = [
        (nsa.attention(q, k, v), seen),
        (nsa.sliding_window_attention(q, k, v, window=5), seen.clamp(max=5)),
        (nsa.selected_attention(q, k, v, ids, select_block=8), seen.clamp(max=8)),
        (nsa.compressed_attention(q, *cmp, kv_len=t, block=4, stride=2), blocks),
    ]
    for (_, lse), count in results:
        assert lse.dtype == stat
        torch.testing.assert_close(lse[0, :, 0].double(), count.log(), rtol=1e-6, atol=1e-6)
    assert math.isinf(results[3][0][1][0, 0, 0])


@pytest.mark.parametrize("scale", [None, 0.37, -0.2, 0.0, 2])
def test_scale_is_always_honoured(scale: float | None) -> None:
    q, k, v = qkv(17, 9, 9, 4, 2)
    o, lse = nsa.attention(*batched(q, k, v), scale=scale)
    wanted_o, wanted_lse = attend(q, k, v, causal, 0, scale)
    same(o[0], wanted_o)
    same(lse[0], wanted_lse)
