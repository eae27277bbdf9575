"""`cpu:native` where a second chunk, part, tail or page begins, and what lies beside tensors."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_neuron.backends.cpu.native_mode import IMPLEMENTATIONS, build
from nsa_neuron.cases import Case, cast
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.ops import get

pytestmark = pytest.mark.skipif(bool(build.hindrance()), reason=f"no kernels: {build.hindrance()}")

F32 = torch.float32


def arguments(
    op: str, sizes: dict[str, int], dtype: torch.dtype = F32, **scalars: int
) -> dict[str, Any]:
    shape = {"B": 1, "Hq": 1, "Hkv": 1, "Dk": 4, "Dv": 3} | sizes
    return get(op).arguments(Case(f"{op}-{sizes}", ("edge",), shape, scalars), dtype)


def results(op: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = IMPLEMENTATIONS[op](**values)
    return out if isinstance(out, tuple) else (out,)


def check(op: str, values: dict[str, Any]) -> None:
    """Within the op's budget of the float64 reference."""
    spec = get(op)
    stats = tuple(arg.name for arg in spec.tensors if arg.dtype == "stat")
    wanted = [
        x if isinstance(x, tuple) else (x,)
        for x in (
            spec.reference(**cast(values, torch.float64, ())),
            spec.reference(
                **cast(values, values["gates" if op.startswith("g") else "q"].dtype, stats)
            ),
        )
    ]
    for item, mine, oracle, plain in zip(spec.returns, results(op, values), *wanted, strict=True):
        diff = spec.compare[item.name](mine, oracle, plain, values)
        assert diff.ok, f"{item.name}: {diff.detail}"


NARROW = {"block": 1, "stride": 1, "select_block": 4}


@pytest.mark.parametrize(
    ("op", "sizes", "scalars"),
    [
        # 600 compressed keys: three products with values; 12,300: not one row of logits fits.
        ("nsa_attention_forward", {"S": 9, "T": 600}, {**NARROW, "num_selected": 5}),
        ("nsa_attention_forward", {"S": 10, "T": 12_300, "Hq": 16}, {**NARROW, "num_selected": 5}),
        ("nsa_attention_forward", {"S": 3, "T": 700, "Hq": 2}, {**NARROW, "num_selected": 9}),
        ("nsa_attention_forward", {"S": 40, "T": 90, "Hq": 40, "Hkv": 2},
         {**NARROW, "num_initial": 3, "num_local": 3, "num_selected": 9}),
        # More heads than rows of a tile; keys in several chunks, parts and merges.
        ("attention", {"S": 9, "T": 300, "Hq": 260, "Hkv": 2}, {}),
        ("attention_backward", {"S": 9, "T": 300, "Hq": 260, "Hkv": 2}, {}),
        ("attention", {"S": 300, "T": 600, "B": 2}, {}),
        ("attention_backward", {"S": 300, "T": 600, "B": 2}, {}),
        ("sliding_window_attention", {"S": 300, "T": 600}, {"window": 70}),
        ("sliding_window_attention_backward", {"S": 300, "T": 600}, {"window": 70}),
        ("selected_attention", {"S": 9, "T": 90, "Hq": 80, "Hkv": 2},
         {"select_block": 5}),
        ("selected_attention_backward", {"S": 9, "T": 90, "Hq": 80, "Hkv": 2},
         {"select_block": 5}),
        ("gated_sum", {"S": 300, "Dv": 17}, {}),
        ("gated_sum_backward", {"S": 300, "Dv": 17}, {}),
    ],
)  # fmt: skip
def test_second_chunks_and_parts(op, sizes, scalars):
    check(op, arguments(op, sizes, **scalars))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(7, 9), (17, 24)])
def test_a_few_queries_read_any_number_of_16_bit_channels(dtype, dims):
    sizes = {"S": 2, "T": 11, "Hq": 4, "Hkv": 2, "Dk": dims[0], "Dv": dims[1]}
    values = arguments("attention", sizes, dtype)
    check("attention", values)


