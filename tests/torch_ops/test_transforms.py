"""Autograd, torch.func, layouts and autocast around the registered ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, vmap

import nsa_neuron as nsa
from nsa_neuron.errors import InvalidType, UnsupportedTransform

GEOMETRY = {"block": 4, "stride": 2}
WHOLE = {**GEOMETRY, "select_block": 8, "num_selected": 3, "window": 5}
S, HQ, HKV, DK, DV = 12, 4, 2, 4, 3
NC = (S - 4) // 2 + 1


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def ids(batch: int = 1) -> Tensor:
    own = torch.arange(S) // 8
    return (
        torch.stack([torch.zeros(S), own.where(own > 0, -1)], -1)
        .int()[:, None]
        .expand(batch, S, HKV, 2)
    )


def inputs(name: str, batch: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Differentiable inputs of `OPS[name]`."""

    def head(seed: int, tokens: int, heads: int, dim: int) -> Tensor:
        return normal(seed, batch, tokens, heads, dim, dtype=dtype)

    q, k, v = head(1, S, HQ, DK), head(2, S, HKV, DK), head(3, S, HKV, DV)
    k_cmp, v_cmp = head(4, NC, HKV, DK), head(5, NC, HKV, DV)
    gates = head(6, S, HQ, 3).sigmoid()
    o = [head(seed, S, HQ, DV) for seed in (7, 8, 9)]
    return {
        "attention": [q, k, v],
        "sliding_window_attention": [q, k, v],
        "compressed_attention": [q, k_cmp, v_cmp],
        "selected_attention": [q, k, v],
        "gated_sum": [*o, gates],
        "nsa_attention": [q, k_cmp, v_cmp, k, v, k + 1, v + 1, gates],
        "compress": [k],
    }[name]


OPS: dict[str, Callable[..., Any]] = {
    "attention": nsa.attention,
    "sliding_window_attention": lambda *x: nsa.sliding_window_attention(*x, window=5),
    "compressed_attention": lambda *x: nsa.compressed_attention(*x, kv_len=S, **GEOMETRY),
    "selected_attention": lambda q, *x: nsa.selected_attention(
        q, *x, ids(q.shape[0]), select_block=8
    ),
    "gated_sum": nsa.gated_sum,
    "nsa_attention": lambda *x: nsa.nsa_attention(*x, **WHOLE),
    "compress": lambda x: nsa.compress(x, **GEOMETRY),
}
by_op = pytest.mark.parametrize("name", OPS)


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def loss_of(name: str) -> Callable[..., Tensor]:
    return lambda *x: first(OPS[name](*x)).square().sum()


def eager_grads(name: str, values: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in values]
    return list(torch.autograd.grad(loss_of(name)(*leaves), leaves))


@by_op
def test_func_grad(name: str) -> None:
    values = inputs(name)
    got = grad(loss_of(name), argnums=tuple(range(len(values))))(*values)
    torch.testing.assert_close(list(got), eager_grads(name, values))


@by_op
@pytest.mark.parametrize("in_dim", [0, 2])
def test_vmap_is_a_loop(name: str, in_dim: int) -> None:
    values = [torch.stack([x, x * 0.5 + 0.1], in_dim) for x in inputs(name, batch=2)]
    got = vmap(OPS[name], in_dims=in_dim)(*values)
    loop = [OPS[name](*(x.select(in_dim, i) for x in values)) for i in range(2)]
    if isinstance(got, tuple):
        wanted: Any = tuple(torch.stack(pair) for pair in zip(*loop, strict=True))
    else:
        wanted = torch.stack(loop)
    torch.testing.assert_close(got, wanted)


@by_op
def test_vmap_over_one_input_only(name: str) -> None:
    """Per-sample queries against shared keys, of a batch each."""
    values = inputs(name, batch=2)
    many = torch.stack([values[0], values[0] * 2])
    got = vmap(lambda x: first(OPS[name](x, *values[1:])))(many)
    wanted = torch.stack([first(OPS[name](x, *values[1:])) for x in many])
    torch.testing.assert_close(got, wanted)


@by_op
def test_vmap_of_grad(name: str) -> None:
    """Per-sample gradients."""
    values = inputs(name, batch=3)
    each = tuple(range(len(values)))
    got = vmap(grad(loss_of(name), argnums=each))(*(x[:, None] for x in values))
    for i in range(3):
        alone = eager_grads(name, [x[i : i + 1] for x in values])
        torch.testing.assert_close([x[i] for x in got], alone)


@pytest.mark.parametrize("name", ["attention", "gated_sum", "compress", "nsa_attention"])
def test_jacrev(name: str) -> None:
    values = inputs(name)
    jacobian = jacrev(lambda x: first(OPS[name](x, *values[1:])))(values[0])
    wanted = torch.autograd.functional.jacobian(
        lambda x: first(OPS[name](x, *values[1:])), values[0]
    )
    torch.testing.assert_close(jacobian, wanted)


@by_op
def test_second_derivative_is_refused(name: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(name)]
    gradient = torch.autograd.grad(loss_of(name)(*leaves), leaves[0], create_graph=True)[0]
    with pytest.raises(UnsupportedTransform, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), leaves[0])


