"""Benchmarks measure what they say; no test asserts a time."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nsa_neuron import layer_bench, model_bench
from nsa_neuron.bench import attention, native, native_memory, native_peers, native_stages, overhead
from nsa_neuron.bench.record import Record
from nsa_neuron.cli import UNUSABLE, main
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn import NativeSparseAttention, NsaConfig
from nsa_neuron.ops import get
from nsa_neuron.registry import REGISTRY


def ratio(tokens: int, value: float) -> Record:
    return Record.of("attention", "ratio", "ratio", [value], tokens=tokens)


def test_a_record_keeps_median_and_spread() -> None:
    record = Record.of("b", "n", "us", [5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (record.median, record.p20, record.p80, record.runs) == (3.5, 2.0, 5.0, 6)
    assert record.to_dict()["kind"] == "measured"


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({1: 2.0, 2: 1.5}, "no crossover up to 2"),
        ({1: 2.0, 2: 0.5, 4: 0.4}, "between 1 and 2"),
        ({1: 0.9, 2: 0.5}, "every measured length from 1"),
        ({1: 0.9, 2: 1.5, 4: 0.4}, "between 2 and 4"),
    ],
)
def test_the_crossover_is_where_nsa_stays_ahead(ratios: dict[int, float], said: str) -> None:
    assert said in attention.crossover([ratio(*pair) for pair in ratios.items()])


@pytest.mark.parametrize("name", overhead.OPS)
def test_both_sides_of_the_overhead_return_made_results_of_the_right_shapes(name: str) -> None:
    spec = get(name)
    case = next(case for case in spec.cases if case.name == overhead.CASE)
    values = spec.arguments(case, torch.float32)
    tensors = [values[arg.name] for arg in spec.tensors if values[arg.name] is not None]
    leaves = [
        x.clone().requires_grad_(arg.differentiable)
        for x, arg in zip(tensors, spec.tensors, strict=False)
    ]
    promised = [tuple(shape) for _, shape, _ in spec.bind(values).returns()]
    with torch.library._scoped_library(overhead.NAMESPACE, "FRAGMENT") as library:
        empty = overhead.empty_op(library, spec, values)
        with overhead.null_backend():
            for op in (getattr(torch.ops.nsa, name).default, empty):
                out = op(*leaves)
                results = out if isinstance(out, tuple) else (out,)
                assert [tuple(x.shape) for x in results] == promised
                assert not any(x.any() for x in results)
                wanted = [x for x in leaves if x.requires_grad]
                grads = torch.autograd.grad(results[0], wanted, torch.ones_like(results[0]))
                assert [x.shape for x in grads] == [x.shape for x in wanted]
    assert "null" not in REGISTRY.names()


def test_both_attentions_give_gradients_of_everything() -> None:
    values = attention.tensors(96)
    again = attention.tensors(96)
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True)), "each time the same"
    nsa, sdpa = attention.nsa_step(*values), attention.sdpa_step(*values)
    assert [x.shape for x in nsa] == [x.shape for x in values[:4]]
    assert [x.shape for x in sdpa] == [x.shape for x in values[:3]]
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in (*nsa, *sdpa))


def test_bench_writes_records_with_where_they_were_measured(tmp_path, capsys) -> None:
    out = tmp_path / "results" / "cpu.jsonl"
    words = ["bench", "--target", "cpu", "--part", "attention", "--tokens", "64", "128"]
    assert main([*words, "--out", str(out)]) == 0
    assert "NSA / SDPA" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["facts"]["tokens"] for row in rows] == [64] * 3 + [128] * 3
    for row in rows:
        assert row["kind"] == "measured" and math.isfinite(row["median"])
        assert row["p20"] <= row["median"] <= row["p80"]
        assert {"cpu", "versions", "revision"} <= set(row["environment"])


def test_bench_overhead_names_every_op_and_mode() -> None:
    records = overhead.measure(ops=["gated_sum"], rounds=2, number=2)
    table = overhead.to_text(records)
    assert {r.facts["mode"] for r in records} == set(overhead.modes(get("gated_sum")))
    assert all(r.runs == 2 for r in records) and "gated_sum" in table


def test_bench_of_the_cpu_backend_names_every_contestant(tmp_path, capsys) -> None:
    out = tmp_path / "native.jsonl"
    words = ["bench", "--target", "cpu", "--part", "native", "--tokens", "128"]
    assert main([*words, "--shape", "2/1/16/bfloat16", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    timed = {(row["facts"].get("pass"), row["name"]) for row in rows}
    ours = native.usable()
    ways = (native.FORWARD, native.BACKWARD)
    assert {(way, name) for way in ways for name in ("sdpa", *ours)} <= timed
    assert {("decode", "decode"), ("decode", "sdpa decode")} <= timed
    for row in rows:
        assert row["kind"] == "measured" and row["median"] > 0
        assert "pass" not in row["facts"] or {"cpu_ms", "load"} <= set(row["facts"])
    assert "its bytes" in capsys.readouterr().out
    ahead = tmp_path / "forward.jsonl"
    assert main([*words, "--shape", "2/1/16/float32", "--forward", "--out", str(ahead)]) == 0
    passes = {json.loads(line)["facts"].get("pass") for line in ahead.read_text().splitlines()}
    assert passes == {None, native.FORWARD, "decode"}


def test_ids_that_the_kernel_checks_are_not_read_by_the_router() -> None:
    spec = get("selected_attention")
    case = next(case for case in spec.cases if case.name == overhead.CASE)
    good = spec.arguments(case, torch.float32)
    bad = {**good, "block_indices": torch.full_like(good["block_indices"], 10**6)}
    for checks in (False, True):
        with overhead.null_backend(checks):
            torch.ops.nsa.selected_attention(**good)  # the first call of a size reads them always
            if checks:
                torch.ops.nsa.selected_attention(**bad)
            else:
                with pytest.raises(InvalidArgument, match="block_indices"):
                    torch.ops.nsa.selected_attention(**bad)
    names = overhead.modes(spec)
    assert overhead.KERNEL_CHECKS in names and overhead.KERNEL_CHECKS not in overhead.modes(
        get("attention")
    )


NATIVE = pytest.mark.skipif("cpu:native" not in native.usable(), reason="no C++ kernels here")


@NATIVE
def test_stages_are_the_kernels_of_a_pass_and_add_up_to_it(tmp_path, capsys) -> None:
    out = tmp_path / "stages.jsonl"
    words = ["bench", "--target", "cpu", "--part", "stages", "--tokens", "1200"]
    assert main([*words, "--shape", "2/1/16/float32", "--out", str(out)]) == 0
    rows = [row for row in map(json.loads, out.read_text().splitlines()) if row["unit"] == "ms"]
    ahead = {"compress", "compressed + select", "selected", "window"}
    back = {f"{name}, backward" for name in ("compressed", "selected", "window")}
    for way, stages in (
        (native.FORWARD, ahead),
        (native.BACKWARD, ahead | back | {"gated sum", "gated sum backward"}),
    ):
        for made in (native_stages.RANDOM, native_stages.CORRELATED):
            mine = {
                r["name"]: r
                for r in rows
                if r["facts"]["pass"] == way and r["facts"]["input"] == made
            }
            assert set(mine) == stages | {native_stages.REST, native_stages.WHOLE}
            assert all(
                mine[name]["facts"]["gflops"] > 0
                for name in stages - {"compress", "gated sum", "gated sum backward"}
            )
    new = {r["facts"]["input"]: r["facts"]["replaced"] for r in rows}
    assert 0 <= new[native_stages.CORRELATED] < new[native_stages.RANDOM] < 1
    assert "of GEMM" in capsys.readouterr().out


def test_a_peak_is_what_a_pass_holds_beyond_its_results(monkeypatch) -> None:
    made = []

    def large(name: str, problem: native.Problem) -> Callable[[], torch.Tensor]:
        made.append((name, problem.tokens))
        # At 2048 tokens 128 + 64 MiB go and 64 stay: each more than the 32 MiB up to which glibc
        # may take what an earlier test of this process freed, which would not raise its peak.
        numbers = problem.tokens * 2**14
        return lambda: torch.ones(numbers)[:1] + torch.ones(numbers // 2)

    monkeypatch.setattr(native_memory, "_pass", large)
    problem = native.Problem(2048, (2, 1), 16, torch.float32, native.FORWARD)
    found = native_memory.peak("cpu:torch", problem)
    assert made == [("cpu:torch", 512), ("cpu:torch", 2048)], "after a small one"
    assert found["outputs"] == 2**26 and 190 * 2**20 < found["above"] < 200 * 2**20


def test_memory_is_measured_in_processes_of_their_own(monkeypatch) -> None:
    problem = native.Problem(128, (2, 1), 16, torch.float32, native_memory.DECODE)
    record = native_memory._in_a_process("cpu:torch", problem)
    assert record.unit == "MiB" and record.facts["outputs"] == 2 * 16 * 4
    asked = []
    monkeypatch.setattr(native_memory, "_in_a_process", lambda *a: asked.append(a) or record)
    native_memory.measure([128, 2**17], (2, 1), 16, "float32")
    tried = {(name, p.way, p.tokens) for name, p in asked}
    assert ("sdpa", native.BACKWARD, 128) in tried and ("sdpa", "decode", 128) not in tried
    assert not {x for x in tried if x[2] > 128 and x[0] == "cpu:torch"}
    assert "KiB per token" in native_memory.to_text([record])


@NATIVE
def test_peers_are_checked_before_they_are_timed_and_missed_by_name(
    monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(sys.modules, native_peers.MODULE, None)
    out = tmp_path / "peers.jsonl"
    words = ["bench", "--target", "cpu", "--part", "peers", "--tokens", "256"]
    assert main([*words, "--shape", "4/2/16/float32", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    by_kind = {
        (r["facts"]["attention"], r["name"]): r["kind"] for r in rows if "attention" in r["facts"]
    }
    assert by_kind == {
        ("causal", "sdpa"): "measured", ("causal", "cpu:native"): "measured",
        ("causal", "FlexAttention"): "measured", ("window", "cpu:native"): "measured",
        ("window", "FlexAttention"): "measured", ("selected", "cpu:native"): "measured",
        ("selected", "FlexAttention"): "measured", ("nsa", "cpu:native"): "measured",
        ("nsa", "lucidrains"): "absent",
    }  # fmt: skip
    assert "cannot be imported" in capsys.readouterr().out


@NATIVE
def test_a_peer_that_differs_has_no_time(monkeypatch) -> None:
    class Module(torch.nn.Module):
        def __init__(self, **sizes: object) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 0

    monkeypatch.setitem(sys.modules, native_peers.MODULE, SimpleNamespace(SparseAttention=Module))
    problem = native.Problem(64, (2, 1), 16, torch.float32, native.FORWARD)
    zeros = torch.zeros(1, 64, 2, 16)
    steps = {
        "cpu:native": lambda: zeros, "FlexAttention": lambda: zeros + 1,
        "lucidrains": native_peers.lucidrains(problem),
    }  # fmt: skip
    found = {r.name: r for r in native_peers._timed(problem, "nsa", steps)}
    assert found["FlexAttention"].reason == "differs from ours by 1"
    assert found["lucidrains"].reason == "its result is not finite"
    assert found["cpu:native"].unit == "ms"


def test_bench_refuses_a_shape_that_is_none(capsys) -> None:
    for shape in ("16/3/64/float32", "16/1/64", "16/1/0/float32", "16/1/64/float64"):
        assert main(["bench", "--target", "cpu", "--part", "native", "--shape", shape]) == UNUSABLE
        assert "HQ/HKV/D/DTYPE" in capsys.readouterr().err


def test_bench_of_models_names_both_attentions_and_counts_their_caches(
    monkeypatch, tmp_path, capsys
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(model_bench, "TRAIN_LIMIT", 64)
    out = tmp_path / "model.jsonl"
    words = ["bench", "--target", "cpu", "--part", "model", "--tokens", "64", "8192"]
    assert main([*words, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    timed = {(row["name"], row["facts"]["tokens"]) for row in rows}
    decoded = {(f"decode {kind}", t) for kind in ("nsa", "full") for t in (64, 8192)}
    assert timed == {("train nsa", 64), ("train full", 64)} | decoded
    held = {(row["name"], row["facts"]["tokens"]): row["facts"].get("bytes") for row in rows}
    # Two layers of keys and values of one head of 64 floats. NSA holds a set of them for selection
    # and a 16th for compression, with an eighth of room, and of two other sets the last rows only;
    # each pool up to three pages more, two of them spare, of 256 tokens or their 16 blocks.
    row = 2 * 2 * 64 * 4
    assert held["decode full", 8192] == 8192 * row
    least = (8192 + 8192 // 16 + 512) * row
    pages = 3 * (3 * 256 + 16)
    assert least < held["decode nsa", 8192] < least + (8192 // 8 * 17 / 16 + 1500 + pages) * row
    assert "NSA cache, MiB" in capsys.readouterr().out


def test_bench_of_a_layer_measures_three_sides_and_says_both_ratios() -> None:
    small = NsaConfig(dim=256, heads=4, kv_heads=1, dk=16, dv=16)
    records = layer_bench.measure([(small, 96)], rounds=2)
    assert [r.name for r in records] == list(layer_bench.SIDES)
    assert all(r.runs == 2 and r.median > 0 and r.facts["cpu_ms"] > 0 for r in records)
    times = dict(zip(layer_bench.SIDES, (60.0, 40.0, 50.0), strict=True))
    told = [
        Record.of("layer", name, "ms", [ms], tokens=2048, width=256, cpu_ms=2 * ms, load=0.5)
        for name, ms in times.items()
    ]
    (_, headers, (row,)), (_, _, counted) = layer_bench.tables(told)
    by = dict(zip(headers, row, strict=True))
    assert by["layer / op"] == "1.50"
    assert by["layer / op and projections"] == "1.20"
    assert by["(layer - both) / op"] == "0.25"
    assert by["the three by CPU time"] == "1.50, 1.20, 0.25"
    assert len(counted) == len(layer_bench.counted(layer_bench.NARROW, 2048))
    assert layer_bench.to_text(told)


def test_operations_of_a_layer_s_products_are_those_that_torch_counts() -> None:
    config, tokens = NsaConfig(dim=48, heads=4, kv_heads=2, dk=16, dv=8), 96
    with torch.device("meta"):
        layer, x = NativeSparseAttention(config), torch.empty(1, tokens, config.dim)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    parts = layer_bench.counted(config, tokens)
    products = [flops for name, (flops, _) in parts.items() if "projection" in name]
    assert sum(products) + parts["gates"][0] == counter.get_total_flops()
    assert all(flops > 0 and moved > 0 for flops, moved in parts.values())
