"""One test for each defect of public NSA kernels that `docs/hopper.md` lists, in its order.

Through the public ops, as a user would meet them, on the interpreted Triton kernels. What an op
must give is judged by its own spec against the float64 reference; the launchers' tests next door
look closer at each kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from masked_oracle import far_apart

import nsa_neuron as nsa
from nsa_neuron.cases import cast
from nsa_neuron.ops import OPS, get
from nsa_neuron.registry import use_backend

pytestmark = pytest.mark.sim
SMALL = {"block": 8, "stride": 4, "select_block": 16, "num_selected": 4}


@pytest.fixture(autouse=True)
def on_the_interpreter():
    with use_backend("cuda:sim"):
        yield


def judge(name: str, values: dict[str, Any], **inputs: Any) -> tuple[torch.Tensor, ...]:
    """The results of a call on the backend in use, each within its budget of the float64 truth.

    Args:
        inputs: arguments of the call that differ from `values`, such as strided copies.
    """
    spec = get(name)
    given = {**spec.defaults, **values}
    got = _several(getattr(torch.ops.nsa, name)(**{**given, **inputs}))
    truth = _several(spec.reference(**cast(given, torch.float64, ())))
    eager = _several(spec.reference(**given))
    for item, mine, exact, plain in zip(spec.returns, got, truth, eager, strict=True):
        diff = spec.compare[item.name](mine, exact, plain, given)
        assert diff.ok, f"{name}, {item.name}: {diff.detail}"
    return got


def _several(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def case(name: str, which: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    spec = get(name)
    return spec.arguments(next(c for c in spec.cases if c.name == which), dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forward_and_backward(name: str, values: dict[str, Any], **grads: Any) -> tuple[Any, ...]:
    """Judges an op and its backward; returns the gradients."""
    results = judge(name, values)
    spec, saved = get(name), {}
    for item, x in zip(spec.returns, results, strict=True):
        if item.name in spec.saves:
            saved[item.name] = x
    first = f"grad_{spec.returns[0].name}"
    given = {first: normal(*results[0].shape, dtype=results[0].dtype, seed=9), **grads}
    return judge(spec.backward, {**values, **saved, **given})


def test_window_of_w_tokens_in_prefill_and_in_decode():
    """Not w + 1 in one of them: with equal logits o counts the values that were seen."""
    tokens, window = 40, 9
    q, k = torch.zeros(1, tokens, 1, 16), torch.zeros(1, tokens, 1, 16)
    v = torch.eye(tokens).view(1, tokens, 1, tokens)
    prefill, _ = nsa.sliding_window_attention(q, k, v, window=window)
    table = torch.arange(5, dtype=torch.int32)[None]
    page, gates = v.view(5, 8, 1, tokens), torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 1, 3)
    keys = k.view(5, 8, 1, 16)
    step = nsa.decode(
        q[:, -1:], keys, page, k.view(1, tokens, 1, 16), v.view(1, tokens, 1, tokens), keys, page,
        gates, torch.tensor([tokens], dtype=torch.int32), table, table[:, :1], table,
        block=8, stride=8, select_block=8, num_selected=3, window=window,
    )  # fmt: skip
    seen = [row.nonzero().flatten().tolist() for row in prefill[0, :, 0]]
    assert seen == [list(range(max(0, t - window + 1), t + 1)) for t in range(tokens)]
    assert step[0, 0, 0].nonzero().flatten().tolist() == seen[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_running_maximum_for_every_token(dtype):
    """Not the first token's for a whole tile: the others' exponentials overflow float16."""
    q, k, v = (normal(1, 40, 4 if i == 0 else 1, 32, seed=i).to(dtype) for i in range(3))
    q[:, 1:] *= 60
    o, lse = judge("attention", {"q": q, "k": k, "v": v, "scale": 1.0})
    assert lse.max() > 500 and o.isfinite().all()


def test_rows_without_any_valid_block():
    """No 0 / 0: o = 0, and gradients of 0."""
    values = case("selected_attention", "dead_rows")
    dead = (values["block_indices"] < 0).all(-1)
    assert dead.any() and not dead.all()
    o, _ = judge("selected_attention", values)
    assert not o[dead.repeat_interleave(o.shape[2] // dead.shape[2], -1)].any()
    forward_and_backward("selected_attention", values)


def test_scale_is_not_rounded_into_q():
    """0.11 is no bfloat16 number: with it rounded into q, lse moves by 1e-3 of itself."""
    q, k, v = (normal(1, 30, 2, 64, dtype=torch.bfloat16, seed=i) for i in range(3))
    judge("attention", {"q": q * 8, "k": k, "v": v, "scale": 0.11})


@pytest.mark.parametrize(
    ("name", "which"),
    [("attention", "group4_s40"), ("sliding_window_attention", "group4_s40"),
     ("selected_attention", "group4_s40"), ("compressed_attention", "l8_d4"),
     ("nsa_attention", "group4_s40"), ("decode", "two_sequences")],
)  # fmt: skip
def test_a_custom_scale_is_honoured(name, which):
    """And changes the result, so that the comparison could notice that it is ignored."""
    values = case(name, which)
    custom = judge(name, {**values, "scale": 0.37})
    default = judge(name, values)
    assert not custom[0].equal(default[0])


def test_scores_of_large_groups_do_not_overflow_half_precision():
    """40 heads that agree: sums of probabilities and of logits beyond float16's 65,504."""
    q = normal(1, 42, 1, 32, dtype=torch.float16).expand(1, 42, 40, 32) * 80
    k = normal(1, 9, 1, 32, dtype=torch.float16, seed=1) * 80
    where = {"kv_len": 42, "block": 8, "stride": 4, "scale": 1.0}
    _, lse = nsa.compressed_attention(q, k, k, **where)
    assert lse.max() > 65_504
    values = {"q": q, "k_cmp": k, "lse": lse, **where, **SMALL}
    judge("select_blocks", values)


