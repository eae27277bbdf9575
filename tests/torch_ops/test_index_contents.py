"""What index tensors hold is checked at each call, however few or many, changed or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spy_backend import spying
from torch import Tensor

import nsa_neuron as nsa
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.ops import get
from nsa_neuron.ops.selected_attention import FEW_IDS

BLOCK, BLOCKS = 4, 5
TOKENS = BLOCK * BLOCKS - 1


def legal(row: list[int]) -> bool:
    """Rule 5, word for word."""
    used = [i for i in row if i != -1]
    return all(0 <= i < BLOCKS for i in used) and len(set(used)) == len(used)


def values_of(ids: Tensor) -> dict[str, Any]:
    q, k = torch.zeros(1, ids.shape[1], 2, 4), torch.zeros(1, TOKENS, 1, 4)
    return {
        "q": q, "k": k, "v": k, "block_indices": ids, "cu_seqlens_q": None, "cu_seqlens_k": None,
        "select_block": BLOCK, "scale": None,
    }  # fmt: skip


def refused(ids: Tensor) -> bool:
    spec = get("selected_attention")
    values = values_of(ids)
    try:
        spec.check_values(spec.bind(values), values)
    except InvalidArgument as error:
        assert error.argument == "block_indices"
        return True
    return False


@given(
    st.lists(st.integers(-2, BLOCKS), min_size=1, max_size=6),
    st.integers(0, TOKENS - 1),
)
def test_few_ids_and_many_are_judged_alike(row: list[int], place: int) -> None:
    """A row by itself, and the same row among so many that they are checked in bulk."""
    assert refused(torch.tensor([[[row]]], dtype=torch.int32)) == (not legal(row))
    many = torch.full((FEW_IDS, TOKENS, 1, len(row)), -1, dtype=torch.int32)
    many[-1, place, 0] = torch.tensor(row)
    values = values_of(many)
    values |= {x: values[x].expand(FEW_IDS, *values[x].shape[1:]) for x in ("q", "k", "v")}
    spec = get("selected_attention")
    if legal(row):
        spec.check_values(spec.bind(values), values)
    else:
        with pytest.raises(InvalidArgument, match="block_indices"):
            spec.check_values(spec.bind(values), values)


def test_ids_changed_in_place_are_checked_again() -> None:
    ids = torch.tensor([[[[0, 2, -1]]]], dtype=torch.int32)
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, TOKENS, 1, 4)
    with spying() as spy:
        for _ in range(2):
            nsa.selected_attention(q, k, k, ids, select_block=BLOCK)
        ids[0, 0, 0, 1] = 0
        with pytest.raises(InvalidArgument, match="block_indices"):
            nsa.selected_attention(q, k, k, ids, select_block=BLOCK)
    assert spy.calls == 2


@pytest.mark.parametrize("how", ["in place", "another tensor", "in inference mode"])
def test_changed_offsets_are_checked_again(how: str) -> None:
    """Layers share offsets, so those of the last call are remembered: but not their change."""
    with torch.inference_mode(how == "in inference mode"):
        q, k = torch.randn(1, 6, 2, 4), torch.randn(1, 6, 1, 4)
        edges = torch.tensor([0, 2, 6], dtype=torch.int32)
        with spying() as spy:
            for _ in range(3):
                nsa.attention(q, k, k, cu_seqlens_q=edges, cu_seqlens_k=edges)
            if how == "another tensor":
                edges = torch.tensor([0, 7, 6], dtype=torch.int32)
            else:
                edges[1] = 7
            with pytest.raises(InvalidArgument, match="cu_seqlens_q"):
                nsa.attention(q, k, k, cu_seqlens_q=edges, cu_seqlens_k=edges)
    assert spy.calls == 3


def test_offsets_of_the_last_call_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 6, 2, 4), torch.randn(1, 6, 1, 4)
    edges = torch.tensor([0, 2, 6], dtype=torch.int32)
    with spying(lambda results: results) as spy:
        for _ in range(2):
            nsa.attention(q, k, k, cu_seqlens_q=edges, cu_seqlens_k=edges)

        def fail(*_: Any) -> None:
            raise AssertionError("read again")

        monkeypatch.setitem(vars(get("attention")), "check_values", fail)
        nsa.attention(q, k, k, cu_seqlens_q=edges, cu_seqlens_k=edges)
    assert spy.calls == 3
