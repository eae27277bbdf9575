"""Values of the command line at their limits, units, and who is said to run a call."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_neuron.cli import FAILED, UNUSABLE, coverage, explain, main, ops, plan, shared, values
from nsa_neuron.conformance.targets import find_targets
from nsa_neuron.distributed.plan.model import Problem
from nsa_neuron.ops import get
from nsa_neuron.registry import Supported, Unsupported, requesting
from nsa_neuron.spec import MAX_INT

# ---- values


@pytest.mark.parametrize(
    ("read", "inside", "outside"),
    [
        (values.whole(), ["1", str(2**63 - 1)], ["0", str(2**63), "1.0", ""]),
        (values.whole(0), ["0"], ["-1"]),
        (values.seed, [str(-(2**63)), str(2**63 - 1)], [str(-(2**63) - 1), str(2**63)]),
        (values.share, ["0", "1", "0.25"], ["-0.01", "1.01", "nan", "inf", "x"]),
        (plan.count, ["1", "64K", "1m"], ["0", "0K", "-1", "K", "1.5K", "1G"]),
        (shared.dtype, ["bf16", "torch.float64", "float32"], ["int32", "nothing", "fp8"]),
    ],
    ids=["whole", "whole from 0", "seed", "share", "count", "dtype"],
)
def test_values_are_read_up_to_their_limits(
    read: Any, inside: list[str], outside: list[str]
) -> None:
    for text in inside:
        read(text)
    for text in outside:
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


def test_units_are_binary() -> None:
    assert [plan.count(x) for x in ("7", "64K", "1M", "3m")] == [7, 65536, 2**20, 3 * 2**20]


def test_numbers_of_devices_double_up_to_the_last() -> None:
    assert plan.numbers(["3", "16..64", "5..19", "8..8"]) == [3, 16, 32, 64, 5, 10, 8]


@pytest.mark.parametrize("locked", ["there.html", "folder"])
def test_a_file_that_cannot_be_written_is_refused(monkeypatch, tmp_path: Path, locked: str) -> None:
    """The file if it is there, else its folder; root may write everything, so access is made up."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "there.html").write_text("")
    monkeypatch.setattr(values.os, "access", lambda path, mode: Path(path).name != locked)
    taken = {}
    for name in ("there.html", "new.html"):
        try:
            values.new_file(str(folder / name))
            taken[name] = True
        except argparse.ArgumentTypeError:
            taken[name] = False
    assert taken == {"there.html": locked == "folder", "new.html": locked != "folder"}
    if locked == "folder":
        with pytest.raises(argparse.ArgumentTypeError, match="no folder that can be written to"):
            values.new_folder(str(folder / "deep"))


def test_json_has_text_where_numbers_end(capsys) -> None:
    inf = float("inf")
    shared.print_json({"a": (inf, [-inf, float("nan")]), "b": 1.5, "c": Path("x")})
    assert json.loads(capsys.readouterr().out) == {
        "a": ["inf", ["-inf", "nan"]],
        "b": 1.5,
        "c": "x",
    }


# ---- calls of given sizes


@pytest.mark.parametrize(("size", "code"), [(MAX_INT, 0), (MAX_INT + 1, UNUSABLE)])
def test_the_largest_size_is_a_size(capsys, size: int, code: int) -> None:
    words = ["--size", f"S={size}", "Hq=1", "Dk=1", "Dv=1", "--set", "window=1"]
    assert main(["ops", "sliding_window_attention", *words]) == code


def test_keys_are_as_many_as_queries_unless_that_is_said() -> None:
    spec = get("attention")
    for sizes, wanted in (({"S": 5}, (5, 5)), ({"S": 5, "T": 9}, (5, 9)), ({}, (8192, 8192))):
        bound = shared.bind(spec, sizes, {}, torch.bfloat16)
        assert (bound["S"], bound["T"]) == wanted
        assert bound.shapes["k"] == (1, wanted[1], 1, 128) and bound.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_statistics_have_the_dtype_of_their_calls(dtype: torch.dtype) -> None:
    """A float64 call whose lse were float32 would be refused."""
    bound = shared.bind(get("attention_backward"), {"S": 4}, {}, dtype)
    assert bound.dtype == dtype


def test_a_cache_s_pages_follow_from_its_tokens() -> None:
    """8192 tokens: 511 blocks in 8 pages of 64, 32 pages of 256, 128 of 64; two sequences."""
    bound = shared.bind(get("decode"), {"B": 2}, {}, torch.bfloat16)
    found = [[bound[f"{x}_{n}"] for x in ("page", "most", "pages")] for n in ("cmp", "slc", "win")]
    assert found == [[64, 8, 16], [256, 32, 64], [64, 128, 256]] and bound["S"] == 1
    own = shared.bind(get("decode"), {"page_win": 100, "T": 201}, {}, torch.bfloat16)
    assert (own["most_win"], own["pages_win"], own["most_cmp"]) == (3, 3, 1)


@pytest.mark.parametrize(
    ("method", "given"),
    [("mean", set()), ("linear", {"w1"}), ("mlp", {"w1", "b1", "w2", "b2"})],
)
def test_compression_has_the_weights_of_its_method(method: str, given: set[str]) -> None:
    scalars = {"method": method, "block": "4", "stride": "2"}
    bound = shared.bind(get("compress"), {"Dk": 8}, scalars, torch.float32)
    assert set(bound.shapes) == {"x", *given}
    assert bound.shapes.get("w1") in (None, (32, 8)) and bound["l"] == 4


def test_memory_s_limit_is_a_limit_of_elements(capsys) -> None:
    words = ["ops", "attention", "--size", f"B={2**30}", "Hq=1", "Dk=1", "Dv=1"]
    assert main([*words, f"S={2**30 - 1}"]) == 0
    assert main([*words, f"S={2**30}"]) == UNUSABLE


