"""What is still a legal call and what no more: tables, ids, offsets, numbers; and what backends get
of very large numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.ops import common, get
from nsa_neuron.ops.selected_attention import FEW_IDS
from nsa_neuron.spec import MAX_INT, Bound

META = torch.device("meta")


def bound_of(op: str, sizes: dict[str, int], **scalars: Any) -> Bound:
    spec = get(op)
    values: dict[str, Any] = {**dict.fromkeys(spec.names), **spec.defaults, **scalars}
    for arg in spec.tensors:
        if not arg.optional:
            kind = {"stat": torch.float32, "i32": torch.int32}.get(arg.dtype, torch.float32)
            shape = [sizes[s] if s in sizes else int(s) for s in arg.forms[0]]
            values[arg.name] = torch.empty(shape, dtype=kind, device=META)
    return spec.bind(values)


# ---- very large scalars


@pytest.mark.parametrize(
    ("tokens", "window", "wanted"),
    [
        (20, 20, 20), (20, 1024, 1024), (20, 1025, 1024), (20, MAX_INT, 1024),
        (1024, MAX_INT, 1024), (1025, MAX_INT, 2048), (2049, 4096, 4096), (2049, 4097, 4096),
        (2048, 2047, 2047),
    ],
)  # fmt: skip
def test_a_window_of_more_than_all_is_a_power_of_two_that_holds_all(tokens, window, wanted) -> None:
    sizes = {"B": 1, "S": 1, "T": tokens, "Hq": 1, "Hkv": 1, "Dk": 4, "Dv": 4}
    bound = common.clamp(bound_of("sliding_window_attention", sizes, window=window))
    assert bound["w"] == bound.scalars["window"] == wanted
    assert wanted >= min(window, tokens), "no token is lost"


@pytest.mark.parametrize(
    ("tokens", "stride", "block", "wanted"),
    [(20, 4, 64, 64), (20, 4, 4 * 10**6, 1024), (20, 3, 3 * 10**6, 1026), (1500, 3, 2100, 2049)],
)
def test_a_clamped_block_holds_all_tokens_and_is_a_multiple_of_the_stride(
    tokens, stride, block, wanted
) -> None:
    sizes = {"B": 1, "S": 1, "Hq": 1, "Hkv": 1, "Dk": 4}
    sizes["Nc"] = (tokens - 2 * stride) // stride + 1
    scalars = {"kv_len": tokens, "block": 2 * stride, "stride": stride, "select_block": block}
    bound = common.clamp(bound_of("select_blocks", sizes, **scalars))
    assert bound["m"] == bound.scalars["select_block"] == wanted
    assert wanted % stride == 0 and wanted >= min(block, tokens)


@pytest.mark.parametrize(
    ("forced", "ids", "wanted"),
    [((1, 2), 64, 64), ((1, 2), 65, 64), ((50, 60), 110, 110), ((50, 60), 500, 128)],
)
def test_clamped_ids_hold_the_forced_blocks(forced, ids, wanted) -> None:
    """Of 40 tokens in blocks of 16, more are forced than there are."""
    sizes = {"B": 1, "S": 1, "Hq": 1, "Hkv": 1, "Dk": 4, "Nc": 9}
    scalars = {"kv_len": 40, "block": 8, "stride": 4, "select_block": 16, "num_selected": ids}
    scalars |= {"num_initial": forced[0], "num_local": forced[1]}
    bound = common.clamp(bound_of("select_blocks", sizes, **scalars))
    assert bound["n"] == bound.scalars["num_selected"] == wanted >= min(ids, sum(forced))


def test_ids_that_are_given_keep_their_number() -> None:
    sizes = {"B": 1, "S": 1, "T": 40, "Hq": 1, "Hkv": 1, "Dk": 4, "Dv": 4, "n": 500}
    bound = bound_of("selected_attention", sizes, select_block=16)
    assert common.clamp(bound) is bound and bound["n"] == 500


# ---- numbers


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("window", MAX_INT, True), ("window", MAX_INT + 1, False), ("window", 1, True),
        ("window", 0, False), ("scale", float("nan"), False), ("scale", float("inf"), False),
        ("scale", float("-inf"), False), ("scale", 0.0, True), ("scale", -1.5, True),
        ("scale", True, False), ("window", True, False), ("scale", 2, True),
    ],
)  # fmt: skip
def test_scalars_are_legal_up_to_their_limits(name: str, value: Any, legal: bool) -> None:
    """Of the op, and of the function in front of it, which answers some of them itself."""
    q, k = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 1, 4)
    spec = get("sliding_window_attention")
    values = {**dict.fromkeys(spec.names), **spec.defaults, "q": q, "k": k, "v": k, name: value}
    import nsa_neuron

    calls = [
        lambda: spec.bind(values),
        lambda: nsa_neuron.sliding_window_attention(q, k, k, **{name: value}),
    ]
    for call in calls:
        if legal:
            call()
        else:
            with pytest.raises(InvalidArgument) as caught:
                call()
            assert caught.value.argument == name


@pytest.mark.parametrize(("tokens", "hint"), [(5, True), (4, False), (3, False)])
def test_only_tensors_that_have_more_tokens_as_heads_are_said_to_be_transposed(
    tokens: int, hint: bool
) -> None:
    """Axis 1 has 4, axis 2 `tokens`: with 4 heads and 5 tokens it looks like [B, H, S, D]."""
    q, k = torch.zeros(1, 4, tokens, 8), torch.zeros(1, 2, tokens, 8)
    spec = get("attention")
    values = {**dict.fromkeys(spec.names), "q": q, "k": k, "v": k}
    with pytest.raises(InvalidArgument) as caught:
        spec.bind(values)
    assert ("look like [B, H, S, D]" in str(caught.value)) == hint


# ---- ids


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("row", "legal"),
    [
        ([-1, 0], True), ([4, 0], True), ([5, 0], False), ([-2, 0], False), ([0, 0], False),
        ([3, 3], False), ([-1, -1], True),
    ],
)  # fmt: skip
def test_ids_are_of_blocks_that_there_are_once_each(
    many: bool, row: list[int], legal: bool
) -> None:
    """19 tokens in blocks of 4; few ids are checked one by one, many in bulk."""
    batch = FEW_IDS if many else 1
    ids = torch.tensor(row, dtype=torch.int32).expand(batch, 1, 1, 2).clone()
    if many:
        ids[:-1] = torch.tensor([0, 1], dtype=torch.int32)
    q, k = torch.zeros(batch, 1, 1, 4), torch.zeros(batch, 19, 1, 4)
    spec = get("selected_attention")
    values = {**dict.fromkeys(spec.names), "q": q, "k": k, "v": k, "block_indices": ids}
    values["select_block"] = 4
    bound = spec.bind(values)
    if legal:
        spec.check_values(bound, values)
    else:
        with pytest.raises(InvalidArgument, match="block_indices"):
            spec.check_values(bound, values)


@pytest.mark.parametrize(
    ("sequence", "id", "legal"), [(0, 1, True), (0, 2, False), (1, 3, True), (1, 4, False)]
)
def test_ids_of_packed_sequences_stay_in_their_own(sequence: int, id: int, legal: bool) -> None:
    """5 and 14 tokens: 2 and 4 blocks of 4."""
    edges = torch.tensor([0, 5, 19], dtype=torch.int32)
    ids = torch.zeros(1, 19, 1, 1, dtype=torch.int32)
    ids[0, 5 * sequence] = id
    x = torch.zeros(1, 19, 1, 4)
    spec = get("selected_attention")
    values = {**dict.fromkeys(spec.names), "q": x, "k": x, "v": x, "block_indices": ids}
    values |= {"select_block": 4, "cu_seqlens_q": edges, "cu_seqlens_k": edges}
    bound = spec.bind(values)
    if legal:
        spec.check_values(bound, values)
    else:
        with pytest.raises(InvalidArgument, match=rf"\[-1, {2 + 2 * sequence}\) in sequence"):
            spec.check_values(bound, values)


# ---- packed offsets and blocks


@pytest.mark.parametrize(("rows", "legal"), [(2, False), (3, True), (4, True)])
def test_packed_calls_need_the_blocks_of_their_sequences(rows: int, legal: bool) -> None:
    """7, 8 and 13 tokens: no block of 8, one, and two from 4 on."""
    edges = torch.tensor([0, 7, 15, 28], dtype=torch.int32)
    spec = get("compressed_attention")
    q, k = torch.zeros(1, 28, 1, 4), torch.zeros(1, rows, 1, 4)
    values = {**dict.fromkeys(spec.names), "q": q, "k_cmp": k, "v_cmp": k, "kv_len": 28}
    values |= {"block": 8, "stride": 4, "cu_seqlens_q": edges, "cu_seqlens_k": edges}
    bound = spec.bind(values)
    if legal:
        spec.check_values(bound, values)
    else:
        with pytest.raises(InvalidArgument, match="at least the 3 of the packed sequences"):
            spec.check_values(bound, values)


@pytest.mark.parametrize(
    ("q_edges", "k_edges", "argument"),
    [
        ([0, 2, 5], [0, 2, 7], ""), ([0, 2, 5], [0, 4, 7], ""),
        ([1, 2, 5], [0, 2, 7], "cu_seqlens_q"),
        ([0, 2, 5], [0, 5, 7], "cu_seqlens_k"), ([0, 2, 2, 5], [0, 2, 4, 7], "cu_seqlens_q"),
        ([0, 2, 4], [0, 2, 7], "cu_seqlens_q"), ([0, 2, 5], [0, 2, 6], "cu_seqlens_k"),
        ([0, 2, 5], [0, 1, 7], "cu_seqlens_k"), ([0, 3, 2, 5], [0, 3, 4, 7], "cu_seqlens_q"),
    ],
)  # fmt: skip
def test_offsets_start_at_0_grow_and_end_at_all(q_edges, k_edges, argument: str) -> None:
    """5 queries and 7 keys; the second sequence of `[0, 5, 7]` has 3 queries and 2 keys."""
    spec = get("attention")
    values = {**dict.fromkeys(spec.names), "q": torch.zeros(1, 5, 1, 4)}
    values["k"] = values["v"] = torch.zeros(1, 7, 1, 4)
    values["cu_seqlens_q"], values["cu_seqlens_k"] = (
        torch.tensor(x, dtype=torch.int32) for x in (q_edges, k_edges)
    )
    bound = spec.bind(values)
    if not argument:
        spec.check_values(bound, values)
        return
    with pytest.raises(InvalidArgument) as caught:
        spec.check_values(bound, values)
    assert caught.value.argument == argument


# ---- pages


def step(tokens: int, **tables: list[int]) -> dict[str, Any]:
    """A decode step of one sequence: pages of 4 blocks, of 16 and of 8 tokens; pools of 6 pages."""
    spec = get("decode")
    rows = {"cmp": 4, "slc": 16, "win": 8}
    values: dict[str, Any] = {**spec.defaults, "q": torch.zeros(1, 2, 2, 4)}
    values |= {"block": 8, "stride": 4, "select_block": 16, "num_selected": 4, "window": 10}
    for name, page in rows.items():
        values[f"k_{name}"] = values[f"v_{name}"] = torch.zeros(6, page, 1, 4)
        values[f"{name}_table"] = torch.tensor([tables[name]], dtype=torch.int32)
    values["gates"] = torch.zeros(1, 2, 2, 3)
    values["seqlens"] = torch.tensor([tokens], dtype=torch.int32)
    return {name: values[name] for name in spec.names}


FULL = {"cmp": [0, 5], "slc": [0, 5], "win": [-1, -1, 0, 5]}


@pytest.mark.parametrize(
    ("tokens", "tables", "argument"),
    [
        (32, {}, ""), (33, {}, "seqlens"), (0, {}, ""), (-1, {}, "seqlens"),
        (32, {"slc": [0, 6]}, "slc_table"), (32, {"slc": [-1, 5]}, "slc_table"),
        (32, {"win": [-1, -1, -1, 5]}, "win_table"),  # 11 tokens: of pages 2 and 3
        (32, {"win": [-1, 9, 0, 5]}, ""), (32, {"cmp": [0, 6]}, "cmp_table"),
        (16, {"slc": [0, 99], "win": [0, 1]}, ""), (17, {"slc": [0, 99]}, "slc_table"),
        (20, {"cmp": [0, 99], "win": [9, 1, 0]}, ""),
        (24, {"cmp": [0, 99]}, "cmp_table"),
        (32, {"cmp": [0]}, "seqlens"), (32, {"win": [-1, 0, 0]}, "seqlens"),
    ],
)  # fmt: skip
def test_a_step_reads_only_pages_that_there_are(tokens: int, tables, argument: str) -> None:
    """Entries that no query sees may hold anything. 20 tokens have 4 blocks, 24 have 5."""
    spec, values = get("decode"), step(tokens, **{**FULL, **tables})
    bound = spec.bind(values)
    if not argument:
        spec.check_values(bound, values)
        return
    with pytest.raises(InvalidArgument) as caught:
        spec.check_values(bound, values)
    assert caught.value.argument == argument
