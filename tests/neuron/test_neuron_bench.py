"""`nsa bench --target trn2`: what is modelled, and that it says so; no test asserts a time."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from nsa_neuron.bench import decoding, looped, trainium
from nsa_neuron.cli import main
from nsa_neuron.nn import NsaConfig, PagedCache

pytestmark = pytest.mark.sim


@pytest.fixture
def short(monkeypatch):
    """Two stages, of few queries."""
    few = [
        trainium.Stage("sliding_window_attention", 32, trainium._attention, steady=True),
        trainium.Stage("gated_sum", 64, trainium._gated_sum, per_token=True),
    ]
    monkeypatch.setattr(trainium, "STAGES", tuple(few))
    monkeypatch.setattr(trainium, "ATTENTION", trainium.Stage("attention", 32, trainium._attention))
    monkeypatch.setattr(trainium, "ONE_KERNEL", trainium.Stage(trainium.WHOLE, 64, trainium._whole))


def test_lines_are_modelled_and_ordered(short, capsys) -> None:
    words = ["bench", "--target", "trn2", "--tokens", "256", "--dims", "32/32", "64/32", "--json"]
    assert main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == [
        "sliding_window_attention", "gated_sum", "nsa_attention", "attention",
    ] * 2  # fmt: skip
    for line in lines:
        assert line["kind"] == "modelled" and line["bench"] == "trn2"
        assert 0 < line["low"] <= line["central"] <= line["high"]
        assert line["facts"]["cores"] == 1
    assert {line["facts"]["Dk"] for line in lines} == {32, 64}


def test_text_says_that_nothing_was_measured(short, capsys) -> None:
    assert main(["bench", "--target", "trn2", "--tokens", "256", "--dims", "32/32"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("MODELLED, not measured, not run on hardware")
    assert "measured on" not in text
    assert "dense / nsa, central" in text and "dense / nsa in one kernel, central" in text


def test_some_stages_are_never_shown_as_the_whole(short, capsys) -> None:
    words = ["bench", "--target", "trn2", "--tokens", "256", "--dims", "32/32"]
    assert main([*words, "--stage", "gated_sum", "attention"]) == 0
    text = capsys.readouterr().out
    assert "gated_sum" in text and "dense attention" in text
    assert "window" not in text and "nsa (" not in text and "dense / nsa" not in text


def test_backward_leaves_out_what_has_no_gradient(short, capsys, monkeypatch) -> None:
    select = trainium.Stage("select_blocks", 32, trainium._select)
    monkeypatch.setattr(trainium, "STAGES", (*trainium.STAGES, select))
    words = ["bench", "--target", "trn2", "--tokens", "256", "--dims", "32/32", "--backward"]
    assert main([*words, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == [
        "sliding_window_attention", "gated_sum", "attention",
    ]  # fmt: skip
    assert {line["facts"]["pass"] for line in lines} == {"backward"}


def test_dims_that_are_none_are_refused(capsys) -> None:
    assert main(["bench", "--target", "trn2", "--dims", "192"]) == 2
    assert "--dims is '192'" in capsys.readouterr().err


def test_the_whole_runs_as_one_kernel(monkeypatch) -> None:
    """Its queries drift so slowly that no list is too short: each run is one launch."""
    kernels = []
    estimate = trainium.cost.estimate
    monkeypatch.setattr(
        trainium.cost, "estimate", lambda run: kernels.append(run.kernel) or estimate(run)
    )
    problem = trainium.Problem(4096, (16, 1), (32, 32), 0.05)
    stage = trainium.Stage(trainium.WHOLE, 64, trainium._whole)
    assert trainium._stage(problem, stage).name == "nsa_attention"
    assert kernels == ["forward"] * 4


def test_positions_integrate_a_cubic() -> None:
    cubic = [sum(share**k for share in trainium.GAUSS) / 2 for k in range(4)]
    assert cubic == pytest.approx([1 / (k + 1) for k in range(4)])


@pytest.mark.parametrize("replaced", [0.0, 0.05, 1.0])
def test_blocks_drift(replaced) -> None:
    rows = list(trainium.drifting_blocks(40_000, replaced))
    assert len(rows) == 1024
    for t, ids in zip(range(40_000 - 1024, 40_000), rows, strict=True):
        assert ids == sorted(set(ids)) and len(ids) == 16
        assert {0, t // 64 - 1, t // 64} <= set(ids) and ids[-1] == t // 64
    changed = [len(set(b) - set(a)) for a, b in itertools.pairwise(rows)]
    share = sum(changed) / len(changed) / 13
    assert abs(share - replaced) < 0.03


def test_short_sequences_have_fewer_blocks() -> None:
    (first, *_) = trainium.drifting_blocks(100, 0.5)
    assert first == [0] + [-1] * 15


def test_longer_sequences_continue_the_line(short, capsys, monkeypatch) -> None:
    monkeypatch.setattr(trainium, "LONGEST", 256)
    words = ["bench", "--target", "trn2", "--tokens", "256", "1024", "--dims", "32/32", "--json"]
    assert main([*words, "--no-dense"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    near, _, _, far, _, _ = lines
    assert "continued as it is" in far["facts"]["how"] and "error" in far["facts"]
    assert far["central"] > 3 * near["central"]


@pytest.mark.parametrize("cores", [2, 8])
def test_work_of_several_cores(short, capsys, cores) -> None:
    words = ["bench", "--target", "trn2", "--tokens", "256", "--dims", "32/32", "--no-dense"]
    found = []
    for count in (1, cores):
        assert main([*words, "--cores", str(count), "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {line["facts"]["cores"] for line in lines} == {count}
        found.append([line["central"] for line in lines])
        assert trainium.WHOLE in {line["name"] for line in lines}
    for one, many in zip(*found, strict=True):
        assert many < one < 1.5 * cores * many
    main([*words, "--cores", str(cores)])
    assert f"{cores} cores (" in capsys.readouterr().out


def test_hardware_loops_are_their_paces_times_their_turns() -> None:
    """At 64K tokens dense attention loops; two cores take half as long as one."""
    call = looped.Call("attention", 65_536, 16, (64, 64), kv_heads=4)
    assert call.loops() and not replace(call, tokens=4096).loops()
    (low, central, high), error = looped.nanoseconds(call)
    assert low < central < high and error < 0.02
    # Not faster than ScalarE alone: 0.43 us for the exponentials of 512 rows and 128 keys.
    assert central > 65_536 / 32 * 256 * 0.43e3
    both = looped.nanoseconds(replace(call, lnc=2))[0]
    assert 0.45 < both[1] / central < 0.6


@pytest.mark.parametrize("heads", [1, 4])
def test_decode_is_modelled_with_the_caches_that_nn_makes(heads: int) -> None:
    config = NsaConfig(dim=8, heads=8, kv_heads=heads, dk=192, dv=128)
    cache = PagedCache(config, ("nsa",), 1, 1, pages=decoding.POOL, dtype=torch.bfloat16)
    for name in decoding.PAGES:
        for pool, dim in zip(cache.layers[0][name], (192, 128), strict=True):
            modelled = decoding.a_pool(name, heads, dim, contiguous=False)
            assert pool.shape[1:] == modelled.shape[1:] and pool.stride() == modelled.stride()


def test_decode_of_a_chip(capsys) -> None:
    words = ["bench", "--target", "trn2", "--tokens", "2048", "--decode", "1", "16", "--dims"]
    assert main([*words, "192/128", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == [
        "decode", "decode, contiguous caches", "dense, its bytes"
    ] * 2  # fmt: skip
    one, _, dense, many, contiguous, _ = lines
    # Of contiguous caches, chosen blocks are read with the other three heads'.
    assert contiguous["facts"]["bytes of a core"] > 1.5 * many["facts"]["bytes of a core"]
    assert one["facts"]["of each core"] == "1 of 4 kv heads"
    assert many["facts"]["of each core"] == "2 sequences"
    assert dense["facts"]["bytes"] == 2048 * 4 * 320 * 2
    assert one["facts"]["bytes"] < dense["facts"]["bytes"]
    assert one["central"] < many["central"]
    for line in lines:
        assert line["kind"] == "modelled" and 0 < line["low"] <= line["central"] <= line["high"]
