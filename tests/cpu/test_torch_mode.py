"""What `cpu:torch` does beyond the reference: its cuts, its two selected attentions, its top-n."""

from __future__ import annotations

import pytest
import torch
from chosen_blocks import random_ids
from hypothesis import given
from hypothesis import strategies as st

import nsa_neuron as nsa
from nsa_neuron.backends.cpu.torch_mode import interval, layout, selected_attention
from nsa_neuron.backends.cpu.torch_mode.select_blocks import best_ids
from nsa_neuron.conformance import DTYPES, find_targets, problems, try_problem
from nsa_neuron.conformance.pytest_suite import settle
from nsa_neuron.library import pinned
from nsa_neuron.ops import OPS
from nsa_neuron.ops.select_blocks import top_ids
from nsa_neuron.registry import Target, use_backend

CUT = problems(dtypes=DTYPES[:1], tags=("edge",))
BY_BLOCK = [p for p in CUT if p.op in ("selected_attention", "nsa_attention_forward")]


@pytest.mark.parametrize("problem", BY_BLOCK, ids=str)
def test_selected_attention_block_by_block(problem, monkeypatch):
    """Small problems gather by themselves; here blocks are also read in several parts."""
    monkeypatch.setattr(selected_attention, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(selected_attention, "READERS", 3)
    settle(try_problem(problem, find_targets(["cpu:torch"])[0]))


def test_neighbours_are_read_where_they_lie_and_every_pair_once(monkeypatch):
    """Readings partition the visible (query, block) pairs, up to half more than READERS at a time;
    long runs of queries are slices."""
    monkeypatch.setattr(selected_attention, "READERS", 5)
    ids = random_ids(60, 70, 2, 4, 8)
    ids[:, :, :, 0] = 0  # everybody reads the first block
    for row in ids.flatten(0, 2):
        row[1:].masked_fill_(row[1:] == 0, -1)
    found, slices = [], 0
    parts = list(selected_attention.readings(ids, 8, 70, (None, None)))
    for part in parts:
        rows = part.rows
        slices += isinstance(rows, slice)
        listed = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        assert 0 < len(listed) < 7.5
        found += [(part.lane, row, part.keys.start // 8) for row in listed]
    expected = {(h, s, x) for s in range(60) for h in range(2) for x in ids[0, s, h].tolist()}
    assert len(found) == len(set(found)) and set(found) == {x for x in expected if x[2] >= 0}
    assert slices >= 2 * 60 // 7
    assert len(found) > 2.5 * len(parts)  # half as many as READERS on average at least


ATTENTIONS = [p for p in CUT if "attention" in p.op or p.op == "select_blocks"]


@pytest.mark.parametrize("problem", ATTENTIONS[::3], ids=str)
def test_tiles_of_few_logits(problem, monkeypatch):
    """Tiles cut queries, and lanes from each other, in sizes that nothing is a multiple of."""
    monkeypatch.setattr(interval, "TILE_ELEMENTS", 150)
    settle(try_problem(problem, find_targets(["cpu:torch"])[0]))


@given(
    scores=st.lists(st.sampled_from([-torch.inf, torch.inf, 0.0, 0.5, 1.0]), min_size=1),
    count=st.integers(1, 8),
)
def test_best_ids_are_those_of_a_stable_sort(scores, count):
    """Ties go to the lowest id, -inf is never chosen, short rows are padded."""
    rows = torch.tensor([scores, scores[::-1]])
    assert torch.equal(best_ids(rows, count), top_ids(rows, count))


def test_a_window_at_the_end_of_many_keys_converts_only_what_it_sees():
    """2 GiB of keys in bf16 as an expanded view: conversion to float32 would take 8 GiB."""
    store = torch.ones(1, 1, 1, 64, dtype=torch.bfloat16)
    k = store.expand(1, 2**24, 1, 64)
    q = torch.ones(1, 2, 2, 64, dtype=torch.bfloat16)
    with use_backend("cpu:torch"):
        o, lse = nsa.sliding_window_attention(q, k, k, window=8)
    assert torch.equal(o, torch.ones_like(o))
    torch.testing.assert_close(lse, torch.full_like(lse, 8.0 + torch.tensor(8.0).log()))


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_lowered_ops_take_tensors_that_want_a_gradient(spec):
    """As graphs hand them over where nothing is recorded; the results are the same."""
    values = spec.arguments(spec.cases[0], torch.float32)
    wanting = {
        name: x.clone().requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for name, x in values.items()
    }
    op = pinned(spec.name, Target("cpu", "torch"))
    plain, other = op(**values), op(**wanting)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (plain, other)), strict=True):
        assert torch.equal(a, b.detach())


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 2), (2, 1, 2, 1), (0, 2)])
def test_results_have_the_strides_of_new_tensors(shape):
    """As fakes promise, on axes of one element too, and where there is but one element."""
    x = torch.zeros(*shape, 3)[..., 1]
    assert layout.dense(x).stride() == torch.zeros(shape).stride()
