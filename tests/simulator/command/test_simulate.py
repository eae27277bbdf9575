"""`nsa simulate` and `python -m nsa_neuron.simulator`, on files outside the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nsa_neuron
from nsa_neuron.simulator import SimulationWarning
from nsa_neuron.simulator.command import loading
from nsa_neuron.simulator.command import simulate as cli
from nsa_neuron.simulator.run.arguments import ShapeDtype

KERNELS = """
import nki
import nki.isa as nisa
import nki.language as nl
from helpers import load

@nki.jit
def scaled(a, scale=1.0, other=None, kind="plain"):
    x = load(a)
    nisa.tensor_scalar(dst=x, data=x, op0=nl.multiply, operand0=scale)
    out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    return out

@nki.jit
def refused(a):
    x = load(a)
    nisa.memset(dst=x[5:10], value=0.0)
    nisa.dma_copy(dst=a, src=x)

@nki.jit
def raises(a):
    return {}["absent"]

if __name__ == "__main__":
    import sys
    import numpy as np
    print(sys.argv[1:], nki.simulate(scaled)(np.ones((4, 4), np.float32), 3.0).sum())
"""

HELPERS = """
import nki.isa as nisa
import nki.language as nl

def load(a):
    x = nl.ndarray(a.shape, a.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=x, src=a)
    return x
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "user_kernels.py").write_text(KERNELS)
    (tmp_path / "helpers.py").write_text(HELPERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def simulate(capsys, kernel, *words):
    code = cli.simulate_main([f"user_kernels.py::{kernel}", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_summary(folder, capsys):
    code, out, _ = simulate(capsys, "scaled", "--arg", "a=full(2):64x32:bf16", "--arg", "scale=3")
    assert code == 0
    assert "result 0              bfloat16 [64, 32]  min 6  max 6  mean 6" in out
    assert "instructions 3 (dma 2, vector 1)" in out
    assert "DMA wrote 8,192 bytes" in out
    assert "SBUF 64 of 212,984" in out
    assert not {"user_kernels", "helpers", "nki"} & set(sys.modules)


def test_json_lnc_and_saved_results(folder, capsys):
    np.save("a.npy", np.arange(12, dtype=np.float32).reshape(3, 4))
    words = ("--arg", "a=a.npy", "--lnc", "2", "--json", "--save", "out")
    code, out, _ = simulate(capsys, "scaled", *words)
    facts = json.loads(out)
    assert (code, facts["cores"], facts["instructions"]) == (0, 2, 6)
    assert facts["results"][0]["max"] == 11
    np.testing.assert_array_equal(np.load("out/scaled_0.npy"), np.load("a.npy"))


def test_shape_only_needs_no_memory(folder, capsys):
    code, out, _ = simulate(
        capsys, "scaled", "--arg", "a=randn:128x40000:fp32", "--shape-only", "--json"
    )
    facts = json.loads(out)
    assert code == 0 and facts["data"] is False
    assert facts["results"] == [{"shape": [128, 40000], "dtype": "float32"}]
    assert facts["peak_bytes_per_partition"][0]["sbuf"]["live"] == 160_000


def test_a_broken_rule(folder, capsys):
    code, out, err = simulate(capsys, "refused", "--arg", "a=ones:128x4")
    assert code == 1 and not out
    assert "rule start-partition" in err and "user_kernels.py:18 in refused" in err
    code, out, _ = simulate(capsys, "refused", "--arg", "a=ones:128x4", "--json")
    assert json.loads(out)["error"]["line"] == 18
    code, out, _ = simulate(capsys, "refused", "--arg=a=ones:128x4", "--relax=start-partition")
    assert code == 0
    assert "RELAXED start-partition: broken 1 times" in out
    assert "(written by the kernel)" in out


@pytest.mark.parametrize("version", ["0.6", "0.7"])
def test_the_version_is_named_and_its_warnings_are_printed_once(folder, capsys, recwarn, version):
    source = Path("user_kernels.py")
    source.write_text(
        source.read_text() + "\n@nki.jit\ndef looped(a):\n"
        "    for _ in nl.affine_range(2):\n        nisa.dma_copy(a, a)\n"
    )
    code, out, err = simulate(capsys, "looped", "--arg", "a=ones:8x4", "--nki", version)
    assert (code, err) == (0, "") and f"looped on trn2, NKI {version}, 1 core" in out
    assert out.count("is deprecated in NKI 0.7: write range") == (version == "0.7")
    assert [w for w in recwarn if issubclass(w.category, SimulationWarning)] == []


@pytest.mark.parametrize(
    ("first_line", "code", "text"),
    [
        ("import neuronxcc.nki as nki", 1, "neuronxcc is the NKI 0.1 API"),
        ("from nki.language import par_dim", 1, "nki.language.par_dim no longer exists"),
        ("import nki; nki.benchmark", 1, "write instead: `nsa profile"),
        ("def broken(:", 2, "old.py:1: "),
    ],
)
def test_a_file_of_another_era_is_refused_at_its_line(tmp_path, capsys, first_line, code, text):
    (tmp_path / "old.py").write_text(f"{first_line}\n")
    assert cli.simulate_main([f"{tmp_path / 'old.py'}::kernel"]) == code
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err
    assert "old.py:1" in err


def test_an_exception_in_the_kernel_shows_the_kernels_frames_only(folder, capsys):
    code, _, err = simulate(capsys, "raises", "--arg", "a=ones:8x4")
    assert code == 1
    assert "KeyError: 'absent'" in err and 'return {}["absent"]' in err
    assert "nsa_neuron" not in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["absent.py::k"], "no file absent.py"),
        (["user_kernels.py::absent"], "there are: raises, refused, scaled"),
        (["user_kernels.py"], "which kernel?"),
        (["user_kernels.py::scaled"], "needs a: --arg a=randn"),
        (["user_kernels.py::scaled", "--arg", "a"], "write NAME=VALUE"),
        (["user_kernels.py::scaled", "--arg", "b=1"], "has no 'b'"),
        (["user_kernels.py::scaled", "--arg", "a=random:3x3"], "no fill 'random'"),
        (["user_kernels.py::scaled", "--arg", "a=randn:3x3:uint64"], "no such 64-bit"),
        (["user_kernels.py::scaled", "--arg", "a=randn:3x"], "cannot read 'randn:3x'"),
        (["user_kernels.py::scaled", "--arg", "a=full:3x3"], "full cannot use ()"),
        (["user_kernels.py::scaled", "--arg", "a=no.npy"], "no file no.npy"),
        (
            ["user_kernels.py::scaled", "--relax", "bonds"],
            "no rule is named 'bonds'; close: bounds",
        ),
        (["user_kernels.py::scaled", "--relax", "xyz"], "no rule is named 'xyz'; rules: address"),
        (["user_kernels.py::scaled", "--target", "trn9"], "'trn9' is not modelled"),
        (
            ["user_kernels.py::scaled", "--nki", "0.9"],
            "NKI '0.9' is not simulated; versions: '0.6'",
        ),
    ],
)
def test_command_lines_that_cannot_be_carried_out(folder, capsys, words, text):
    assert cli.simulate_main(words) == cli.UNUSABLE
    out, err = capsys.readouterr()
    assert not out and text in err and err.startswith("nsa simulate: ")


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("user_kernels.txt", b"", "is no Python file"),
        ("leaves.py", b"import sys; sys.exit(0)", "ends the process (exit code 0) on import"),
        ("binary.py", b"\xff\x00", "binary.py:1: "),
    ],
)
def test_files_that_cannot_be_imported_are_named(folder, capsys, file, content, text):
    (folder / file).write_bytes(content)
    assert cli.simulate_main([f"{file}::scaled"]) == cli.UNUSABLE
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1.5", -1.5),
        ("true", True),
        ("None", None),
        ("none", None),
        ("(1, 'a')", (1, "a")),
        ("'3'", "3"),
        ("causal", "causal"),
        ("a:b", "a:b"),
        ("dtype:bf16", "bfloat16"),
    ],
)
def test_values_that_are_no_tensors(text, value):
    got = loading.parse_value(text, np.random.default_rng(0))
    assert got == value and isinstance(got, type(value))


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "low", "high"),
    [
        ("zeros:2x3:fp16", (2, 3), "float16", 0, 0),
        ("ones:4", (4,), "float32", 1, 1),
        ("arange:2x3:int32", (2, 3), "int32", 0, 5),
        ("full(-2.5):1x1x1", (1, 1, 1), "float32", -2.5, -2.5),
        ("randint(3,5):50x1:uint8", (50, 1), "uint8", 3, 4),
        ("rand:100x1", (100, 1), "float32", 0, 1),
    ],
)
def test_tensor_values(text, shape, dtype, low, high):
    array = loading.parse_value(text, np.random.default_rng(0))
    assert (array.shape, str(array.dtype)) == (shape, dtype)
    assert array.min() >= low and array.max() <= high
    lazy = loading.parse_value(text, np.random.default_rng(0), data=False)
    assert lazy == ShapeDtype(shape, dtype)


