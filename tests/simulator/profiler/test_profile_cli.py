"""`nsa profile` on files outside the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nsa_neuron.simulator.command import profile as profile_cli
from nsa_neuron.simulator.profiler import diff

KERNELS = """
import nki
import nki.isa as nisa
import nki.language as nl

@nki.jit
def scaled(a, width=128):
    out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
    for start in range(0, a.shape[1], width):
        tile = nl.ndarray((128, width), a.dtype, buffer=nl.sbuf)
        nisa.dma_copy(tile, a[:, start : start + width])
        nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
        nisa.dma_copy(out[:, start : start + width], tile)
    return out

@nki.jit
def refused(a):
    nisa.memset(nl.ndarray((128, 64), a.dtype)[5:10], 0.0)
    return a

@nki.jit
def looped(n):
    register = nisa.register_alloc()
    nisa.register_load(register, n)
    tile = nl.ndarray((128, 64), nl.float32, buffer=nl.sbuf)
    nisa.memset(tile, 0.0)
    def body(_):
        nisa.activation(tile, nl.copy, tile)
    nl.fori_loop(0, register, body)
    out = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(out, tile)
    return out

def times(n, count):
    tile = nl.ndarray((128, 64), nl.float32, buffer=nl.sbuf)
    nisa.memset(tile, 0.0)
    def body(_):
        nisa.activation(tile, nl.copy, tile)
    for _ in range(count):
        register = nisa.register_alloc()
        nisa.register_load(register, n)
        nl.fori_loop(0, register, body)
    out = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(out, tile)
    return out

@nki.jit
def twice(n):
    return times(n, 2)

@nki.jit
def thrice(n):
    return times(n, 3)
