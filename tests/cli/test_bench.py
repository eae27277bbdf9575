"""Benchmarks measure what they say; no test asserts a time."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nsa_neuron import model_bench
from nsa_neuron.bench import attention, native, overhead
from nsa_neuron.bench.record import Record
from nsa_neuron.cli import UNUSABLE, main
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


def test_bench_refuses_a_shape_that_is_none(capsys) -> None:
    for shape in ("16/3/64/float32", "16/1/64", "16/1/0/float32", "16/1/64/float64"):
        assert main(["bench", "--target", "cpu", "--part", "native", "--shape", shape]) == UNUSABLE
        assert "HQ/HKV/D/DTYPE" in capsys.readouterr().err


def test_bench_of_models_names_both_attentions_and_counts_their_caches(
    monkeypatch, tmp_path, capsys
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(model_bench, "MODULE_TOKENS", 96)
    monkeypatch.setattr(model_bench, "TRAIN_LIMIT", 64)
    out = tmp_path / "model.jsonl"
    words = ["bench", "--target", "cpu", "--part", "model", "--tokens", "64", "8192"]
    assert main([*words, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    timed = {(row["name"], row["facts"]["tokens"]) for row in rows}
    decoded = {(f"decode {kind}", t) for kind in ("nsa", "full") for t in (64, 8192)}
    layer = {(name, 96) for name in ("module", "op", "parts")}
    assert timed == layer | {("train nsa", 64), ("train full", 64)} | decoded
    held = {(row["name"], row["facts"]["tokens"]): row["facts"].get("bytes") for row in rows}
    # Two layers of keys and values of one head of 64 floats. NSA holds a set of them for selection
    # and a 16th for compression, with an eighth of room, and of two other sets the last rows only.
    row = 2 * 2 * 64 * 4
    assert held["decode full", 8192] == 8192 * row
    least = (8192 + 8192 // 16 + 512) * row
    assert least < held["decode nsa", 8192] < least + (8192 // 8 * 17 / 16 + 1500) * row
    assert "NSA cache, MiB" in capsys.readouterr().out
