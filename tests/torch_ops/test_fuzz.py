"""Random calls, some broken: a typed error, or finite results of the promised shapes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nsa_neuron as nsa
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.ops import get

ATTENTIONS = (
    "attention", "sliding_window_attention", "compressed_attention", "select_blocks",
    "selected_attention", "nsa_attention",
)  # fmt: skip
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Small sizes with the edges among them; 0 and disagreeing ones are errors.
size = st.sampled_from([8, 1, 2, 3, 4, 5, 7, 9, 16, 17, 33, 0])
few = st.integers(0, 4)
scale = st.sampled_from([None] * 9 + [0.3, -1.0, 0.0, 1e4, float("nan"), float("inf")])


@st.composite
def tensor(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A finite tensor, sometimes huge, strided, or of another dtype, rank or extent."""
    broken = draw(st.sampled_from(range(-60, 5)))
    if broken == 0:
        shape = shape[:-1]
    elif broken == 1:
        shape = (*shape[:-1], draw(size))
    elif broken == 2:
        shape = (shape[0], draw(size), *shape[2:])
    elif broken == 3:
        dtype = draw(st.sampled_from([*FLOATS, torch.int32, torch.bool]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    magnitude = draw(st.sampled_from([0.0, 1.0, 1.0, 1.0, 30.0]))
    x = torch.randn(shape, generator=gen) * magnitude
    if broken == 4 and len(shape) > 2:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.to(dtype)


@st.composite
def offsets(draw: Any, s: int, t: int) -> dict[str, Tensor]:
    """cu_seqlens of up to three sequences, often legal."""
    parts = draw(st.integers(1, 3))
    cuts_q = sorted(draw(st.lists(st.integers(-1, s + 1), min_size=parts, max_size=parts)))
    cuts_k = sorted(draw(st.lists(st.integers(-1, t + 1), min_size=parts, max_size=parts)))
    if draw(st.booleans()):  # legal: one key per query, the rest to the last sequence
        cuts_q = sorted({x for x in cuts_q if 0 < x < s})
        cuts_k = list(cuts_q)
    edges = ([0, *cuts_q, s], [0, *cuts_k, t])
    q, k = (torch.tensor(row, dtype=torch.int32) for row in edges)
    return {"cu_seqlens_q": q, "cu_seqlens_k": k}


@st.composite
def attention_call(draw: Any) -> tuple[str, dict[str, Any]]:
    """A call of one of the attention ops, `select_blocks` or `nsa_attention`."""
    name = draw(st.sampled_from(ATTENTIONS))
    dtype = draw(st.sampled_from(FLOATS))
    hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    s = draw(size)
    t = s + draw(st.sampled_from([0, 0, 0, 0, 1, 5, 7, 30, -1]))
    b, dk, dv = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    d = draw(st.integers(1, 4))
    l, m = d * draw(st.integers(1, 3)), d * draw(st.integers(1, 6))
    m = m if draw(st.sampled_from(range(9))) == 8 else max(m, l)
    l = draw(few) if draw(st.sampled_from(range(16))) == 15 else l
    packed = draw(st.integers(0, 3)) == 0
    b = 1 if packed and draw(st.integers(0, 9)) else b
    t = max(t, 0)
    nc = max(0, (t - l) // max(d, 1) + 1)
    q = draw(tensor((b, s, hkv * group, dk), dtype))
    k, v = draw(tensor((b, t, hkv, dk), dtype)), draw(tensor((b, t, hkv, dv), dtype))
    k_cmp, v_cmp = draw(tensor((b, nc, hkv, dk), dtype)), draw(tensor((b, nc, hkv, dv), dtype))
    geometry = {"block": l, "stride": d}
    initial, local = draw(st.integers(0, 2)), draw(st.sampled_from([1, 2, 3, 1, 2, 3, 0]))
    spare = draw(st.sampled_from([0, 1, 2, 5, 0, 1, 2, 5, -1]))
    selection = {
        "select_block": m, "num_selected": initial + local + spare, "num_initial": initial,
        "num_local": local,
    }  # fmt: skip
    values: dict[str, Any] = {"q": q, "scale": draw(scale)}
    if name in ("attention", "sliding_window_attention", "selected_attention"):
        values |= {"k": k, "v": v}
    if name in ("compressed_attention", "select_blocks"):
        values |= {"k_cmp": k_cmp, "kv_len": t, **geometry}
    if name == "compressed_attention":
        values["v_cmp"] = v_cmp
    if name == "select_blocks":
        values |= {"lse": draw(tensor((b, s, hkv * group), torch.float32)), **selection}
        values["lse"] = values["lse"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    if name == "selected_attention":
        top = -(-t // m) + (draw(st.integers(0, 9)) == 0)
        rows = draw(st.permutations(range(-1, max(top, 1))))[: draw(st.integers(1, 3))]
        values["block_indices"] = torch.tensor(rows).int().expand(b, s, hkv, len(rows))
        values["select_block"] = m
    if name == "nsa_attention":
        values |= {"k_cmp": k_cmp, "v_cmp": v_cmp, "k_slc": k, "v_slc": v, "k_win": k, "v_win": v}
        values |= {"gates": torch.full((b, s, hkv * group, 3), 0.5, dtype=dtype)}
        values |= {**geometry, **selection}
    if name in ("nsa_attention", "sliding_window_attention"):
        values["window"] = draw(st.sampled_from([*range(1, 40), 0]))
    if packed:
        values |= draw(offsets(s, t))
    return name, values


def check(name: str, values: dict[str, Any]) -> bool:
    """Runs forward and backward; True if the call was accepted."""
    spec = get(name)
    leaves = {
        arg.name: values[arg.name].detach().clone().requires_grad_()
        for arg in spec.tensors
        if arg.differentiable
        and isinstance(values.get(arg.name), Tensor)
        and values[arg.name].is_floating_point()
    }
    given = {**values, **leaves}
    try:
        results = getattr(nsa, name)(**given)
    except InvalidArgument as error:
        assert error.argument in spec.names
        return False
    results = results if isinstance(results, tuple) else (results,)
    bound = spec.bind({**spec.defaults, **given})
    for (label, shape, dtype), x in zip(bound.returns(), results, strict=True):
        assert tuple(x.shape) == tuple(shape) and x.dtype == dtype
        assert not x.isnan().any(), f"NaN in {label}"
        if label.startswith("o"):
            assert x.isfinite().all(), f"infinity in {label}"
    if spec.backward:
        results[0].float().sum().backward()
        for label, leaf in leaves.items():
            assert leaf.grad is not None and leaf.grad.shape == leaf.shape
            assert not leaf.grad.isnan().any(), f"NaN in the gradient of {label}"
    return True


def test_attention_ops_give_a_typed_error_or_a_result() -> None:
    """For every op some calls are accepted and some refused, which guards the strategy."""
    outcomes: set[tuple[str, bool]] = set()

    @settings(max_examples=300)
    @given(attention_call())
    def every(call: tuple[str, dict[str, Any]]) -> None:
        outcomes.add((call[0], check(*call)))

    every()
    assert {name for name, accepted in outcomes if accepted} == set(ATTENTIONS)
    assert {name for name, accepted in outcomes if not accepted} == set(ATTENTIONS)


@st.composite
def compress_call(draw: Any) -> dict[str, Any]:
    dtype = draw(st.sampled_from(FLOATS))
    b, t = draw(st.integers(1, 3)), draw(size)
    hkv, dim, hidden = (draw(st.integers(1, 4)) for _ in range(3))
    d = draw(st.integers(1, 4))
    l = d * draw(st.integers(1, 3)) + (draw(st.integers(0, 15)) == 0)
    method = draw(st.sampled_from(["mean", "linear", "mlp", "max"]))
    lead = (hkv,) if draw(st.booleans()) else ()
    width = dim if method == "linear" else hidden
    shapes = {
        "w1": (*lead, l * dim, width), "b1": (*lead, width), "w2": (*lead, hidden, dim),
        "b2": (*lead, dim), "pe": (*lead, l, dim),
    }  # fmt: skip
    used = {"mean": ("pe",), "linear": ("w1", "b1", "pe"), "mlp": tuple(shapes), "max": ()}[method]
    values: dict[str, Any] = {"x": draw(tensor((b, t, hkv, dim), dtype))}
    values |= {name: draw(tensor(shapes[name], dtype)) for name in used}
    if draw(st.integers(0, 12)) == 0:
        values.pop(draw(st.sampled_from(list(values)[1:] or ["none"])), None)
    if draw(st.integers(0, 3)) == 0 and t > 1:
        cut = draw(st.integers(0, t))
        values["cu_seqlens_k"] = torch.tensor([0, cut, t], dtype=torch.int32)
    return {**values, "method": method, "block": l, "stride": d}


@settings(max_examples=200)
@given(compress_call())
def test_compress_gives_a_typed_error_or_a_result(values: dict[str, Any]) -> None:
    check("compress", values)