def test_a_future_block_does_not_tie_with_an_underflowed_one():
    """Key 13 makes every other probability 0: what remains is chosen by lowest id, never later."""
    k = torch.zeros(1, 24, 1, 16)
    k[0, 13] = 100.0
    q = torch.ones(1, 96, 1, 16)
    where = {"kv_len": 96, "block": 4, "stride": 4, "scale": 1.0}
    _, lse = nsa.compressed_attention(q, k, k, **where)
    ids = nsa.select_blocks(
        q, k, lse, **where, select_block=4, num_selected=5, num_initial=1, num_local=1
    )
    for t, row in enumerate(ids[0, :, 0].tolist()):
        own, chosen = t // 4, [j for j in row if j >= 0]
        must = {0, own} | ({13} if own >= 13 else set())
        rest = [j for j in range(own + 1) if j not in must]
        assert chosen == sorted([*must, *rest[: min(5, own + 1) - len(must)]])


def test_importance_is_the_sum_over_the_groups_heads():
    """One head decides alone if only it is sure; neither its mean nor the first head's is taken.

    Head 1 gives all of its mass to block 2, head 0 a little more than even shares to block 3.
    """
    k = torch.zeros(1, 8, 1, 16)
    k[0, 2, 0, 0], k[0, 3, 0, 1] = 1.0, 1.0
    q = torch.zeros(1, 32, 2, 16)
    q[:, :, 0, 1], q[:, :, 1, 0] = 0.1, 20.0
    where = {"kv_len": 32, "block": 4, "stride": 4, "scale": 1.0}
    _, lse = nsa.compressed_attention(q, k, k, **where)
    values = {"q": q, "k_cmp": k, "lse": lse, **where}
    selection = {"select_block": 4, "num_selected": 3, "num_initial": 1, "num_local": 1}
    (ids,) = judge("select_blocks", {**values, **selection})
    assert ids[0, -1, 0].tolist() == [0, 2, 7]


def test_lse_of_an_empty_row_is_minus_infinity():
    values = case("compressed_attention", "one_token")
    o, lse = judge("compressed_attention", values)
    assert not o.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "name", [s.name for s in OPS if s.direction == "backward" and s.stem != "nsa_attention"]
)
def test_gradients_are_bit_equal_from_run_to_run(name):
    """No atomics: with any in them, sums come in another order. (Of the whole: conformance.)"""
    which = {"compress_backward": "mlp_kv2", "selected_attention_backward": "default_block"}
    values = case(name, which.get(name, "batch2_kv2"))
    op = getattr(torch.ops.nsa, name)
    for first, second in zip(op(**values), op(**values), strict=True):
        assert first.equal(second)


def test_offsets_beyond_32_bits():
    """Keys almost 2**22 elements apart: from token 514 on an int32 offset wraps."""
    q, k, v = (normal(1, t, h, 16, dtype=torch.float16, seed=i)
               for i, (t, h) in enumerate(((3, 2), (600, 1), (600, 1))))  # fmt: skip
    far = {"k": far_apart(k), "v": far_apart(v)}
    judge("sliding_window_attention", {"q": q, "k": k, "v": v, "window": 9}, **far)


def test_offsets_beyond_32_bits_in_a_page():
    """A contiguous cache is one page per sequence: its tokens lie as far apart as they like."""
    values = case("decode", "one_token", torch.float16)
    tokens = 48
    where = {"seqlens": torch.tensor([tokens], dtype=torch.int32), "scale": 0.3}
    one_page = torch.zeros(1, 1, dtype=torch.int32)
    tables = {f"{name}_table": one_page for name in ("cmp", "slc", "win")}
    pools = {}
    for i, (name, rows) in enumerate((("cmp", 11), ("slc", tokens), ("win", tokens))):
        for side in "kv":
            seed = 2 * i + (side == "v")
            pools[f"{side}_{name}"] = normal(1, rows, 1, 32, dtype=torch.float16, seed=seed)
    far = {name: far_apart(x, 2**26) for name, x in pools.items() if x.shape[1] == tokens}
    judge("decode", {**values, **where, **tables, **pools}, **far)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 20])
