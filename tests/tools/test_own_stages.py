"""Our table in the peers' harness: every stage right, interpreted; refusals refuse."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from nsa_neuron.errors import NsaError
from tools import own_stages
from tools.peers import dry_run
from tools.peers.__main__ import main as peers
from tools.peers.adapters import Own
from tools.peers.measure import check_backward, check_forward
from tools.peers.problem import GRADS, LONG, Geometry, Heads, make_decode, make_problem, random_ids

pytestmark = pytest.mark.sim
GEOM, HEADS = Geometry(n=4, w=40), Heads(2, 1, 24, 16)
PREFILL = ("dense", "window", "slc", "cmp", "select", "cmp_select", "nsa")


@pytest.fixture(scope="module")
def problem():
    return make_problem(HEADS, GEOM, 136, 0.1, 12, torch.float16, "cpu")


@pytest.mark.parametrize("stage", PREFILL)
def test_stage(stage, problem):
    leaves = [getattr(problem, name).detach().requires_grad_() for name in GRADS.get(stage, ())]
    out = Own("tools.own_stages:STAGES").stages()[stage](problem)(*leaves)
    right, errors = check_forward(stage, problem, out.detach())
    assert right, errors
    if leaves:
        right, errors = check_backward(stage, problem, leaves, out, torch.randn_like(out))
        assert right, errors


def test_decode_from_shuffled_pages():
    p = make_decode(HEADS, GEOM, 2, 300, torch.float16, "cpu")
    state = own_stages.decode_setup(p)
    assert state.caches.slc_table.shape == (2, 3)
    table = state.caches.slc_table[1].long()
    assert state.caches.k_slc[table].flatten(0, 1)[:300].equal(p.k[1])
    out = own_stages.decode(p.q[:, None], state, p.gates[:, None], GEOM)[:, 0]
    right, errors = check_forward("decode", p, out)
    assert right, errors


def test_the_table_never_falls_back(problem):
    with pytest.raises(NsaError):  # no kernel takes float64
        own_stages.window(*(x[None].double() for x in (problem.q, problem.k, problem.v)), GEOM)


def test_ids_of_long_problems_are_legal():
    geom, gen = Geometry(), torch.Generator().manual_seed(0)
    ids = random_ids(3000, 2, geom, gen)
    own = torch.arange(3000)[:, None, None] // geom.m
    there = ids >= 0
    assert ids.dtype == torch.int32 and ids.shape == (3000, 2, geom.n)
    assert (ids <= own).all() and (there.flip(-1).cummax(-1).values.flip(-1) == there).all()
    rising = (ids[..., 1:] > ids[..., :-1]) | ~there[..., 1:]
    assert rising.all()
    for forced in (torch.zeros_like(own), own, (own - 1).clamp(min=0)):
        assert (ids == forced).any(-1).all()
    assert LONG > 131072  # the shorter lengths have the reference's selection


def test_the_harness_checks_itself():
    """Its reference against loops and torch's attention; its checks must be able to fail."""
    p = make_problem(Heads(6, 2, 16, 16), dry_run.TINY, 260, 0.0, 8, torch.float32, "cpu")
    for check in ("inputs", "selection", "reference", "indices", "refusals"):
        getattr(dry_run, f"check_{check}")(p)


@pytest.mark.parametrize("tokens", [128, 129, 1030])
@pytest.mark.parametrize("window", [1, 80, 127, 128, 129, 512, 1030])
def test_block_masks_of_flex_attention(tokens, window):
    dry_run.check_block_mask(tokens, window)


def test_a_run_out_of_time_resumes(tmp_path):
    out = tmp_path / "rows.jsonl"
    words = (
        "--tiny --own tools.own_stages:STAGES --only nsa-neuron,sdpa-math --stages dense "
        f"--dists random --resume --revision r1 --out {out}"
    ).split()

    def run(*more):
        code = peers([*words, *more])
        return code, [json.loads(x) for x in out.read_text().splitlines()]

    code, rows = run("--budget", "0")
    assert code == 3 and {r["status"] for r in rows} == {"skipped"}
    code, rows = run()
    assert code == 0
    assert {(r["peer"], r["direction"]) for r in rows} == {
        (peer, d) for peer in ("nsa-neuron", "sdpa-math") for d in ("fwd", "bwd")
    }
    assert all(r["status"] == "ok" and r["revision"] == "r1" and r["when"] for r in rows)
