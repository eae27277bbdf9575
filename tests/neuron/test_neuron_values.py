"""Values that are not finite stay in their packed sequence, forward and backward, bit for bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import nsa_neuron as nsa
from nsa_neuron.backends.neuron import plans

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")]

EDGES = (0, 10, 23, 40)
SPOILED = slice(10, 23)
OTHERS = (slice(0, 10), slice(23, 40))
GEOMETRY = {"block": 8, "stride": 4}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(tokens: int = 40) -> dict[str, torch.Tensor]:
    return {
        "q": normal(1, tokens, 4, 16, seed=0), "k": normal(1, tokens, 2, 16, seed=1),
        "v": normal(1, tokens, 2, 8, seed=2),
    }  # fmt: skip


def packed() -> dict[str, torch.Tensor]:
    edges = torch.tensor(EDGES, dtype=torch.int32)
    return {"cu_seqlens_q": edges, "cu_seqlens_k": edges}


def attention(q, k, v):
    return nsa.attention(q, k, v, **packed())


def window(q, k, v):
    return nsa.sliding_window_attention(q, k, v, window=6, **packed())


def chosen() -> torch.Tensor:
    """The first block of each sequence and the query's own."""
    ids = torch.full((1, EDGES[-1], 2, 3), -1, dtype=torch.int32)
    for first, end in pairwise(EDGES):
        own = torch.arange(end - first) // 4
        ids[0, first:end, :, 0] = 0
        ids[0, first:end, :, 1] = torch.where(own > 0, own, -1)[:, None]
    return ids


def selected(q, k, v):
    return nsa.selected_attention(q, k, v, chosen(), select_block=4, **packed())


def compressed(q, k, v):
    edges = packed()
    k, v = (nsa.compress(x, cu_seqlens_k=edges["cu_seqlens_k"], **GEOMETRY) for x in (k, v))
    return nsa.compressed_attention(q, k, v, **GEOMETRY, **edges, kv_len=q.shape[1])


OPS = [attention, window, selected, compressed]


def results(op, values, grad) -> list[torch.Tensor]:
    """o, lse, dq, dk, dv."""
    inputs = [x.clone().requires_grad_() for x in values.values()]
    with nsa.use_backend("neuron:sim"):
        o, lse = op(*inputs)
        return [o.detach(), lse.detach(), *torch.autograd.grad(o, inputs, grad)]


def check(op, values, grad, dirty, dirty_grad, reached: tuple[int, ...]) -> None:
    clean, found = results(op, values, grad), results(op, dirty, dirty_grad)
    for a, b in zip(clean, found, strict=True):
        for part in OTHERS:
            assert b[:, part].equal(a[:, part])
    for i in reached:
        assert not found[i][:, SPOILED].isfinite().all(), i


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", OPS)
def test_keys_and_values(op, value: float) -> None:
    values, grad = given(), normal(1, 40, 4, 8, seed=3)
    for name, reached in (("k", (0, 1, 2, 3, 4)), ("v", (0, 2, 3))):
        dirty = {**values, name: values[name].clone()}
        dirty[name][:, SPOILED] = value
        check(op, values, grad, dirty, grad, reached)


@pytest.mark.parametrize("op", OPS)
def test_queries_and_gradients(op) -> None:
    values, grad = given(), normal(1, 40, 4, 8, seed=3)
    spoiled = grad.clone()
    spoiled[:, SPOILED] = float("nan")
    check(op, values, grad, values, spoiled, (2, 3, 4))
    dirty = {**values, "q": values["q"].clone()}
    dirty["q"][:, SPOILED] = float("nan")
    check(op, values, grad, dirty, grad, (0, 1, 2, 3, 4))


