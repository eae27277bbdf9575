"""What the demo and the planted facts report, of results made by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import model

from nsa_neuron import conformance, demo, planted
from nsa_neuron.conformance import text as matrix_text
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.show import Look
from nsa_neuron.show.record import Passage, View

TEXT = b"the start of it,\nQB in here and so on, the end of the document Q"
VIEW = View(
    63, 2, "blocks.2.attention", 1,
    (Passage(0, 0, 15, 0.1, "first"), Passage(1, 16, 31, 0.9, "importance"),
     Passage(3, 48, 63, 0.2, "own")),
    (0.1, 0.9, 0.3, 0.2), ((0.5, 0.5, 0.5),), (), (), (1.0, 1.0, 1.0),
)  # fmt: skip
LOOK = Look(TEXT, 16, 8, 4, (63,), (VIEW,))
RIGHT = planted.Answer(63, 17, b"QB", b"B", ((VIEW, VIEW.picked[1]),))
WRONG = planted.Answer(63, 40, b"AN", b"\xff", ())


def result(**changes):
    values = {
        "document": "a document", "model": "a model", "tokens": 60,
        "timings": demo.Timings(compile=1.25, prefill=0.5, decode=4.0), "written": "new",
        "selected": demo.selected_blocks(LOOK), "look": LOOK,
        "facts": planted.Planted(TEXT, (RIGHT, WRONG), LOOK), "parameters": 1234,
        "lowerings": {"choices": [{"target": "cpu:native"}, {"target": "cpu:torch"}],
                      "rest": "inductor"},
        "modelled": {"prefill": demo.Modelled(7, 1000.0, 2345.6, 3000.0)},
        "compared": {"cpu:native": 900.0, demo.REFERENCE: 60.0}, **changes,
    }  # fmt: skip
    return demo.DemoResult(**values)


def test_the_report_says_every_number_with_its_unit() -> None:
    lines = dict(line.split(None, 1) for line in demo.report(result()).splitlines()[:9])
    assert lines["lowering"] == "nsa ops -> cpu:native, cpu:torch; the rest -> inductor"
    assert lines["compile"].startswith("1.2 s (once")
    assert lines["prefill"] == "60 tokens in 0.50 s = 120 tokens/s"
    assert lines["decode"] == f"{demo.DECODE} tokens in 4.00 s = {demo.DECODE / 4:.1f} tokens/s"
    assert lines["beside"] == (
        "60 tokens, not compiled: cpu:native 900 tokens/s (15.0 times reference), reference 60"
    )
    assert lines["read"] == "… the start of it,·QB in here and so on, the end of the docume"
    assert lines["wrote"] == "'new'" and lines["document"] == "a document"
    assert demo.report(result()).splitlines()[-1] == (
        "modelled   nsa ops of prefill, one simulated NeuronCore: 2,346 us (1,000 to 3,000) in 7 "
        "kernel launches"
    )
    assert "beside" not in demo.report(result(compared={}))


def test_the_selection_is_told_block_by_block() -> None:
    _, *rows = demo.selection_report(result()).splitlines()
    assert [row.split(None, 5) for row in rows] == [
        ["0", "tokens", "0..15", "first", "the", "start of it,"],
        ["1", "tokens", "16..31", "importance", "·QB", "in here and "],
        ["3", "tokens", "48..63", "own", "f", "the document Q"],
    ]


def test_plain_data_has_what_was_measured_apart_from_what_was_modelled() -> None:
    plain = json.loads(json.dumps(result().to_json()))
    assert plain["prefill"] == {"tokens": 60, "seconds": 0.5}
    assert plain["decode"] == {"tokens": demo.DECODE, "seconds": 4.0}
    assert plain["compile_seconds"] == 1.25
    assert plain["modelled"] == {
        "prefill": {"launches": 7, "low": 1000.0, "central": 2345.6, "high": 3000.0}
    }
    assert plain["compared"] == {"cpu:native": 900.0, "reference": 60.0}
    assert plain["facts"] == [
        {"asked": 63, "place": 17, "fact": "QB", "said": "B", "right": True,
         "picked_by": [{"layer": 2, "kv_head": 1, "first": 16, "last": 31}]},
        {"asked": 63, "place": 40, "fact": "AN", "said": "�", "right": False, "picked_by": []},
    ]  # fmt: skip


def test_the_facts_report_tells_the_farthest_and_where_it_was_seen() -> None:
    lines = planted.report(result().facts).splitlines()
    assert lines[:3] == [
        "planted    2 facts, two capitals each, in 64 bytes",
        "found      1 of 2 when asked for at the end",
        "farthest   QB at byte 17, asked for 46 bytes later: answered B, right",
    ]
    assert lines[3].startswith("passage    picked by layer 2, kv head 1, bytes 16 to 31: … ")
    assert len(lines) == 4
    shown = lines[3].partition(": … ")[2].removesuffix(" …")
    assert shown == TEXT[0:62].decode().replace("\n", "·")  # 30 bytes on either side
    alone = planted.report(planted.Planted(TEXT, (WRONG,), None)).splitlines()
    assert alone[2].endswith("answered �, wrong") and "no layer picked its block" in alone[3]


def test_modelled_times_are_sums_in_microseconds(monkeypatch) -> None:
    """Bands are nanoseconds; launches come one after the other; stages begin where they are."""
    bands = {
        "a": SimpleNamespace(low=1000.0, central=2000.0, high=4000.0),
        "b": SimpleNamespace(low=500.0, central=1500.0, high=2500.0),
    }
    monkeypatch.setattr(demo.cost, "estimate", lambda r: SimpleNamespace(band=bands[r]))
    assert demo.Modelled.of("ab") == demo.Modelled(2, 1.5, 3.5, 6.5)
    assert demo.modelled_stages("abb", 1) == {
        "prefill": demo.Modelled(1, 1.0, 2.0, 4.0), "decode": demo.Modelled(2, 1.0, 3.0, 5.0)
    }  # fmt: skip
    assert demo.modelled_stages("", 0) == {} and set(demo.modelled_stages("a", 1)) == {"prefill"}


def test_a_model_is_described_by_its_own_numbers() -> None:
    net = model(("nsa", "nsa", "nsa"), torch.float32, dim=64)
    count = sum(p.numel() for p in net.parameters())
    assert demo.describe(net, {"trained_bytes": 2_340_000}) == (
        f"3 NSA blocks, 4 query heads on 2 kv head, width 64, {count / 10**6:.2f} M parameters, "
        "trained 2.3 MB"
    )


def test_the_document_begins_with_what_training_left_out() -> None:
    topics = demo.help_topics()
    held = sorted((t for i, t in enumerate(topics) if i % 20 == 0), key=len, reverse=True)
    found = demo.document()
    assert found.startswith(b"\n\n".join(held))
    assert len(found) == sum(map(len, topics)) + 2 * (len(topics) - 1)
    assert len(held[0]) >= len(held[-1]) and demo.PROMPT == 8192 <= sum(map(len, held))


def test_writing_is_timed_and_counted_by_stage() -> None:
    net, records = model(("window",), torch.float32), [1, 2, 3]
    timings = demo.Timings()
    written = demo.write(net, b"some text", 5, timings, records)
    assert len(written) == 5 and timings.launches == 3
    assert timings.prefill > 0 and timings.decode > 0 and timings.compile == 0


def test_planting_without_looking_needs_no_nsa_layer() -> None:
    net = model(("full",), torch.float32)
    found = planted.plant(net, demo.document()[:300], facts=2, looking=False)
    assert found.look is None and all(a.seen == () for a in found.answers)
    again = planted.plant(net, demo.document()[:300], facts=2, looking=False)
    other = planted.plant(net, demo.document()[:300], facts=2, seed=1, looking=False)
    assert found.text == again.text != other.text and len(found.text) == 300


def test_facts_lie_before_what_the_windows_of_all_layers_hand_on() -> None:
    """Two questions of 2 bytes, 3 layers of a window of 12, and 5 bytes for two facts."""
    net, text = model(("window",) * 3, torch.float32), demo.document()
    for seed in range(5):
        found = planted.plant(net, text[: 4 + 36 + 5], facts=2, seed=seed, looking=False)
        assert all(a.place + 2 <= 5 and a.asked in (41, 43) for a in found.answers)
    with pytest.raises(InvalidArgument, match="at least 45"):
        planted.plant(net, text[:44], facts=2, looking=False)


def test_only_picks_by_importance_that_hold_the_fact_count_as_seen() -> None:
    net = model(("nsa",), torch.float32)
    made = planted.plant(net, demo.document()[:150], facts=2, seed=5)
    for answer in made.answers:
        wanted = [
            (view.layer, view.kv_head, p.block)
            for view in made.look.views if view.query == answer.asked
            for p in view.picked
            if p.why == "importance" and p.block == answer.place // 16
        ]  # fmt: skip
        assert [(v.layer, v.kv_head, p.block) for v, p in answer.seen] == wanted


@pytest.mark.parametrize(
    ("words", "prompt", "options"),
    [
        ([], 8192, None), (["--prompt", "77"], 77, None),
        (["--mode", "sim", "--target", "trn2"], 1024, {"target": "trn2", "mode": "sim"}),
        (["--mode", "sim", "--prompt", "9", "--json"], 9, {"mode": "sim"}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("ok", [True, False])
def test_the_command(words, prompt, options, ok, monkeypatch, tmp_path, capsys) -> None:
    asked = []
    matrix = SimpleNamespace(ok=ok, to_dict=lambda: {"cells": 1})
    monkeypatch.setattr(demo, "run", lambda *a: asked.append(a) or result())
    monkeypatch.setattr(conformance, "run", lambda tags: asked.append(tags) or matrix)
    monkeypatch.setattr(matrix_text, "matrix", lambda m: "THE MATRIX")
    page = tmp_path / "deep" / "page.html"
    assert demo.main([*words, "--page", str(page)]) == (0 if ok else 1)
    assert asked == [(prompt, options), ("smoke",)]
    assert "Facts asked for" in page.read_text()
    out = capsys.readouterr().out
    if "--json" in words:
        assert json.loads(out) == {"demo": result().to_json(), "matrix": {"cells": 1}}
    else:
        for part in ("document   a document", "THE MATRIX", "Blocks that the last query selected",
                     "1,234 parameters", "temperature 0.8", "likeliest 85%"):  # fmt: skip
            assert part in out