def python(folder, *words, **environment):
    root = str(Path(nsa_neuron.__file__).parents[1])
    path = os.pathsep.join([root, *environment.pop("path", [])])
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


def test_scripts_run_on_the_simulator(folder):
    module = ("-m", "nsa_neuron.simulator")
    want = "['one'] 48.0\n"
    assert python(folder, *module, "user_kernels.py", "one").stdout == want
    assert python(folder, *module, "-m", "user_kernels", "one").stdout == want
    site = python(folder, *module, "--path").stdout.strip()
    done = python(folder, "user_kernels.py", "one", path=[site], NKI_SIMULATOR="1")
    assert done.stdout == want, done.stderr
    done = python(folder, "user_kernels.py", path=[site], NKI_SIMULATOR="0")
    assert done.returncode != 0 and "set NKI_SIMULATOR=1" in done.stderr
    done = python(folder, *module, "absent.py")
    assert (done.returncode, "no file absent.py" in done.stderr) == (2, True)


def test_command_imports_no_torch(folder):
    code = (
        "import sys\n"
        "from nsa_neuron.cli import main\n"
        "assert main(['simulate', 'user_kernels.py::scaled', '--arg', 'a=ones:8x8']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = python(folder, "-c", code)
    assert done.returncode == 0, done.stderr


REFERENCES = """
import numpy as np

def doubled(a):
    return 2.0 * a

def doubled_but_one(a, **other):
    wanted = 2.0 * a
    wanted[3, 5] += 0.25
    return wanted

def narrow(a):
    return a[:, :1]

def two(a):
    return a, a

def nothing(a):
    return None

def raises(a):
    raise KeyError("absent")
"""
CHECKED = ("user_kernels.py::scaled", "--arg", "a=randn:16x8:fp32", "--arg", "scale=2.0", "--check")


@pytest.fixture
def references(tmp_path, monkeypatch):
    (tmp_path / "user_kernels.py").write_text(KERNELS)
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "references.py").write_text(REFERENCES)
    monkeypatch.chdir(tmp_path)