@pytest.mark.parametrize(("batch", "heads"), [(2, 1), (1, 2)])
def test_a_block_that_all_read_is_summed_in_parts_of_its_own_head(batch, heads):
    """1,030 readers of block 0 in each of two lanes, and of nothing else."""
    sizes = {"B": batch, "S": 1030, "T": 1030, "Hq": heads, "Hkv": heads, "Dk": 2, "Dv": 2}
    values = arguments("selected_attention_backward", sizes, select_block=16)
    ids = torch.zeros(batch, 1030, heads, 1, dtype=torch.int32)
    forward = {name: values[name] for name in ("q", "k", "v", "scale", "select_block")}
    o, lse = get("selected_attention").reference(**forward, block_indices=ids)
    values |= {"block_indices": ids, "o": o, "lse": lse}
    check("selected_attention_backward", values)


@pytest.mark.parametrize("op", ["sliding_window_attention", "sliding_window_attention_backward"])
def test_windows_of_sequences_whose_first_keys_nobody_sees(op):
    """Each begins with whole tiles of 64 keys, other ones than its neighbours, that none reads."""
    values = arguments(op, {"S": 45, "T": 600, "Hq": 2, "Hkv": 2}, window=7)
    queries, keys = [0, 9, 29, 45], [0, 70, 350, 600]
    cu = {f"cu_seqlens_{x}": torch.tensor(at, dtype=torch.int32)
          for x, at in (("q", queries), ("k", keys))}  # fmt: skip
    if op.endswith("backward"):
        forward = {name: values[name] for name in ("q", "k", "v", "window", "scale")}
        o, lse = get("sliding_window_attention").reference(**forward, **cu)
        values |= {"o": o, "lse": lse}
    check(op, values | cu)


OF_KEYS = [
    ("attention", {}), ("attention_backward", {}),
    ("sliding_window_attention", {"window": 7}),
    ("sliding_window_attention_backward", {"window": 7}),
    ("compressed_attention", {"block": 4, "stride": 2}),
    ("compressed_attention_backward", {"block": 4, "stride": 2}),
    ("selected_attention", {"select_block": 8}),
    ("selected_attention_backward", {"select_block": 8}),
    ("nsa_attention_forward",
     {"block": 4, "stride": 2, "select_block": 8, "num_selected": 4, "window": 7}),
]  # fmt: skip


@pytest.mark.parametrize("queries", [2, 21])
@pytest.mark.parametrize(("op", "scalars"), OF_KEYS)
def test_nothing_behind_the_keys_is_read(op, scalars, queries):
    """NaN stands behind every sequence's last key and value, and between its keys."""
    values = arguments(op, {"B": 2, "S": queries, "T": 37, "Hq": 4, "Hkv": 2}, **scalars)
    wanted = results(op, values)
    for name in [name for name in values if name.startswith(("k_", "v_")) or name in ("k", "v")]:
        x = values[name]
        if isinstance(x, Tensor):
            store = torch.full((2, x.shape[1] + 64, 2, x.shape[3] + 5), float("nan"))
            values[name] = store[:, : x.shape[1], :, : x.shape[3]].copy_(x)
    for got, want in zip(results(op, values), wanted, strict=True):
        assert torch.equal(got, want)


def far(x: Tensor, axis: int) -> Tensor:
    """x with 3 * 2**30 elements from the first to the last on an axis, in memory that is not there
    until it is touched."""
    strides = list(x.contiguous().stride())
    strides[axis] = -(-(2**31 + 2**30) // (x.shape[axis] - 1))
    count = sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    place = mmap.mmap(-1, 4 * count, flags=flags)
    return torch.frombuffer(place, dtype=F32).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "token", "head"])
@pytest.mark.parametrize(
    ("op", "queries", "scalars"),
    [
        ("attention", 2, {}),
        ("attention", 9, {}),
        ("attention_backward", 9, {}),
        ("selected_attention", 9, {"select_block": 8}),
        ("selected_attention_backward", 9, {"select_block": 8}),
    ],
)
def test_offsets_beyond_32_bits(op, queries, scalars, axis):
    of_axis = {"B": 1, "T": 6000} if axis == 1 else {"B": 2, "T": 12}
    sizes = {"S": queries, "Hq": 2, "Hkv": 2, "Dk": 1, "Dv": 1} | of_axis
    values = arguments(op, sizes, **scalars)
    wanted = results(op, values)
    for name in ("k", "v") if axis == 1 else ("q", "k", "v"):
        values[name] = far(values[name], axis)
    for got, want in zip(results(op, values), wanted, strict=True):
        assert torch.equal(got, want)


