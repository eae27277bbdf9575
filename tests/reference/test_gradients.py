"""Backward ops: `gradcheck` in float64, and autograd through the loops of `naive_nsa`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from naive_nsa import attend, causal, chosen, complete, compress, gated, gelu, windowed
from torch import Tensor
from torch.autograd import gradcheck

import nsa_neuron as nsa

L, D, M, W = 4, 2, 4, 5
GEOMETRY = {"block": L, "stride": D}
# s, t, hq, hkv: causal with a group, kv heads, T > S
SHAPES = [(7, 7, 4, 1), (6, 6, 4, 2), (3, 9, 2, 1), (1, 8, 3, 1)]
PACKED = ((2, 2), (5, 9), (6, 6))  # (S_i, T_i); the first has no compressed block


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.requires_grad_() for x in tensors]


def live(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """lse with dead rows at 0: finite differences of -inf are NaN."""
    return o, lse.masked_fill(lse.isneginf(), 0.0)


def offsets() -> dict[str, Tensor]:
    columns = zip(*PACKED, strict=True)
    q, k = (torch.tensor([0, *column]).cumsum(0).int() for column in columns)
    return {"cu_seqlens_q": q, "cu_seqlens_k": k}


def random_ids(seed: int, s: int, t: int, hkv: int, n: int) -> Tensor:
    """Distinct ids `[s, hkv, n]`; every third row selects nothing, others have gaps."""
    gen = torch.Generator().manual_seed(seed)
    blocks = -(-t // M)
    rows = [torch.randperm(blocks, generator=gen)[:n].tolist() for _ in range(s * hkv)]
    ids = torch.tensor([row + [-1] * (n - len(row)) for row in rows]).view(s, hkv, n).int()
    ids[torch.rand(ids.shape, generator=gen) < 0.2] = -1
    ids[::3] = -1
    return ids


def op_of(
    name: str, s: int, t: int, hkv: int, scale: float | None = None
) -> tuple[Callable[..., Any], int, Callable]:
    """The op as f(q, k, v), its number of keys, and the loops' visibility."""
    if name == "attention":
        return partial(nsa.attention, scale=scale), t, causal
    if name == "sliding_window_attention":
        return partial(nsa.sliding_window_attention, window=W, scale=scale), t, windowed(W)
    if name == "compressed_attention":
        blocks, see = max(0, (t - L) // D + 1), complete(L, D, t)
        return partial(nsa.compressed_attention, kv_len=t, scale=scale, **GEOMETRY), blocks, see
    ids = random_ids(1, s, t, hkv, 2)
    op = partial(nsa.selected_attention, block_indices=ids[None], select_block=M, scale=scale)
    return op, t, chosen(ids, M, t - s)


ATTENTIONS = (
    "attention",
    "sliding_window_attention",
    "compressed_attention",
    "selected_attention",
)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(("s", "t", "hq", "hkv"), SHAPES)
def test_gradcheck_of_attentions(name: str, s: int, t: int, hq: int, hkv: int) -> None:
    """Through o and lse; dead rows included (first rows of compressed, empty selections)."""
    op, keys, _ = op_of(name, s, t, hkv)
    values = leaves(normal(1, 1, s, hq, 3), normal(2, 1, keys, hkv, 3), normal(3, 1, keys, hkv, 2))
    assert gradcheck(lambda q, k, v: live(*op(q, k, v)), values)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(("s", "t", "hq", "hkv"), SHAPES)
@pytest.mark.parametrize(("through", "scale"), [("o", None), ("lse", -0.4), ("both", 1.7)])
def test_backward_is_autograd_of_the_loops(
    name: str, s: int, t: int, hq: int, hkv: int, through: str, scale: float | None
) -> None:
    """By default and at scales that no default reaches: of both signs, above and below 1."""
    op, keys, visible = op_of(name, s, t, hkv, scale)
    values = leaves(normal(1, s, hq, 3), normal(2, keys, hkv, 3), normal(3, keys, hkv, 2))
    grad_o, grad_lse = normal(4, s, hq, 2), normal(5, s, hq)

    def pull(o: Tensor, lse: Tensor) -> Sequence[Tensor]:
        lse = lse.masked_fill(lse.isneginf(), 0.0)
        loss = (o * grad_o).sum() * (through != "lse") + (lse * grad_lse).sum() * (through != "o")
        connected = loss + 0 * sum(x.sum() for x in values)  # all rows may be dead
        return torch.autograd.grad(connected, values, materialize_grads=True)

    got = pull(*(x[0] for x in op(*(x[None] for x in values))))
    wanted = pull(*attend(*values, visible, t - s, scale))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_gradcheck_packed(name: str) -> None:
    cu = offsets()
    s, t = (int(x[-1]) for x in cu.values())
    q, k, v = normal(1, 1, s, 2, 2), normal(2, 1, t, 1, 2), normal(3, 1, t, 1, 2)
    calls = {
        "attention": lambda q, k, v: nsa.attention(q, k, v, **cu),
        "sliding_window_attention": lambda q, k, v: nsa.sliding_window_attention(
            q, k, v, **cu, window=3
        ),
        "compressed_attention": lambda q, k, v: nsa.compressed_attention(
            q, k, v, **cu, kv_len=t, **GEOMETRY
        ),
        "selected_attention": lambda q, k, v: nsa.selected_attention(
            q, k, v, ids[None], **cu, select_block=M
        ),
    }
    parts = [random_ids(i, a, b, 1, 2) for i, (a, b) in enumerate(PACKED)]
    ids = torch.cat(parts)
    if name == "compressed_attention":
        blocks = (t - L) // D + 1
        k, v = k[:, :blocks], v[:, :blocks]
    assert gradcheck(lambda *x: live(*calls[name](*x)), leaves(q.clone(), k.clone(), v.clone()))


METHODS = ("mean", "linear", "mlp")


def weights(method: str, per_head: bool, dim: int, heads: int, hidden: int = 3) -> dict[str, Any]:
    lead = (heads,) if per_head else ()
    shapes = {"pe": (L, dim)}
    if method != "mean":
        width = dim if method == "linear" else hidden
        shapes |= {"w1": (L * dim, width), "b1": (width,)}
    if method == "mlp":
        shapes |= {"w2": (hidden, dim), "b2": (dim,)}
    return {
        name: normal(seed, *lead, *shape).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items(), 10)
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_compress(method: str, per_head: bool, packed: bool) -> None:
    cu = offsets()["cu_seqlens_k"] if packed else None
    x = normal(1, 1, 17 if packed else 9, 2, 2).requires_grad_()
    given = weights(method, per_head, 2, 2)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(given, values, strict=True))
        return nsa.compress(x, **named, cu_seqlens_k=cu, method=method, **GEOMETRY)

    assert gradcheck(call, (x, *given.values()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_head", [False, True])
def test_compress_backward_is_autograd_of_the_loops(method: str, per_head: bool) -> None:
    x = normal(1, 11, 2, 3).requires_grad_()
    given = weights(method, per_head, 3, 2)

    def phi(block: Tensor, h: int) -> Tensor:
        w = {name: value[h] if per_head else value for name, value in given.items()}
        block = block + w["pe"]
        if method == "mean":
            return block.mean(0)
        y = block.flatten() @ w["w1"] + w["b1"]
        return y if method == "linear" else gelu(y) @ w["w2"] + w["b2"]

    y = nsa.compress(x[None], **given, method=method, **GEOMETRY)[0]
    wanted_y = compress(x, phi, L, D)
    dy, inputs = normal(2, *y.shape), [x, *given.values()]
    got = torch.autograd.grad((y * dy).sum(), inputs)
    wanted = torch.autograd.grad((wanted_y * dy).sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_gated_sum() -> None:
    branches = [normal(seed, 1, 3, 2, 2) for seed in range(3)]
    assert gradcheck(nsa.gated_sum, leaves(*branches, normal(4, 1, 3, 2, 3).sigmoid()))


def test_gated_sum_backward_is_autograd_of_the_loops() -> None:
    values = leaves(*(normal(seed, 1, 5, 2, 3) for seed in range(3)), normal(4, 1, 5, 2, 3))
    grad = normal(5, 1, 5, 2, 3)
    got = torch.autograd.grad(nsa.gated_sum(*values), values, grad)
    wanted = torch.autograd.grad(gated(values[:3], values[3]), values, grad)
    torch.testing.assert_close(got, wanted)


WHOLE = {**GEOMETRY, "select_block": M, "num_selected": 3, "window": 3, "scale": 0.9}


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_nsa_attention(packed: bool) -> None:
    """Logits are far enough apart that finite differences do not change the selection."""
    cu: dict[str, Tensor] = offsets() if packed else {}
    s, t = (int(x[-1]) for x in cu.values()) if packed else (9, 15)
    nc = (t - L) // D + 1
    values = [normal(1, 1, s, 2, 2)]
    values += [normal(seed, 1, n, 1, 2) for seed, n in enumerate((nc, nc, t, t, t, t), 2)]
    values.append(normal(9, 1, s, 2, 3).sigmoid())
    assert gradcheck(lambda *x: nsa.nsa_attention(*x, **cu, **WHOLE), leaves(*values))


SAVED = ("grad_o", "q", "k", "v", "o", "lse", "grad_lse")


@pytest.mark.parametrize("name", ["compressed_attention", "selected_attention"])
def test_dead_rows_take_no_gradient_whatever_comes_through_their_lse(name: str) -> None:
    """A loss of lse has NaN where lse is -inf: exp(lse - lse), lse - lse.max() and their like."""
    op, keys, _ = op_of(name, 7, 7, 1)
    values = normal(1, 1, 7, 2, 3), normal(2, 1, keys, 1, 3), normal(3, 1, keys, 1, 2)
    o, lse = op(*values)
    dead = lse.isneginf()
    assert dead.any() and not dead.all()
    grad_lse = normal(5, *lse.shape)
    calls = []
    for poison in (0.0, torch.nan, torch.inf, -torch.inf):
        given = (normal(4, *o.shape), *values, o, lse, grad_lse.masked_fill(dead, poison))
        names = (f"{n}_cmp" if n in "kv" and "compressed" in name else n for n in SAVED)
        call = dict(zip(names, given, strict=True)) | op.keywords
        calls.append(getattr(torch.ops.nsa, f"{name}_backward")(**call))
    for got in calls[1:]:
        torch.testing.assert_close(got, calls[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_inputs_dtype_and_are_finite(dtype: torch.dtype) -> None:
    """Huge but finite 16-bit inputs with dead rows: no NaN, no infinity in any gradient."""
    q, k, v = (normal(i, 1, 9, 2, 4).mul(20).to(dtype).requires_grad_() for i in range(3))
    nc = (9 - L) // D + 1
    k_cmp, v_cmp = (x[:, :nc].detach().clone().requires_grad_() for x in (k, v))
    gates = normal(5, 1, 9, 2, 3).sigmoid().to(dtype).requires_grad_()
    inputs = (q, k_cmp, v_cmp, k, v, k, v, gates)
    nsa.nsa_attention(*inputs, **WHOLE).sum().backward()
    for x in inputs:
        assert x.grad is not None and x.grad.dtype == dtype and bool(x.grad.isfinite().all())