def test_check_finds_the_largest_error_and_its_place(references, capsys):
    assert cli.simulate_main([*CHECKED, "references.py::doubled"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "  check result 0 against references.py::doubled: largest error 0"
    assert cli.simulate_main([*CHECKED, "references.py::doubled_but_one"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "largest error 0.25 (" in line and " at [3, 5]: " in line


def test_check_within_decides_the_exit_code(references, capsys):
    words = [*CHECKED, "references.py::doubled_but_one", "--json", "--within"]
    assert cli.simulate_main([*words, "0.5"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["check"]
    assert found["index"] == [3, 5] and found["error"] == 0.25 and found["agrees"]
    assert found["wanted"] - found["got"] == pytest.approx(0.25)
    assert cli.simulate_main([*words, "1e-4"]) == 1
    assert not json.loads(capsys.readouterr().out)["check"][0]["agrees"]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("narrow", "result 0 has shape [16, 8], the reference's has [16, 1]"),
        ("two", "the kernel gives 1 results, the reference 2"),
        ("nothing", "nothing gives no array of numbers"),
        ("raises", "raises(a): KeyError: 'absent'"),
        ("absent", "no function 'absent' in "),
    ],
)
def test_a_reference_that_cannot_be_compared_is_one_line(references, capsys, reference, said):
    assert cli.simulate_main([*CHECKED, f"references.py::{reference}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("nsa simulate: --check: ") and said in err


def test_check_sees_what_a_kernel_did_to_nan(references, capsys):
    np.save("a.npy", np.array([[1.0, np.nan, 3.0]], np.float32))
    words = ["user_kernels.py::scaled", "--arg", "a=a.npy", "--arg", "scale=2.0", "--check"]
    assert cli.simulate_main([*words, "references.py::doubled"]) == 0
    assert cli.simulate_main([*words[:-2], "scale=3.0", "--check", "references.py::doubled"]) == 0
    assert "at [0, 2]: 9, wanted 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--within", "0.1"], "--within needs --check"),
        (["--check", "references.py::doubled", "--shape-only"], "--check needs data"),
    ],
)
def test_options_of_a_check_that_make_no_sense(references, capsys, words, said):
    with pytest.raises(SystemExit):
        cli.simulate_main([*CHECKED[:-1], *words])
    assert said in capsys.readouterr().err


def test_a_rule_that_does_not_exist_cannot_be_relaxed(references, capsys):
    assert cli.simulate_main([*CHECKED[:-1], "--relax", "absent"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "absent" in err