"""
SCALED = ("user_kernels.py::scaled", "--arg", "a=randn:128x2048:fp32")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "user_kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nsa(capsys):
    def call(*words):
        code = profile_cli.profile_main(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_report_names_what_matters(nsa):
    code, out, err = nsa(*SCALED)
    assert (code, err) == (0, "")
    first, *rest = out.splitlines()
    assert first.startswith("scaled on trn2: ") and "us MODELLED, between" in first
    for word in ("roofline: ", "HBM: 2,097,152 bytes", "dma-load", "vector", "PE utilisation 0.0%",
                 "SBUF peak", "critical path: ", "user_kernels.py:11", "advice"):  # fmt: skip
        assert any(word in line for line in rest), word


def test_json_is_the_same_report(nsa):
    facts = json.loads(nsa(*SCALED, "--json")[1])
    out = nsa(*SCALED)[1]
    assert f"{facts['time_us']['central']:.2f} us MODELLED" in out
    for advice in facts["advice"]:
        assert advice["message"] in " ".join(out.split())


def test_files_are_written(nsa, folder):
    pytest.importorskip("matplotlib")
    code, _, _ = nsa(*SCALED, "--save", "a.json", "--trace", "t.json", "--png", "p.png")
    assert code == 0
    assert json.loads((folder / "t.json").read_text())["traceEvents"]
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    assert diff.load("a.json") == json.loads(nsa(*SCALED, "--json")[1])


def test_diff_tells_what_changed(nsa):
    nsa(*SCALED, "--save", "a.json")
    nsa(*SCALED, "--arg", "width=512", "--save", "b.json")
    a, b = diff.load("a.json"), diff.load("b.json")
    code, out, _ = nsa("--diff", "a.json", "b.json")
    assert code == 0
    first, one, other = out.splitlines()[:3]
    assert first == "A -> B, MODELLED, not measured"
    assert one == f"  A: a.json, scaled(a float32 128x2048), {a['time_us']['central']:.2f} us"
    assert other.startswith("  B: b.json, scaled(")
    ratio = b["time_us"]["central"] / a["time_us"]["central"]
    assert ratio < 1 and f"x {ratio:.3f}" in out
    assert "instructions" in out and "HBM bytes" not in out  # the same in both
    found = json.loads(nsa("--diff", "a.json", "b.json", "--json")[1])
    assert found["quantities"]["instructions"] == {"a": 48, "b": 12, "ratio": 0.25}
    assert found["comparable"] is True


def test_the_report_is_printed_where_there_is_no_matplotlib(nsa, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = nsa(*SCALED, "--png", "p.png")
    assert code == 2 and out.startswith("scaled on trn2: ")
    assert err.splitlines() == [
        "nsa profile: the picture needs matplotlib: pip install nsa-neuron[plot]"
    ]


def test_a_page_is_written(nsa, folder):
    assert nsa(*SCALED, "--html", "p.html")[0] == 0
    assert (folder / "p.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("command", ["profile", "simulate"])
def test_a_reader_that_goes_away_is_no_error(command, folder):
    """`nsa profile ... | true`: the pipe is closed before anything is written."""
    words = [command, *SCALED, "--json"]
    script = f"import sys; from nsa_neuron.cli import main; sys.exit(main({words!r}))"
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True,
            check=False, cwd=folder,
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_trace_of_trip_counts_that_is_cut_is_one_line(nsa):
    given = ("--arg", "n=full(3):1x1:int32", "--trips", "3,4")
    assert nsa("user_kernels.py::twice", *given)[0] == 0
    code, out, err = nsa("user_kernels.py::thrice", *given)
    assert (code, out) == (2, "")
    assert err == "nsa profile: the trace holds 2 trip counts; the kernel asks for more\n"


def test_a_saved_report_that_is_cut_is_one_line(nsa, folder):
    nsa(*SCALED, "--save", "a.json")
    text = (folder / "a.json").read_text()
    (folder / "cut.json").write_text(text[: len(text) // 2])
    code, out, err = nsa("--diff", "a.json", "cut.json")
    assert (code, out) == (2, "") and err.startswith("nsa profile: cut.json is no JSON: ")
    assert len(err.splitlines()) == 1


def test_diff_of_equal_runs_and_of_incomparable_ones(nsa):
    nsa(*SCALED, "--save", "a.json")
    assert "no difference" in nsa("--diff", "a.json", "a.json")[1]
    nsa(*SCALED, "--params", "documented", "--save", "b.json")
    assert "NOT COMPARABLE" in nsa("--diff", "a.json", "b.json")[1]


def test_trip_counts_are_taken_and_told(nsa):
    words = ("user_kernels.py::looped", "--arg", "n=full(3):1x1:int32")
    code, out, err = nsa(*words)
    assert code == 1 and "refused" in err
    times = {}
    for trips in ("2", "7"):
        code, out, _ = nsa(*words, "--trips", trips)
        assert code == 0 and f"the constant {trips}" in out
        times[trips] = float(out.split("looped on trn2: ")[1].split()[0])
    assert times["2"] < times["7"]
    with_data = nsa(*words, "--data", "--json")[1]
    assert json.loads(with_data)["cores"][0]["engines"]["scalar"]["instructions"] == 3


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("user_kernels.py::refused", "--arg", "a=zeros:128x64"), 1, "refused: memset"),
        (("absent.py::scaled",), 2, "no file absent.py"),
        (("user_kernels.py::absent",), 2, "no kernel 'absent'"),
        (("user_kernels.py::scaled",), 2, "needs a"),
        (("--diff", "absent.json", "absent.json"), 2, "no file absent.json"),
        (("--diff", "user_kernels.py", "user_kernels.py"), 2, "is no JSON"),
        ((*SCALED, "--trace", "absent/t.json"), 2, "absent/t.json"),
    ],
)
def test_what_goes_wrong_is_said(nsa, words, code, said):
    got, out, err = nsa(*words)
    assert (got, out) == (code, "")
    assert said in err


def test_a_file_that_is_no_profile_is_refused(nsa, folder):
    (folder / "other.json").write_text("[1, 2]")
    assert "is no saved profile" in nsa("--diff", "other.json", "other.json")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--trips", "x"), "'x': write 8, a trace 3,5,4 or draw:3,5,4"),
        (("--trips", "3,"), "'3,': write 8, a trace 3,5,4"),
        (("--trips=-3",), "'-3': -3 is less than none"),
        (("--params", "guess"), "'measured-3p'"),
    ],
)
def test_bad_options_end_with_usage(nsa, words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        nsa(*SCALED, *words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "usage: nsa profile" in err and said in err


@pytest.mark.parametrize("bytes_", [1, 40, 400])
def test_a_saved_profile_that_is_cut_is_refused_in_one_line(nsa, folder, bytes_):
    assert nsa(*SCALED, "--save", "whole.json")[0] == 0
    (folder / "cut.json").write_text((folder / "whole.json").read_text()[:bytes_])
    code, out, err = nsa("--diff", "whole.json", "cut.json")
    assert (code, out) == (profile_cli.UNUSABLE, "")
    assert "cut.json is no JSON" in err and err.count("\n") == 1


def test_constants_can_be_set_and_the_report_says_so(nsa):
    before = json.loads(nsa(*SCALED, "--json")[1])["time_us"]
    facts = json.loads(nsa(*SCALED, "--constant", "dma_rate=1", "--json")[1])
    assert facts["time_us"]["low"] > before["high"]
    assert "dma_rate = 1, as given" in facts["assumptions"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dma_rats=1", "no constant is named 'dma_rats'; there are dma_rate"),
        ("dma_rate=-1", "dma_rate = -1.0: a constant is a finite number, 0 or more"),
        ("dma_rate=nan", "dma_rate = nan"),
    ],
)
def test_a_constant_that_cannot_be_set_is_refused(nsa, word, said):
    code, out, err = nsa(*SCALED, "--constant", word)
    assert (code, out) == (profile_cli.UNUSABLE, "") and said in err


def test_a_constant_without_a_value_is_refused(nsa, capsys):
    with pytest.raises(SystemExit):
        nsa(*SCALED, "--constant", "dma_rate")
    assert "write NAME=VALUE" in capsys.readouterr().err


def test_constants_are_listed_with_band_and_source(nsa):
    code, out, _ = nsa("--constants")
    assert code == 0 and len(out.splitlines()) > 50
    (line,) = (x for x in out.splitlines() if x.startswith("dma_run_time"))
    assert "1600 (1000 to 2200) ns" in line and "[guess; third party" in line
    assert json.loads(nsa("--constants", "--json")[1])["dma_run_time"]["value"] == 1600
