"""Tables of the benchmarks of layers and models, of records made by hand; and what is counted."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from nsa_neuron import layer_bench, model_bench, ops
from nsa_neuron.bench.record import Record
from nsa_neuron.nn import NsaConfig

CONFIG = NsaConfig(dim=48, heads=4, kv_heads=2, dk=16, dv=8, block=8, stride=4, select_block=16)
TOKENS = 96


def record(bench, name, values, **facts):
    return Record.of(bench, name, "ms", values, **facts)


def test_parts_of_a_layer_are_counted_by_their_shapes() -> None:
    """Products: 2 S N K operations; S (N + K) + N K numbers of four bytes."""
    found = layer_bench.counted(CONFIG, TOKENS)
    for part, columns, depth in (
        ("projection of queries", 4 * 16, 48),
        ("projection of keys and values, sets: 3", 3 * 2 * (16 + 8), 48),
        ("projection of the output", 48, 4 * 8),
        ("gates", 12, 48),
    ):
        moved = 4 * (96 * (columns + depth) + columns * depth)
        assert found[part] == (2 * 96 * columns * depth, moved), part
    # Queries of 4 heads and two sets of keys of 2: three operations, two reads and three writes.
    rotated = 96 * 16 * (4 + 2 * 2)
    assert found["rotation"] == (3 * rotated, 5 * 4 * rotated)
    shared = layer_bench.counted(dataclasses.replace(CONFIG, shared_kv=True), TOKENS)
    once = 96 * 16 * (4 + 2)
    assert shared["rotation"] == (3 * once, 5 * 4 * once)
    columns = 2 * (16 + 8)
    assert shared["projection of keys and values, sets: 1"][0] == 2 * 96 * columns * 48


@pytest.mark.parametrize("phi", ["mean", "linear", "mlp"])
def test_compression_and_attention_are_counted_by_their_specs(phi) -> None:
    config = dataclasses.replace(CONFIG, phi=phi)
    found = layer_bench.counted(config, TOKENS)
    both = []
    for dim in (16, 8):
        shapes = {"pe": (8, dim)}
        shapes |= {"w1": (8 * dim, dim)} if phi != "mean" else {}
        shapes |= {"b1": (dim,), "w2": (dim, dim), "b2": (dim,)} if phi == "mlp" else {}
        weights = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
        spec = ops.get("compress")
        x = torch.empty(1, TOKENS, 2, dim, device="meta")
        given = {**dict.fromkeys(spec.names), **spec.defaults, "x": x, **weights}
        sizes = {"method": phi, "block": 8, "stride": 4}
        both.append(spec.cost(spec.bind({**given, **sizes})))
    want = sum(x.flops for x in both), sum(x.bytes for x in both)
    assert found["compression"] == want
    spec, blocks = ops.get("nsa_attention"), (96 - 8) // 4 + 1
    shapes = {
        "q": (4, 16), "gates": (4, 3), **{f"k_{n}": (2, 16) for n in ("slc", "win")},
        **{f"v_{n}": (2, 8) for n in ("slc", "win")},
    }  # fmt: skip
    given = {n: torch.empty(1, TOKENS, *s, device="meta") for n, s in shapes.items()}
    given |= {n: torch.empty(1, blocks, 2, d, device="meta") for n, d in (("k_cmp", 16), ("v_cmp", 8))}  # fmt: skip # noqa: E501
    values = {**dict.fromkeys(spec.names), **spec.defaults, **given, **config.geometry}
    cost = spec.cost(spec.bind(values))
    assert found["nsa_attention"] == (cost.flops, cost.bytes)


def test_a_layer_s_table_divides_what_it_says() -> None:
    told = [
        record("layer", name, [ms], tokens=tokens, width=width, cpu_ms=cpu, load=0.5)
        for tokens, width, times in (
            (8192, 256, ((60, 90), (40, 50), (50, 60))),
            (2048, 1024, ((3, 3), (2, 2), (2, 1))),
        )
        for name, (ms, cpu) in zip(layer_bench.SIDES, times, strict=True)
    ]
    other = record("other", "layer", [1.0], tokens=1, width=1)
    (_, headers, rows), (_, _, counted) = layer_bench.tables([*told, other])
    assert [row[:2] for row in rows] == [["8192", "256"], ["2048", "1024"]]
    named = dict(zip(headers, rows[0], strict=True))
    assert named["layer / op"] == "1.50" and named["(layer - both) / op"] == "0.25"
    assert named["the three by CPU time"] == "1.80, 1.50, 0.60" and named["load"] == "0.5"
    assert rows[1][5:8] == ["1.50", "1.50", "0.50"]
    wide = dataclasses.replace(layer_bench.NARROW, dim=1024)
    parts = layer_bench.counted(wide, 2048)
    mine = [row for row in counted if row[1] == "1024"]
    assert [row[2] for row in mine] == list(parts)
    for row, (operations, moved) in zip(mine, parts.values(), strict=True):
        assert row[0] == "2048" and float(row[3]) == pytest.approx(operations / 1e9, abs=6e-4)
        share = operations / parts["nsa_attention"][0]
        assert float(row[4]) == pytest.approx(share, abs=6e-4)
        assert float(row[5]) == pytest.approx(moved / 1e6, abs=0.06)
    assert layer_bench.tables([other]) == [] and layer_bench.to_text([]) == ""


def test_short_sequences_are_timed_more_often(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(layer_bench, "overhead", lambda *a: asked.append(a) or [])
    layer_bench.measure([(CONFIG, 1000), (CONFIG, 50_000)])
    layer_bench.measure([(CONFIG, 1000)], rounds=3)
    assert asked == [(CONFIG, 1000, 50), (CONFIG, 50_000, 5), (CONFIG, 1000, 3)]


def test_a_model_s_tables_divide_what_they_say() -> None:
    facts = {"layers": 2, "load": 0.25}
    told = [
        record("model", "decode nsa", [4.0], tokens=64, cpu_ms=6.0, bytes=3 * 2**20, **facts),
        record("model", "decode full", [8.0], tokens=64, cpu_ms=24.0, bytes=12 * 2**20, **facts),
        record("model", "decode nsa", [1.0], tokens=32, cpu_ms=1.0, bytes=2**20, **facts),
        record("model", "decode full", [1.0], tokens=32, cpu_ms=2.0, bytes=2**20, **facts),
        record("model", "train nsa", [30.0], tokens=64, cpu_ms=1.0, **facts),
        record("model", "train full", [20.0], tokens=64, cpu_ms=4.0, **facts),
        record("model", "train nsa", [30.0], tokens=128, cpu_ms=1.0, **facts),
        record("other", "train full", [20.0], tokens=128, cpu_ms=4.0, **facts),
    ]
    (train, heads, rows), (decode, more, both) = model_bench.tables(told)
    assert "training step" in train and "one new token" in decode
    named = [dict(zip(heads, row, strict=True)) for row in rows]
    assert [row["tokens"] for row in named] == ["64"]
    assert named[0]["NSA / full"] == "1.50" and named[0]["by CPU time"] == "0.25"
    assert named[0]["load"] == "0.25" and "NSA, tokens/s" not in heads
    named = [dict(zip(more, row, strict=True)) for row in both]
    assert [row["tokens"] for row in named] == ["32", "64"]
    assert named[1]["NSA / full"] == "0.50" and named[1]["by CPU time"] == "0.25"
    assert (named[1]["NSA cache, MiB"], named[1]["full cache, MiB"]) == ("3.0", "12.0")
    assert (named[1]["NSA, tokens/s"], named[1]["full, tokens/s"]) == ("250", "125")
    assert model_bench.tables([]) == []


def test_models_are_trained_up_to_the_limit_and_decoded_at_every_length(monkeypatch) -> None:
    monkeypatch.setattr(model_bench, "training", lambda n: [("train", n)])
    monkeypatch.setattr(model_bench, "decoding", lambda n: [("decode", n)])
    assert model_bench.measure([64, 32768, 32769]) == [
        ("train", 64), ("train", 32768), ("decode", 64), ("decode", 32768), ("decode", 32769)
    ]  # fmt: skip


def test_training_is_timed_thrice_where_it_is_short(monkeypatch) -> None:
    asked = []

    def in_turns(bench, steps, rounds, facts, held=None, warm=True):
        asked.append((bench, list(steps), rounds, facts, warm))
        return []

    monkeypatch.setattr(model_bench, "in_turns", in_turns)
    for tokens in (16383, 16384):
        model_bench.training(tokens)
    names = ["train nsa", "train full"]
    assert asked == [
        ("model", names, 3, {"tokens": 16383, "layers": 2}, True),
        ("model", names, 1, {"tokens": 16384, "layers": 2}, False),
    ]


def test_a_step_of_training_makes_gradients_anew(monkeypatch) -> None:
    made = {}
    monkeypatch.setattr(model_bench, "in_turns", lambda b, steps, *a, **k: made.update(steps) or [])
    nets, build = [], model_bench.ByteLanguageModel
    monkeypatch.setattr(
        model_bench, "ByteLanguageModel", lambda *a: nets.append(build(*a)) or nets[-1]
    )
    model_bench.training(40)
    assert [net.kinds for net in nets] == [("nsa",) * 2, ("full",) * 2]
    for net, step in zip(nets, made.values(), strict=True):
        step()
        once = [p.grad.clone() for p in net.parameters()]
        step()
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), once, strict=True))


def test_bytes_of_a_cache_count_each_store_once() -> None:
    x = torch.zeros(10)
    layer = type("Layer", (), {})()
    layer.one, layer.two = x, {"a": [x[2:], torch.zeros(3, dtype=torch.float64)], "b": (x,)}
    layer.own = layer
    cache = type("Cache", (), {"layers": [layer, layer]})()
    assert model_bench._bytes_of(cache) == 40 + 24


def test_layers_and_models_have_the_sizes_that_are_told() -> None:
    """16 heads of 64 for one kv head, width 256 (or 1024, their product), two layers."""
    narrow = NsaConfig(dim=256, heads=16, kv_heads=1, dk=64, dv=64)
    wide = dataclasses.replace(narrow, dim=16 * 64)
    assert layer_bench.SHAPES == ((narrow, 2048), (wide, 2048), (narrow, 8192))
    assert narrow == model_bench.CONFIG and model_bench.LAYERS == 2
    assert model_bench.BODY == {
        "vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
        "num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 64,
    }  # fmt: skip


@pytest.mark.parametrize("module", [layer_bench, model_bench], ids=["layer", "model"])
def test_progress_is_full_when_everything_was_measured(module, monkeypatch) -> None:
    told = []

    @contextlib.contextmanager
    def progress(name, total):
        told.append((name, total))
        yield told.append

    monkeypatch.setattr(module, "progress", progress)
    for name in ("overhead", "training", "decoding"):
        monkeypatch.setattr(module, name, lambda *_: [], raising=False)
    module.measure([(CONFIG, 96), (CONFIG, 8)] if module is layer_bench else [64, 32769])
    (_, total), *steps = told
    assert len(steps) == total and len(set(steps)) == total
