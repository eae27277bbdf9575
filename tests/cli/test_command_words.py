"""Words of commands that become values."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import pytest
import torch

import nsa_neuron
from nsa_neuron.cli import agree, conform, main, plan, shared, values
from nsa_neuron.cli import bench as bench_command
from nsa_neuron.errors import NsaError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("16/1/128/float32", ((16, 1), 128, "float32")), ("8/8/64/float16", ((8, 8), 64, "float16")),
     ("4/2/16/bfloat16", ((4, 2), 16, "bfloat16"))],
)  # fmt: skip
def test_a_shape_is_heads_head_dim_and_dtype(text: str, sizes: Any) -> None:
    assert bench_command._shape(text) == sizes


@pytest.mark.parametrize(
    ("part", "lengths"),
    [
        ("native", [4096, 8192, 16384]), ("stages", [4096, 16384]),
        ("memory", [4096, 8192, 16384, 65536]), ("peers", [4096]),
        ("attention", [2048, 8192, 16384]),
        ("model", [2048, 8192, 32768]),
    ],
)  # fmt: skip
def test_parts_are_measured_at_lengths_of_their_own_unless_others_are_given(
    monkeypatch, part: str, lengths: list[int]
) -> None:
    name = bench_command.NATIVE_PARTS.get(part, (part, []))[0]
    module = importlib.import_module(
        "nsa_neuron.model_bench" if part == "model" else f"nsa_neuron.bench.{name}"
    )
    asked: list[Any] = []
    monkeypatch.setattr(module, "measure", lambda *a, **k: asked.append((a, k)) or [])
    monkeypatch.setattr(module, "to_text", lambda records: "text")
    # Without gradients is an option of one part.
    for more in ([], ["--tokens", "7"], ["--forward"]):
        assert main(["bench", "--target", "cpu", "--part", part, *more]) == 0
    shape = ((16, 1), 128, "float32") if part in bench_command.NATIVE_PARTS else ()
    forward = {"gradients": False} if part == "native" else {}
    assert asked == [((lengths, *shape), {}), (([7], *shape), {}), ((lengths, *shape), forward)]


def test_a_layer_and_the_simulator_are_measured_as_they_are(monkeypatch, capsys) -> None:
    for words, name in (
        (["--target", "cpu", "--part", "layer"], "nsa_neuron.layer_bench"),
        (["--simulator"], "nsa_neuron.bench.simulator"),
    ):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "measure", lambda: [])
        monkeypatch.setattr(module, "to_text", lambda records, name=name: f"text of {name}")
        assert main(["bench", *words]) == 0
        head, text = capsys.readouterr().out.strip().split("\n\n")
        assert head.startswith("measured on") and text == f"text of {name}"


@pytest.mark.parametrize("text", ["192", "192/128/1", "0/8", "8/0", "a/8", "8/", "-8/8"])
def test_dims_are_two_numbers(text: str) -> None:
    assert bench_command._dims("192/128") == (192, 128)
    with pytest.raises(NsaError, match=f"--dims is '{text}'; it must be DK/DV, such as 192/128"):
        bench_command._dims(text)


def test_targets_stand_between_commas() -> None:
    assert agree._names(" h200:sim,, cpu ,") == ["h200:sim", "cpu"]


def test_names_and_values_are_parted_at_the_first_sign() -> None:
    assert shared.pairs(["a=b=c", "d=1"], "--set") == {"a": "b=c", "d": "1"}
    for word in ("a", "=b", "a="):
        with pytest.raises(NsaError, match=f"--set: '{word}' is not of the form NAME=VALUE"):
            shared.pairs([word], "--set")


def test_what_was_tried_is_said_in_the_order_of_the_options() -> None:
    given = argparse.Namespace(
        backend=["a"], op=["x", "y"], case="c", dtype=[torch.float16], tag=["edge"]
    )
    assert conform._tried(given) == ("backend a; op x, y; case c; dtype float16; cases tagged edge")


def test_values_say_what_is_wrong_with_them() -> None:
    for read, text, said in (
        (values.whole(3), "2", "2 is too small; it must be at least 3"),
        (values.whole(), str(2**63), f"{2**63} is too large; it must be at most {2**63 - 1}"),
        (values.whole(), "x", "'x' is no whole number"),
        (values.share, "2", "'2' is no number from 0 to 1"),
        (shared.dtype, "int8", "no dtype 'int8'; there are fp32, fp16, bf16, fp64"),
        (plan.count, "1.5K", "'1.5K' is no whole number above 0, such as 64K or 1M"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            read(text)
        assert str(error.value) == said


def test_results_of_json_are_indented_and_odd_values_are_words(capsys) -> None:
    shared.print_json({"a": [1], "d": torch.float16})
    assert capsys.readouterr().out == '{\n "a": [\n  1\n ],\n "d": "torch.float16"\n}\n'


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "meta"])
def test_a_call_moves_to_a_device_with_nothing_else_changed(device: str) -> None:
    bound = shared.bind(nsa_neuron.ops.get("gated_sum"), {"S": 4}, {}, torch.float16)
    moved = shared.on_device(bound, device)
    assert moved.device == torch.device(device) and moved.shapes == bound.shapes
    assert shared.on_device(bound, "neuron").device.type in ("neuron", "privateuseone")
    with pytest.raises(NsaError, match="no device type 'toaster'"):
        shared.on_device(bound, "toaster")
