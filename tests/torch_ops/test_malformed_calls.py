"""Rule 15: malformed calls get a typed error that names the argument; no kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from spy_backend import spying
from torch import Tensor

import nsa_neuron as nsa
from nsa_neuron.errors import InvalidArgument, InvalidType

B, S, T, HQ, HKV, DK, DV = 2, 12, 20, 4, 2, 6, 5
GEOMETRY = {"block": 4, "stride": 2}
NC = (T - 4) // 2 + 1
SELECTION = {"select_block": 8, "num_selected": 3}
PAGES = 6


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape)


def cu(*edges: int) -> Tensor:
    return torch.tensor(edges, dtype=torch.int32)


def pages(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def legal(op: str) -> dict[str, Any]:
    """Arguments of a call that works."""
    q, k, v = rand(B, S, HQ, DK), rand(B, T, HKV, DK), rand(B, T, HKV, DV)
    cmp = {"k_cmp": rand(B, NC, HKV, DK), "v_cmp": rand(B, NC, HKV, DV)}
    if op.startswith("packed_"):
        q, k, v = q[:1], k[:1], v[:1]
        cmp = {name: x[:1] for name, x in cmp.items()}
    gates = torch.rand(q.shape[0], S, HQ, 3)
    o = {f"o_{branch}": rand(B, S, HQ, DV) for branch in ("cmp", "slc", "win")}
    values: dict[str, dict[str, Any]] = {
        "attention": {"q": q, "k": k, "v": v},
        "sliding_window_attention": {"q": q, "k": k, "v": v, "window": 5},
        "selected_attention": {
            "q": q, "k": k, "v": v, "select_block": 8,
            "block_indices": torch.tensor([0, 1, -1]).int().expand(q.shape[0], S, HKV, 3),
        },
        "compressed_attention": {"q": q, **cmp, "kv_len": T, **GEOMETRY},
        "select_blocks": {
            "q": q, "k_cmp": cmp["k_cmp"], "lse": rand(*q.shape[:3]), "kv_len": T, **GEOMETRY,
            **SELECTION,
        },
        "gated_sum": {**o, "gates": gates},
        "nsa_attention": {
            "q": q, **cmp, "k_slc": k, "v_slc": v, "k_win": k, "v_win": v, "gates": gates,
            **GEOMETRY, **SELECTION, "window": 5,
        },
        "compress": {"x": k, **GEOMETRY},
        "decode": {
            "q": q, "k_cmp": rand(PAGES, 4, HKV, DK), "v_cmp": rand(PAGES, 4, HKV, DV),
            "k_slc": rand(PAGES, 16, HKV, DK), "v_slc": rand(PAGES, 16, HKV, DV),
            "k_win": rand(PAGES, 16, HKV, DK), "v_win": rand(PAGES, 16, HKV, DV),
            "gates": gates, "seqlens": cu(T, 13), "cmp_table": pages([2, 0, 4], [1, 5, -1]),
            "slc_table": pages([5, 0], [1, 9]), "win_table": pages([3, 2], [4, -7]),
            **GEOMETRY, **SELECTION, "window": 5,
        },
    }  # fmt: skip
    made = values[op.removeprefix("packed_")]
    if op.startswith("packed_"):
        if op != "packed_compress":
            made["cu_seqlens_q"] = cu(0, 5, S)
        made["cu_seqlens_k"] = cu(0, 9, T)
    return made


PUBLIC = (
    "attention", "sliding_window_attention", "selected_attention", "compressed_attention",
    "select_blocks", "gated_sum", "nsa_attention", "compress", "decode",
)  # fmt: skip
PACKED = tuple(f"packed_{op}" for op in PUBLIC if op not in ("gated_sum", "decode"))


@dataclass(frozen=True)
class Bad:
    """A legal call with one thing changed.

    Attributes:
        op: key of `legal`.
        change: the arguments that differ.
        argument: the one that the error must name.
        error: its exact class.
    """

    op: str
    change: dict[str, Any]
    argument: str
    error: type[InvalidArgument] = InvalidArgument

    def __str__(self) -> str:
        return f"{self.op}-{'-'.join(self.change)}-{self.argument}"


LINEAR = {"method": "linear"}
MLP = {
    "method": "mlp", "w1": rand(4 * DK, 7), "b1": rand(7), "w2": rand(7, DK), "b2": rand(DK),
}  # fmt: skip
CMP_DIMS = {"k_cmp": DK, "v_cmp": DV}
IDS = torch.zeros(B, S, HKV, 3, dtype=torch.int32)


def ids(*row: int) -> Tensor:
    return torch.tensor(row, dtype=torch.int32).expand(B, S, HKV, len(row))


TABLE = (
    # rank and kind
    Bad("attention", {"q": rand(B, S, HQ)}, "q"),
    Bad("attention", {"k": rand(B, T, DK)}, "k"),
    Bad("attention", {"v": rand(1, B, T, HKV, DV)}, "v"),
    Bad("attention", {"q": None}, "q", InvalidType),
    Bad("attention", {"q": [1.0]}, "q", InvalidType),
    Bad("attention", {"k": 3}, "k", InvalidType),
    Bad("attention", {"v": rand(B, T, HKV, DV).to_sparse()}, "v", InvalidType),
    Bad("gated_sum", {"gates": rand(B, S, 3)}, "gates"),
    Bad("compress", {"x": rand(T, HKV, DK)}, "x"),
    # dtypes and devices
    Bad("attention", {"q": torch.ones(B, S, HQ, DK, dtype=torch.int64)}, "q", InvalidType),
    Bad("attention", {"q": rand(B, S, HQ, DK).cfloat()}, "q", InvalidType),
    Bad("attention", {"k": rand(B, T, HKV, DK).half()}, "k", InvalidType),
    Bad("attention", {"v": rand(B, T, HKV, DV).double()}, "v", InvalidType),
    Bad("gated_sum", {"gates": rand(B, S, HQ, 3).bfloat16()}, "gates", InvalidType),
    Bad("nsa_attention", {"v_win": rand(B, T, HKV, DV).half()}, "v_win", InvalidType),
    Bad("select_blocks", {"lse": rand(B, S, HQ).half()}, "lse", InvalidType),
    Bad("select_blocks", {"lse": rand(B, S, HQ).double()}, "lse", InvalidType),
    Bad("selected_attention", {"block_indices": IDS.long()}, "block_indices", InvalidType),
    Bad("selected_attention", {"block_indices": IDS.float()}, "block_indices", InvalidType),
    Bad("packed_attention", {"cu_seqlens_q": cu(0, 5, S).long()}, "cu_seqlens_q", InvalidType),
    Bad("packed_attention", {"cu_seqlens_k": [0, 9, T]}, "cu_seqlens_k", InvalidType),
    Bad("attention", {"v": rand(B, T, HKV, DV).to("meta")}, "v"),
    Bad("compress", {**MLP, "w2": MLP["w2"].half()}, "w2", InvalidType),
    # heads
    Bad("attention", {"q": rand(B, S, 3, DK)}, "q"),
    Bad("sliding_window_attention", {"q": rand(B, S, 1, DK)}, "q"),
    Bad("compressed_attention", {"q": rand(B, S, 5, DK)}, "q"),
    Bad("select_blocks", {"q": rand(B, S, 3, DK), "lse": rand(B, S, 3)}, "q"),
    Bad("attention", {"v": rand(B, T, 1, DV)}, "v"),
    Bad("nsa_attention", {"k_win": rand(B, T, 1, DK)}, "k_win"),
    Bad("nsa_attention", {"gates": rand(B, S, HKV, 3)}, "gates"),
    # sizes that must agree
    Bad("attention", {"k": rand(1, T, HKV, DK)}, "k"),
    Bad("attention", {"k": rand(B, T, HKV, DK + 1)}, "k"),
    Bad("attention", {"v": rand(B, T - 1, HKV, DV)}, "v"),
    Bad("gated_sum", {"o_win": rand(B, S, HQ, DV + 1)}, "o_win"),
    Bad("gated_sum", {"o_slc": rand(B, S + 1, HQ, DV)}, "o_slc"),
    Bad("gated_sum", {"gates": rand(B, S, HQ, 2)}, "gates"),
    Bad("nsa_attention", {"gates": rand(B, S, HQ, 4)}, "gates"),
    Bad("nsa_attention", {"v_cmp": rand(B, NC, HKV, DV + 1)}, "v_slc"),
    Bad("nsa_attention", {"v_slc": rand(B, T - 2, HKV, DV)}, "v_slc"),
    Bad("selected_attention", {"block_indices": IDS[:, 1:]}, "block_indices"),
    Bad("selected_attention", {"block_indices": IDS[:, :, :1]}, "block_indices"),
    Bad("select_blocks", {"lse": rand(B, S, HKV)}, "lse"),
    # empty
    Bad("attention", {"q": rand(B, 0, HQ, DK)}, "q"),
    Bad("attention", {"q": rand(0, S, HQ, DK)}, "q"),
    Bad("attention", {"k": rand(B, 0, HKV, DK), "v": rand(B, 0, HKV, DV)}, "k"),
    Bad("attention", {"k": rand(B, T, 0, DK)}, "k"),
    Bad("attention", {"v": rand(B, T, HKV, 0)}, "v"),
    Bad("compress", {"x": rand(B, 0, HKV, DK)}, "x"),
    Bad("selected_attention", {"block_indices": IDS[..., :0]}, "block_indices"),
    # queries are the last S of T
    Bad("attention", {"k": rand(B, S - 1, HKV, DK), "v": rand(B, S - 1, HKV, DV)}, "k"),
    Bad("compressed_attention", {"kv_len": S - 1}, "kv_len"),
    Bad("compressed_attention", {"kv_len": T + 2}, "k_cmp"),
    Bad("compressed_attention", {"kv_len": 0}, "kv_len"),
    Bad("compressed_attention", {"kv_len": None}, "kv_len", InvalidType),
    Bad("select_blocks", {"kv_len": T - 2}, "k_cmp"),
    Bad("select_blocks", {"kv_len": 20.0}, "kv_len", InvalidType),
    Bad("nsa_attention", {n: rand(B, NC - 1, HKV, d) for n, d in CMP_DIMS.items()}, "k_cmp"),
    # geometry
    Bad("compress", {"block": 5}, "stride"),
    Bad("compress", {"block": 0}, "block"),
    Bad("compress", {"stride": 0}, "stride"),
    Bad("compress", {"stride": -2}, "stride"),
    Bad("compressed_attention", {"stride": 3}, "stride"),
    Bad("select_blocks", {"select_block": 7}, "select_block"),
    Bad("select_blocks", {"select_block": 2}, "block"),
    Bad("select_blocks", {"num_selected": 2}, "num_selected"),
    Bad("select_blocks", {"num_selected": 0}, "num_selected"),
    Bad("select_blocks", {"num_initial": -1}, "num_initial"),
    Bad("select_blocks", {"num_local": 0}, "num_local"),
    Bad("nsa_attention", {"num_initial": 2}, "num_selected"),
    Bad("nsa_attention", {"window": 0}, "window"),
    Bad("sliding_window_attention", {"window": -5}, "window"),
    Bad("sliding_window_attention", {"window": 5.0}, "window", InvalidType),
    Bad("sliding_window_attention", {"window": True}, "window", InvalidType),
    Bad("sliding_window_attention", {"window": None}, "window", InvalidType),
    Bad("selected_attention", {"select_block": 0}, "select_block"),
    Bad("attention", {"scale": float("nan")}, "scale"),
    Bad("attention", {"scale": float("inf")}, "scale"),
    Bad("attention", {"scale": "big"}, "scale", InvalidType),
    # weights of compress
    Bad("compress", {"method": "max"}, "method"),
    Bad("compress", {"method": 3}, "method", InvalidType),
    Bad("compress", {"method": None}, "method", InvalidType),
    Bad("compress", {"w1": rand(4 * DK, DK)}, "w1"),
    Bad("compress", LINEAR, "w1"),
    Bad("compress", {**LINEAR, "w1": rand(4 * DK + 1, DK)}, "w1"),
    Bad("compress", {**LINEAR, "w1": rand(4 * DK, DK + 1)}, "w1"),
    Bad("compress", {**LINEAR, "w1": rand(3, 4 * DK, DK)}, "w1"),
    Bad("compress", {**LINEAR, "w1": rand(4 * DK, DK), "b1": rand(DK + 1)}, "b1"),
    Bad("compress", {**LINEAR, "w1": rand(4 * DK, DK), "w2": rand(DK, DK)}, "w2"),
    Bad("compress", {**MLP, "w2": None}, "w2"),
    Bad("compress", {**MLP, "b2": None}, "b2"),
    Bad("compress", {**MLP, "w2": rand(8, DK)}, "w2"),
    Bad("compress", {**MLP, "b2": rand(DK - 1)}, "b2"),
    Bad("compress", {"pe": rand(5, DK)}, "pe"),
    Bad("compress", {"pe": rand(3, 4, DK)}, "pe"),
    # contents: offsets
    Bad("packed_attention", {"cu_seqlens_q": cu(1, 5, S)}, "cu_seqlens_q"),
    Bad("packed_attention", {"cu_seqlens_q": cu(0, 5, S - 1)}, "cu_seqlens_q"),
    Bad("packed_attention", {"cu_seqlens_q": cu(0, 5, S + 1)}, "cu_seqlens_q"),
    Bad("packed_attention", {"cu_seqlens_k": cu(0, 9, T + 4)}, "cu_seqlens_k"),
    Bad("packed_attention", {"cu_seqlens_q": cu(0, 0, S)}, "cu_seqlens_q"),
    Bad("packed_attention", {"cu_seqlens_q": cu(0, 15, S)}, "cu_seqlens_q"),
    Bad("packed_attention", {"cu_seqlens_k": cu(0, -3, T)}, "cu_seqlens_k"),
    Bad("packed_attention", {"cu_seqlens_k": cu(0, 4, T)}, "cu_seqlens_k"),
    Bad("packed_attention", {"cu_seqlens_k": cu(0, 9, 15, T)}, "cu_seqlens_k"),
    Bad("packed_attention", {"cu_seqlens_k": None}, "cu_seqlens_k"),
    Bad("packed_attention", {"cu_seqlens_q": None}, "cu_seqlens_q"),
    Bad("packed_attention", {"cu_seqlens_q": cu(0), "cu_seqlens_k": cu(0)}, "cu_seqlens_q"),
    Bad("packed_attention", {"cu_seqlens_q": cu(0, S)[None]}, "cu_seqlens_q"),
    Bad("attention", {"cu_seqlens_q": cu(0, S), "cu_seqlens_k": cu(0, T)}, "cu_seqlens_q"),
    Bad("packed_compress", {"cu_seqlens_k": cu(0, 9, T - 1)}, "cu_seqlens_k"),
    Bad("packed_compress", {"cu_seqlens_k": cu(2, 9, T)}, "cu_seqlens_k"),
    Bad("compress", {"cu_seqlens_k": cu(0, T)}, "cu_seqlens_k"),
    Bad("packed_sliding_window_attention", {"cu_seqlens_k": cu(0, 30, T)}, "cu_seqlens_k"),
    Bad("packed_nsa_attention", {"cu_seqlens_q": cu(0, 12, 6)}, "cu_seqlens_q"),
    Bad("packed_select_blocks", {"cu_seqlens_k": cu(0, 20, 20)}, "cu_seqlens_k"),
    Bad(
        "packed_compressed_attention",
        {"k_cmp": rand(1, 4, HKV, DK), "v_cmp": rand(1, 4, HKV, DV)},
        "k_cmp",
    ),
    # paged caches
    Bad("decode", {"q": rand(B, S, 3, DK)}, "gates"),
    Bad("decode", {"q": rand(3, S, HQ, DK)}, "gates"),
    Bad("decode", {"k_cmp": rand(B, PAGES, 4, HKV, DK)}, "k_cmp"),
    Bad("decode", {"v_cmp": rand(PAGES, 5, HKV, DV)}, "v_cmp"),
    Bad("decode", {"v_slc": rand(PAGES + 1, 16, HKV, DV)}, "v_slc"),
    Bad("decode", {"v_win": rand(PAGES, 16, HKV, DV).half()}, "v_win", InvalidType),
    Bad(
        "decode",
        {"k_slc": rand(PAGES, 12, HKV, DK), "v_slc": rand(PAGES, 12, HKV, DV)},
        "k_slc",
    ),
    Bad("decode", {"gates": rand(B, S, HQ, 2)}, "gates"),
    Bad("decode", {"seqlens": cu(T, 13).long()}, "seqlens", InvalidType),
    Bad("decode", {"seqlens": cu(T)}, "seqlens"),
    Bad("decode", {"slc_table": pages([5, 0])}, "slc_table"),
    Bad("decode", {"win_table": rand(B, 2)}, "win_table", InvalidType),
    Bad("decode", {"window": 0}, "window"),
    Bad("decode", {"num_selected": 2}, "num_selected"),
    Bad("decode", {"stride": 3}, "stride"),
    Bad("decode", {"seqlens": cu(T, -1)}, "seqlens"),
    Bad("decode", {"seqlens": cu(T, 33)}, "seqlens"),
    Bad("decode", {"cmp_table": pages([2, 0], [1, 5])}, "seqlens"),
    Bad("decode", {"cmp_table": pages([2, 0, PAGES], [1, 5, -1])}, "cmp_table"),
    Bad("decode", {"slc_table": pages([5, 0], [-1, 9])}, "slc_table"),
    Bad("decode", {"win_table": pages([3, -2], [4, -7])}, "win_table"),
    # contents: block ids
    Bad("selected_attention", {"block_indices": ids(0, 3)}, "block_indices"),
    Bad("selected_attention", {"block_indices": ids(0, -2)}, "block_indices"),
    Bad("selected_attention", {"block_indices": ids(1, 0, 1)}, "block_indices"),
    Bad("selected_attention", {"block_indices": ids(2**31 - 1)}, "block_indices"),
    Bad(
        "packed_selected_attention",  # the first sequence has 9 tokens, so blocks 0 and 1 only
        {"block_indices": ids(0, 2)[:1]},
        "block_indices",
    ),
)  # fmt: skip


def names() -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for bad in TABLE:
        seen[str(bad)] = seen.get(str(bad), 0) + 1
        out.append(f"{bad}-{seen[str(bad)]}")
    return out


def function(op: str) -> Callable[..., Any]:
    return getattr(nsa, op.removeprefix("packed_"))


@pytest.mark.parametrize("op", (*PUBLIC, *PACKED))
def test_the_unchanged_call_works_and_reaches_the_backend(op: str) -> None:
    with spying() as spy:
        function(op)(**legal(op))
    assert spy.calls == 1


@pytest.mark.parametrize("bad", TABLE, ids=names())
def test_bad_call(bad: Bad) -> None:
    with spying() as spy, pytest.raises(InvalidArgument) as caught:
        function(bad.op)(**{**legal(bad.op), **bad.change})
    assert type(caught.value) is bad.error
    assert caught.value.argument == bad.argument
    assert caught.value.op == bad.op.removeprefix("packed_")
    assert bad.argument in str(caught.value) and caught.value.expected in str(caught.value)
    assert spy.calls == 0, "a kernel ran"


@pytest.mark.parametrize("bad", TABLE, ids=names())
def test_bad_call_after_a_good_one(bad: Bad) -> None:
    """The router remembers good calls by their sizes; contents are checked again each time."""
    with spying() as spy:
        function(bad.op)(**legal(bad.op))
        with pytest.raises(InvalidArgument):
            function(bad.op)(**{**legal(bad.op), **bad.change})
    assert spy.calls == 1


@pytest.mark.parametrize("wrong", [[1.0], None, 2])
@pytest.mark.parametrize("op", PUBLIC)
def test_positional_tensors_are_checked_alike(op: str, wrong: object) -> None:
    """Every tensor argument given positionally as something else gets InvalidType."""
    values = legal(op)
    scalars = {name: x for name, x in values.items() if not isinstance(x, Tensor)}
    tensors = [x for x in values.values() if isinstance(x, Tensor)]
    names_of = [name for name, x in values.items() if isinstance(x, Tensor)]
    for i in range(len(tensors)):
        broken = [*tensors[:i], wrong, *tensors[i + 1 :]]
        with pytest.raises(InvalidType) as caught:
            function(op)(*broken, **scalars)
        assert caught.value.argument == names_of[i]


def test_requiring_gradients_changes_nothing() -> None:
    q = rand(B, S, 3, DK).requires_grad_()
    with spying() as spy, pytest.raises(InvalidArgument) as caught:
        nsa.attention(**{**legal("attention"), "q": q})
    assert caught.value.argument == "q" and spy.calls == 0


@pytest.mark.parametrize("op", ["attention_backward", "compress_backward", "gated_sum_backward"])
def test_backward_ops_refuse_wrong_gradients(op: str) -> None:
    forward = op.removesuffix("_backward")
    values = legal(forward)
    if forward == "attention":
        o, lse = nsa.attention(**values)
        values |= {"o": o, "lse": lse, "grad_o": o[..., 1:]}
        with pytest.raises(InvalidArgument) as caught:
            torch.ops.nsa.attention_backward(**values)
        assert caught.value.argument in ("grad_o", "v")
        return
    first = "grad_y" if forward == "compress" else "grad_o"
    with pytest.raises(InvalidArgument):
        getattr(torch.ops.nsa, op)(**{first: rand(B, 3, HKV, DK), **values})


def test_missing_and_unknown_arguments_are_type_errors() -> None:
    """As for any Python function."""
    values = legal("compressed_attention")
    del values["kv_len"]
    with pytest.raises(TypeError, match="kv_len"):
        nsa.compressed_attention(**values)
    with pytest.raises(TypeError, match=r"attention: missing.*'v'"):
        nsa.attention(values["q"], values["q"])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"attention: .*windows"):
        nsa.attention(**legal("attention"), windows=3)  # type: ignore[call-arg]


def test_the_table_is_large_enough() -> None:
    assert len(TABLE) >= 80
    assert {bad.op.removeprefix("packed_") for bad in TABLE} == set(PUBLIC)
