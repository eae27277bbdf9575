"""Launches at a million tokens: grids within CUDA's limits, arguments as the kernels want them.

Nothing runs: launchers get tensors without memory and kernels that record (`recorder`). A grid of
more than 65,535 along y or z, or an argument in the wrong place, would show on a GPU only.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from recorder import Kernels, Memory, tensor

from nsa_neuron.backends.cuda import BACKEND, plans
from nsa_neuron.backends.cuda.kernel_table import KERNELS, Shape
from nsa_neuron.backends.cuda.launch import (
    attention,
    common,
    compress,
    compressed_attention,
    decode,
    gated_sum,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from nsa_neuron.backends.launching import with_scale
from nsa_neuron.ops import get
from nsa_neuron.registry import Supported, Unsupported

MILLION = 2**20
LIMITS = (2**31 - 1, 65_535, 65_535)
"""CUDA C++ Programming Guide, compute capability 9.0: the largest grid along x, y and z."""

H200_BYTES = 143_771 * 2**20
"""What nvidia-smi shows of an H200 (machine notes of 2026-10-27)."""

GEOMETRY = {"block": 32, "stride": 16}
SELECTION = {"select_block": 64, "num_selected": 16, "num_initial": 1, "num_local": 2}
CASES = {
    "1M, G=16": SimpleNamespace(batch=1, tokens=MILLION, heads=64, kv=4, sequences=0),
    "1M, G=1": SimpleNamespace(batch=1, tokens=MILLION, heads=64, kv=64, sequences=0),
    "64 x 1M, G=16": SimpleNamespace(batch=64, tokens=MILLION, heads=64, kv=4, sequences=0),
    "64 x 1M, G=1": SimpleNamespace(batch=64, tokens=MILLION, heads=16, kv=16, sequences=0),
    "1M packed": SimpleNamespace(batch=1, tokens=MILLION, heads=64, kv=4, sequences=5000),
    "1M packed, G=1": SimpleNamespace(batch=1, tokens=MILLION, heads=16, kv=16, sequences=5000),
}


def attention_inputs(case, keys=None, dk=192, dv=128):
    keys = case.tokens if keys is None else keys
    q = tensor(case.batch, case.tokens, case.heads, dk)
    k, v = (tensor(case.batch, keys, case.kv, dim) for dim in (dk, dv))
    return q, k, v


def lengths(case):
    if not case.sequences:
        return {}
    cu = tensor(case.sequences + 1, dtype=torch.int32)
    return {"cu_seqlens_q": cu, "cu_seqlens_k": cu}


def plan(op, case, dtype="bfloat16"):
    group = case.heads // case.kv
    return plans.find("h200", op, dk=192, dv=128, dtype=dtype, group=group)


def both_ways(launcher, op, case, inputs, **named):
    """Forward and backward of an attention-like op; what they launched."""
    kernels = Kernels(op)
    named |= {"scale": 0.1, **lengths(case)}
    o, lse = launcher.forward(kernels, plan(op, case), *inputs, **named)
    grads = launcher.backward(
        kernels, plan(op, case), torch.empty_like(o), *inputs, o, lse, torch.empty_like(lse),
        **named,
    )  # fmt: skip
    assert all(g.shape == x.shape and g.is_meta for g, x in zip(grads, inputs[:3], strict=True))
    return kernels.launches


def run_attention(case):
    return both_ways(attention, "attention", case, attention_inputs(case))


def run_window(case):
    op = "sliding_window_attention"
    return both_ways(sliding_window_attention, op, case, attention_inputs(case), window=512)


def run_selected(case):
    ids = tensor(case.batch, case.tokens, case.kv, 16, dtype=torch.int32)
    inputs = (*attention_inputs(case), ids)
    return both_ways(selected_attention, "selected_attention", case, inputs, select_block=64)


def run_compressed(case):
    blocks = max(0, (case.tokens - 32) // 16 + 1)
    inputs = attention_inputs(case, keys=blocks)
    named = {"kv_len": case.tokens, **GEOMETRY}
    return both_ways(compressed_attention, "compressed_attention", case, inputs, **named)


def run_select(case):
    q, k_cmp, _ = attention_inputs(case, keys=max(0, (case.tokens - 32) // 16 + 1))
    lse = tensor(case.batch, case.tokens, case.heads, dtype=torch.float32)
    kernels = Kernels("select_blocks")
    named = {"kv_len": case.tokens, "scale": 0.1, **GEOMETRY, **SELECTION, **lengths(case)}
    ids = select_blocks.forward(kernels, plan("select_blocks", case), q, k_cmp, lse, **named)
    assert ids.shape == (case.batch, case.tokens, case.kv, 16) and ids.is_meta
    return kernels.launches


def run_compress(case):
    kernels, dim, hidden = Kernels("compress"), 192, 192
    x = tensor(case.batch, case.tokens, case.kv, dim)
    w1, w2 = tensor(32 * dim, hidden), tensor(hidden, dim)
    b1, b2, pe = tensor(hidden), tensor(dim), tensor(case.kv, 32, dim)
    cu = {name: cu for name, cu in lengths(case).items() if name == "cu_seqlens_k"}
    for method, weights in (
        ("mean", (None, None, None, None)),
        ("linear", (w1, b1, None, None)),
        ("mlp", (w1, b1, w2, b2)),
    ):
        named = {"method": method, **GEOMETRY, **cu}
        constants = plan("compress", case)
        y = compress.forward(kernels, constants, x, *weights, pe, **named)
        grads = compress.gradients(kernels, constants, y, x, *weights, pe, **named)
        for grad, value in zip(grads, (x, *weights, pe), strict=True):
            assert (grad is None) == (value is None)
            assert grad is None or (grad.shape == value.shape and grad.is_meta)
    return kernels.launches


def run_gated(case):
    kernels = Kernels("gated_sum")
    branches = [tensor(case.batch, case.tokens, case.heads, 128) for _ in range(3)]
    gates = tensor(case.batch, case.tokens, case.heads, 3)
    constants = plan("gated_sum", case)
    o = gated_sum.forward(kernels, constants, *branches, gates)
    gated_sum.backward(kernels, constants, o, *branches, gates)
    return kernels.launches


RUN = {
    "attention": run_attention,
    "sliding_window_attention": run_window,
    "selected_attention": run_selected,
    "compressed_attention": run_compressed,
    "select_blocks": run_select,
    "compress": run_compress,
    "gated_sum": run_gated,
}


def run_decode(batch, kv_heads, group, pages):
    kernels = Kernels("decode")
    case = SimpleNamespace(heads=kv_heads * group, kv=kv_heads)

    def pools():
        return (tensor(batch * pages, 128, kv_heads, dim) for dim in (192, 128))

    def table():
        return tensor(batch, pages, dtype=torch.int32)

    k_cmp, v_cmp = pools()
    k, v = pools()
    caches = decode.PagedCaches(
        seqlens=tensor(batch, dtype=torch.int32), k_cmp=k_cmp, v_cmp=v_cmp, cmp_table=table(),
        k_slc=k, v_slc=v, slc_table=table(), k_win=k, v_win=v, win_table=table(),
    )  # fmt: skip
    geometry = decode.Geometry(**GEOMETRY, **SELECTION, window=512, scale=0.1)
    q = tensor(batch, 1, kv_heads * group, 192)
    gates = tensor(batch, 1, kv_heads * group, 3)
    o = decode.step(kernels, plan("decode", case), q, gates, caches, geometry)
    assert o.shape == (batch, 1, kv_heads * group, 128)
    return kernels.launches


def check_grid(launch):
    assert 1 <= len(launch.grid) <= 3
    for size, limit in zip(launch.grid, LIMITS, strict=False):
        assert 1 <= size <= limit, f"{launch.name}: grid {launch.grid}"


TRITON_NAMES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.int16: "i16", torch.int8: "i8",
}  # fmt: skip
# Arguments that are not read under these constants; launchers pass any tensor for them.
UNREAD = {
    "PACKED": ("cu_q", "cu_k", "cu_cmp", "starts", "total"),
    "HAS_PE": ("pe", "y_sum"),
    "HAS_BIAS": ("bias",),
    "GELU": ("hidden",),
    "HAS_GRAD_LSE": ("grad_lse",),
}


def check_arguments(op, launch):
    """The types that the compile check compiles for are those of the launch."""
    entries = [e for e in KERNELS if (e.op, e.kernel) == (op, launch.name)]
    constants = {p.name for p in launch.function.params if p.is_constexpr}
    unread = {
        name
        for flag, names in UNREAD.items()
        if launch.arguments.get(flag, True) is False
        for name in names
    }
    for name, value in launch.arguments.items():
        compiled = {entry.type_of(name).replace("dtype", "bf16") for entry in entries}
        if name in constants:
            right = isinstance(value, int | bool | str)
        elif isinstance(value, torch.Tensor):
            right = f"*{TRITON_NAMES[value.dtype]}" in compiled or name in unread
            right = right and value.is_meta and all(kind.startswith("*") for kind in compiled)
        else:
            right = compiled == {"fp32" if type(value) is float else "i32"}
        assert right, f"{op}.{launch.name}: {name} = {value!r}, compiled for {compiled}"


# Flags of a call, not of a plan.
CHOSEN = {"PACKED", "MEASURED", "HAS_PE", "HAS_BIAS", "GELU", "HAS_GRAD_LSE"}


def check_constants(op, launch, case):
    """The constants of the launch are among those that the compile check derives."""
    found = plan(op, case)
    shape = Shape(192, 128, case.heads // case.kv, found[launch.name])
    compiled = [e.constants(shape) for e in KERNELS if (e.op, e.kernel) == (op, launch.name)]
    for param in launch.function.params:
        if param.is_constexpr and param.name not in CHOSEN:
            value = launch.arguments[param.name]
            known = [constants[param.name] for constants in compiled]
            assert value in known, f"{op}.{launch.name}: {param.name} = {value}, not in {known}"


def check(op, launches):
    """All grids, and the arguments of the first and the last launch of each kernel, by gelu."""
    assert launches
    for launch in launches:
        check_grid(launch)
    for order in (launches, launches[::-1]):
        for launch in {(x.name, x.arguments.get("GELU")): x for x in order}.values():
            check_arguments(op, launch)


@pytest.mark.parametrize("op", RUN)
@pytest.mark.parametrize("name", CASES)
def test_a_million_tokens(op, name):
    check(op, RUN[op](CASES[name]))


@pytest.mark.parametrize("op", RUN)
@pytest.mark.parametrize("name", ["1M, G=16", "1M, G=1"])
def test_what_is_launched_is_what_is_compiled(op, name):
    for launch in RUN[op](CASES[name]):
        check_constants(op, launch, CASES[name])


@pytest.mark.parametrize("group", [1, 5, 16, 40])
def test_what_decode_launches_is_what_is_compiled(group):
    """But into how many programs a call is cut, which its batch decides."""
    cut = {"CMP_SPLITS", "WIN_SPLITS", "SLC_SPLITS", "PLACES"}
    case = SimpleNamespace(heads=group, kv=1)
    for launch in run_decode(1, 1, group, 64):
        entry = next(e for e in KERNELS if (e.op, e.kernel) == ("decode", launch.name))
        compiled = entry.constants(Shape(192, 128, group, plan("decode", case)[launch.name]))
        for param in launch.function.params:
            if param.is_constexpr and param.name not in cut:
                assert launch.arguments[param.name] == compiled[param.name], param.name


@pytest.mark.parametrize(
    ("ratio", "kept", "blocks", "slots", "warps", "stages"),
    [
        (4, 16, 16, 512, 4, 3),
        (4, 256, 16, 512, 4, 3),
        (1, 512, 64, 1024, 4, 3),  # winners so far, and as many that may take their places
        (64, 16, 1, 512, 4, 3),  # a block fills a tile of 64 keys
        (128, 16, 1, 512, 8, 1),
    ],
)
def test_tiles_of_the_scores_of_decode(ratio, kept, blocks, slots, warps, stages):
    planned = {"KEYS": 64, "PROGRAMS": 528, "SLOTS": 512, "num_warps": 4, "num_stages": 3}
    assert decode.score_constants(planned, ratio, kept) == {
        "BLOCKS": blocks, "RATIO": ratio, "SLOTS": slots, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_widths_of_lists_are_multiples_of_16(name):
    """Triton compiles a kernel once more for whole numbers that are not."""
    widths = [
        launch.arguments[argument]
        for launch in run_selected(CASES[name])
        for argument in ("width", "lane_width")
        if argument in launch.arguments
    ]
    assert widths and all(width % 16 == 0 for width in widths)


@pytest.mark.parametrize("op", RUN)
def test_a_million_tokens_fit_the_memory(op):
    """Forward and backward of one op with all inputs, outputs, gradients and workspaces."""
    with Memory() as memory:
        RUN[op](CASES["1M, G=16"])
    assert memory.peak < H200_BYTES, f"{memory.peak / 2**30:.0f} GiB"


@pytest.mark.parametrize("batch, kv_heads, group", [(1, 1, 1), (32, 4, 16), (4096, 64, 1)])
def test_decode(batch, kv_heads, group):
    launches = run_decode(batch, kv_heads, group, pages=2 + MILLION // 128)
    assert [launch.name for launch in launches] == ["score", "attend"]
    check("decode", launches)


def test_the_widest_batch_that_a_grid_takes():
    """y and z count kv heads and batches: the most that the backend lets through still fit."""
    case = SimpleNamespace(batch=4095, tokens=64, heads=16, kv=16, sequences=0)
    assert case.batch * case.kv <= LIMITS[1]
    for op, run in RUN.items():
        check(op, run(case))


def test_a_wider_batch_is_refused():
    def verdict(batch, heads):
        x = torch.empty(batch, 1, heads, 16)
        values = {"q": x, "k": x, "v": x, "cu_seqlens_q": None, "cu_seqlens_k": None, "scale": None}
        return BACKEND.supports(get("attention").bind(values), "sim")

    assert isinstance(verdict(4369, 15), Supported)  # 65,535
    refused = verdict(4096, 16)
    assert isinstance(refused, Unsupported) and "B * Hkv = 65536" in str(refused)


@pytest.mark.parametrize(("select_block", "taken"), [(128, True), (130, False)])
def test_decode_refuses_blocks_of_more_compressed_keys_than_a_tile_holds(select_block, taken):
    spec = get("decode")
    case = next(case for case in spec.cases if case.name == "stride_one")
    values = spec.arguments(case, torch.bfloat16)
    for name in ("k_slc", "v_slc"):
        shape = values[name].shape
        values[name] = values[name].new_empty(shape[0], 2 * select_block, *shape[2:])
    bound = spec.bind({**values, "select_block": select_block})
    verdict = BACKEND.supports(bound, "sim")
    assert isinstance(verdict, Supported) == taken
    assert taken or "select_block / stride = 130 > 128" in str(verdict)


def test_a_wrong_launch_is_noticed():
    """The checks can fail."""
    kernels = Kernels("gated_sum")
    x, gates = tensor(8, 128), tensor(8, 3)
    good = {"rows": 8, "DV": 128, "WIDTH": 128, "BLOCK_M": 16}
    kernels.forward[(65_536,)](x, x, x, gates, x, **good)
    check_grid(kernels.launches[-1])
    check_arguments("gated_sum", kernels.launches[-1])
    kernels.forward[1, 65_536](x, x, x, gates.float(), x, **good)
    with pytest.raises(AssertionError, match="grid"):
        check_grid(kernels.launches[-1])
    with pytest.raises(AssertionError, match="gates"):
        check_arguments("gated_sum", kernels.launches[-1])
    with pytest.raises(AssertionError, match="missing"):
        kernels.forward[(1,)](x, x, x, gates, **good)
    with pytest.raises(AssertionError, match="unknown"):
        kernels.forward[(1,)](x, x, x, gates, x, **good, BLOCK_X=1)
    with pytest.raises(RuntimeError, match="meta tensors"):
        gates.max().item()


assert math.prod(LIMITS) > 0


@pytest.mark.parametrize(
    ("strides", "copied"),
    [
        ((1, 2**22 - 1, 2**22 - 1, 1), False),  # 512 tokens of a tile are 2**31 elements apart
        ((1, 2**22, 8, 1), True), ((1, 8, 2**22, 1), True), ((2**40, 64, 8, 1), False),
        ((64, 32, 16, 2), True),
    ],
)  # fmt: skip
def test_what_a_tile_cannot_address_in_32_bits_is_copied(strides, copied):
    x = torch.empty_strided((2, 3, 2, 8), strides, device="meta")
    taken = common.addressable(x)
    assert (taken is not x) is copied and (taken.is_contiguous() or not copied)


@pytest.mark.parametrize(
    ("dim", "tiles"),
    [
        (1, (16, 0)), (8, (16, 0)), (16, (16, 0)), (17, (32, 0)), (24, (32, 0)), (33, (32, 16)),
        (48, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (100, (128, 0)),
        (128, (128, 0)), (192, (128, 64)), (256, (256, 0)),
    ],
)  # fmt: skip
def test_head_dims_are_cut_where_that_saves_columns(dim, tiles):
    assert common.split_head_dim(dim) == tiles


SELECT_PLAN = {"COLUMNS": 64, "KEYS": 64, "SCORES": 2048, "PROGRAMS": 2, "UPCAST": True}


@pytest.mark.parametrize(
    ("group", "ratio", "n", "selectable", "scores", "tiles"),
    [
        (16, 4, 16, 1024, 2048, (16, 4, 4, 16, 16, 512)),
        (3, 3, 5, 10, 2048, (4, 16, 4, 16, 16, 32)),
        (100, 1, 4, 1, 2048, (128, 1, 1, 64, 64, 128)),
        (1, 128, 16, 16, 2048, (1, 64, 128, 1, 16, 32)),
        (4, 4, 16, 64, 2048, (4, 16, 4, 16, 16, 128)),
        (1, 4, 30, 99, 512, (1, 64, 4, 16, 32, 64)),
    ],
)
def test_tiles_of_the_selection(group, ratio, n, selectable, scores, tiles):
    """Counted by hand: a row of scratch holds the winners so far and at least as many scores."""
    planned = {**SELECT_PLAN, "SCORES": scores}
    found = select_blocks.tile_constants(planned, group, ratio, n, selectable)
    names = ("GP", "TOKENS", "RATIO", "BLOCKS", "NP", "SLOTS")
    assert found == {"G": group, **dict(zip(names, tiles, strict=True)), "UPCAST": True}


@pytest.mark.parametrize("tokens", [1, 31, 32])
def test_nothing_is_launched_for_blocks_that_are_not_there(tokens):
    """A grid of no programs is an error on a GPU."""
    case = SimpleNamespace(batch=1, tokens=tokens, heads=2, kv=1, sequences=0)
    blocks = max(0, (tokens - 32) // 16 + 1)
    for launch in [
        *both_ways(compressed_attention, "compressed_attention", case,
                   attention_inputs(case, keys=blocks), kv_len=tokens, **GEOMETRY),
        *run_compress(case), *run_select(case),
    ]:  # fmt: skip
        check_grid(launch)


@pytest.mark.parametrize("tokens", [1, 5, 100_000])
def test_a_selection_has_no_more_programs_than_work(tokens):
    case = SimpleNamespace(batch=1, tokens=tokens, heads=16, kv=1, sequences=0)
    (launch,) = run_select(case)
    resident = plan("select_blocks", case)["forward"]["PROGRAMS"]
    tiles = -(-tokens // launch.arguments["TOKENS"])
    assert launch.grid == (min(resident, tiles),)


@pytest.mark.parametrize(
    ("window", "programs", "splits"),
    [(1, 99, 1), (64, 99, 1), (65, 99, 2), (512, 99, 8), (512, 6, 3), (512, 1, 1)],
)
def test_a_window_has_no_more_splits_than_tiles_nor_than_programs_are_wanted(
    window, programs, splits
):
    """Two items (one query, two kv heads), tiles of 64 keys; 6 programs are 3 for each item."""
    planned = {"score": {"KEYS": 64, "BLOCK_N": 64, "PROGRAMS": programs}}
    geometry = decode.Geometry(32, 16, 64, 16, 1, 2, window, 1.0)
    pool, table = torch.empty(4, 16, 2, 8, device="meta"), torch.empty(1, 4, device="meta")
    caches = SimpleNamespace(k_cmp=pool, v_cmp=pool, cmp_table=table)
    sizes = decode._Sizes.of(planned, torch.empty(1, 1, 4, 8, device="meta"), caches, geometry)
    assert sizes.win_splits == splits and sizes.items == 2


@pytest.mark.parametrize(("given", "launched"), [(None, 0.25), (0.0, 0.0), (-0.5, -0.5)])
def test_a_scale_of_zero_is_none_s_no_more_than_another(given, launched):
    scale_of = with_scale(get("attention"), lambda **values: values["scale"])
    assert scale_of(q=torch.empty(1, 1, 1, 16), scale=given) == launched


@pytest.mark.parametrize(
    ("dk", "dv", "taken"), [(256, 256, True), (257, 64, False), (64, 257, False)]
)
def test_head_dims_without_plans_are_refused(dk, dv, taken):
    spec = get("attention")
    q, k, v = (torch.empty(1, 4, 1, dim) for dim in (dk, dk, dv))
    given = {**dict.fromkeys(spec.names), **spec.defaults, "q": q, "k": k, "v": v}
    verdict = BACKEND.supports(spec.bind(given), "sim")
    assert isinstance(verdict, Supported) is taken
    assert taken or verdict.rule == "head_dim"