def test_the_exponential_is_good_to_a_few_units_in_the_last_place():
    """Two keys with logits x and 0 and the values 1 and 0: o = 1 / (1 + exp(-x)), by hand."""
    x = torch.cat((torch.linspace(-80, 80, 1601), torch.linspace(-1, 1, 401)))
    q = torch.zeros(len(x), 2, 1, 1)
    q[:, 1, 0, 0] = x
    k = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(len(x), 2, 1, 1).contiguous()
    o, lse = results("attention", {"q": q, "k": k, "v": k, "scale": 1.0})
    exact = x.double()
    wanted = torch.sigmoid(exact)
    assert ((o[:, 1, 0, 0] - wanted) / wanted).abs().max() < 5e-7
    error = lse[:, 1, 0] - torch.nn.functional.softplus(exact)
    assert (error / exact.abs().clamp(min=1)).abs().max() < 2.5e-7


@pytest.mark.parametrize("queries", [1, 9])
def test_the_largest_logit_is_found_wherever_it_stands(queries):
    """One key of 70 far above the others, at each place: its value alone comes out."""
    keys = 70
    k = torch.eye(keys).view(keys, keys, 1, 1) * 200
    v = torch.arange(1.0, keys + 1).view(1, keys, 1, 1).expand(keys, keys, 1, 1).contiguous()
    o, lse = results(
        "attention", {"q": torch.ones(keys, queries, 1, 1), "k": k, "v": v, "scale": 1.0}
    )
    seen = torch.arange(keys)[:, None] <= torch.arange(keys - queries, keys)
    assert torch.equal(o[..., 0, 0][seen], v[0, :, 0].expand(keys, queries)[seen])
    assert (lse[..., 0][seen] == 200).all()


@pytest.mark.parametrize("queries", [2, 9])
def test_a_nan_is_passed_on_even_if_nothing_else_is_seen(queries):
    values = arguments("attention", {"S": queries, "T": queries})
    values["k"][:, 0] = float("nan")
    o, lse = results("attention", values)
    assert o.isnan().all() and lse.isnan().all()


def test_a_lack_of_memory_is_a_memory_error():
    """256 TiB, which no address space has."""
    values = arguments("selected_attention", {"S": 9, "T": 9}, select_block=8)
    values["block_indices"] = torch.zeros(1, 9, 1, 1, dtype=torch.int32)
    with pytest.raises(MemoryError, match="selected_attention"):
        IMPLEMENTATIONS["selected_attention"](**{**values, "select_block": 2**46})


def a_decode() -> dict[str, Any]:
    spec = get("decode")
    case = next(case for case in spec.cases if case.name == "two_sequences")
    return spec.arguments(case, F32)


@pytest.mark.parametrize("branch", ["cmp", "slc", "win"])
def test_the_first_page_behind_a_pool_is_refused(branch):
    values = a_decode()
    values[f"{branch}_table"][:, :] = values[f"k_{branch}"].shape[0]
    with pytest.raises(InvalidArgument, match="page") as caught:
        IMPLEMENTATIONS["decode"](**values)
    assert caught.value.argument == "seqlens"


def test_a_table_one_page_short_is_refused():
    values = a_decode()
    needed = -(-int(values["seqlens"].max()) // values["k_slc"].shape[1])
    results("decode", {**values, "slc_table": values["slc_table"][:, :needed].contiguous()})
    short = values["slc_table"][:, : needed - 1].contiguous()
    with pytest.raises(InvalidArgument, match="longer than its table"):
        IMPLEMENTATIONS["decode"](**{**values, "slc_table": short})


@pytest.mark.parametrize(("tokens", "last"), [(64, 3), (65, 4), (79, 4), (80, 4)])
def test_the_last_block_is_read_and_the_next_refused(tokens, last):
    """Blocks of 16, the last one whole or not; the last query stands in it."""
    values = arguments("selected_attention", {"S": 9, "T": tokens}, select_block=16)
    values["block_indices"] = torch.full((1, 9, 1, 1), last, dtype=torch.int32)
    _, lse = results("selected_attention", values)
    assert lse[0, -1].isfinite().all()
    values["block_indices"] += 1
    with pytest.raises(InvalidArgument, match=rf"id {last + 1} .* in \[-1, {last + 1}\)"):
        results("selected_attention", values)