def test_second_func_grad_is_refused() -> None:
    values = inputs("attention")
    inner = grad(loss_of("attention"))
    with pytest.raises(UnsupportedTransform, match="first derivatives only"):
        grad(lambda x: inner(x, *values[1:]).sum())(values[0])


@by_op
def test_jvp_is_refused(name: str) -> None:
    values = inputs(name)
    with forward_ad.dual_level(), pytest.raises(UnsupportedTransform, match="forward-mode"):
        OPS[name](forward_ad.make_dual(values[0], torch.ones_like(values[0])), *values[1:])


def test_func_jvp_is_refused() -> None:
    q, k, v = inputs("attention")
    with pytest.raises(UnsupportedTransform):
        torch.func.jvp(lambda x: nsa.attention(x, k, v)[0], (q,), (q,))


def test_vmap_over_packed_sequences_is_refused() -> None:
    q, k, v = (x.expand(2, *x.shape) for x in inputs("attention"))
    cu = torch.tensor([0, 5, S], dtype=torch.int32)
    with pytest.raises(UnsupportedTransform, match="packed"):
        vmap(lambda q, k, v: nsa.attention(q, k, v, cu, cu))(q, k, v)


@by_op
def test_no_graph_where_none_is_wanted(name: str) -> None:
    values = inputs(name)
    assert first(OPS[name](*values)).grad_fn is None
    with torch.no_grad():
        assert first(OPS[name](*(x.requires_grad_() for x in values))).grad_fn is None
    with torch.inference_mode():
        assert first(OPS[name](*values)).is_inference()


@by_op
def test_gradient_of_some_inputs_only(name: str) -> None:
    values = inputs(name)
    wanted = eager_grads(name, values)
    for i, x in enumerate(values):
        leaves = [y.detach().clone() for y in values]
        leaves[i].requires_grad_()
        loss_of(name)(*leaves).backward()
        torch.testing.assert_close(leaves[i].grad, wanted[i])
        assert all(y.grad is None for y in leaves if y is not leaves[i])
        assert x.grad is None


def scrambled(x: Tensor) -> Tensor:
    """The same numbers with other strides, inside a NaN-filled larger storage."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] * 2 + 1), torch.nan, dtype=x.dtype)
    view = wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 1::2]
    view.copy_(x)
    assert not view.is_contiguous()
    return view


@by_op
def test_non_contiguous_inputs_and_gradients(name: str) -> None:
    """Strided inputs, and gradients that are expanded scalars, give what contiguous ones give."""
    values = inputs(name)
    strided = [scrambled(x).requires_grad_() for x in values]
    torch.testing.assert_close(OPS[name](*strided), OPS[name](*values))
    torch.testing.assert_close(
        eager_grads(name, [scrambled(x) for x in values]), eager_grads(name, values)
    )
    out = first(OPS[name](*strided))
    expanded = torch.ones((), dtype=out.dtype).expand_as(out)
    got = torch.autograd.grad(out, strided, expanded, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(out, strided, torch.ones_like(out)))


def test_results_never_alias_inputs_and_inputs_are_not_written() -> None:
    for name, op in OPS.items():
        values = inputs(name)
        before = [x.clone() for x in values]
        out = op(*values)
        for x in out if isinstance(out, tuple) else (out,):
            assert x.is_contiguous()
            assert all(x.data_ptr() != y.data_ptr() for y in values)
        assert all(torch.equal(x, y) for x, y in zip(values, before, strict=True)), name


@pytest.mark.parametrize("name", ["attention", "compressed_attention", "nsa_attention"])
def test_autocast_does_not_cast_and_mixed_dtypes_are_refused(name: str) -> None:
    """Under autocast ops keep the dtype they are given; matmul's output mixed with a float32
    tensor is refused by name, not silently computed."""
    values = inputs(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert first(OPS[name](*values)).dtype == torch.float32
        projected = [x @ torch.eye(x.shape[-1]) for x in values]
        assert projected[0].dtype == torch.bfloat16
        assert first(OPS[name](*projected)).dtype == torch.bfloat16
        with pytest.raises(InvalidType) as caught:
            OPS[name](projected[0], *values[1:])
    assert caught.value.argument == ("k" if name == "attention" else "k_cmp")


def test_meta_tensors_give_shapes() -> None:
    q, k, v = (x.to("meta") for x in inputs("attention"))
    o, lse = nsa.attention(q, k, v)
    assert o.device.type == "meta" and o.shape == (1, S, HQ, DV) and lse.shape == (1, S, HQ)


def test_compress_weights_get_per_sample_gradients_or_a_clear_error() -> None:
    """Shared weights have no batch axis: vmap of their gradient is refused, not wrong."""
    x, w = normal(1, 2, 1, 9, 1, 2), normal(2, 8, 2)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return nsa.compress(x, w, method="linear", **GEOMETRY).square().sum()

    with pytest.raises(UnsupportedTransform, match="dw1"):
        vmap(grad(loss), in_dims=(None, 0))(w, x)
