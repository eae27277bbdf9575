"""What kernels do where something finds no room, tried with less room than SBUF has; dead tiles."""

from __future__ import annotations

import judged
import masked_oracle as oracle
import pytest
import test_neuron_attention as ranges
import test_neuron_compressed_attention as compressed
import torch
from test_neuron_nsa_attention import problem

from nsa_neuron.backends.neuron import run
from nsa_neuron.ops import get

pytestmark = pytest.mark.sim


def test_compressed_keys_that_do_not_stay_give_the_same_bits(monkeypatch):
    """Loaded for each tile of queries again, ahead of it, one tile of keys at a time."""
    values = problem(40, 8500, (2, 1), (144, 16), alike=0.0, num_selected=9)
    (wanted,) = judged.call("nsa_attention", values)
    kernel = run.package().load("nsa_attention.compressed")
    monkeypatch.setattr(kernel, "RESIDENT", 0)
    monkeypatch.setattr(kernel, "LOADED", (1, 1))
    for lnc in (1, 2):
        (o,) = judged.call("nsa_attention", values, lnc)
        assert o.equal(wanted)


def test_masks_that_are_not_kept_give_the_same_bits(monkeypatch):
    """Made anew for each tile of keys; kept, they hang on distance, queries and keys of a tile."""
    p = oracle.Problem.random(1, 70, 345, 1, 2, 16, 16, torch.bfloat16)
    ways = ranges.Launcher(window=190)
    wanted = ways.forward(p.q, p.k, p.v, scale=p.scale)
    kernel = run.package().load("common.range_attention.fast")
    for most in (1, 0):
        monkeypatch.setattr(kernel, "KEPT_MASKS", most)
        assert all(map(torch.equal, ways.forward(p.q, p.k, p.v, scale=p.scale), wanted))


@pytest.mark.parametrize("name", ["several_queries", "group34_kv2"])
def test_chosen_keys_that_are_fetched_one_tile_at_a_time_give_the_same_bits(name, monkeypatch):
    spec = get("decode")
    case = next(case for case in spec.cases if case.name == name)
    values = spec.arguments(case, torch.bfloat16)
    (wanted,) = judged.call("decode", values)
    monkeypatch.setattr(run.package().load("decode.chosen"), "MOST_BYTES", 0)
    (o,) = judged.call("decode", values)
    assert o.equal(wanted)


def test_tiles_of_queries_before_the_first_compressed_block():
    """130 queries of 16 heads are three pairs of tiles, the first one before block 0 ends."""
    values = compressed.problem([(130, 130)], (16, 1), (96, 32))
    compressed.check(values, torch.bfloat16)


def test_sections_of_keys_older_than_every_window():
    """Two sections of 256 keys that no query sees have gradients of zero."""
    problem = oracle.Problem.random(1, 3, 1100, 2, 2, 16, 16)
    ranges.check(problem, window=20)


def test_keys_at_the_edge_of_a_section_count_for_the_block_behind_it(monkeypatch):
    """Key 511, which ends four tiles of 128 keys, has half of its tokens in block 127, half in 128;
    sections of four tiles instead of twelve. Most of the importance is that key's."""
    kernels = run.package()
    compressed_branch = kernels.load("nsa_attention.compressed")
    for name in ("SECTION", "TOGETHER"):
        monkeypatch.setattr(compressed_branch, name, 4)
    monkeypatch.setattr(kernels.load("nsa_attention.work"), "PIECES_OF_SECTION", 1)
    values = problem(33, 8700, (2, 1), num_selected=5)
    values["k_cmp"][0, 511] = 4.0 * values["q"].float().mean((0, 1, 2)).to(torch.bfloat16)
    values["gates"].zero_()
    values["gates"][..., 1] = 1.0
    values["k_slc"].zero_()
    values["v_slc"][:] = (torch.arange(8700) // 64 == 128)[None, :, None, None]
    (o,) = judged.call("nsa_attention", values)
    torch.testing.assert_close(
        o.float(), torch.full_like(o, 64.0).float() / seen(values), rtol=0.02, atol=0
    )


def seen(values) -> torch.Tensor:
    """Tokens of the five blocks of each query, [1, S, 1, 1]: four whole ones and its own."""
    t = torch.arange(8700 - 33, 8700)
    return (4 * 64 + t % 64 + 1)[None, :, None, None].float()