def test_any_group(group):
    """Not only 16 and its multiples."""
    values = case("nsa_attention", "group4_s40")
    heads = {"q": normal(1, 40, group, 64), "gates": torch.rand(1, 40, group, 3)}
    judge("nsa_attention", {**values, **heads})


def test_key_and_value_dims_differ():
    values = case("nsa_attention", "dims_odd_80_24")
    assert values["k_cmp"].shape[-1] != values["v_cmp"].shape[-1]
    judge("nsa_attention", values)
    judge("nsa_attention_backward", case("nsa_attention_backward", "dims_odd_80_24"))


@pytest.mark.parametrize("branch", range(3))
def test_gradients_of_each_branch_alone(branch):
    """Gates of 0 and 1 leave one branch: the others' gradients are 0, its own are right."""
    values = case("nsa_attention", "group4_s40")
    gates = torch.zeros_like(values["gates"])
    gates[..., branch] = 1
    grads = forward_and_backward_of_the_whole({**values, "gates": gates})
    given = [name for name in values if name.startswith(("k_", "v_"))]
    for name, grad in zip(given, grads[1:7], strict=True):
        own = name.endswith(("cmp", "slc", "win")[branch])
        assert bool(grad.any()) == own, name


def forward_and_backward_of_the_whole(values: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Judges `nsa_attention` with its backward, whose inputs are the forward's float64 results."""
    forward = get("nsa_attention_forward")
    exact = forward.reference(**cast(values, torch.float64, ()))
    named = dict(zip([item.name for item in forward.returns], exact, strict=True))
    grad_o = normal(*named.pop("o").shape, seed=9)
    saved = cast(named, torch.float32, ())
    judge("nsa_attention_forward", values)
    return judge("nsa_attention_backward", {**values, **saved, "grad_o": grad_o})


def test_a_decode_step_gives_what_prefill_gave():
    """Token by token against pages, over block and window edges."""
    values = case("nsa_attention", "group4_s40")
    prefill = nsa.nsa_attention(**values)
    pages = {}
    for name in ("cmp", "slc", "win"):
        for side in "kv":
            x = values[f"{side}_{name}"]
            size = -(-x.shape[1] // 16) * 16
            padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, size - x.shape[1]))
            pages[f"{side}_{name}"] = padded.view(-1, 16, *x.shape[2:])
        table = torch.arange(len(pages[f"k_{name}"]), dtype=torch.int32)
        pages[f"{name}_table"] = table[None]
    scalars = {name: values[name] for name in (*SMALL, "window", "scale")}
    for t in (0, 6, 7, 15, 16, 19, 20, 31, 39):
        step = nsa.decode(
            q=values["q"][:, t : t + 1], gates=values["gates"][:, t : t + 1],
            seqlens=torch.tensor([t + 1], dtype=torch.int32), **pages, **scalars,
        )  # fmt: skip
        torch.testing.assert_close(step, prefill[:, t : t + 1], rtol=0, atol=2e-6)


def test_models_of_other_geometry_in_one_process():
    """Interleaved calls give what each gives alone: no state of a module is shared."""
    calls = [case("nsa_attention", which) for which in ("group4_s40", "l_d_m_equal")]
    alone = [nsa.nsa_attention(**values) for values in calls]
    for values, expected in reversed(list(zip(calls, alone, strict=True))):
        assert nsa.nsa_attention(**values).equal(expected)


def two_tiles():
    """A call of `nsa_attention` that cuts queries and keys."""
    values = case("nsa_attention", "several_tiles")
    return {
        key: x[:, -20:] if key in ("q", "gates") else x[:, :300] if key[:2] in ("k_", "v_") else x
        for key, x in values.items()
    }


@pytest.fixture(scope="module")
def unchanged():
    """Its result."""
    with use_backend("cuda:sim"):
        return nsa.nsa_attention(**two_tiles())


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 8), ("select_block", 32), ("num_selected", 6), ("num_initial", 0),
     ("num_local", 1), ("window", 7), ("scale", 0.5)],
)  # fmt: skip
def test_no_argument_is_ignored(name, value, unchanged):
    """Each changes the result, and to the right one."""
    values = two_tiles()
    changed = {**values, name: value}
    if name == "stride":
        blocks = (values["k_slc"].shape[1] - values["block"]) // value + 1
        changed |= {key: values[key][:, :blocks] for key in ("k_cmp", "v_cmp")}
    (o,) = judge("nsa_attention", changed)
    assert not o.equal(unchanged)


@pytest.mark.parametrize(
    "name",
    ["attention", "sliding_window_attention", "selected_attention", "compressed_attention"],
)
def test_grad_o_has_strides_of_its_own(name):
    """Broadcast gradients have stride 0, transposed ones another order than o."""
    backward = f"{name}_backward"
    values = case(backward, "batch2_kv2")
    grad = values["grad_o"].transpose(1, 2).contiguous().transpose(1, 2)
    assert grad.stride() != values["o"].stride()
    judge(backward, values, grad_o=grad)
    ones = torch.ones(()).expand_as(grad)
    judge(backward, {**values, "grad_o": ones.contiguous()}, grad_o=ones)