def test_costs_are_shown_in_decimal_units() -> None:
    row = {"cost": {"flops": 3_000_000_000, "bytes": 1_500_000}}
    assert ops._cost(row) == ["3.00", "1.5", "2000.0"]


def test_ops_say_what_must_be_given_and_what_need_not(capsys) -> None:
    assert main(["ops"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "q, k, v  " in lines["attention"] and "cu_seqlens" not in lines["attention"]
    assert "q, k_cmp, v_cmp, kv_len  " in lines["compressed_attention"]
    assert "grad_o, q, k, v, o, lse  " in lines["attention_backward"]


# ---- nsa plan


def test_the_plan_shows_as_many_neighbours_as_asked_for(capsys) -> None:
    words = ["plan", "--tokens", "64K", "--layers", "4", "--devices", "16", "--json"]
    found = {}
    for rows in (0, 2):
        assert main([*words, "--rows", str(rows)]) == 0
        data = json.loads(capsys.readouterr().out)
        found[rows] = data["plans"][0]["meshes"]
        assert data["problem"]["tokens"] == 65536 and data["problem"]["layers"] == 4
    assert len(found[0]) == 1 and len(found[2]) == 3 and found[2][0] == found[0][0]
    best = found[0][0]
    product = 1
    for size in best["mesh"].values():
        product *= size
    assert product == 16 and best["seconds_per_step"] > 0


@pytest.mark.parametrize(("layers", "fits"), [(1, True), (2000, False)])
def test_the_plan_warns_where_no_mesh_fits(capsys, layers: int, fits: bool) -> None:
    words = ["--devices", "16", "--tokens", "64K", "--layers", str(layers), "--rows", "0"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert ("NO MESH FITS" in out, "too much" in out) == (not fits, not fits)
    assert out.startswith("MODELLED, not measured") and Problem(tokens=1).dk


# ---- nsa explain


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["takes", "takes"], [0]),
        (["refuses", "takes", "takes"], [1]),
        (["hindered", "takes"], [1]),
        (["hindered", "refuses"], []),
    ],
    ids=str,
)
def test_the_first_that_takes_a_call_and_can_run_is_chosen(monkeypatch, targets, chosen) -> None:
    monkeypatch.setattr(
        explain, "verdict", lambda bound, place: {"supported": place.said != "refuses"}
    )
    places = [SimpleNamespace(said=x, hindrance="no GPU" * (x == "hindered")) for x in targets]
    rows = explain.choose(SimpleNamespace(), places)
    assert [i for i, row in enumerate(rows) if row["chosen"]] == chosen


def test_every_device_asked_for_needs_somebody(capsys) -> None:
    words = ["explain", "attention", "--policy", "cuda:sim", "--device"]
    assert main([*words, "cpu"]) == 0
    assert main([*words, "cuda"]) == FAILED, "the interpreter reads CPU tensors only"
    assert main([*words, "cpu", "--device", "cuda"]) == FAILED


def test_a_verdict_keeps_rule_reason_and_plan(monkeypatch) -> None:
    bound = shared.on_device(shared.bind(get("attention"), {}, {}, torch.float64), "cpu")
    rows = {
        p: explain.verdict(bound, explain.find_targets([p])[0]) for p in ("cuda:sim", "reference")
    }
    assert rows["cuda:sim"]["rule"] == "dtype" and "float64" in rows["cuda:sim"]["reason"]
    assert not rows["cuda:sim"]["supported"] and rows["reference"]["supported"]


def test_backends_are_listed_with_what_hinders_them_and_who_is_asked_for(capsys) -> None:
    places = find_targets()
    with requesting("reference:eager"):
        assert main(["backends"]) == 0
    lines = capsys.readouterr().out.split("kernels\n")[0].splitlines()
    rows = {line.split()[0]: line for line in lines if ":" in line.split(" ")[0]}
    assert set(rows) == {str(place.target) for place in places}
    for place in places:
        row = rows[str(place.target)]
        assert (place.hindrance or "  available  ") in row and f"  {place.device}" in row
        asked = "by NSA_BACKEND=reference:eager" in row
        assert asked == (str(place.target) == "reference:eager")


def test_a_target_s_cell_is_its_verdict_or_the_rule_that_refuses() -> None:
    yes, no = Supported(), Unsupported("dtype", "none of them")
    for forward, backward, said in (
        (yes, yes, "fwd, bwd"), (yes, no, "fwd"), (yes, None, "fwd"), (no, yes, "no: dtype"),
        (Unsupported("kernel", "none"), None, "no kernel"),
    ):  # fmt: skip
        assert coverage.Covered("attention", forward, backward).text() == said


def test_the_readme_s_table_tells_what_has_not_run_from_what_has_no_path(monkeypatch) -> None:
    """On hardware; elsewhere a cell says what it has."""
    yes, no = Supported(), Unsupported("kernel", "none")
    column = [
        coverage.Covered(spec.name, no if spec.name == "decode" else yes, None)
        for spec in coverage.public()
    ]
    monkeypatch.setattr(coverage, "find_targets", lambda order: [])
    monkeypatch.setattr(
        coverage, "covered", lambda places: dict.fromkeys(("x:sim", "x:hw"), column)
    )
    rows = [line.split(" | ") for line in coverage.markdown().splitlines()[2:]]
    cells = {op.strip("|` "): [cell.strip("| ") for cell in rest] for op, *rest in rows}
    assert cells.pop("decode") == ["no kernel", "no path yet"]
    assert set(map(tuple, cells.values())) == {("fwd", "not run")}