@pytest.mark.parametrize("method", ["mean", "linear"])
def test_compression(method: str) -> None:
    """Blocks, and gradients of tokens; those of weights are everybody's."""
    k, edges = given()["k"], packed()["cu_seqlens_k"]
    weights = {"w1": normal(8 * 16, 16, seed=4)} if method == "linear" else {}
    counts = [(end - first - 8) // 4 + 1 for first, end in pairwise(EDGES)]
    mine = slice(counts[0], counts[0] + counts[1])
    found = []
    for value, grad_value in ((None, None), (float("nan"), None), (None, float("nan"))):
        x, grad = k.clone(), normal(1, 9, 2, 16, seed=5)
        if value is not None:
            x[:, SPOILED] = value
        if grad_value is not None:
            grad[:, mine] = grad_value
        x.requires_grad_()
        with nsa.use_backend("neuron:sim"):
            y = nsa.compress(x, method=method, cu_seqlens_k=edges, **GEOMETRY, **weights)
            found.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    for y, dx in found[1:]:
        for part in (slice(0, mine.start), slice(mine.stop, sum(counts))):
            assert y[:, part].equal(found[0][0][:, part])
        for part in OTHERS:
            assert dx[:, part].equal(found[0][1][:, part])
    assert found[1][0][:, mine].isnan().all() and not found[2][1][:, SPOILED].isfinite().all()


def test_a_row_that_sees_no_such_value_is_finite() -> None:
    values = given()
    values["v"][0, 15] = float("nan")
    with nsa.use_backend("neuron:sim"):
        o, lse = attention(**values)
    assert o[:, 10:15].isfinite().all() and lse.isfinite().all()
    assert o[:, 15:23].isnan().all()


def test_selection() -> None:
    """Block ids of one sequence do not hang on another's keys, or statistics."""
    values, edges = given(), packed()
    k = nsa.compress(values["k"], cu_seqlens_k=edges["cu_seqlens_k"], **GEOMETRY)
    place = {**GEOMETRY, **edges, "kv_len": 40}
    _, lse = nsa.compressed_attention(values["q"], k, k, **place)
    count = (EDGES[1] - 8) // 4 + 1  # compressed blocks of the first sequence
    dirty_k, dirty_lse = k.clone(), lse.clone()
    dirty_k[:, count : count + (13 - 8) // 4 + 1] = float("nan")
    dirty_lse[:, SPOILED] = float("nan")
    found = []
    for keys, shift in ((k, lse), (dirty_k, dirty_lse)):
        with nsa.use_backend("neuron:sim"):
            found.append(
                nsa.select_blocks(values["q"], keys, shift, **place, select_block=8, num_selected=3)
            )
    for part in OTHERS:
        assert found[1][:, part].equal(found[0][:, part])


def test_one_kernel_keeps_batch_rows_apart() -> None:
    """`nsa_attention` in one kernel takes no packed batch; its batch rows are as far apart."""
    sizes = {"q": (320, 4, 192), "k_cmp": (19, 1, 192), "v_cmp": (19, 1, 128)}
    sizes |= {"k": (320, 1, 192), "v": (320, 1, 128)}
    clean = {
        name: normal(2, *size, seed=i).bfloat16() for i, (name, size) in enumerate(sizes.items())
    }
    gates, found = torch.rand(2, 320, 4, 3).bfloat16(), []
    for spoiled in ((), clean):
        given = {name: x.clone() for name, x in clean.items()}
        for name in spoiled:
            given[name][1] = float("nan")
        q, k_cmp, v_cmp, k, v = given.values()
        with nsa.use_backend("neuron:sim"):
            found.append(
                nsa.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, num_selected=4, window=64)
            )
    assert found[1][0].equal(found[0][0]) and found[1][1].isnan().any()


def test_hardware_loops_keep_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    values, grad = given(), normal(1, 40, 4, 8, seed=3)
    plan = plans.load("attention")
    monkeypatch.setitem(plan["looped"], "most_packed", -1)
    dirty = {**values, "v": values["v"].clone()}
    dirty["v"][:, SPOILED] = float("nan")
    check(attention, values, grad, dirty, grad, (0, 2, 3))


@pytest.mark.parametrize("op", OPS)
def test_a_kv_head_leaves_the_others_alone(op) -> None:
    """Of two kv heads with two query heads each only the second one's have such values."""
    values, grad = given(), normal(1, 40, 4, 8, seed=3)
    clean = results(op, values, grad)
    for name in ("k", "v"):
        dirty = {**values, name: values[name].clone()}
        dirty[name][:, SPOILED, 1] = float("nan")
        found = results(op, dirty, grad)
        for of_query, own, other in ((True, 2, slice(0, 2)), (False, 1, slice(0, 1))):
            for i in (0, 2) if of_query else (3, 4) if name == "k" else (3,):
                assert found[i][:, :, other].equal(clean[i][:, :, other])
                assert not found[i][:, SPOILED, own:].isfinite().all((0, 1, 3)).any()
    spoiled = grad.clone()
    spoiled[:, SPOILED, 3] = float("nan")
    found = results(op, values, spoiled)
    assert found[2][:, :, :3].equal(clean[2][:, :, :3])
    for i in (3, 4):
        assert found[i][:, :, 0].equal(clean[i][:, :, 0])
        assert not found[i][:, SPOILED, 1].isfinite().all()


@pytest.mark.parametrize(("token", "reached"), [(None, False), (22, False), (21, True)])
@pytest.mark.parametrize("where", ["x", "grad_y"])
def test_gradients_of_weights_are_everybodys(token, reached: bool, where: str) -> None:
    """Token 22 is the last of its sequence and in no block of 8 that begins every 4 tokens."""
    edges = packed()["cu_seqlens_k"]
    tensors = {"x": given()["k"], "grad_y": normal(1, 9, 2, 16, seed=5)}
    if token is not None:
        row = token if where == "x" else 2 if reached else 8  # of 1 + 2 + 3 blocks; 8 is none
        tensors[where][:, row] = float("nan")
    x = tensors["x"].requires_grad_()
    w1 = normal(8 * 16, 16, seed=4).requires_grad_()
    pe = normal(8, 16, seed=6).requires_grad_()
    with nsa.use_backend("neuron:sim"):
        y = nsa.compress(x, w1, pe=pe, method="linear", cu_seqlens_k=edges, **GEOMETRY)
        dx, dw, dpe = torch.autograd.grad(y, (x, w1, pe), tensors["grad_y"])
    assert dw.isnan().all().item() == dpe.isnan().all().item() == reached
    if not reached:
        assert all(grad.isfinite().all() for grad in (y, dx, dw, dpe))
